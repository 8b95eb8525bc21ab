"""Goku's operators in diffusers' transformers: equal to the unmodified models, and reversible."""

import copy
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.overrides import TorchFunctionMode

from goku_kernels.integrations.diffusers import (
    fuse,
    fused,
    hunyuan_video,
    is_fused,
    swapping,
    unfuse,
    wan,
)

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
    "rope_max_seq_len": 16,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24,
    "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2,
    "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 12, 8), "mlp_ratio": 2.0,
}  # fmt: skip
# What varies: configuration, latent (frames, height, width), tokens of text (of the image before).
WAN_CASES = {
    "wan": ({}, (3, 4, 6), 7, 0),
    "wan, image": ({}, (1, 8, 4), 2, 0),
    "wan, no cross-attention norm": ({"cross_attn_norm": False}, (2, 6, 4), 5, 0),
    # 13 channels a third: axes of 10, 8, 8
    "wan, uneven axes": ({"attention_head_dim": 26}, (5, 2, 4), 5, 0),
    "wan, image to video": ({"image_dim": 12, "added_kv_proj_dim": 48}, (3, 4, 4), 512, 9),
    "wan, a time per token": ({}, (2, 4, 6), 7, 0),
}
HUNYUAN_CASES = {
    "hunyuan": ({}, (3, 4, 6), [7, 3]),
    "hunyuan, unpadded, no guidance": ({"guidance_embeds": False}, (2, 2, 8), [4, 4]),
    "hunyuan, one text token": ({"rope_theta": 77.0}, (1, 4, 4), [1, 6]),
    "hunyuan, first frame replaced": ({"image_condition_type": "token_replace"}, (3, 4, 4), [5, 2]),
}
CASES = [*WAN_CASES, *HUNYUAN_CASES]
PLAIN = ["wan", "hunyuan"]


