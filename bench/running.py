"""Runs operators' benchmarks one problem after the other and writes their rows.

A run can be stopped at any time and taken up again: rows are written as they come, and with `resume`
what has a row of these sources and this chip is not measured again, unless it is ours and was wrong
or failed. What ended a process, or took the device's context along, is told and passed over until the
sources change; where the context alone is lost, the command runs itself again from there.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import begun, block, cases, harness, step, timing
from bench.watch import Mark, Watch

OPERATORS = (
    "qk_norm_rope", "adaln_modulate", "gated_residual_adaln", "varlen_attention",
    "rectified_flow_noise", "velocity_loss",
)  # fmt: skip
BENCHMARKS = (*OPERATORS, block.OPERATOR, step.OPERATOR)


@dataclass(frozen=True)
class Options:
    """What to measure and how.

    device: to measure on.
    out: folder of results.
    seconds: of timing for one problem in one direction, all peers together.
    only: parts of cases' and packs' names; () for all.
    peers: parts of peers' names; () for all.
    resume: leave out what has been measured.
    limit: seconds after which no further problem is begun.
    """

    device: torch.device
    out: Path
    seconds: float = 1.0
    only: Sequence[str] = ()
    peers: Sequence[str] = ()
    resume: bool = False
    limit: float = float("inf")

    def wants(self, *names: str) -> bool:
        """Whether every part asked for is in one of `names`."""
        return all(any(part in name for name in names) for part in self.only)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Those of the peers `names` that are asked for."""
        return [n for n in names if not self.peers or any(part in n for part in self.peers)]


Pair = tuple[str, str]  # peer, direction


@dataclass(frozen=True)
class Work:
    """One problem of any benchmark.

    key: (case, pack, dtype) as in its rows.
    peers: names of those that take part.
    directions: in which they are measured, in this order.
    measure: gives the rows of some (peer, direction), telling `Mark` what it begins.
    """

    key: tuple[str, str, str]
    sources: Sequence[str]
    peers: Sequence[str]
    directions: Sequence[str]
    measure: Callable[[timing.Ceilings, Collection[Pair], Mark], Iterator[harness.Row]]

    @property
    def pairs(self) -> list[Pair]:
        """Everything that there is to measure."""
        return [(peer, direction) for direction in self.directions for peer in self.peers]

    def wanted(self, settled: Mapping[Pair, Mapping[str, Any]]) -> list[Pair]:
        """What is to be measured where some have rows already.

        Those that can be timed are timed again beside a new one, in the directions that lack one.
        """
        lacking = {pair[1] for pair in self.pairs if pair not in settled}
        return [
            pair
            for pair in self.pairs
            if pair[1] in lacking and (pair not in settled or settled[pair]["status"] == "measured")
        ]


def works(name: str, options: Options) -> Iterator[Work]:
    """All problems of benchmark `name` that `options` ask for."""
    kind = options.device.type
    if name == block.OPERATOR:
        for setting, peers_of in block.passes(kind):
            names = options.chosen(peers_of)
            if options.wants(setting.preset, setting.pack.name, setting.dtype):
                key = (setting.preset, setting.pack.name, setting.dtype)
                measure = partial(_block, setting, options)
                yield Work(key, block.SOURCES, names, ("forward+backward",), measure)
        return
    if name == step.OPERATOR:
        truths: dict[tuple[str, str], step.Truth] = {}
        for one in step.settings(kind):
            if options.wants(one.preset, one.pack.name, block.MIXED) and options.chosen([one.name]):
                key = (one.preset, one.pack.name, block.MIXED)
                measure = partial(_step, one, truths, options)
                yield Work(key, step.SOURCES, [one.name], ("step",), measure)
        return
    module = importlib.import_module(f"bench.{name}")
    peers = [p for p in module.PEERS if options.chosen([p.name])]
    for problem in module.problems(kind):
        dtype = str(problem.dtype).removeprefix("torch.")
        if options.wants(problem.case, problem.pack.name, dtype):
            key = (problem.case, problem.pack.name, dtype)
            names = [p.name for p in peers]
            measure = partial(_problem, problem, peers, options)
            yield Work(key, problem.sources, names, problem.directions, measure)


def _block(
    setting: block.Setting, options: Options, ceilings: timing.Ceilings, wanted: Collection[Pair],
    mark: Mark,
) -> Iterator[harness.Row]:  # fmt: skip
    return block.measure(
        setting, [peer for peer, _ in wanted], options.device, ceilings, seconds=options.seconds,
        records=harness.read(options.out), mark=mark,
    )  # fmt: skip


