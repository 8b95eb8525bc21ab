"""What tests/gpu checks of every operator, on any device and backend.

The same code runs on a CPU with the reference at small sizes (tests/bench), so that a check is not
met for the first time where it costs a GPU's time. Every check raises AssertionError.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import timing
from bench.cases import Function, Inputs, Problem, Results, Truths, results

Maker = Callable[[str], Function]  # backend -> the operator


def fits(problem: Problem, function: Function, device: torch.device) -> None:
    """Outputs and every gradient obey FlashAttention's rule, sample by sample."""
    all_fit(problem, [function], device)


def all_fit(problem: Problem, functions: Sequence[Function], device: torch.device) -> None:
    """As `fits`, for several ways of computing one operator: the truth, which costs most, is found once."""
    truths = Truths(problem, problem.draw(device, 0))
    for i, function in enumerate(functions):
        verdict = truths.verdict(function, problem.reference)
        assert verdict.right, (
            f"{problem.operator} {problem.case} {problem.pack.name} {i}: {verdict}"
        )


def deterministic(problem: Problem, function: Function, device: torch.device, runs: int) -> None:
    """`runs` runs on the same inputs give the same bits, gradients included."""
    inputs = problem.draw(device, 0).cast(None, problem.differentiable)
    probe_free = dataclasses.replace(problem, probe=None)
    first = results(probe_free, function, inputs, probed=False)
    for i in range(1, runs):
        again = results(probe_free, function, inputs, probed=False)
        for name, x in first.items():
            assert torch.equal(x, again[name]), f"{problem.operator} {name}: run {i} differs"


def far_rows(
    problem: Problem, small: Problem, function: Function, device: torch.device, past: int = 2**31
) -> None:
    """The last sample of a huge pack gets what it gets alone: offsets beyond int32 are right.

    Args:
        problem: some tensor of its tokens has an element offset past `past`.
        small: the same with the last sample alone.
        function: the operator.
        device: to run on.
        past: the offset; tests on a CPU lower it.
    """
    assert problem.pack.grids[-1] == small.pack.grids[0]
    assert len(small.pack.grids) == 1
    inputs = problem.draw(device, 0).cast(None, problem.differentiable)
    reach = max(x.stride(0) * (x.shape[0] - 1) for x in inputs.leaves)
    assert reach > past, f"the last row lies at element {reach}"
    alone = last_sample(problem, inputs, small.draw(device, 0))
    tail = small.pack.tokens
    free = [dataclasses.replace(p, probe=None) for p in (problem, small)]
    huge = _with_gradients(free[0], function, inputs, tail)
    near = _with_gradients(free[1], function, alone, tail)
    for name, want in near.items():
        # The same numbers on the same chip; one rounding for another order of summation, and 8 where
        # the sum is over the sample's tokens, whose partial sums round as they grow.
        error = (huge[name].float() - want.float()).abs().max()
        roundings = 1 if want.dim() and want.shape[0] == tail else 8
        allowed = roundings * torch.finfo(want.dtype).eps * want.float().abs().max()
        assert error <= allowed, f"{problem.operator} {name}: off by {error}, allowed {allowed}"


def last_sample(problem: Problem, inputs: Inputs, small: Inputs) -> Inputs:
    """Inputs of the last sample alone: its rows of everything that has one a token or a sample.

    Offsets are `small`'s. Widths must be neither the number of tokens nor that of samples.
    """

    def part(x: Tensor) -> Tensor:
        return _last_rows(problem, x)

    leaves = tuple(part(x).detach().requires_grad_(problem.differentiable) for x in inputs.leaves)
    rest = dict(small.rest)
    for name, x in inputs.rest.items():
        if isinstance(x, Tensor) and not name.startswith("cu_seqlens"):
            rest[name] = part(x)
    return Inputs(leaves, rest)


def _last_rows(problem: Problem, x: Tensor) -> Tensor:
    """The last sample's rows of x, or all of it where x has rows of neither tokens nor samples."""
    rows = {len(problem.pack.grids): 1, problem.pack.tokens: problem.pack.lengths[-1]}
    return x[-rows[x.shape[0]] :] if x.shape[0] in rows else x


def _with_gradients(problem: Problem, function: Function, inputs: Inputs, tail: int) -> Results:
    """The last `tail` rows of the outputs, and gradients where those rows alone have one.

    Of gradients with a row for every token or sample the last sample's; weights' whole, since no
    other row adds to them.
    """
    outs = function(inputs)
    rows = {f"output {i}": x.detach()[-tail:] for i, x in enumerate(outs) if x.dim()}
    if not problem.differentiable:
        return rows
    gradients = []
    for x in outs:
        generator = torch.Generator(x.device).manual_seed(1)
        if x.dim() == 0:
            gradients.append(torch.ones_like(x))
            continue
        full = torch.zeros_like(x)
        full[-tail:] = torch.randn(full[-tail:].shape, generator=generator, device=x.device)
        gradients.append(full)
    grads = torch.autograd.grad(outs, inputs.leaves, gradients, allow_unused=True)
    for i, grad in enumerate(grads):
        if grad is not None:
            rows[f"gradient {i}"] = _last_rows(problem, grad)
    return rows