class EverythingInFp64(TorchFunctionMode):
    """diffusers says float32 in many places; here that means float64, so that 1e-10 can be asked of
    the code as it stands.
    """

    def __torch_function__(self, function, classes, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args, kwargs = list(args), dict(kwargs or {})
        for inputs, keys in ((args, range(len(args))), (kwargs, list(kwargs))):
            for key in keys:
                inputs[key] = torch.float64 if inputs[key] is torch.float32 else inputs[key]
        return function(*args, **kwargs)


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make(case):
    """The model of a case in fp64, all its parameters random, and its inputs."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    if case in WAN_CASES:
        changes, size, text, image = WAN_CASES[case]
        model = diffusers.WanTransformer3DModel(**WAN | changes)
        inputs = {
            "hidden_states": draw(generator, 2, 4, *size),
            "timestep": torch.tensor([3.0, 711.0]),
            "encoder_hidden_states": draw(generator, 2, text, 16),
        }
        if image:
            inputs["encoder_hidden_states_image"] = draw(generator, 2, image, 12)
        if case == "wan, a time per token":
            inputs["timestep"] = torch.randint(1000, (2, 2 * 2 * 3), generator=generator)
    else:
        changes, size, lengths = HUNYUAN_CASES[case]
        model = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN | changes)
        inputs = {
            "hidden_states": draw(generator, 2, 4, *size),
            "timestep": torch.tensor([3, 711]),
            "encoder_hidden_states": draw(generator, 2, max(lengths), 16),
            "encoder_attention_mask": torch.tensor(
                [[int(i < n) for i in range(max(lengths))] for n in lengths]
            ),
            "pooled_projections": draw(generator, 2, 8),
        }
        if changes.get("guidance_embeds", True):
            inputs["guidance"] = torch.tensor([1000.0, 6000.0])
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            shape = parameter.shape
            # Norms' gains and biases are drawn too; matrices keep activations near one.
            fan = shape[1:].numel() if len(shape) > 1 else 25
            near = 1.0 if parameter.eq(1).all() else 0.0
            parameter.copy_(near + draw(generator, *shape) / max(fan, 1) ** 0.5)
    return model.eval(), inputs


def run(model, inputs):
    """The output, and the gradients of all floating inputs and all parameters, by name."""
    inputs = dict(inputs)
    leaves = dict(model.named_parameters())
    for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image",
                 "pooled_projections"):  # fmt: skip
        if name in inputs:
            leaves[name] = inputs[name] = inputs[name].detach().requires_grad_()
    out = model(**inputs, return_dict=False)[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos()
    grads = torch.autograd.grad((out.double() * weights).sum(), list(leaves.values()))
    return {"output": out.detach()} | dict(zip(leaves, grads, strict=True))


def assert_close(got, want):
    """1e-10 of the largest entry of each. Some gradients are zero but for rounding (a bias of keys
    that no norm follows): those are judged beside the largest gradient.
    """
    assert list(got) == list(want)
    largest = max(x.abs().max() for x in want.values())
    for name, x in want.items():
        allowed = 1e-10 * x.abs().max() + 1e-14 * largest
        error = (got[name] - x).abs().max()
        assert error <= allowed, f"{name}: off by {error:.1e}, allowed {allowed:.1e}"


@pytest.fixture
def fp64():
    with EverythingInFp64():
        yield


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_are_equal(case):
    model, inputs = make(case)
    want = run(model, inputs)
    fuse(model)
    assert_close(run(model, inputs), want)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("case", CASES)
def test_a_single_sample(case):
    # At batch 1 a transposed view flattens without a copy, and keeps its strides.
    model, inputs = make(case)
    inputs = {name: value[:1] for name, value in inputs.items()}
    want = run(model, inputs)
    fuse(model)
    assert_close(run(model, inputs), want)


def like_loaded(model, dtype):
    """Cast as from_pretrained(torch_dtype=dtype) does: what the class keeps in fp32 stays."""
    kept = model._keep_in_fp32_modules or []
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        x.data = x.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
    return model


def assert_flash_rule(got, same, exact):
    """FlashAttention's rule in the Euclidean norm of each tensor: at most twice the error of the
    unmodified model in the same dtype, and one unit of rounding. Gradients that are zero but for
    rounding are judged beside the largest.
    """
    floor = 1e-4 * max(x.norm() for x in exact.values())
    for name, x in exact.items():
        assert got[name].dtype == same[name].dtype
        allowed = 2 * (same[name].double() - x).norm()
        allowed += torch.finfo(got[name].dtype).eps * max(x.norm(), floor)
        error = (got[name].double() - x).norm()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


def in_dtype(case, dtype):
    """A case twice: in a dtype, and the very same numbers to be computed with in fp64."""
    with EverythingInFp64():
        model, inputs = make(case)
    low = like_loaded(copy.deepcopy(model), dtype)
    for x, y in zip(model.parameters(), low.parameters(), strict=True):
        x.data.copy_(y)
    floats = [name for name, x in inputs.items() if x.dtype == torch.float64]
    low_inputs = inputs | {name: inputs[name].to(dtype) for name in floats}
    return (low, low_inputs), (model, inputs | {name: low_inputs[name].double() for name in floats})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_the_unmodified_model(case, dtype):
    (low, inputs), wide = in_dtype(case, dtype)
    with EverythingInFp64():
        exact = run(*wide)
    same = run(low, inputs)
    fuse(low)
    assert_flash_rule(run(low, inputs), same, exact)


@pytest.mark.parametrize("case", PLAIN)
def test_autocast(case):
    (low, inputs), wide = in_dtype(case, torch.float32)
    with EverythingInFp64():
        exact = run(*wide)
    with torch.autocast("cpu", torch.bfloat16):
        same = run(low, inputs)
        fuse(low)
        got = run(low, inputs)
    assert_flash_rule(got, same, exact)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing(case):
    model, inputs = make(case)
    model.train()
    want = run(model, inputs)
    model.enable_gradient_checkpointing()
    fuse(model)
    assert_close(run(model, inputs), want)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("case", ["wan", "wan, image to video"])
def test_fused_projections_of_diffusers(case):
    model, inputs = make(case)
    model.fuse_qkv_projections()
    with torch.no_grad():
        want = model(**inputs).sample
        fuse(model)
        torch.testing.assert_close(model(**inputs).sample, want, rtol=1e-10, atol=1e-12)


class LowRank(nn.Module):
    """A projection with a trained addition, as PEFT's LoRA puts them into a model."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, linear.out_features, bias=False).double()

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("case", PLAIN)
def test_replaced_projections(case):
    model, inputs = make(case)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("to_q", "to_v", "add_k_proj", "proj_out", "linear") and hasattr(
                child, "in_features"
            ):
                setattr(module, name, LowRank(child))
    want = run(model, inputs)
    fuse(model)
    assert_close(run(model, inputs), want)


@pytest.mark.parametrize("case", PLAIN)
def test_unfuse_restores_the_very_objects(case):
    model, inputs = make(case)
    model = like_loaded(model, torch.float32)
    inputs = {k: x.float() if x.dtype == torch.float64 else x for k, x in inputs.items()}

    def objects():
        members = [(name, key, id(x)) for name, m in model.named_modules()
                   for key, x in vars(m).items()]  # fmt: skip
        return members, [(k, id(x)) for k, x in model.named_parameters()], list(model.state_dict())

    before, want = objects(), run(model, inputs)
    fuse(model)
    assert is_fused(model)
    assert objects()[1:] == before[1:]
    assert not torch.equal(run(model, inputs)["output"], want["output"])  # it did something
    unfuse(model)
    assert not is_fused(model)
    assert objects() == before
    again = run(model, inputs)
    assert all(torch.equal(again[name], x) for name, x in want.items())


def test_the_context_manager_unfuses_after_an_error():
    model, _ = make("wan")

    def work():
        with fused(model, deterministic=True):
            raise KeyError("fused" if is_fused(model) else "not fused")

    with pytest.raises(KeyError, match="'fused'"):
        work()
    assert not is_fused(model)


@pytest.mark.parametrize("case", PLAIN)
def test_hooks_of_blocks_and_projections_still_run(case):
    model, inputs = make(case)
    calls = []
    for name, module in model.named_modules():
        if name.endswith((".0", ".to_q", ".add_q_proj", ".attn", ".attn1", ".attn2")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with EverythingInFp64():
        model(**inputs)
        before = calls.copy()
        calls.clear()
        fuse(model)
        model(**inputs)
    assert calls == before
    assert any(name.endswith("to_q") for name in calls)


@pytest.mark.parametrize(
    ("case", "module", "expected"),
    [
        # two layers: self- and cross-attention; a block's three joints; one offset for the video,
        # one for the text
        ("wan", wan, {"varlen_attention": 4, "qk_norm_rope": 4, "adaln_modulate": 2,
                      "gated_residual_adaln": 6, "equal_segments": 2}),
        # two dual blocks with two streams, two single ones; offsets of video, text and both
        ("hunyuan", hunyuan_video, {"varlen_attention": 4, "qk_norm_rope": 6, "adaln_modulate": 6,
                                    "gated_residual_adaln": 10, "equal_segments": 3}),
    ],
)  # fmt: skip
def test_the_operators_run_and_offsets_are_made_once(case, module, expected, monkeypatch):
    model, inputs = make(case)
    calls = []

    def spy(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append((name, kwargs.get("backend"), kwargs.get("deterministic")))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in expected:
        spy(swapping if name == "equal_segments" else module, name)
    fuse(model, backend="torch", deterministic=True)
    with EverythingInFp64():
        model(**inputs)
    assert {name: sum(call[0] == name for call in calls) for name in expected} == expected
    assert {call for call in calls if call[0] != "equal_segments"} == {
        (name, "torch", True if name == "varlen_attention" else None)
        for name in expected
        if name != "equal_segments"
    }


def test_the_attention_backend_is_passed_on():
    model, inputs = make("wan")
    fuse(model, attention_backend="cuda")
    with EverythingInFp64(), pytest.raises(RuntimeError, match="varlen_attention: backend 'cuda'"):
        model(**inputs)


def test_copies_are_independent():
    model, inputs = make("wan")
    with EverythingInFp64():
        plain = model(**inputs).sample
        fuse(model)
        want = model(**inputs).sample
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            assert torch.equal(copied(**inputs).sample, want)
            unfuse(copied)
            assert torch.equal(copied(**inputs).sample, plain)
        assert is_fused(model)


# ---- what is refused -----------------------------------------------------------------------------


def assert_refused(model, message, **settings):
    """The refusal names what is wrong, and leaves the model as it was."""
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        fuse(model, **settings)
    assert [dict(vars(module)) for module in model.modules()] == before


class OwnWan(diffusers.WanTransformer3DModel):
    pass


def test_other_models():
    message = "CogVideoXTransformer3DModel: supported are diffusers' WanTransformer3DModel and Huny"
    other = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, text_embed_dim=8, num_layers=1
    )
    assert_refused(other, message)
    assert_refused(nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear: supported")
    assert_refused(OwnWan(**WAN), "OwnWan: supported")
    assert_refused(nn.Sequential(make("wan")[0]), "Sequential: supported")


def test_other_versions_of_diffusers(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.420.0")
    assert_refused(make("wan")[0], r"diffusers is 0\.420\.0: supported are \['0\.42'\]")


def set_forward(module):
    module.forward = types.MethodType(type(module).forward, module)


def double_tables(model):
    model.rope.freqs_cos.mul_(2)


def own_processor(model):
    model.blocks[1].attn2.processor = type("Own", (), {})()


def other_attention(model):
    model.blocks[0].attn1.set_attention_backend("flash")


def context_parallel(model):
    model.blocks[0].attn1.processor._parallel_config = object()


def hook_on_norm(model):
    model.blocks[1].norm3.register_forward_pre_hook(lambda *_: None)


def own_norm(model):
    model.blocks[0].attn1.norm_k = nn.LayerNorm(48)


def other_eps(model):
    model.blocks[0].attn2.norm_k.eps = 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double_tables, r"rope\.freqs_cos is not the cos table of base 10000"),
        (own_processor, r"blocks\.1\.attn2\.processor is a Own: covered is WanAttnProcessor"),
        (other_attention, r"blocks\.0\.attn1\.processor uses the attention backend 'flash'"),
        (context_parallel, "context parallelism"),
        (hook_on_norm, r"blocks\.1\.norm3 has hooks"),
        (own_norm, r"blocks\.0\.attn1\.norm_k is a LayerNorm: covered is RMSNorm"),
        (other_eps, r"blocks\.0\.attn2 has eps 1e-06 for queries and 0\.001 for keys"),
        (lambda model: set_forward(model.blocks[1]), r"forward of blocks\.1 is replaced"),
        (lambda model: model.to("meta"), "meta device"),
        (fuse, "is fused already"),
    ],
)
def test_settings_of_wan_that_are_not_covered(change, message):
    model, _ = make("wan")
    change(model)
    assert_refused(model, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"qk_norm": "layer_norm"}, r"norm_q is a LayerNorm: covered is qk_norm='rms_norm'"),
        ({"qk_norm": None}, r"norm_q is a NoneType: covered is qk_norm='rms_norm'"),
        ({"rope_axes_dim": (4, 8, 8)}, r"rope_axes_dim is \(4, 8, 8\): covered are 3 even numbers"),
    ],
)
def test_settings_of_hunyuan_that_are_not_covered(config, message):
    assert_refused(diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN | config), message)


