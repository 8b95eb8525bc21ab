"""adaln_modulate against a sample-by-sample reference, and its contract."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing, adaln_modulate, adaln_modulate_bytes, adaln_modulate_flops

D = 6


def plain_norm(x, norm, weight, eps=1e-6):
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm != "none":
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def plain(x, shift, scale, lengths, norm="layer", weight=None):
    """One sample at a time, with a (B, d) shift and scale; None means none."""
    samples = []
    for i, part in enumerate(x.split(lengths)):
        y = plain_norm(part, norm, weight)
        y = y if scale is None else y * (1 + scale[i])
        samples.append(y if shift is None else y + shift[i])
    return torch.cat(samples)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same_with_gradients(got, want, inputs):
    """Value and gradients; fp64 rounding of a dozen operations stays under 1e-12."""
    inputs = [x for x in inputs if x is not None]
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(9), dtype=got.dtype)
    pairs = [(got, want)]
    a, b = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want))
    for x, y in [*pairs, *zip(a, b, strict=True)]:
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "weighted"),
    [("layer", False), ("layer", True), ("rms", False), ("rms", True), ("none", False)],
)
@pytest.mark.parametrize("parts", ["both", "shift", "scale"])
def test_equals_the_plain_reference(norm, weighted, parts):
    lengths = [3, 0, 1, 4]
    x, weight = draw(8, D), draw(D) if weighted else None
    shift = None if parts == "scale" else draw(4, D, seed=1)
    scale = None if parts == "shift" else draw(4, D, seed=2)
    cu = Packing.from_lengths(lengths).cu_seqlens
    got = adaln_modulate(x, shift, scale, cu, norm=norm, weight=weight)
    want = plain(x, shift, scale, lengths, norm, weight)
    assert_same_with_gradients(got, want, (x, shift, scale, weight))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
def test_any_lengths(lengths):
    x, shift, scale = draw(sum(lengths), D), draw(len(lengths), D), draw(len(lengths), D, seed=1)
    got = adaln_modulate(x, shift, scale, Packing.from_lengths(lengths).cu_seqlens)
    assert_same_with_gradients(got, plain(x, shift, scale, lengths), (x, shift, scale))


@pytest.mark.parametrize("rows", [(), (5,)])
def test_without_cu_seqlens_one_row_for_all_or_one_per_token(rows):
    x, shift, scale = draw(5, D), draw(*rows, D, seed=1), draw(*rows, D, seed=2)
    got = adaln_modulate(x, shift, scale, norm="rms")
    want = plain_norm(x, "rms", None) * (1 + scale) + shift
    assert_same_with_gradients(got, want, (x, shift, scale))


def test_chunks_of_one_projection_need_no_copy():
    x, rows = draw(5, D), draw(2, 2 * D)
    shift, scale = rows.chunk(2, dim=-1)
    assert not shift.is_contiguous()
    cu = Packing.from_lengths([2, 3]).cu_seqlens
    got = adaln_modulate(x, shift, scale, cu)
    assert_same_with_gradients(got, plain(x, shift, scale, [2, 3]), (x, rows))


def test_a_shard_that_begins_inside_a_sample_gives_partial_sums():
    x, shift, scale = draw(9, D), draw(3, D, seed=1), draw(3, D, seed=2)
    cu = Packing.from_lengths([4, 3, 2]).cu_seqlens
    whole = adaln_modulate(x, shift, scale, cu)
    parts = [adaln_modulate(x[a:b], shift, scale, cu, token_offset=a) for a, b in ((0, 5), (5, 9))]
    assert torch.equal(torch.cat(parts), whole)
    total = torch.autograd.grad(whole.square().sum(), (shift, scale))
    sums = [torch.autograd.grad(part.square().sum(), (shift, scale)) for part in parts]
    for want, a, b in zip(total, *sums, strict=True):
        torch.testing.assert_close(a + b, want, rtol=1e-12, atol=1e-12)
        assert (a != 0).any(-1).tolist() == [True, True, False]


def test_padding_rows_are_zero_even_when_they_hold_nan():
    x = torch.randn(5, D, dtype=torch.float64)
    x[3:] = float("nan")
    x.requires_grad_()
    shift, scale = draw(1, D), draw(1, D, seed=1)
    y = adaln_modulate(x, shift, scale, Packing.from_lengths([3]).cu_seqlens)
    grads = torch.autograd.grad(y.sum(), (x, shift, scale))
    for z in (y, grads[0]):
        assert torch.equal(z[3:], torch.zeros(2, D, dtype=torch.float64))
    assert y[:3].abs().min() > 0
    assert torch.equal(grads[1], torch.full((1, D), 3.0, dtype=torch.float64))
    assert all(grad.isfinite().all() for grad in grads)


def test_bf16_tokens_with_fp32_modulation():
    x = draw(5, D, dtype=torch.bfloat16)
    shift, scale = draw(2, D, dtype=torch.float32), draw(2, D, seed=1, dtype=torch.float32)
    cu = Packing.from_lengths([2, 3]).cu_seqlens
    got = adaln_modulate(x, shift, scale, cu)
    assert got.dtype == torch.bfloat16
    # Computed in fp32 and rounded once at the end.
    assert torch.equal(got, adaln_modulate(x.float(), shift, scale, cu).bfloat16())
    grads = torch.autograd.grad(got.sum(), (x, shift, scale))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_changes_nothing():
    x, shift = draw(5, D, dtype=torch.float32), draw(D, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = adaln_modulate(x, shift, None)
    assert torch.equal(got, adaln_modulate(x, shift, None))


def test_gradients_of_gradients():
    cu = Packing.from_lengths([2, 1]).cu_seqlens
    inputs = (draw(3, D), draw(2, D, seed=1), draw(2, D, seed=2))
    torch.autograd.gradgradcheck(lambda x, b, a: adaln_modulate(x, b, a, cu), inputs)


_X, _CU = torch.zeros(5, D), Packing.from_lengths([2, 3]).cu_seqlens
_BAD = {
    "x has dtype": {"x": _X.long()},
    r"x has shape \(5,\)": {"x": _X[:, 0]},
    "x has inner stride 5": {"x": torch.zeros(D, 5).t()},
    r"shift has shape \(3, 6\): wanted \(2, 6\)": {"shift": torch.zeros(3, D)},
    r"shift has shape \(6,\): wanted \(2, 6\)": {"shift": torch.zeros(D)},
    r"scale has shape \(4, 6\): wanted \(5, 6\)": {"scale": torch.zeros(4, D), "cu_seqlens": None},
    "scale has dtype torch.float64: with torch.float32": {"scale": torch.zeros(2, D).double()},
    "scale is on meta": {"scale": torch.zeros(2, D, device="meta")},
    "scale has inner stride 2": {"scale": torch.zeros(2, 2 * D)[:, ::2]},
    "cu_seqlens has dtype": {"cu_seqlens": _CU.long()},
    r"cu_seqlens\[0\] is 1": {"cu_seqlens": _CU + 1},
    "norm is 'batch'": {"norm": "batch"},
    r"weight has shape \(5,\)": {"weight": torch.zeros(5)},
    'weight is given with norm="none"': {"weight": torch.zeros(D), "norm": "none"},
    "eps is 0": {"eps": 0},
    "token_offset is 1 without cu_seqlens": {"cu_seqlens": None, "token_offset": 1},
    "token_offset is -1": {"token_offset": -1},
    "backend is 'flash'": {"backend": "flash"},
}


def test_tokens_without_memory_are_refused():
    x, rows = torch.zeros(4, D, device="meta"), torch.zeros(D, device="meta")
    with pytest.raises(ValueError, match="adaln_modulate: the tokens are on meta: allowed are"):
        adaln_modulate(x, rows, rows)


@pytest.mark.parametrize("message", _BAD)
def test_refusals(message):
    good = {"x": _X, "shift": None, "scale": None, "cu_seqlens": _CU}
    with pytest.raises(ValueError, match=f"adaln_modulate: {message}"):
        adaln_modulate(**(good | _BAD[message]))


def test_an_absent_backend_says_what_brings_it():
    with pytest.raises(RuntimeError, match="'triton' is not available"):
        adaln_modulate(_X, None, None, backend="triton")


def test_costs():
    assert adaln_modulate_flops(10, 4) == 320
    assert adaln_modulate_flops(10, 4, norm="none", backward=True) == 160
    assert adaln_modulate_bytes(10, 4, itemsize=2) == 160
    assert adaln_modulate_bytes(10, 4, itemsize=4, backward=True) == 480


def test_the_result_is_never_the_argument():
    x, cu = torch.ones(2, D), Packing.from_lengths([2]).cu_seqlens
    y = adaln_modulate(x, None, None, cu, norm="none")
    assert torch.equal(y, x)
    assert y is not x
    assert y.data_ptr() != x.data_ptr()
