"""The ODE samplers against a Gaussian's closed-form answer."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from goku.flow import (
    METHODS,
    Method,
    guided,
    integrate,
    interpolate,
    time_grid,
    velocity_target,
)
from goku.random import normal

X = torch.zeros(3, 2)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


MU, SIGMA = 1.5, 0.3


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[x1 - x0 | x_t = x] for data N(MU, SIGMA^2): the exact marginal field, linear in x."""
    variance = t**2 * SIGMA**2 + (1 - t) ** 2
    return MU + (t * SIGMA**2 - (1 - t)) / variance * (x - t * MU)


def test_the_gaussian_field_and_its_solution_are_what_they_claim() -> None:
    """x(t) = t MU + sd(t) x(0) solves dx/dt = v(x, t): (x - t MU) / sd(t) is constant along it."""
    x0 = randn(9, seed=3)

    def solution(t: float) -> Tensor:
        return t * MU + math.sqrt(t**2 * SIGMA**2 + (1 - t) ** 2) * x0

    for t in (0.1, 0.5, 0.9):
        slope = (solution(t + 1e-5) - solution(t - 1e-5)) / 2e-5
        # Central difference: 1e-10 times a third derivative of order 10.
        torch.testing.assert_close(slope, gaussian_velocity(solution(t), t), rtol=0, atol=1e-7)
    # The field is the regression of x1 - x0 on x_t: the residual is orthogonal to 1 and to x_t.
    n, t = 200_000, 0.6
    data = MU + SIGMA * normal(1, 1, n, dtype=torch.float64)
    noise = normal(1, 2, n, dtype=torch.float64)
    xt = interpolate(data, noise, t)
    residual = velocity_target(data, noise) - gaussian_velocity(xt, t)
    limit = 4.5 / math.sqrt(n)
    assert abs(residual.mean().item()) < limit * residual.std().item()
    assert abs((residual * (xt - xt.mean())).mean().item()) < limit * (
        residual.std().item() * xt.std().item()
    )


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samplers_converge_at_their_order_to_the_closed_form(
    method: str, order: int, shift: float
) -> None:
    x0 = randn(100, seed=4)
    exact = MU + SIGMA * x0

    def error(steps: int) -> float:
        x1 = integrate(gaussian_velocity, x0, time_grid(steps, shift), method)  # type: ignore[arg-type]
        return (x1 - exact).abs().max().item()

    # The second term of ab2 is larger: it shows the order at smaller steps.
    counts = (800, 1600, 3200) if method == "ab2" else (200, 400, 800)
    errors = [error(steps) for steps in counts]
    for coarse, fine in itertools.pairwise(errors):
        # Halving the step divides the error by 2^order, up to the next term (about 1/steps).
        assert coarse / fine == pytest.approx(2**order, rel=0.05)
    assert errors[-1] < (1e-2 if method == "euler" else 1e-4)


def test_samplers_are_exact_where_they_should_be() -> None:
    x0, x1 = randn(4, 3, seed=5), randn(4, 3, seed=6)
    # A straight path has a constant velocity: one step is enough for any of them.
    for method in METHODS:
        got = integrate(lambda x, t: velocity_target(x1, x0), x0, time_grid(1), method)
        torch.testing.assert_close(got, x1, rtol=1e-14, atol=1e-15)
    # A velocity linear in t: the trapezoid is exact (3/2 * 1), Euler is not.
    start = torch.zeros(1, dtype=torch.float64)
    heun = integrate(lambda x, t: torch.full_like(x, 3 * t), start, time_grid(4), "heun")
    euler = integrate(lambda x, t: torch.full_like(x, 3 * t), start, time_grid(4), "euler")
    assert heun.item() == 1.5
    assert euler.item() == 1.125


def test_ab2_extends_the_line_through_two_velocities() -> None:
    """Exact for a velocity linear in t but for its first, Euler, step, however the times are spaced."""
    times = torch.tensor([0.0, 0.1, 0.25, 0.7, 1.0], dtype=torch.float64)
    start, asked = torch.zeros(1, dtype=torch.float64), []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.full_like(x, 2.0 + 3.0 * t)

    got = integrate(velocity, start, times, "ab2")
    # From 0.1 on the integral of 2 + 3 t; before it, 0.1 * 2.
    assert got.item() == pytest.approx(0.2 + (2 + 1.5) - (0.2 + 1.5 * 0.01), rel=1e-14)
    assert asked == times[:-1].tolist()  # one evaluation a step
    # Where the velocity does not change it is Euler's method to the bit.
    constant = randn(4, 3, seed=9)
    euler, ab2 = (
        integrate(lambda x, t: constant, randn(4, 3), time_grid(7, 3.0), method)
        for method in ("euler", "ab2")
    )
    assert torch.equal(euler, ab2)


