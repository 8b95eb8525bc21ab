"""The packed model against a plain one, sample by sample; independence of samples; precision."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.model import GokuTransformer, ModelConfig
from goku_kernels import Packing

_PLAIN = Path(__file__).with_name("plain_goku.py")
_spec = importlib.util.spec_from_file_location("plain_goku", _PLAIN)
plain_goku = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_goku)

CONFIG = ModelConfig(dim=48, depth=2, heads=2, text_dim=20, latent_channels=3, time_channels=16)
AXES = (8, 8, 8)  # of head width 24, by hand
GRIDS = [(1, 3, 4), (3, 2, 3), (1, 1, 1), (2, 4, 1)]
TEXT = [5, 1, 9, 2]


def perturbed(config=CONFIG, dtype=torch.float64):
    """A model whose zero-initialised parts are random too: zeros would hide mistakes."""
    model = GokuTransformer(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def batch(grids=GRIDS, text=TEXT, config=CONFIG, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    packing, text_packing = Packing.from_grids(grids), Packing.from_lengths(text)
    x = torch.randn(packing.total, config.patch_dim, generator=generator, dtype=dtype)
    t = torch.rand(packing.batch, generator=generator, dtype=dtype)
    y = torch.randn(text_packing.total, config.text_dim, generator=generator, dtype=dtype)
    return x, t, y, packing, text_packing


def assert_equals_plain(grids, text):
    model = perturbed()
    x, t, y, packing, text_packing = batch(grids, text)
    for tensor in (x, t, y):
        tensor.requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    inputs = [x, t, y, *model.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    out = model(x, t, y, packing, text_packing)
    grads = torch.autograd.grad((out * weights).sum(), inputs)

    p = dict(model.named_parameters())
    samples = zip(x.split(packing.lengths), t, y.split(text), grids, strict=True)
    wanted = torch.cat(
        [plain_goku.transformer(p, CONFIG, xi, ti, yi, grid, AXES) for xi, ti, yi, grid in samples]
    )
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), inputs)
    # fp64 rounding over two blocks stays near 1e-13 of the largest value.
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    for name, grad, want in zip(["x", "t", "text", *names], grads, wanted_grads, strict=True):
        scale = want.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        assert (grad - want).abs().max().item() <= 1e-10 * max(1, scale), name


def test_packed_equals_plain_in_output_and_every_gradient():
    assert_equals_plain(GRIDS, TEXT)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(sizes, st.integers(1, 6)), min_size=1, max_size=4))
def test_packed_equals_plain_on_any_grids(samples):
    # One sample of several tokens is appended: a single token has no gradient into its queries.
    samples = [*samples, ((2, 2, 2), 3)]
    assert_equals_plain([grid for grid, _ in samples], [n for _, n in samples])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["latent", "time", "text"])
def test_changing_one_sample_changes_no_bit_of_another(what, dtype):
    model = perturbed(dtype=torch.float32)
    x, t, y, packing, text_packing = batch(dtype=torch.float32)
    changed = 1
    x2, t2, y2 = x.clone(), t.clone(), y.clone()
    {"latent": x2.split(packing.lengths), "time": t2.split(1), "text": y2.split(TEXT)}[what][
        changed
    ].mul_(0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        before = model(x, t, y, packing, text_packing).split(packing.lengths)
        after = model(x2, t2, y2, packing, text_packing).split(packing.lengths)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != changed)


def test_at_the_start_only_cross_attention_acts_and_the_velocity_is_zero():
    model = GokuTransformer(CONFIG)
    x, t, y, packing, text_packing = batch(dtype=torch.float32)
    assert torch.equal(model(x, t, y, packing, text_packing), torch.zeros_like(x))
    h, c = torch.randn(packing.total, CONFIG.dim), torch.randn(packing.batch, CONFIG.dim)
    for block in model.blocks:
        assert not torch.equal(block(h, c, y, packing, text_packing), h)
        with torch.no_grad():
            block.attn2.o_proj.weight.zero_()
        assert torch.equal(block(h, c, y, packing, text_packing), h)


def test_bf16_autocast_keeps_norms_and_modulation_in_fp32():
    model = perturbed(dtype=torch.float32)
    x, t, y, packing, text_packing = batch(dtype=torch.float32)
    seen = {}
    for name in ("norm1.linear", "attn1.q_proj", "mlp.fc1"):
        module = model.blocks[0].get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.dtype}))
    model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.update({"stream": out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y, packing, text_packing)
    assert seen == {
        "norm1.linear": torch.float32,
        "attn1.q_proj": torch.bfloat16,
        "mlp.fc1": torch.bfloat16,
        "stream": torch.float32,
    }
    assert out.dtype == torch.float32


def test_mixed_precision_is_within_bf16_rounding_of_fp32():
    model = perturbed(dtype=torch.float32)
    x, t, y, packing, text_packing = batch(dtype=torch.float32)
    exact = model(x, t, y, packing, text_packing)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y, packing, text_packing)
    pure = model.bfloat16()(x, t, y, packing, text_packing)
    assert pure.dtype == torch.bfloat16
    error = (mixed - exact).norm() / exact.norm()
    # bf16 rounds to 2^-9; some twenty roundings in a row, of random sign, stay under ten of them.
    assert 0 < error < 10 * 2**-9
    # Keeping the residual stream in fp32 is the point of mixing: pure bf16 is further away.
    assert (pure.float() - exact).norm() / exact.norm() > error


def test_times_may_come_in_any_precision():
    model = perturbed(dtype=torch.float32)
    x, t, y, packing, text_packing = batch(dtype=torch.float32)
    a = model(x, t, y, packing, text_packing)
    assert torch.equal(a, model(x, t.double(), y, packing, text_packing))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 12)}, r"x has shape \(3, 12\): wanted \(39, 12\)"),
        ({"t": torch.zeros(3)}, r"t has shape \(3,\): wanted \(4,\)"),
        ({"text": torch.zeros(17, 21)}, r"text has shape \(17, 21\): wanted \(17, 20\)"),
        ({"packing": Packing.from_lengths([39])}, "packing has no grids"),
        ({"text_packing": Packing.from_lengths([17])}, "text_packing has 1 sequences"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = ("x", "t", "text", "packing", "text_packing")
    arguments = dict(zip(names, batch(dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        GokuTransformer(CONFIG)(**(arguments | change))