def _step(
    setting: step.Setting, truths: dict[tuple[str, str], step.Truth], options: Options,
    ceilings: timing.Ceilings, wanted: Collection[Pair], mark: Mark,
) -> Iterator[harness.Row]:  # fmt: skip
    yield step.measure(
        setting, options.device, ceilings, seconds=options.seconds,
        records=harness.read(options.out), truths=truths, mark=mark,
    )  # fmt: skip


def _problem(
    problem: cases.Problem, peers: Sequence[cases.Peer], options: Options,
    ceilings: timing.Ceilings, wanted: Collection[Pair], mark: Mark,
) -> Iterator[harness.Row]:  # fmt: skip
    return cases.measure(
        problem, peers, options.device, ceilings, seconds=options.seconds, wanted=wanted, mark=mark
    )


def run(name: str, options: Options, say: Callable[[str], None] = print) -> bool:
    """Measure benchmark `name`; False if a peer of ours was wrong or failed, or time ran out.

    Raises:
        begun.ContextLost: a peer took the device's context along, and this process is no
            `python -m bench`, which would have run itself again.
    """
    began = time.monotonic()
    start = begun.Start.of(options.resume)
    watch = Watch(name, options.out, options.device, time.time() + options.limit)
    watch.recover(say)
    todo = [work for work in works(name, options) if work.peers]
    said: set[str] = set()
    done = measured(options.out, options.device)
    # Rows of this run without a time: a later pass over the same problem leaves them out.
    untimed: dict[tuple[str, str, str], dict[Pair, Mapping[str, Any]]] = {}
    good, ceilings, last_case = True, None, ""
    for work in todo:
        settled = _settled(done.get((name, *work.key), {}), work, start)
        for record in settled.values():
            if is_bad(record):
                say(f"passed over: {harness.describe(record)}")
                good = False
        wanted = work.wanted(settled | untimed.get(work.key, {}))
        if not wanted:
            continue
        if time.monotonic() - began > options.limit:
            say(f"{name}: stopped after {options.limit:.0f} s; --resume goes on from here")
            return False
        if ceilings is None:
            ceilings = timing.measure_ceilings(options.device, min(1.0, options.seconds))
        if work.key[0] != last_case:
            # Widths are compiled as constants; those of the case before would count as variants.
            torch.compiler.reset()
            last_case = work.key[0]
        watch.forget()
        lost = ""
        for row in work.measure(ceilings, wanted, watch.mark):
            record = watch.write(row)
            if record["status"] != "absent":
                say(harness.describe(record))
            elif record["peer"] not in said:  # once, not for every problem
                said.add(record["peer"])
                say(f"{name}: {record['peer']} is absent: {record['note']}")
            good = good and not is_bad(record)
            if record["status"] != "measured":
                pair = (record["peer"], record["direction"])
                untimed.setdefault(work.key, {})[pair] = record
            if record["extra"].get(begun.ENDED):
                lost = f"{record['peer']}: {record['note']}"
        watch.begun.clear()
        if lost:
            say(f"{name}: the device's context is lost; the command runs itself again")
            begun.restart(options.limit - (time.monotonic() - began), start)
            raise begun.ContextLost(lost)
    return good


def is_bad(record: Mapping[str, Any]) -> bool:
    """Whether a peer of ours was wrong or failed."""
    return bool(record["backend"]) and record["status"] in ("wrong", "failed")


def measured(
    folder: Path, device: torch.device
) -> dict[tuple[str, ...], dict[Pair, Mapping[str, Any]]]:
    """(name, case, pack, dtype) -> (peer, direction) -> its newest row on this chip."""
    found: dict[tuple[str, ...], dict[Pair, Mapping[str, Any]]] = {}
    chip = harness.hardware(device)["device"]
    records: Sequence[Mapping[str, Any]] = harness.read(folder)
    for record in records:
        if record["hardware"]["device"] == chip and record["device_type"] == device.type:
            key = tuple(record[k] for k in ("name", "case", "pack", "dtype"))
            found.setdefault(key, {})[record["peer"], record["direction"]] = record
    return found


def _settled(
    known: Mapping[Pair, Mapping[str, Any]], work: Work, start: begun.Start
) -> dict[Pair, Mapping[str, Any]]:
    """Rows of `work` that this command does not measure again.

    Its own from before it ran itself again, and with --resume all of these sources but a mistake of
    ours: that is measured again, and told again, until it is mended, but where it ended a process.
    """
    digest = _hash(work.sources)

    def settled(record: Mapping[str, Any]) -> bool:
        if record["sources_sha256"] != digest:
            return False
        own = start.since is not None and record["measured_at"] >= start.since
        return own or (
            start.resume and (not is_bad(record) or bool(record["extra"].get(begun.ENDED)))
        )

    return {pair: known[pair] for pair in work.pairs if pair in known and settled(known[pair])}


def _hash(sources: Sequence[str]) -> str:
    return harness.source_hash(sources)
