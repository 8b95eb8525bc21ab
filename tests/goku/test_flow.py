"""The rectified flow against closed forms: times, a Gaussian's exact ODE, losses."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from goku.flow import (
    FlowConfig,
    drop_text,
    effective_shift,
    interpolate,
    per_sample_mse,
    sample_times,
    shift_time,
    velocity_target,
    weighted_loss,
)
from goku.random import Purpose, uniform_each
from goku_kernels import Packing

MANY = 20_000
# Kolmogorov's quantile 2.23/sqrt(n) has p = 1e-4, and the seeds are fixed.
KS_LIMIT = 2.23 / math.sqrt(MANY)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def ks_distance(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    expected = cdf(values.sort().values)
    rank = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return max((expected - rank[:-1]).max().item(), (rank[1:] - expected).max().item())


# Times


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_uniform_times_follow_their_closed_form(shift: float) -> None:
    config = FlowConfig(time_distribution="uniform", shift=shift)
    t = sample_times(config, 5, range(MANY), [64] * MANY)
    assert t.dtype == torch.float64
    assert t.shape == (MANY,)
    assert t.min().item() >= 0.0
    assert t.max().item() <= 1.0
    # P(t <= x) = P(u <= x / (x + (1 - x) / s)): the inverse of the shift is the shift by 1/s.
    assert ks_distance(t, lambda x: x / (x + (1 - x) / shift)) < KS_LIMIT


@pytest.mark.parametrize(
    ("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 0.6, 1.0), (-0.3, 1.4, 3.0)]
)
def test_logit_normal_times_follow_their_closed_form(mean: float, std: float, shift: float) -> None:
    config = FlowConfig(
        time_distribution="logit_normal", logit_mean=mean, logit_std=std, shift=shift
    )
    t = sample_times(config, 6, range(MANY), [64] * MANY)

    def cdf(x: Tensor) -> Tensor:
        z = (torch.logit(x) - (mean - math.log(shift))) / std
        return 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    assert t.min().item() > 0.0
    assert t.max().item() < 1.0
    assert ks_distance(t, cdf) < KS_LIMIT
    # The limit can fail: it tells a shift of 10% from none.
    assert ks_distance(shift_time(t, 1.1), cdf) > KS_LIMIT


def test_times_depend_on_nothing_but_seed_stream_and_tokens() -> None:
    streams, tokens = [3, 9, 2**40, 3], [64, 256, 4096, 1024]
    for distribution in ("uniform", "logit_normal"):
        config = FlowConfig(time_distribution=distribution, resolution_shift=True)
        together = sample_times(config, 1, streams, tokens)
        alone = [
            sample_times(config, 1, [i], [n]).item() for i, n in zip(streams, tokens, strict=True)
        ]
        assert together.tolist() == alone
        assert sample_times(config, 2, streams, tokens).tolist() != alone
    uniform_times = sample_times(FlowConfig(), 1, streams, tokens)
    assert torch.equal(uniform_times, uniform_each(1, streams, Purpose.TIME))


@given(shift=st.floats(0.05, 20), other=st.floats(0.05, 20))
def test_shift_is_sd3s_formula_monotone_and_composes(shift: float, other: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, shift)
    assert shifted[0].item() == 0.0
    assert shifted[-1].item() == 1.0
    assert bool((shifted.diff() > 0).all())
    # SD3, equation 23, on noise levels tau = 1 - t. 1e-14: 1 ulp of 1 times a slope <= 20.
    tau = 1 - t
    torch.testing.assert_close(
        1 - shifted, shift * tau / (1 + (shift - 1) * tau), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(
        shift_time(shifted, other), shift_time(t, shift * other), rtol=1e-13, atol=0
    )
    inner = shifted[1:-1] - t[1:-1]
    if shift > 1.0:
        assert bool((inner <= 1e-15).all())  # towards noise, t = 0
    else:
        assert bool((inner >= -1e-15).all())


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_resolution_shift_moves_mass_towards_noise(distribution: str) -> None:
    config = FlowConfig(time_distribution=distribution, resolution_shift=True, base_tokens=256)  # type: ignore[arg-type]
    streams = range(2000)
    base, larger, largest, smaller = (
        sample_times(config, 8, streams, [n] * 2000) for n in (256, 1024, 219_600, 64)
    )
    plain = sample_times(FlowConfig(time_distribution=distribution), 8, streams, [256] * 2000)  # type: ignore[arg-type]
    assert torch.equal(base, plain)
    inside = base > 0
    assert bool((larger < base)[inside].all())
    assert bool((largest < larger)[inside].all())
    assert bool((smaller > base)[inside].all())
    # Four times as many tokens: a shift of 2, so the median at 1/2 goes to 1/3.
    # A median of 2,000 has a standard error of about 1/(2 f sqrt(n)) = 0.011 or less here.
    assert base.median().item() == pytest.approx(1 / 2, abs=0.05)
    assert larger.median().item() == pytest.approx(1 / 3, abs=0.05)


def test_effective_shift() -> None:
    off = FlowConfig(shift=3.0)
    assert effective_shift(off, [1, 500]).tolist() == [3.0, 3.0]
    on = FlowConfig(shift=3.0, resolution_shift=True, base_tokens=100)
    assert effective_shift(on, [100, 400, 25]).tolist() == [3.0, 6.0, 1.5]


def test_text_is_dropped_at_the_stated_rate_and_independently_of_the_times() -> None:
    config = FlowConfig(text_drop=0.1)
    dropped = drop_text(config, 3, range(MANY))
    assert dropped.dtype == torch.bool
    # 4.5 standard errors.
    assert abs(dropped.double().mean().item() - 0.1) < 4.5 * math.sqrt(0.09 / MANY)
    times = sample_times(config, 3, range(MANY), [1] * MANY)
    error = 4.5 * math.sqrt(1 / 12 / dropped.sum().item())
    assert abs(times[dropped].mean().item() - 0.5) < error
    assert drop_text(config, 3, [17, 4]).tolist() == [dropped[17].item(), dropped[4].item()]
    assert not drop_text(FlowConfig(text_drop=0.0), 3, range(1000)).any()
    assert drop_text(FlowConfig(text_drop=1.0), 3, range(1000)).all()


# The path


def test_interpolate_ends_at_noise_and_data_and_its_slope_is_the_target() -> None:
    x1, x0 = randn(7, 3, seed=1), randn(7, 3, seed=2)
    assert torch.equal(interpolate(x1, x0, 0.0), x0)
    assert torch.equal(interpolate(x1, x0, 1.0), x1)
    slope = (interpolate(x1, x0, 0.75) - interpolate(x1, x0, 0.25)) / 0.5
    torch.testing.assert_close(slope, velocity_target(x1, x0), rtol=1e-13, atol=1e-14)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_interpolation_is_each_samples_own(lengths: list[int], seed: int) -> None:
    packing = Packing.from_lengths(lengths)
    x1, x0 = randn(packing.total, 5, seed=seed), randn(packing.total, 5, seed=seed + 100)
    t = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed)).double()
    parts = [
        interpolate(a, b, time)
        for a, b, time in zip(x1.split(lengths), x0.split(lengths), t, strict=True)
    ]
    assert torch.equal(interpolate(x1, x0, t, packing.segment_ids()), torch.cat(parts))
    rows = t[packing.segment_ids()]
    assert torch.equal(interpolate(x1, x0, rows), torch.cat(parts))


def test_interpolation_precision() -> None:
    x1, x0 = randn(40, 8, seed=1, dtype=torch.bfloat16), randn(40, 8, seed=2, dtype=torch.bfloat16)
    t = torch.tensor([0.3], dtype=torch.float64)
    ids = torch.zeros(40, dtype=torch.int64)
    got = interpolate(x1, x0, t, ids)
    exact = 0.3 * x1.double() + 0.7 * x0.double()
    assert got.dtype == torch.bfloat16
    # Rounded once to bf16's 8 bits, not at each of three operations.
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-6)
    assert velocity_target(x1, x0).dtype == torch.float32
    assert torch.equal(velocity_target(x1, x0), x1.float() - x0.float())
    # 1 - t is taken before t is rounded to fp32: at 1 - 1e-9 it would vanish.
    near = torch.tensor(1 - 1e-9, dtype=torch.float64)
    noise_alone = interpolate(torch.zeros(3), torch.ones(3), near)
    torch.testing.assert_close(noise_alone, torch.full((3,), 1e-9), rtol=1e-6, atol=0)


# The loss


def loop_mse(prediction: Tensor, target: Tensor, lengths: Sequence[int]) -> list[float]:
    """Plain Python sums, correctly rounded."""
    values, row = [], 0
    for n in lengths:
        squares = (prediction[row : row + n].double() - target[row : row + n].double()) ** 2
        values.append(math.fsum(squares.flatten().tolist()) / squares.numel())
        row += n
    return values


@given(lengths=LENGTHS, seed=st.integers(0, 99), channels=st.integers(1, 20))
def test_mse_is_each_samples_own_mean(lengths: list[int], seed: int, channels: int) -> None:
    packing = Packing.from_lengths(lengths)
    p, q = (
        randn(packing.total, channels, seed=seed),
        randn(packing.total, channels, seed=seed + 100),
    )
    expected = torch.tensor(loop_mse(p, q, lengths), dtype=torch.float64)
    got = per_sample_mse(p, q, packing)
    assert got.dtype == torch.float64
    # Sums of at most 180 positive terms: n * 1.1e-16 at worst.
    torch.testing.assert_close(got, expected, rtol=2e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mse_reduces_low_precision_in_fp32_whatever_the_packing(dtype: torch.dtype) -> None:
    lengths = [3000, 1, 17, 900]
    packing = Packing.from_lengths(lengths)
    p, q = randn(3918, 64, seed=1, dtype=dtype), randn(3918, 64, seed=2, dtype=dtype)
    got = per_sample_mse(p, q, packing)
    assert got.dtype == torch.float32
    expected = torch.tensor(loop_mse(p, q, lengths))
    # fp32: difference, square, row mean and result are rounded once each; row errors average out.
    torch.testing.assert_close(got, expected, rtol=5e-7, atol=0)
    order = [2, 0, 3, 1]
    pieces = list(zip(p.split(lengths), q.split(lengths), strict=True))
    moved = per_sample_mse(
        torch.cat([pieces[i][0] for i in order]),
        torch.cat([pieces[i][1] for i in order]),
        Packing.from_lengths([lengths[i] for i in order]),
    )
    alone = torch.cat([per_sample_mse(a, b, Packing.from_lengths([len(a)])) for a, b in pieces])
    # One rounding of fp32 (6e-8) per step that may differ: a row's mean, the result.
    torch.testing.assert_close(moved, got[order], rtol=1.5e-7, atol=0)
    torch.testing.assert_close(alone, got, rtol=1.5e-7, atol=0)
    assert torch.equal(per_sample_mse(p, q, packing), got)  # and deterministic


def test_mse_gradient() -> None:
    packing = Packing.from_lengths([2, 1, 4])
    p = randn(7, 3, seed=1).requires_grad_()
    q = randn(7, 3, seed=2)
    assert torch.autograd.gradcheck(lambda x: per_sample_mse(x, q, packing), (p,))
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(per_sample_mse(p, q, packing) @ weights, p)
    rows = (weights / torch.tensor([2.0, 1.0, 4.0]))[packing.segment_ids()]
    closed_form = 2 * (p - q).detach() / 3 * rows[:, None]
    torch.testing.assert_close(gradient, closed_form, rtol=1e-14, atol=0)
    low = p.detach().bfloat16().requires_grad_()
    per_sample_mse(low, q.bfloat16(), packing).sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


PACKINGS = st.permutations(range(6)).flatmap(
    lambda order: st.lists(st.booleans(), min_size=5, max_size=5).map(
        lambda cuts: [
            [order[i] for i in range(6) if sum(cuts[:i]) == pack] for pack in range(sum(cuts) + 1)
        ]
    )
)


@given(packs=PACKINGS, seed=st.integers(0, 99))
@settings(max_examples=40)
def test_gradient_of_the_weighted_loss_is_the_same_for_any_packing(
    packs: list[list[int]], seed: int
) -> None:
    """A model applied to one pack of everything, and to any split and order, summed: fp64, 1e-12.

    1e-12: the gradients are of order 1 and sums of some 200 products, in another order.
    """
    assert sorted(i for pack in packs for i in pack) == list(range(6))
    lengths = [5, 1, 8, 3, 13, 2]
    inputs = [randn(n, 4, seed=seed + i) for i, n in enumerate(lengths)]
    targets = [randn(n, 3, seed=seed + 50 + i) for i, n in enumerate(lengths)]
    weights = torch.tensor([1.0, 2.0, 0.0, 0.25, 1.0, 3.0], dtype=torch.float64)
    weight_sum = weights.sum().item()

    def run(packing_of_samples: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
        first = randn(4, 6, seed=1).requires_grad_()
        second = randn(6, 3, seed=2).requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for pack in packing_of_samples:
            x = torch.cat([inputs[i] for i in pack])
            prediction = torch.tanh(x @ first) @ second
            means = per_sample_mse(
                prediction,
                torch.cat([targets[i] for i in pack]),
                Packing.from_lengths([lengths[i] for i in pack]),
            )
            loss = weighted_loss(means, weights[pack], weight_sum)
            loss.backward()  # accumulates over packs, as a training step does
            total += loss.detach()
        assert first.grad is not None
        assert second.grad is not None
        return total, [first.grad, second.grad]

    loss, gradients = run(packs)
    expected_loss, expected = run([list(range(6))])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert want.abs().max().item() > 1e-3  # there is something to compare


def test_weighted_loss_is_the_global_mean() -> None:
    means = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    assert weighted_loss(means, weights, 6.0).item() == 15 / 6
    assert weighted_loss(means, weights, weights.sum()).item() == 15 / 6
    shares = [weighted_loss(means[i : i + 1], weights[i : i + 1], 6.0).item() for i in range(3)]
    assert sum(shares) == pytest.approx(15 / 6, rel=1e-15)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time_distribution": "cosine"}, "time_distribution is 'cosine'; allowed are 'uniform'"),
        ({"logit_mean": math.nan}, "logit_mean is nan"),
        ({"logit_std": 0.0}, "logit_std is 0.0; allowed is a finite number above 0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"shift": math.inf}, "shift is inf"),
        ({"base_tokens": 0}, "base_tokens is 0; allowed is 1 or more"),
        ({"text_drop": 1.5}, r"text_drop is 1.5; allowed is \[0, 1\]"),
        ({"text_drop": math.nan}, "text_drop is nan"),
    ],
)
def test_bad_configs_are_refused(arguments, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        FlowConfig(**arguments)


X = torch.zeros(3, 2)
TWO = Packing.from_lengths([1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_times(FlowConfig(), 0, [1, 2], [4]), "tokens has 1 entries"),
        (lambda: sample_times(FlowConfig(), 0, [1], [0]), "tokens contains 0"),
        (lambda: interpolate(X, X[:2], 0.5), r"x0 has shape \(2, 2\)"),
        (lambda: interpolate(X, X, torch.zeros(2)), r"t has shape \(2,\); without segment_ids"),
        (lambda: interpolate(X, X, torch.zeros(2), torch.zeros(2).long()), r"segment_ids \(2,\)"),
        (lambda: interpolate(X, X, torch.tensor(0.5), torch.zeros(3).long()), r"t has shape \(\)"),
        (lambda: velocity_target(X, X[:, :1]), r"x0 has shape \(3, 1\)"),
        (lambda: per_sample_mse(X, X[:, :1], TWO), r"target has shape \(3, 1\)"),
        (lambda: per_sample_mse(X[:2], X[:2], TWO), r"allowed is \(3, channels\)"),
        (lambda: per_sample_mse(X, X, Packing.from_lengths([3, 0])), r"packing.lengths\[1\] is 0"),
        (lambda: weighted_loss(X[:, 0], X[:2, 0], 1.0), r"weights has shape \(2,\)"),
        (lambda: weighted_loss(X[:, 0], X[:, 0], 0.0), "weight_sum is 0.0"),
        (lambda: weighted_loss(X[:, 0], X[:, 0], X[:, 0]), r"weight_sum has shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
