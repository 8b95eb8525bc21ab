"""Times configurations of a kernel against each other on the GPU at hand.

All of a row's candidates run in rounds, as peers do (timing.py), on inputs that are drawn once; the
slower half leaves after each stage, so that most of the time goes to those that may win. Whether a
result is right is judged by a truth that is computed once per problem, and only of who won.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench import cases, timing
from bench.ahead import overridden, with_config, with_use
from bench.begun import ContextLost, lost
from bench.candidates import Config, Row, direction, options
from bench.packs import GPU_PACKS, Pack
from bench.watch import reason, together

ROUNDS = (5, 10, 20)  # of each stage
GAIN = 0.99  # the winner has to take less than this share of what the shipped one takes
CLOSE = 1.02  # nobody leaves who is this close to the best
# One sample and many. Attention's work grows with the square of a sample: on 64K tokens of one clip
# a call takes a tenth of a second, and tiles compare on 16K as they do there.
JUDGED_ON = ("64K, one clip", "64K, many images")
JUDGED_SHORT = ("16K, one clip", "64K, many images")

# Names of candidates, rounds -> milliseconds of a call; infinite where it fails
Clock = Callable[[Sequence[int], int], Mapping[int, float]]


@dataclass
class Outcome:
    """Of one row. order: candidates that may be taken, best first. ms, rounds: of each candidate,
    from the last stage that it was in. failed: why some could not run."""

    order: list[int] = field(default_factory=list)
    ms: dict[int, float] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def contest(
    names: Sequence[int], clock: Clock, *, first: int, stages: Sequence[int] = ROUNDS,
    enough: Callable[[], bool] = lambda: False,
) -> Outcome:  # fmt: skip
    """Successive halving. `first`, the one to beat, is in every stage.

    enough: asked before every stage but the first; what is known by then decides if it is true.
    """
    out = Outcome()
    alive = list(names)
    for stage, rounds in enumerate(stages):
        if not alive or (stage and (len(alive) == 1 or enough())):
            break
        times = clock(alive, rounds)
        alive = [name for name in alive if times[name] < math.inf]
        for name in alive:
            out.ms[name], out.rounds[name] = times[name], rounds
        if not alive:
            out.order = []
            break
        ranked = sorted(alive, key=lambda name: times[name])
        out.order = ranked
        half = ranked[: max(2, math.ceil(len(ranked) / 2))]
        close = [n for n in ranked if times[n] <= CLOSE * times[ranked[0]]]
        # Of many that are equally good, the later stages need not take all.
        alive = list(dict.fromkeys([*half, *close[: len(half) + 2]]))
        if first in ranked and first not in alive:
            alive.append(first)
    if first in out.order and out.ms[out.order[0]] >= GAIN * out.ms[first]:
        out.order = [first, *(n for n in out.order if n != first)]
    return out


def packs(op: str) -> list[Pack]:
    """What configurations of an operator are judged on."""
    names = JUDGED_SHORT if op == "varlen_attention" else JUDGED_ON
    return [pack for pack in GPU_PACKS if pack.name in names]


class Stand:
    """One problem on a device: inputs, truth and kept forwards, shared by all configurations."""

    def __init__(self, problem: cases.Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        first = problem.draw(device, 0)
        self.truths: cases.Truths | None = None
        count = timing.copies_past_cache(first.bytes(), device)
        self.first = first
        self.copies = [first.cast(None, problem.differentiable)]
        self.copies += [
            problem.draw(device, i).cast(None, problem.differentiable) for i in range(1, count)
        ]
        self._kept: dict[tuple[int, str], Any] = {}

    def verdict(self, run: cases.Function) -> cases.Verdict:
        """Whether `run`, with the configurations of now, is right."""
        if self.truths is None:
            self.truths = cases.Truths(self.problem, self.first)
        return self.truths.verdict(run, self.problem.reference)

    def call(
        self, way: str, run: cases.Function, tag: str, around: Callable[[], Any]
    ) -> timing.Call:  # fmt: skip
        """The forward, or the backward alone, within the context that around() gives.

        tag: of `run`, by which its forward is known again.
        """
        if way == "forward":

            def forward(inputs: cases.Inputs) -> object:
                with around():
                    return run(inputs)

            return (lambda i: self.copies[i], forward)

        def backward(state: Any) -> object:
            outs, leaves, gradients = state
            with around():
                return torch.autograd.grad(
                    outs, leaves, gradients, retain_graph=True, allow_unused=True
                )

        return partial(self._forward_of, run, tag), backward

    def _forward_of(self, run: cases.Function, tag: str, i: int) -> Any:
        """One forward of a copy, kept: no configuration of a backward changes it."""
        if (i, tag) not in self._kept:
            outs = run(self.copies[i])
            gradients = [torch.randn_like(x) for x in outs]
            self._kept[i, tag] = (outs, self.copies[i].leaves, gradients)
        return self._kept[i, tag]


@dataclass
class Trials:
    """Contests of an operator's rows on one device; keeps the stands of one width and dtype."""

    op: str
    device: torch.device
    say: Callable[[str], None] = print
    _stands: tuple[object, list[Stand]] = ((), [])

    def stands(self, size: int, dtype: str) -> list[Stand]:
        """The problems that rows of this size and dtype are judged on."""
        key = (size, dtype)
        if self._stands[0] != key:
            self._stands = ((), [])  # the memory first
            module = importlib.import_module(f"bench.{self.op}")
            if dtype == "float32":
                torch.set_float32_matmul_precision("high")  # attention takes fp32 only so
            problems = [module.tuning(size, getattr(torch, dtype), p) for p in packs(self.op)]
            self._stands = (key, [Stand(p, self.device) for p in problems])
        return self._stands[1]

    def row(
        self, rows: Sequence[Row], row: Row, size: int, dtype: str, configs: Sequence[Config], *,
        enough: Callable[[], bool] = lambda: False,
        begun: Callable[[Config], None] = lambda config: None,
    ) -> Outcome:  # fmt: skip
        """Of `configs` for `row`, the first of which it has, those that may be taken, best first.

        The winner is right; who was before it in speed and wrong is in `failed`.

        begun: told of every configuration before it runs.

        Raises:
            ContextLost: the configuration that began last took the device's context along.
        """
        tables = [with_config(rows, row, config) for config in configs]
        marks = [partial(begun, config) for config in configs]
        return self._best(row, size, dtype, tables, marks, first=0, enough=enough)

    def rivals(
        self, rows: Sequence[Row], row: Row, size: int, dtype: str, *,
        begun: Callable[[Config], None] = lambda config: None,
    ) -> Outcome:  # fmt: skip
        """Of running without `row`'s kernel (0) and with it (1) those that may be, better first.

        What the row says now stays unless the other is faster by a gain; else as `row`.
        """
        tables = [with_use(rows, row, used) for used in (False, True)]
        marks: list[Callable[[], None]] = [lambda: begun({}), lambda: begun(dict(row["config"]))]
        return self._best(row, size, dtype, tables, marks, first=0 if row.get("unused") else 1)

    def _best(
        self, row: Row, size: int, dtype: str, tables: Sequence[Sequence[Row]],
        marks: Sequence[Callable[[], None]], *, first: int,
        enough: Callable[[], bool] = lambda: False,
    ) -> Outcome:  # fmt: skip
        """Of `tables` of the operator's rows those that may be taken, best first."""
        stands = self.stands(size, dtype)
        way = direction(row["kernel"])
        if way not in stands[0].problem.directions:
            way = stands[0].problem.directions[0]
        asked = options(self.op, row["kernel"])
        module = importlib.import_module(f"bench.{self.op}")
        function: cases.Function = module.function("triton", **asked)
        calls = [
            [
                stand.call(way, function, str(asked), partial(overridden, self.op, table))
                for table in tables
            ]
            for stand in stands
        ]  # by stand and table
        failed: dict[int, str] = {}

        def failure(error: Exception) -> str:
            if lost(self.device):
                raise ContextLost(reason(error)) from error
            return reason(error)[:200]

        for i, mark in enumerate(marks):
            mark()
            try:
                for stand in calls:
                    prepare, run = stand[i]
                    run(prepare(0))
                timing.synchronise(self.device)
            except cases.REFUSALS as error:
                failed[i] = failure(error)

        def clock(names: Sequence[int], rounds: int) -> dict[int, float]:
            logs = dict.fromkeys(names, 0.0)
            for stand, each in zip(stands, calls, strict=True):
                measure = partial(
                    timing.interleaved, device=self.device, seconds=0.0, warm_up=1,
                    min_rounds=rounds, copies=len(stand.copies),
                )  # fmt: skip
                found = together(
                    {str(n): each[n] for n in names if n not in failed}, measure,
                    {str(n): marks[n] for n in names}, self.device,
                )  # fmt: skip
                if found.lost:
                    raise ContextLost(found.failed[found.lost])
                failed.update({int(n): why for n, why in found.failed.items()})
                for n in names:
                    if n not in failed:
                        logs[n] += math.log(found.found[str(n)].median_ms) / len(stands)
            return {n: math.inf if n in failed else math.exp(x) for n, x in logs.items()}

        able = [i for i in range(len(tables)) if i not in failed]
        out = contest(able, clock, first=first, enough=enough)
        while out.order:
            marks[out.order[0]]()
            try:
                wrong = self._wrong(stands, function, tables[out.order[0]])
            except cases.REFUSALS as error:
                wrong = failure(error)
            if wrong is None:
                break
            failed[out.order.pop(0)] = wrong
        out.failed |= failed
        return out

    def _wrong(
        self, stands: Sequence[Stand], run: cases.Function, table: Sequence[Row]
    ) -> str | None:
        with overridden(self.op, table):
            for stand in stands:
                verdict = stand.verdict(run)
                if not verdict.right:
                    return f"wrong on {stand.problem.pack.name}: {verdict}"[:200]
        return None
