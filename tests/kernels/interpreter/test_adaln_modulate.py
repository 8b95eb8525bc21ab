"""adaln_modulate's kernels in the interpreter, against fp64, forward and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing, adaln_modulate

OP = torch.ops.goku_kernels.adaln_modulate.default
D = 24  # no power of two: the last lanes of a block are masked
NORMS = [("layer", False), ("layer", True), ("rms", False), ("rms", True), ("none", False)]


def draw(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # A mean far from zero, so that a variance as E[x^2] - E[x]^2 would lose digits.
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 3).to(dtype)


def inputs(lengths, padding=0, token_offset=0, dtype=torch.float32, rows=torch.float32, seed=0):
    cu = Packing.from_lengths(lengths).cu_seqlens
    x = draw(seed, sum(lengths) - token_offset + padding, D, dtype=dtype)
    modulation = draw(seed + 1, len(lengths), 2 * D, dtype=rows) - 3
    return cu, x, modulation, draw(seed + 2, D, dtype=rows)


def run(backend, cu, x, modulation, weight, dtype=None, **options):
    """Output and gradients by name, with everything in `dtype` if given; NaN in padding rows."""
    leaves = [
        None if v is None else (v if dtype is None else v.to(dtype)).detach().requires_grad_()
        for v in (x, modulation, weight)
    ]
    shift, scale = leaves[1].chunk(2, dim=-1)
    y = adaln_modulate(leaves[0], shift, scale, cu, weight=leaves[2], backend=backend, **options)
    # The transpose of a contiguous tensor: a gradient whose rows are not contiguous.
    dy = draw(9, *reversed(y.shape)).t().to(y.dtype)
    grads = torch.autograd.grad(y, [v for v in leaves if v is not None], dy)
    return dict(zip(("y", "x", "modulation", "weight"), (y.detach(), *grads), strict=False))


def judge(flash_rule, cu, *tensors, token_offset=0, **options):
    options["token_offset"] = token_offset
    got = run("triton", cu, *tensors, **options)
    same = run("torch", cu, *tensors, **options)
    exact = run("torch", cu, *tensors, dtype=torch.float64, **options)
    for name in exact:
        rows = cu if name in ("y", "x") else None
        flash_rule(name, got[name], same[name], exact[name], rows, token_offset)


@pytest.mark.parametrize(("norm", "weighted"), NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_pack(flash_rule, pack, norm, weighted, dtype):
    cu, x, modulation, weight = inputs(*pack, dtype=dtype)
    judge(flash_rule, cu, x, modulation, weight if weighted else None, norm=norm)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.data())
def test_any_shard_of_any_packing(flash_rule, lengths, data):
    offset = data.draw(st.integers(0, sum(lengths)))
    padding = data.draw(st.integers(0, 3))
    tensors = inputs(lengths, padding, offset, dtype=torch.float16)
    judge(flash_rule, *tensors, token_offset=offset, norm="layer")


def test_shards_add_up_to_the_whole(flash_rule):
    cu, x, modulation, weight = inputs([5, 11, 2])
    whole = run("triton", cu, x, modulation, weight, norm="rms")
    exact = run("torch", cu, x, modulation, weight, dtype=torch.float64, norm="rms")
    dy = draw(9, D, 18).t()
    parts = []
    for rows in (slice(0, 7), slice(7, 18)):
        leaves = [v.clone().requires_grad_() for v in (x[rows], modulation, weight)]
        shift, scale = leaves[1].chunk(2, dim=-1)
        y = adaln_modulate(
            leaves[0], shift, scale, cu, norm="rms", weight=leaves[2], token_offset=rows.start,
            backend="triton",
        )  # fmt: skip
        parts.append(torch.autograd.grad(y, leaves, dy[rows]))
    assert torch.equal(torch.cat([part[0] for part in parts]), whole["x"])
    for i, name in ((1, "modulation"), (2, "weight")):
        flash_rule(name, parts[0][i] + parts[1][i], whole[name], exact[name])


def test_padding_that_holds_nan_reaches_nothing():
    cu, x, modulation, weight = inputs([5, 9], padding=4)
    clean = run("triton", cu, x, modulation, weight)
    x[14:] = float("nan")
    x[15] = float("inf")
    dirty = run("triton", cu, x, modulation, weight)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize("rows", [(), (13,)], ids=["shared", "per token"])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_offsets(flash_rule, rows, norm):
    x, modulation, weight = draw(0, 13, D), draw(1, *rows, 2 * D), draw(2, D)
    judge(flash_rule, None, x, modulation, weight if norm == "layer" else None, norm=norm)


@pytest.mark.parametrize("names", ["shift", "scale", "neither"])
@pytest.mark.parametrize("norm", ["rms", "none"])
def test_what_is_absent(flash_rule, names, norm):
    cu, x, modulation, _ = inputs([4, 3])
    results = []
    for backend, dtype in (("triton", None), ("torch", None), ("torch", torch.float64)):
        x_, row = (v.to(dtype or v.dtype).requires_grad_() for v in (x, modulation[:, :D]))
        shift, scale = (row if n == names else None for n in ("shift", "scale"))
        y = adaln_modulate(x_, shift, scale, cu, norm=norm, backend=backend)
        grads = torch.autograd.grad(y.square().sum(), [x_, row], allow_unused=True)
        results.append([y.detach(), *grads])
    for name, got, same, exact in zip(("y", "x", "row"), *results, strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            flash_rule(name, got, same, exact)


def test_one_row_for_all_beside_one_per_token(flash_rule):
    x, shift, scale = draw(0, 7, D), draw(1, 7, D), draw(2, D)
    results = []
    for backend, dtype in (("triton", None), ("torch", None), ("torch", torch.float64)):
        leaves = [v.to(dtype or v.dtype).requires_grad_() for v in (x, shift, scale)]
        y = adaln_modulate(*leaves, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for name, *values in zip(("y", "x", "shift", "scale"), *results, strict=True):
        flash_rule(name, *values)


def test_inputs_may_be_views_and_are_not_changed(flash_rule):
    cu, _, modulation, weight = inputs([6, 2], dtype=torch.float16)
    wide = draw(5, 8, 3 * D + 1, dtype=torch.float16)
    view = wide[:, D : 2 * D]
    before = wide.clone()
    judge(flash_rule, cu, view, modulation, weight, norm="layer")
    assert torch.equal(wide, before)


def test_equal_bits_on_every_run():
    tensors = inputs([50, 1, 33], dtype=torch.float16)
    first = run("triton", *tensors)
    again = run("triton", *tensors)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_rows_past_two_to_the_31():
    # Rows 2^30 elements apart: the third begins past 2^31. Only the touched pages exist.
    storage = torch.empty(3 * 2**30 + D, dtype=torch.float16)
    x = storage.as_strided((4, D), (2**30, 1))
    x.copy_(draw(0, 4, D))
    cu, _, modulation, _ = inputs([1, 3])
    shift, scale = modulation.chunk(2, dim=1)
    got, want = (adaln_modulate(v, shift, scale, cu, backend="triton") for v in (x, x.contiguous()))
    assert torch.equal(got, want)


def test_opcheck():
    cu, x, modulation, weight = inputs([3, 0, 2], padding=1)
    shift, scale = modulation.requires_grad_().chunk(2, dim=1)
    for arguments in (
        (x.requires_grad_(), shift, scale, cu, "rms", weight.requires_grad_(), 1e-6, 0),
        (x, None, scale, cu, "layer", None, 1e-6, 2),
        (x, weight, None, None, "none", None, 1e-6, 0),
    ):
        torch.library.opcheck(OP, arguments)


def test_fp64_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"adaln_modulate: x has dtype torch\.float64: allowed with"
    ):
        adaln_modulate(torch.zeros(2, D, dtype=torch.float64), None, None, backend="triton")
    for width in (0, 8200):
        with pytest.raises(ValueError, match=f"x has width {width}: allowed"):
            adaln_modulate(torch.zeros(2, width), None, None, backend="triton")


def test_a_scale_that_no_token_has_reaches_no_gradient():
    cu, x, modulation, weight = inputs([3, 0, 1])
    clean = run("triton", cu, x, modulation, weight, norm="rms")
    modulation[1] = float("nan")
    dirty = run("triton", cu, x, modulation, weight, norm="rms")
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
