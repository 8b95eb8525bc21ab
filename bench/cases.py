"""What is measured: problems and peers, and that a peer is right before it is timed.

A `Problem` is one operator at one size; a `Peer` is one way of computing it. Both are declared in
the operator's own file (`bench/<op>.py`), which ends with a list of peers and a function that lists
the problems. A peer whose result is wrong is written down as wrong, with its error, and not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import batching, harness, timing
from bench.begun import ENDED, lost
from bench.judging import Partition
from bench.judging import Results as Results
from bench.judging import Verdict as Verdict
from bench.judging import judge as judge
from bench.packs import Pack
from bench.refusals import REFUSALS as REFUSALS  # for the benchmarks that judge by these rules
from bench.refusals import refusals
from bench.watch import GONE, Mark, reason, together, unmarked
from goku_kernels import Packing
from goku_kernels._checks import triton_absent

# Up to this many numbers in the inputs the truth is fp64, above it fp32: one fp64 tensor of a 220K
# pack at width 3072 takes 5.4 GB, and autograd keeps several.
FP64_NUMBERS = 2**28


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of one copy of a problem's inputs.

    leaves: floating inputs whose gradients are taken, in the operator's order.
    rest: everything else by name; tensors that are rotated too (packings are the same in all).
    """

    leaves: tuple[Tensor, ...]
    rest: Mapping[str, Any] = field(default_factory=dict)

    def bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [*self.leaves, *(x for x in self.rest.values() if isinstance(x, Tensor))]
        return sum(x.numel() * x.element_size() for x in tensors)

    def cast(self, dtype: torch.dtype | None, gradients: bool) -> Inputs:
        """Copies of the leaves, in `dtype` if it is given, that ask for `gradients` or not."""
        leaves = []
        for x in self.leaves:
            # Strides too: a view of a wider buffer stays as far apart as it was.
            kind = x.dtype if dtype is None else dtype
            copy = torch.empty_strided(x.shape, x.stride(), dtype=kind, device=x.device)
            leaves.append(copy.copy_(x.detach()).requires_grad_(gradients))
        return Inputs(tuple(leaves), self.rest)


Function = Callable[[Inputs], tuple[Tensor, ...]]
# inputs, gradients of the outputs -> what is allowed beside the rule, by name of the result
Floors = Callable[[Inputs, Sequence[Tensor]], Mapping[str, float]]


@dataclass(frozen=True)
class Problem:
    """One operator at one size.

    Attributes:
        operator: stem of the benchmark's file.
        case: model, and what else tells it from another problem on the same pack.
        pack: the packed batch.
        dtype: of the tokens.
        shape: the numbers that decide the work, for the row.
        draw: device, seed -> random inputs (never zeros).
        reference: the operator in plain PyTorch, in the dtype of the leaves.
        work: direction -> FLOPs or bytes.
        unit: "FLOP" or "byte".
        sources: what is measured, for the row.
        directions: "forward" and, where it is differentiable, "backward".
        probe: rows of the first output that are compared, None for all. Gradients are then taken
            from those rows alone, and `reference` returns those rows alone: attention's truth would
            not fit otherwise.
        partitions: where the samples' rows end in every kind of tensor that has rows of samples,
            told apart by their sums; () for the pack's lengths.
        floors: what rounding leaves of results whose terms cancel; None for nothing.
        precision: last place of the arithmetic where that is coarser than the dtype's (TF32), else 0.
        note: said with every row.

    Raises:
        ValueError: two different partitions of one number of rows.
    """

    operator: str
    case: str
    pack: Pack
    dtype: torch.dtype
    shape: Mapping[str, Any]
    draw: Callable[[torch.device, int], Inputs]
    reference: Function
    work: Callable[[str], float]
    unit: str
    sources: Sequence[str]
    directions: Sequence[str] = ("forward", "backward")
    probe: Tensor | None = None
    partitions: tuple[Partition, ...] = ()
    floors: Floors | None = None
    precision: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        distinct = set(self.partitions)
        if len({sum(p) for p in distinct}) != len(distinct):
            raise ValueError(f"{self.case}: partitions {self.partitions} have equal sums")

    @property
    def differentiable(self) -> bool:
        """Whether there is a backward."""
        return "backward" in self.directions