def test_ab2_does_not_extend_a_line_across_a_jump() -> None:
    """Of a velocity 1 that is 5 between two times, as guidance in an interval is, every step takes 1 or 5."""
    times = time_grid(10)

    def within(t: float) -> bool:
        return 0.25 <= t <= 0.65

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, 5.0 if within(t) else 1.0)

    def taken(piece: Callable[[float], bool] | None) -> list[float]:
        states = [torch.zeros(1, dtype=torch.float64)]
        integrate(
            velocity, states[0], times, "ab2", lambda done, t, x: states.append(x), piece=piece
        )
        return [(10 * (b - a)).item() for a, b in itertools.pairwise(states)]

    assert taken(within) == pytest.approx([1.0] * 3 + [5.0] * 4 + [1.0] * 3)
    # Unaware of the jumps it takes velocities far beyond either.
    assert (min(taken(None)), max(taken(None))) == pytest.approx((-1.0, 7.0))
    # Within a piece the line is extended as ever: one Euler step at the start of each, then exact.
    line = [
        (b - a).item()
        for a, b in itertools.pairwise(_line_states(times, lambda t: t >= 0.5 - 1e-9))
    ]
    exact = [(b**2 - a**2) / 2 for a, b in itertools.pairwise(times.tolist())]
    begins = (0, 5)
    for k, (ours, theirs) in enumerate(zip(line, exact, strict=True)):
        assert (ours == pytest.approx(theirs, rel=1e-12)) == (k not in begins)


def _line_states(times: Tensor, piece: Callable[[float], bool]) -> list[Tensor]:
    states = [torch.zeros(1, dtype=torch.float64)]
    integrate(
        lambda x, t: torch.full_like(x, t), states[0], times, "ab2",
        lambda done, t, x: states.append(x), piece=piece,
    )  # fmt: skip
    return states


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_of_the_state_can_be_put_in_its_place(method: Method) -> None:
    """project sees every state at its time, and what it returns is gone on from."""
    times = time_grid(3)
    seen: list[tuple[float, float]] = []

    def project(x: Tensor, t: float) -> Tensor:
        seen.append((t, x[0].item()))
        return torch.tensor([10.0 * t, x[1]], dtype=x.dtype)

    states: list[list[float]] = []
    result = integrate(
        lambda x, t: torch.ones_like(x), torch.zeros(2, dtype=torch.float64), times, method,
        lambda done, t, x: states.append(x.tolist()), project,
    )  # fmt: skip
    assert [t for t, _ in seen] == times[1:].tolist()
    assert [x for _, x in seen] == pytest.approx([1 / 3, 11 / 3, 7.0])
    assert result.tolist() == pytest.approx([10.0, 1.0])
    assert [x for x, _ in states] == pytest.approx([10 / 3, 20 / 3, 10.0])


def test_integrate_visits_the_times_and_reports_each_step() -> None:
    asked: list[float] = []
    seen: list[tuple[int, float, Tensor]] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.ones_like(x, dtype=torch.bfloat16)

    x = torch.zeros(2)
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    result = integrate(velocity, x, times, "heun", lambda *step: seen.append(step))
    assert asked == [0.0, 0.25, 0.25, 1.0]
    assert [(done, t, state.tolist()) for done, t, state in seen] == [
        (1, 0.25, [0.25, 0.25]),
        (2, 1.0, [1.0, 1.0]),
    ]
    assert result.dtype == torch.float32  # a bf16 velocity does not degrade the state
    assert x.tolist() == [0.0, 0.0]
    asked.clear()
    integrate(velocity, x, times)
    assert asked == [0.0, 0.25]


@given(steps=st.integers(1, 300), shift=st.floats(0.1, 30))
def test_time_grid(steps: int, shift: float) -> None:
    grid = time_grid(steps, shift)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert grid[0].item() == 0.0
    assert grid[-1].item() == 1.0
    assert bool((grid.diff() > 0).all())
    even = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if shift > 1.0:
        assert bool((grid <= even + 1e-15).all())
    torch.testing.assert_close(time_grid(steps), even, rtol=0, atol=1e-15)


def test_guidance() -> None:
    cond, uncond = randn(5, 2, seed=7), randn(5, 2, seed=8)
    assert torch.equal(guided(cond, uncond, 1.0), cond)
    assert torch.equal(guided(cond, uncond, 0.0), uncond)
    for scale in (0.3, 2.0, 7.5, -1.0):
        expected = uncond + scale * (cond - uncond)
        torch.testing.assert_close(guided(cond, uncond, scale), expected, rtol=1e-13, atol=1e-14)
    low = guided(cond.bfloat16(), uncond.bfloat16(), 7.5)
    exact = guided(cond.bfloat16().double(), uncond.bfloat16().double(), 7.5)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=2.0**-8, atol=1e-5)  # rounded once


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grid(0), "steps is 0"),
        (lambda: time_grid(4, 0.0), "shift is 0.0"),
        (lambda: integrate(torch.add, X, time_grid(2), "rk4"), "method is 'rk4'; allowed are 'euler', 'heun', 'ab2'"),  # type: ignore[arg-type]
        (lambda: integrate(torch.add, X, torch.zeros(1)), r"times has shape \(1,\)"),
        (lambda: integrate(torch.add, X, torch.tensor([0.0, 0.5, 0.5])), "times is"),
        (lambda: integrate(torch.add, X, torch.tensor([0.0, 1.5])), "times is"),
        (lambda: integrate(lambda x, t: x[:1], X, time_grid(2)), r"velocity returned shape"),
        (lambda: guided(X, X[:1], 2.0), r"uncond has shape \(1, 2\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
