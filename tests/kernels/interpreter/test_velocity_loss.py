"""The loss kernels in the interpreter, by FlashAttention's rule against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing
from goku_kernels.velocity_loss import _mse, _mse_backward, per_sample_mse, velocity_loss


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def run(prediction, target, weights, cu, backend, token_offset=0):
    """loss, per_sample, and the gradients of prediction, target and weights."""
    p, q, w = (x.detach().requires_grad_() for x in (prediction, target, weights))
    loss, per_sample = velocity_loss(
        p, q, w, cu, weight_sum=2.5, token_offset=token_offset, backend=backend
    )
    # A share of its own for per_sample, so that both outputs' gradients meet.
    share = draw(len(w), seed=5).to(per_sample.dtype)
    return loss, per_sample, *torch.autograd.grad(loss + per_sample @ share, (p, q, w))


def check(flash_rule, p, q, w, cu, token_offset=0):
    got = run(p, q, w, cu, "triton", token_offset)
    same = run(p, q, w, cu, "torch", token_offset)
    exact = run(p.double(), q.double(), w.double(), cu, "torch", token_offset)
    names = ("loss", "per_sample", "dprediction", "dtarget", "dweights")
    for name, g, s, e in zip(names, got, same, exact, strict=True):
        rows = name in ("dprediction", "dtarget")
        g, s, e = (x.reshape(-1) if name == "loss" else x for x in (g, s, e))
        flash_rule(name, g, s, e, *((cu, token_offset) if rows else ()))
    # Sample by sample, one rounding of the result and what the rows' errors leave (they average
    # out; a row of one channel has three: difference, square, result).
    torch.testing.assert_close(got[1].double(), exact[1].double(), rtol=3e-7, atol=0)
    for g, s in zip(got, run(p, q, w, cu, "triton", token_offset), strict=True):
        assert torch.equal(g, s)  # deterministic
    return got


def weights_of(lengths):
    return torch.linspace(0.5, 2.0, len(lengths))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 27, 1])
def test_every_packing(flash_rule, pack, width, dtype):
    lengths, padding = pack
    tokens = sum(lengths) + padding
    p, q = draw(tokens, width, dtype=dtype), draw(tokens, width, seed=1)
    check(flash_rule, p, q, weights_of(lengths), Packing.from_lengths(lengths).cu_seqlens)


def test_both_in_half_precision(flash_rule):
    p, q = draw(9, 64, dtype=torch.float16), draw(9, 64, seed=1, dtype=torch.float16)
    check(flash_rule, p, q, weights_of([4, 5]), Packing.from_lengths([4, 5]).cu_seqlens)


def test_padding_rows_may_hold_anything():
    cu = Packing.from_lengths([3, 70]).cu_seqlens
    p, q, w = draw(80, 64), draw(80, 64, seed=1), weights_of([1, 1])
    want = run(p[:73], q[:73], w, cu, "triton")
    p[73:], q[75:] = float("nan"), float("inf")
    got = run(p, q, w, cu, "triton")
    for i in (0, 1, 4):
        assert torch.equal(got[i], want[i])
    for i in (2, 3):
        assert torch.equal(got[i][:73], want[i])
        assert torch.equal(got[i][73:], torch.zeros(7, 64))


def test_a_bad_sample_spoils_no_other():
    p, q = draw(9, 64), draw(9, 64, seed=1)
    p[4] = float("nan")
    got = per_sample_mse(p, q, Packing.from_lengths([4, 1, 4]).cu_seqlens, backend="triton")
    assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("width", [64, 200])
def test_shards_add_up(flash_rule, pack, width):
    lengths, padding = pack
    tokens = sum(lengths) + padding
    cu, w = Packing.from_lengths(lengths).cu_seqlens, weights_of(lengths)
    p, q = draw(tokens, width), draw(tokens, width, seed=1)
    whole = per_sample_mse(p.double(), q.double(), cu)
    cut = tokens // 2
    first = check(flash_rule, p[:cut], q[:cut], w, cu)
    second = check(flash_rule, p[cut:], q[cut:], w, cu, token_offset=cut)
    # Two roundings where the whole has one, and their sum's.
    torch.testing.assert_close((first[1] + second[1]).double(), whole, rtol=5e-7, atol=0)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 130]), min_size=1, max_size=7),
    padding=st.integers(0, 3),
    first=st.integers(0, 70),
)
def test_any_packing(flash_rule, lengths, padding, first):
    tokens = sum(lengths) + padding
    cu = Packing.from_lengths(lengths).cu_seqlens
    first = min(first, tokens)
    p, q = draw(tokens, 64, dtype=torch.float16), draw(tokens, 64, seed=1)
    check(flash_rule, p[first:], q[first:], weights_of(lengths), cu, token_offset=first)


def test_more_samples_and_slots_than_one_load():
    """1,040 samples of one token, the search taking two loads; then a giant of 1,099 slots."""
    cu = torch.arange(1041, dtype=torch.int32)
    p, q = draw(20, 8).requires_grad_(), draw(20, 8, seed=1)
    got = per_sample_mse(p, q, cu, token_offset=1015, backend="triton")
    squares = (p.detach().double() - q).square().mean(1)
    want = torch.cat([torch.zeros(1015), squares, torch.zeros(5)])
    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=0)
    weights = draw(1040, seed=2)
    (gradient,) = torch.autograd.grad(got @ weights, p)
    exact = 2 * (p.detach().double() - q) / 8 * weights[1015:1035, None]
    torch.testing.assert_close(gradient.double(), exact, rtol=3e-7, atol=0)
    # At this width a program has one row, and the second stage reads 1,024 slots at once.
    p, q = draw(1100, 520), draw(1100, 520, seed=1)
    cu = torch.tensor([0, 1, 1100], dtype=torch.int32)
    got = per_sample_mse(p, q, cu, backend="triton")
    want = per_sample_mse(p.double(), q.double(), cu)
    torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=0)


def test_strided_rows_and_gradient(flash_rule):
    cu, w = Packing.from_lengths([5, 9]).cu_seqlens, weights_of([1, 1])
    p, q = draw(14, 200)[:, 8:72], draw(14, 100, seed=1)[:, 3:67]
    check(flash_rule, p, q, w, cu)
    # The gradient of per_sample as an expanded and as a strided tensor.
    leaf = p.detach().requires_grad_()
    dense = draw(4, seed=3)
    for gradient in (torch.tensor(1.5).expand(2), dense[::2], dense[:2]):
        per_sample = per_sample_mse(leaf, q, cu, backend="triton")
        (got,) = torch.autograd.grad(per_sample, leaf, gradient)
        (want,) = torch.autograd.grad(
            per_sample_mse(leaf, q, cu, backend="torch"), leaf, gradient.contiguous()
        )
        torch.testing.assert_close(got, want, rtol=5e-7, atol=0)  # three roundings


def test_rows_beyond_2_to_31_elements():
    cu, w = Packing.from_lengths([5, 7]).cu_seqlens, weights_of([1, 1])
    p, q = draw(12, 64), draw(12, 64, seed=1)
    # Virtual memory: only the pages of the rows are touched. 11 * stride is past 2^31.
    far = [torch.empty_strided((12, 64), (2**28, 1)) for _ in range(2)]
    far[0].copy_(p)
    far[1].copy_(q)
    for g, s in zip(run(*far, w, cu, "triton"), run(p, q, w, cu, "triton"), strict=True):
        assert torch.equal(g, s)


def test_the_divisor_is_the_whole_samples_even_past_2_to_31():
    """A shard's few rows of a sample of 2^30 tokens: tokens * channels is 2^36."""
    cu = torch.tensor([0, 2**30], dtype=torch.int32)
    p, q = draw(3, 64).requires_grad_(), draw(3, 64, seed=1)
    got = per_sample_mse(p, q, cu, token_offset=2**29, backend="triton")
    want = (p.detach().double() - q).square().sum() / 2**36
    torch.testing.assert_close(got.double(), want[None], rtol=2e-7, atol=0)
    (gradient,) = torch.autograd.grad(got.sum(), p)
    torch.testing.assert_close(gradient, 2 * (p - q).detach() / 2**36, rtol=3e-7, atol=0)


def test_opcheck():
    cu = Packing.from_lengths([2, 3]).cu_seqlens
    p, q = draw(6, 4).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    torch.library.opcheck(_mse, (p, q, cu, 0))
    torch.library.opcheck(_mse_backward, (draw(2), p.detach(), q.detach(), cu, 0))


def test_fp64_is_refused_by_name_and_falls_back():
    cu = Packing.from_lengths([3]).cu_seqlens
    p, q = draw(3, 4), draw(3, 4, seed=1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"target has dtype torch\.float64"):
        per_sample_mse(p, q, cu, backend="triton")
    assert per_sample_mse(p, q, cu).dtype == torch.float64


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31])
def test_rows_far_past_the_end_are_padding(offset):
    x, cu = torch.ones(4, 8, requires_grad=True), torch.tensor([0, 3, 5], dtype=torch.int32)
    loss, per_sample = velocity_loss(
        x, torch.zeros(4, 8), torch.ones(2), cu, weight_sum=2.0, token_offset=offset,
        backend="triton",
    )  # fmt: skip
    assert not per_sample.any()
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad.any()