def shard(problem: Problem, padding: int = 5) -> Problem:
    """The second half of the rows, as a rank of a sequence-parallel group has them, and padding.

    The first row is inside a sample, whose beginning is another rank's. The padding rows behind the
    last sample are NaN, which no result may show.

    Args:
        problem: one whose function passes inputs.rest["options"] to the operator.
        padding: how many such rows.
    """
    tokens = problem.pack.tokens
    starts = [0, *itertools.accumulate(problem.pack.lengths)]
    first = next(row for row in range(tokens // 2, tokens) if row not in starts)

    def part(x: Tensor) -> Tensor:
        if x.shape[0] != tokens:
            return x
        return torch.cat((x[first:], x.new_full((padding, *x.shape[1:]), float("nan"))))

    def draw(device: torch.device, seed: int) -> Inputs:
        inputs = problem.draw(device, seed)
        rest = {
            name: part(x) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.rest.items()
        }
        options = {**inputs.rest.get("options", {}), "token_offset": first}
        return Inputs(tuple(part(x) for x in inputs.leaves), {**rest, "options": options})

    mine = tuple(max(0, b - max(a, first)) for a, b in itertools.pairwise(starts))
    return dataclasses.replace(
        problem, case=f"{problem.case}, shard", draw=draw, partitions=((*mine, padding),)
    )


def replays(
    first: Problem, second: Problem, function: Function, device: torch.device, within: float = 0.0
) -> None:
    """A CUDA graph captured on one pack computes another of as many tokens and samples.

    within: what results may differ by, as a share of the largest; 0 asks for the same bits.

    `second` has the cu_seqlens of fewer samples, padded by repeating the end. On a CPU, which has
    no graphs, the function is called on the changed tensors.
    """
    assert first.pack.tokens == second.pack.tokens
    assert len(first.pack.grids) == len(second.pack.grids)
    free = [dataclasses.replace(p, probe=None) for p in (first, second)]
    static = _bounded(free[0], free[0].draw(device, 0).cast(None, first.differentiable))
    other = _bounded(free[1], free[1].draw(device, 1).cast(None, first.differentiable))

    if device.type == "cuda":
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                _fixed_gradients(free[0], function, static)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _fixed_gradients(free[0], function, static)
        _overwrite(static, other)
        graph.replay()
        timing.synchronise(device)
    else:
        _overwrite(static, other)
        captured = _fixed_gradients(free[0], function, static)
    for name, want in _fixed_gradients(free[1], function, other).items():
        off = (captured[name].double() - want.double()).abs().max() / want.double().abs().max()
        same = torch.equal(captured[name], want) if within == 0 else bool(off <= within)
        assert same, f"{first.operator} {name} differs in the replay, by {off:.2e} of its largest"


def _fixed_gradients(problem: Problem, function: Function, inputs: Inputs) -> Results:
    """Outputs and gradients for gradients made without a generator, which a graph would hold."""
    outs = function(inputs)
    found = {f"output {i}": x.detach() for i, x in enumerate(outs)}
    if problem.differentiable:
        gradients = [
            torch.arange(x.numel(), device=x.device)
            .reshape(x.shape)
            .remainder(7)
            .sub(3)
            .to(x.dtype)
            for x in outs
        ]
        grads = torch.autograd.grad(outs, inputs.leaves, gradients, allow_unused=True)
        found |= {f"gradient {i}": g for i, g in enumerate(grads) if g is not None}
    return found


def _bounded(problem: Problem, inputs: Inputs) -> Inputs:
    """Bounds of lengths that hold for any pack of as many tokens: a graph keeps them for good."""
    bounds = {name: problem.pack.tokens for name in inputs.rest if name.startswith("max_seqlen")}
    return Inputs(inputs.leaves, {**inputs.rest, **bounds})


def _overwrite(static: Inputs, other: Inputs) -> None:
    with torch.no_grad():
        for x, y in zip(static.leaves, other.leaves, strict=True):
            x.copy_(y)
        for name, x in static.rest.items():
            if isinstance(x, Tensor):
                x.copy_(other.rest[name])


def does_not_wait(problem: Problem, function: Function, device: torch.device) -> None:
    """Forward and backward enqueue their work without waiting for the device (CUDA alone)."""
    inputs = problem.draw(device, 0).cast(None, problem.differentiable)
    free = dataclasses.replace(problem, probe=None)
    _fixed_gradients(free, function, inputs)  # compiles
    if device.type != "cuda":
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _fixed_gradients(free, function, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def all_of(
    problems: Sequence[Problem], maker: Maker, device: torch.device, backend: str, runs: int
) -> None:
    """Rule, determinism and no waiting for each of the problems."""
    for problem in problems:
        fits(problem, maker(backend), device)
        deterministic(problem, maker(backend), device, runs)
        does_not_wait(problem, maker(backend), device)
