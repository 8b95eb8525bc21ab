"""One setting chooses the implementation of every operator that the model and the trainer call."""

import pytest
import torch

import goku.model.block
import goku.model.transformer
from goku import config as parser
from goku.model import PRESETS, GokuTransformer, KernelConfig
from goku_kernels import Packing

CONFIG = PRESETS["tiny-test"]


def inputs():
    packing, text = Packing.from_grids([(1, 2, 2), (2, 1, 2)]), Packing.from_lengths([3, 1])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(8, CONFIG.patch_dim), torch.rand(2), draw(4, CONFIG.text_dim), packing, text


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_every_call_gets_the_setting(monkeypatch, setting):
    calls = []

    def spy(module, name):
        operator = getattr(module, name)

        def called(*args, **kwargs):
            calls.append((name, kwargs["backend"], kwargs.get("deterministic")))
            return operator(*args, **kwargs)

        monkeypatch.setattr(module, name, called)

    for name in ("adaln_modulate", "gated_residual_adaln", "qk_norm_rope", "varlen_attention"):
        spy(goku.model.block, name)
    spy(goku.model.transformer, "adaln_modulate")
    model = GokuTransformer(CONFIG, KernelConfig(backend=setting, deterministic=False))
    model(*inputs())
    # In a block: 1 adaln, 3 gated residuals, 2 rope, 2 attentions; at the end 1 adaln.
    assert len(calls) == 8 * CONFIG.depth + 1
    assert {backend for _, backend, _ in calls} == {None if setting == "auto" else setting}
    assert {d for name, _, d in calls if name == "varlen_attention"} == {False}


def test_insisting_on_triton_without_a_gpu_says_what_is_missing():
    model = GokuTransformer(CONFIG, KernelConfig(backend="triton"))
    with pytest.raises(RuntimeError, match=r"'triton' is not available: .*CUDA device.*on cpu"):
        model(*inputs())


def test_the_default_is_auto_and_deterministic():
    assert KernelConfig() == KernelConfig(backend="auto", deterministic=True)


def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="backend is 'cuda': allowed are 'auto', 'triton' and 'to"):
        KernelConfig(backend="cuda")
    with pytest.raises(parser.ConfigError, match=r"kernels\.backend"):
        parser.parse(KernelConfig, {"backend": "flash"}, where="kernels")
