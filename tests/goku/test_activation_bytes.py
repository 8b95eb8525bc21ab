"""Bytes saved for the backward pass: the closed form against what autograd and checkpointing keep."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from goku.activation_bytes import (
    recomputed_bytes_per_token,
    saved_bytes_per_token,
    unpredicted_operators,
)
from goku.model import PRESETS, ModelConfig
from goku_kernels import _checks, reference
from goku_runtime.activation_checkpoint import EXCHANGES, ActivationCheckpointing

SCRIPT = Path(__file__).with_name("activation_bytes_processes.py")
_spec = importlib.util.spec_from_file_location("activation_bytes_processes", SCRIPT)
measure = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(measure)

ATTENTION = "goku_kernels::varlen_attention"
NONE = ActivationCheckpointing()
CASES = [
    ({"dim": 32, "depth": 2, "heads": 2}, torch.float32),
    ({"dim": 32, "depth": 2, "heads": 2}, torch.bfloat16),
    ({"dim": 256, "depth": 5, "heads": 4}, torch.bfloat16),
    ({"dim": 256, "depth": 2, "heads": 4, "qk_norm": "head"}, torch.float32),
    ({"dim": 128, "depth": 2, "heads": 2, "mlp_ratio": 2.0}, torch.bfloat16),
    ({"dim": 256, "depth": 2, "heads": 4, "qk_norm": "none"}, torch.float32),
    ({"dim": 256, "depth": 2, "heads": 4, "qk_norm": "none"}, torch.bfloat16),
]


def _operators(*save: str) -> ActivationCheckpointing:
    return ActivationCheckpointing(mode="operators", save=save)


def _config(**shape: Any) -> ModelConfig:
    return ModelConfig(text_dim=32, latent_channels=shape["dim"] // 32, **shape)


def _hooked_bytes(model: torch.nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in one forward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # or an address could be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.grad_fn is not None
    return sum(found.values())


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_what_lives_after_a_forward_is_what_the_hooks_saw(
    shape: dict[str, Any], dtype: torch.dtype
) -> None:
    """The instrument: without checkpointing both count the same, but for a few scalars of the
    arithmetic's constants and the offsets, which the packing holds."""
    model = measure.build(_config(**shape), NONE)

    def run() -> Tensor:
        return measure.forward(model, 64, dtype)

    assert measure.kept_bytes(model, run) == pytest.approx(_hooked_bytes(model, run), abs=128)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize(
    "policy",
    [
        NONE,
        ActivationCheckpointing(mode="full"),
        ActivationCheckpointing(mode="every_nth", every=2),
        ActivationCheckpointing(mode="every_nth", every=3),
        _operators(ATTENTION),
        _operators("aten::mm", "aten::addmm.default"),
        _operators(ATTENTION, "aten::mm", "aten::gelu", *EXCHANGES),
        # The eager operators are not called under these names.
        _operators(
            "goku_kernels::qk_norm_rope",
            "goku_kernels::adaln_modulate",
            "goku_kernels::gated_residual_adaln",
        ),
    ],
    ids=["none", "full", "second", "third", "attention", "products", "several", "fused names"],
)
def test_eager_operators(
    policy: ActivationCheckpointing, shape: dict[str, Any], dtype: torch.dtype
) -> None:
    """To 10%: rotation tables and the moments of norms are left out of the prediction."""
    config = _config(**shape)
    measured = measure.kept_per_token(config, policy, dtype)
    predicted = saved_bytes_per_token(config, dtype.itemsize, policy)
    assert predicted == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_frames_add_their_mlp(dtype: torch.dtype) -> None:
    """Exactly, as a difference of two measurements: where all blocks are recomputed it shows most."""
    config = ModelConfig(dim=64, depth=2, heads=2, text_dim=32, latent_channels=4)
    given = replace(config, condition="frames")
    full = ActivationCheckpointing(mode="full")
    with_frames, without = (measure.kept_per_token(c, full, dtype) for c in (given, config))
    ours, theirs = (saved_bytes_per_token(c, dtype.itemsize, full) for c in (given, config))
    assert with_frames - without == ours - theirs == 4 * (16 + 20 + 2 * 64)


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors of shapes without values: any size, and Triton's operators without a GPU."""
    for module in (_checks, reference):  # offsets have no values, as on a device
        monkeypatch.setattr(module, "readable", lambda _: False)
    monkeypatch.setattr(_checks, "triton_absent", lambda _: None)
    return FakeTensorMode()


