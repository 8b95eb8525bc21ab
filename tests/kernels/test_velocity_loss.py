"""velocity_loss against plain sums, sample by sample, and its contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing
from goku_kernels.velocity_loss import (
    per_sample_mse,
    velocity_loss,
    velocity_loss_bytes,
    velocity_loss_flops,
)

WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.37, 4.0, 1.5], dtype=torch.float64)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def cu_of(lengths):
    return Packing.from_lengths(lengths).cu_seqlens


def plain(prediction, target, lengths):
    """Each sample's mean squared error, correctly rounded sums of float64 squares; 0 for none."""
    values = []
    for p, q in zip(prediction.split(lengths), target.split(lengths), strict=True):
        squares = ((p.double() - q.double()) ** 2).flatten().tolist()
        values.append(math.fsum(squares) / max(1, len(squares)))
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    width=st.integers(1, 9),
    scale=st.floats(0.1, 10),
)
def test_value_and_gradients_in_closed_form(lengths, width, scale):
    tokens, batch = sum(lengths), len(lengths)
    p, q = draw(tokens, width).requires_grad_(), draw(tokens, width, seed=1).requires_grad_()
    w = WEIGHTS[:batch].clone().requires_grad_()
    loss, per_sample = velocity_loss(p, q, w, cu_of(lengths), weight_sum=scale)
    means = plain(p.detach(), q.detach(), lengths)
    # float64 throughout: sums of at most 500 positive terms.
    torch.testing.assert_close(per_sample, means, rtol=1e-13, atol=0)
    torch.testing.assert_close(loss, (means * w).sum() / scale, rtol=1e-13, atol=0)
    got = torch.autograd.grad(loss + (per_sample * per_sample).sum(), (p, q, w))
    ids = torch.repeat_interleave(torch.arange(batch), torch.tensor(lengths))
    share = (w.detach() / scale + 2 * means) / (torch.tensor(lengths).clamp(min=1) * width)
    want = 2 * (p - q).detach() * share[ids, None]
    for x, y in zip(got, (want, -want, means / scale), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


def test_shards_add_up_to_the_whole():
    lengths = [4, 0, 3, 2]
    p, q = draw(9, 5), draw(9, 5, seed=1)
    cu, w = cu_of(lengths), WEIGHTS[:4]
    whole = velocity_loss(p, q, w, cu, weight_sum=3.0)
    for cut in range(10):
        parts = [
            velocity_loss(p[a:b], q[a:b], w, cu, weight_sum=3.0, token_offset=a)
            for a, b in ((0, cut), (cut, 9))
        ]
        for x, a, b in zip(whole, *parts, strict=True):
            torch.testing.assert_close(a + b, x, rtol=1e-14, atol=0)
    leaf = p[3:6].clone().requires_grad_()
    loss, _ = velocity_loss(leaf, q[3:6], w, cu, weight_sum=3.0, token_offset=3)
    (gradient,) = torch.autograd.grad(loss, leaf)
    everything = p.clone().requires_grad_()
    loss, _ = velocity_loss(everything, q, w, cu, weight_sum=3.0)
    (want,) = torch.autograd.grad(loss, everything)
    torch.testing.assert_close(gradient, want[3:6], rtol=1e-14, atol=0)


def test_padding_rows_take_no_part_even_when_they_hold_nan():
    p, q = draw(7, 3), draw(7, 3, seed=1)
    cu = cu_of([1, 3])
    want = per_sample_mse(p[:4], q[:4], cu)
    p[4:], q[5:] = float("nan"), float("inf")
    p.requires_grad_()
    got = per_sample_mse(p, q, cu)
    assert torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got.sum(), p)
    assert torch.equal(gradient[4:], torch.zeros(3, 3, dtype=torch.float64))
    assert gradient[:4].abs().min() > 0