@dataclass(frozen=True)
class Peer:
    """One way of computing an operator, or a part of it.

    Attributes:
        name: as the report shows it; a part says which ("Liger RMSNorm only").
        make: problem, device -> the function; raises Absent with the reason.
        backend: of ours, "" for others' code.
        reference: what a part computes, in plain PyTorch; None for the whole operator.
        work: problem, direction -> FLOPs or bytes of a part; None for the whole operator.
        in_place: writes into its inputs, so it gets its own.

    Raises:
        ValueError: a part without its work, which would be credited with the operator's.
    """

    name: str
    make: Callable[[Problem, torch.device], Function]
    backend: str = ""
    reference: Function | None = None
    work: Callable[[Problem, str], float] | None = None
    in_place: bool = False

    def __post_init__(self) -> None:
        if (self.reference is None) != (self.work is None):
            raise ValueError(f"{self.name}: a part needs both its reference and its work")


def needs_triton(device: torch.device) -> None:
    """Raise Absent unless our Triton kernels run, and not in the interpreter, on `device`."""
    reason = triton_absent(device.type)
    if device.type != "cuda":  # its interpreter could run them, but whose time would that be
        reason = f"it needs a CUDA device, this is {device.type}"
    if reason is not None:
        raise Absent(reason)


def packing(pack: Pack, device: torch.device) -> Packing:
    """The pack's Packing on `device`."""
    return Packing.from_grids(pack.grids, device=device)


def draw_normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """Normal numbers drawn on the generator's device."""
    drawn = torch.randn(*shape, generator=generator, device=generator.device)
    return drawn.mul_(scale).to(dtype)


# ---- right before fast ----


def results(problem: Problem, function: Function, inputs: Inputs, probed: bool) -> Results:
    """Outputs and gradients by name, for one fixed random gradient of the outputs.

    probed: `function` returns all rows, of which `problem.probe` are looked at.
    """
    outs = function(inputs)
    rows = problem.probe if probed else None
    seen = outs if rows is None else (outs[0].index_select(0, rows.to(outs[0].device)), *outs[1:])
    found = {f"output {i}": x.detach() for i, x in enumerate(seen)}
    # Of the rows that are not compared, at least that there are numbers in them.
    found["rows that are no numbers"] = (~outs[0].detach().isfinite()).any()[None].float()
    if not problem.differentiable:
        return found
    gradients = output_gradients(problem, seen)
    grads = torch.autograd.grad(seen, inputs.leaves, gradients, allow_unused=True)
    return found | {f"gradient {i}": g for i, g in enumerate(grads) if g is not None}


def output_gradients(problem: Problem, outs: Sequence[Tensor]) -> list[Tensor]:
    """The fixed random gradient of each output, the same numbers in every dtype."""
    generator = torch.Generator(outs[0].device).manual_seed(1)
    return [
        torch.randn(x.shape, generator=generator, device=x.device).to(problem.dtype).to(x.dtype)
        for x in outs
    ]