@pytest.mark.parametrize(
    "policy",
    [
        NONE,
        ActivationCheckpointing(mode="full"),
        ActivationCheckpointing(mode="every_nth", every=2),
        _operators(ATTENTION),
        _operators("goku_kernels::qk_norm_rope", "aten::mm"),
        _operators("goku_kernels::adaln_modulate", "goku_kernels::gated_residual_adaln"),
        _operators(ATTENTION, "aten::addmm", "aten::gelu"),
    ],
    ids=["none", "full", "every_nth", "attention", "rope", "modulation", "several"],
)
@pytest.mark.parametrize("heads", [4, 28])
def test_fused_operators(
    policy: ActivationCheckpointing, heads: int, pretending: FakeTensorMode
) -> None:
    """In fp16, which is as wide as bf16 (Triton's attention takes no bf16 on a CPU)."""
    config = replace(PRESETS["goku-2b"], dim=64 * heads, heads=heads, depth=3)
    with pretending:
        measured = measure.kept_per_token(config, policy, torch.float16, backend="triton")
    predicted = saved_bytes_per_token(config, 2, policy, fused=True)
    assert predicted == pytest.approx(measured, rel=0.01)  # nothing is left out


@pytest.mark.parametrize("policy", [NONE, ActivationCheckpointing(mode="full")])
def test_a_published_width(policy: ActivationCheckpointing, pretending: FakeTensorMode) -> None:
    config = replace(PRESETS["goku-2b"], depth=10)
    with pretending:
        measured = measure.kept_per_token(config, policy, torch.bfloat16)
    assert saved_bytes_per_token(config, 2, policy) == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("heads", [pytest.param(4, marks=pytest.mark.long), 3])
def test_a_shared_pack(heads: int, run_processes: Callable[..., str]) -> None:
    """Two processes, their heads equal and unequal in number."""
    run_processes(2, SCRIPT, ("shared_pack", {"heads": heads}))


def test_fused_with_a_shared_pack_counts_both_sides_of_the_exchange() -> None:
    config = PRESETS["goku-2b"]
    alone, shared = (saved_bytes_per_token(config, 2, sp=sp, fused=True) for sp in (1, 4))
    assert shared - alone == 28 * 1792 * 2  # attention's result in heads, besides that in rows
    # 28 heads on 8 processes: 4 at most, where 3.5 is the average.
    full = ActivationCheckpointing(mode="full")
    four, eight = (saved_bytes_per_token(config, 2, full, sp=sp) for sp in (4, 8))
    assert eight - four == pytest.approx(28 * 1792 * 2 * 3 * (4 / 3.5 - 1))


def test_what_comes_back_is_what_was_not_kept() -> None:
    """A block that keeps nothing and one that keeps everything differ by what comes back."""
    config = PRESETS["goku-2b"]
    for fused in (False, True):
        whole = saved_bytes_per_token(config, 2, NONE, fused=fused)
        for policy in (ActivationCheckpointing(mode="full"), _operators(ATTENTION, "aten::mm")):
            kept = saved_bytes_per_token(config, 2, policy, fused=fused)
            back = recomputed_bytes_per_token(config, 2, policy, fused=fused)
            assert whole - kept == pytest.approx(config.depth * back)
        assert recomputed_bytes_per_token(config, 2, NONE, fused=fused) == 0


def test_what_is_not_predicted_is_named_and_counts_nothing() -> None:
    config = PRESETS["goku-2b"]
    policy = _operators(ATTENTION, "aten::sin", "aten::mm.dtype", "aten::mm.default")
    assert unpredicted_operators(policy) == ("aten::mm.dtype", "aten::sin")
    known = _operators("aten::mm", ATTENTION, "aten::mm.default")
    assert unpredicted_operators(known) == ()
    assert saved_bytes_per_token(config, 2, policy) == saved_bytes_per_token(config, 2, known)
    assert unpredicted_operators(replace(policy, mode="full")) == ()


def test_policies_in_order_of_what_they_keep() -> None:
    """28 blocks of 1792: some MB a token in bf16, which is why long packs recompute."""
    config = PRESETS["goku-2b"]
    kept = [
        saved_bytes_per_token(config, 2, policy)
        for policy in (
            ActivationCheckpointing(mode="full"),
            _operators(ATTENTION),
            _operators(ATTENTION, "aten::mm", "aten::addmm"),
            ActivationCheckpointing(mode="every_nth", every=2),
            NONE,
        )
    ]
    assert kept == sorted(kept)
    assert 4e6 < kept[-1] < 8e6
    assert kept[0] < kept[-1] / 20