def test_a_bad_sample_spoils_no_other():
    p, q = draw(5, 3), draw(5, 3, seed=1)
    p[2] = float("nan")
    got = per_sample_mse(p, q, cu_of([2, 1, 2]))
    assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_reduced_in_fp32_and_rounded_once(dtype):
    lengths = [900, 1, 17]
    p, q = draw(918, 64, dtype=dtype).requires_grad_(), draw(918, 64, seed=1, dtype=torch.float32)
    loss, per_sample = velocity_loss(p, q, WEIGHTS[:3], cu_of(lengths), weight_sum=2.0)
    assert per_sample.dtype == torch.float32
    assert loss.dtype == torch.float64  # that of the weights
    means = plain(p.detach(), q, lengths).float()
    # fp32: difference, square, sum of a row and result are rounded; the rows' errors average out.
    torch.testing.assert_close(per_sample, means, rtol=5e-7, atol=0)
    assert velocity_loss(p, q, WEIGHTS[:3].float(), cu_of(lengths), weight_sum=2.0)[0].dtype == (
        torch.float32
    )
    loss.backward()
    assert p.grad.dtype == dtype


def test_gradients_of_gradients():
    cu, w = cu_of([2, 0, 1]), WEIGHTS[:3]
    inputs = (draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_())

    def call(p, q):
        loss, per_sample = velocity_loss(p, q, w, cu, weight_sum=2.0)
        return loss + per_sample.square().sum()

    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


def test_weight_sum_as_a_tensor_and_no_tokens():
    p, q, cu, w = draw(3, 2), draw(3, 2, seed=1), cu_of([1, 2]), WEIGHTS[:2]
    a = velocity_loss(p, q, w, cu, weight_sum=2.5)
    b = velocity_loss(p, q, w, cu, weight_sum=torch.tensor(2.5))
    assert torch.equal(a[0], b[0])
    loss, per_sample = velocity_loss(p[:0], q[:0], w, cu_of([0, 0]), weight_sum=1.0)
    assert loss.item() == 0
    assert per_sample.tolist() == [0, 0]


def test_autocast_changes_nothing():
    p, q, cu = draw(3, 2, dtype=torch.float32), draw(3, 2, seed=1).float(), cu_of([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        got = per_sample_mse(p, q, cu)
    assert torch.equal(got, per_sample_mse(p, q, cu))


X, CU, W = torch.zeros(5, 4), cu_of([2, 3]), torch.ones(2)
BAD = {
    "prediction has dtype": {"prediction": X.long()},
    r"prediction has shape \(5,\)": {"prediction": X[:, 0]},
    "prediction has inner stride 5": {"prediction": torch.zeros(4, 5).t()},
    r"target has shape \(5, 1\): wanted \(5, 4\)": {"target": X[:, :1]},
    "target is on meta": {"target": X.to("meta")},
    r"weights has shape \(3,\): wanted \(2,\)": {"weights": torch.ones(3)},
    "weights has dtype torch.int64": {"weights": torch.ones(2).long()},
    "weights is on meta": {"weights": W.to("meta")},
    "cu_seqlens has dtype": {"cu_seqlens": CU.long()},
    r"cu_seqlens\[0\] is 1": {"cu_seqlens": CU + 1},
    "weight_sum is 0.0": {"weight_sum": 0.0},
    "weight_sum is nan": {"weight_sum": math.nan},
    r"weight_sum has shape \(2,\)": {"weight_sum": W},
    "token_offset is -1": {"token_offset": -1},
    "backend is 'flash'": {"backend": "flash"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_refused(message):
    options = {
        "prediction": X, "target": X, "weights": W, "cu_seqlens": CU, "weight_sum": 2.0,
    } | BAD[message]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        velocity_loss(**options)


def test_triton_on_a_cpu_says_what_it_needs():
    with pytest.raises(RuntimeError, match="velocity_loss: backend 'triton' is not available"):
        velocity_loss(X, X, W, CU, weight_sum=1.0, backend="triton")


def test_costs():
    assert velocity_loss_bytes(10, 64, itemsize=2) == 10 * 64 * 6
    assert velocity_loss_bytes(10, 64, itemsize=2, backward=True) == 10 * 64 * 8
    assert velocity_loss_bytes(10, 64, itemsize=2, target_itemsize=2) == 10 * 64 * 4
    assert velocity_loss_flops(10, 64) == 10 * 64 * 3
    assert velocity_loss_flops(10, 64, backward=True) == 10 * 64 * 2


def test_the_default_dtype_plays_no_part():
    x, cu = torch.ones(4000, 64), torch.tensor([0, 4000], dtype=torch.int32)
    torch.set_default_dtype(torch.float16)
    try:
        _, per_sample = velocity_loss(x, torch.zeros_like(x), torch.ones(1), cu, weight_sum=1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert per_sample.tolist() == [1.0]