def test_unknown_backends():
    model, _ = make("wan")
    assert_refused(model, r"backend is 'flash': allowed are \[None, 'torch'", backend="flash")
    assert_refused(model, "attention_backend is 'sage'", attention_backend="sage")


@pytest.fixture
def other_active_backend():
    before = _AttentionBackendRegistry.get_active_backend()[0]

    def activate():
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName("flash"))

    yield activate
    _AttentionBackendRegistry.set_active_backend(before)


def test_another_attention_chosen_globally(other_active_backend):
    late, inputs = make("wan")
    fuse(late)
    other_active_backend()
    assert_refused(make("wan")[0], "active attention backend is 'flash'")
    with pytest.raises(ValueError, match="active attention backend is 'flash'"):
        late(**inputs)


@pytest.mark.parametrize("case", PLAIN)
def test_another_attention_chosen_after_fusing(case):
    model, _ = make(case)
    fuse(model)
    with pytest.raises(ValueError, match="attention backend cannot become"):
        model.set_attention_backend("_native_math")
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    model.reset_attention_backend()  # already so
    processor = next(iter(swap.new for swap in vars(model)["_goku_fusion"] if swap.previous))
    with pytest.raises(ValueError, match="context parallelism"):
        processor._parallel_config = object()


def test_masks_and_stray_calls():
    model, inputs = make("wan")
    fuse(model)
    attn, x = model.blocks[0].attn1, torch.zeros(2, 3, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="covers no attention_mask"):
        attn(x, None, torch.ones(3, 3, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="runs in a fused block only"):
        attn(x)
    far = inputs | {"hidden_states": torch.zeros(2, 4, 17, 2, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match="rope_max_seq_len allows 16"):
        model(**far)


def test_unfusing_what_is_not_fused_or_covered_by_a_hook():
    model, inputs = make("wan")
    with pytest.raises(ValueError, match="is not fused"):
        unfuse(model)
    fuse(model)
    mine = model.blocks[0].forward
    model.blocks[0].forward = lambda *args, **kwargs: mine(*args, **kwargs)
    with pytest.raises(ValueError, match=r"the forward of blocks\.0 was replaced after fuse"):
        unfuse(model)
    assert is_fused(model)
    with EverythingInFp64():
        model(**inputs)
    model.blocks[0].forward = mine
    unfuse(model)


def test_diffusers_is_imported_only_when_fusing():
    code = (
        "import sys, goku_kernels, goku_kernels.integrations.diffusers as d; "
        "assert d.fuse; assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_example_of_the_documentation():
    text = (Path(__file__).parents[3] / "docs" / "integrations.md").read_text()
    torch.manual_seed(0)
    example, *_ = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "fuse(" in example
    exec(example, {})