class Truths:
    """What is right for one problem: computed once, for the operator and for each part of it."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.inputs = problem, inputs
        numbers = sum(x.numel() for x in inputs.leaves)
        self.dtype = torch.float64 if numbers <= FP64_NUMBERS else torch.float32
        self._known: dict[Function, tuple[Results, Results, Mapping[str, float]]] = {}

    def verdict(self, function: Function, reference: Function) -> Verdict:
        """Judge `function` by `reference`."""
        if reference not in self._known:
            same = results(self.problem, reference, self._inputs(None), probed=False)
            exact = results(self.problem, reference, self._inputs(self.dtype), probed=False)
            self._known[reference] = (same, exact, self._floors(exact))
        same, exact, floors = self._known[reference]
        problem = self.problem
        got = results(problem, function, self._inputs(None), problem.probe is not None)
        partitions = problem.partitions or (problem.pack.lengths,)
        return judge(got, same, exact, partitions, floors=floors, precision=problem.precision)

    def _floors(self, exact: Results) -> Mapping[str, float]:
        if self.problem.floors is None or not self.problem.differentiable:
            return {}
        outs = [x for name, x in exact.items() if name.startswith("output")]
        return self.problem.floors(self.inputs, output_gradients(self.problem, outs))

    def _inputs(self, dtype: torch.dtype | None) -> Inputs:
        return self.inputs.cast(dtype, self.problem.differentiable)


# ---- one problem, all peers ----


def measure(
    problem: Problem, peers: Sequence[Peer], device: torch.device, ceilings: timing.Ceilings,
    *, seconds: float, wanted: Collection[tuple[str, str]] | None = None, mark: Mark = unmarked,
) -> Iterator[harness.Row]:  # fmt: skip
    """Rows of one problem: every peer in every direction, `seconds` of timing a direction.

    They end behind those of a peer that took the device's context along: their extra has ENDED.

    Args:
        wanted: (peer, direction) to measure; None for all.
        mark: told of the rows to write should the process end in what comes next.
    """
    ceiling = ceilings.of(problem.unit)

    def row(peer: Peer, direction: str, **more: Any) -> harness.Row:
        note = more.pop("note", "")
        return harness.Row(
            name=problem.operator, case=problem.case, pack=problem.pack.name,
            shape={**problem.shape, "tokens": problem.pack.tokens,
                   "samples": len(problem.pack.grids)},
            dtype=str(problem.dtype).removeprefix("torch."),
            work=problem.work(direction) if peer.work is None else peer.work(problem, direction),
            ceiling=ceiling, sources=problem.sources,
            peer=peer.name, backend=peer.backend, direction=direction,
            part=peer.reference is not None, note=note or problem.note, **more,
        )  # fmt: skip

    def gone(peer: Peer, directions: Sequence[str], note: str = GONE) -> list[harness.Row]:
        return [row(peer, d, status="failed", note=note, extra={ENDED: True}) for d in directions]

    def asked(peer: Peer, directions: Sequence[str]) -> list[str]:
        return [d for d in directions if wanted is None or (peer.name, d) in wanted]

    first = problem.draw(device, 0)
    truths = Truths(problem, first)
    usable: dict[str, tuple[Peer, Function]] = {}
    for peer in peers:
        directions = asked(peer, problem.directions)
        if not directions:
            continue
        mark(gone(peer, directions))()
        status, note = "measured", ""
        try:
            function = peer.make(problem, device)
            verdict = truths.verdict(function, peer.reference or problem.reference)
            timing.synchronise(device)
        except Absent as why:
            status, note = "absent", str(why)
        except refusals() as error:
            status, note = "failed", reason(error)
            if lost(device):
                yield from gone(peer, directions, note)
                return
        else:
            if verdict.right:
                usable[peer.name] = (peer, function)
                continue
            status, note = "wrong", str(verdict)
        for direction in directions:
            yield row(peer, direction, status=status, note=note)
    del truths
    if not usable:
        return

    count = timing.copies_past_cache(first.bytes(), device)
    gradients = problem.differentiable
    copies = [first.cast(None, gradients)]
    copies += [problem.draw(device, i).cast(None, gradients) for i in range(1, count)]
    del first
    private = {
        name: [x.cast(None, gradients) for x in copies]
        for name, (peer, _) in usable.items()
        if peer.in_place
    }

    def time(calls: Mapping[str, timing.Call]) -> dict[str, batching.Batched]:
        return batching.timed(calls, device, seconds=seconds, copies=count)

    for i, direction in enumerate(problem.directions):
        chosen = {n: peer for n, (peer, _) in usable.items() if asked(peer, [direction])}
        calls = {n: _call(usable[n][1], private.get(n, copies), direction) for n in chosen}
        # Without its forward there is no backward.
        after = {n: asked(peer, problem.directions[i:]) for n, peer in chosen.items()}
        marks = {n: mark(gone(peer, after[n])) for n, peer in chosen.items()}
        found = together(calls, time, marks, device)
        for name, peer in chosen.items():
            if name in found.found:
                each = found.found[name]
                yield row(peer, direction, timing=each.timing, extra={"calls": each.calls})
            elif name == found.lost:
                yield from gone(peer, after[name], found.failed[name])
            elif name in found.failed:
                yield row(peer, direction, status="failed", note=found.failed[name])
        if found.lost:
            return


def _call(function: Function, copies: Sequence[Inputs], direction: str) -> timing.Call:
    """The timed call: the forward that keeps what the backward needs, or the backward alone."""
    if direction == "forward":
        return (lambda i: copies[i], function)

    def prepare(i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
        outs = function(copies[i])
        return outs, copies[i].leaves, [torch.randn_like(x) for x in outs]

    def backward(state: tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]) -> object:
        outs, leaves, gradients = state
        return torch.autograd.grad(outs, leaves, gradients, allow_unused=True)

    return prepare, backward
