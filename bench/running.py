"""Runs operators' benchmarks one problem after the other and writes their rows.

A run can be stopped at any time and taken up again: rows are written after every problem, and with
`resume` a problem whose rows are there, of these sources and this chip, is not measured again unless
a peer of ours was wrong or failed in it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import block, cases, harness, step, timing

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


@dataclass(frozen=True)
class Work:
    """One problem of any benchmark.

    key: (case, pack, dtype) as in its rows.
    peers: names of those that take part.
    measure: gives its rows.
    """

    key: tuple[str, str, str]
    sources: Sequence[str]
    peers: Sequence[str]
    measure: Callable[[timing.Ceilings], Iterator[harness.Row]]


def works(name: str, options: Options) -> Iterator[Work]:
    """All problems of benchmark `name` that `options` ask for."""
    kind = options.device.type
    if name == block.OPERATOR:
        for setting, peers_of in block.passes(kind):
            names = options.chosen(peers_of)
            if options.wants(setting.preset, setting.pack.name, setting.dtype):
                key = (setting.preset, setting.pack.name, setting.dtype)
                yield Work(key, block.SOURCES, names, partial(_block, setting, names, options))
        return
    if name == step.OPERATOR:
        truths: dict[tuple[str, str], step.Truth] = {}
        for one in step.settings(kind):
            if options.wants(one.preset, one.pack.name, block.MIXED) and options.chosen([one.name]):
                key = (one.preset, one.pack.name, block.MIXED)
                work = partial(_step, one, truths, options)
                yield Work(key, step.SOURCES, [one.name], work)
        return
    module = importlib.import_module(f"bench.{name}")
    peers = [p for p in module.PEERS if options.chosen([p.name])]
    for problem in module.problems(kind):
        dtype = str(problem.dtype).removeprefix("torch.")
        if options.wants(problem.case, problem.pack.name, dtype):
            key = (problem.case, problem.pack.name, dtype)
            names = [p.name for p in peers]
            yield Work(key, problem.sources, names, partial(_problem, problem, peers, options))


def _block(
    setting: block.Setting, names: Sequence[str], options: Options, ceilings: timing.Ceilings
) -> Iterator[harness.Row]:
    return block.measure(
        setting, names, options.device, ceilings, seconds=options.seconds,
        records=harness.read(options.out),
    )  # fmt: skip


def _step(
    setting: step.Setting, truths: dict[tuple[str, str], step.Truth], options: Options,
    ceilings: timing.Ceilings,
) -> Iterator[harness.Row]:  # fmt: skip
    yield step.measure(
        setting, options.device, ceilings, seconds=options.seconds,
        records=harness.read(options.out), truths=truths,
    )  # fmt: skip


def _problem(
    problem: cases.Problem, peers: Sequence[cases.Peer], options: Options,
    ceilings: timing.Ceilings,
) -> Iterator[harness.Row]:  # fmt: skip
    return cases.measure(problem, peers, options.device, ceilings, seconds=options.seconds)


def run(name: str, options: Options, say: Callable[[str], None] = print) -> bool:
    """Measure benchmark `name`; False if a peer of ours was wrong or failed, or time ran out."""
    began = time.monotonic()
    todo = [work for work in works(name, options) if work.peers]
    said: set[str] = set()
    done = measured(options.out, options.device) if options.resume else {}
    good, ceilings, last_case = True, None, ""
    for work in todo:
        known = done.get((name, *work.key), {})
        if {known.get(peer) for peer in work.peers} == {_hash(work.sources)}:
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
        rows = list(work.measure(ceilings))
        for record in harness.write(rows, options.device, options.out):
            if record["status"] != "absent":
                say(harness.describe(record))
            elif record["peer"] not in said:  # once, not for every problem
                said.add(record["peer"])
                say(f"{name}: {record['peer']} is absent: {record['note']}")
            good = good and not is_bad(record)
    return good


def is_bad(record: Mapping[str, Any]) -> bool:
    """Whether a peer of ours was wrong or failed."""
    return bool(record["backend"]) and record["status"] in ("wrong", "failed")


def measured(folder: Path, device: torch.device) -> dict[tuple[str, ...], dict[str, str]]:
    """(name, case, pack, dtype) -> peer -> hash of the sources of its newest row on this chip.

    The hash is "" where that row is bad: a mistake of ours is measured again, and told again, until
    it is mended.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    chip = harness.hardware(device)["device"]
    records: Sequence[Mapping[str, Any]] = harness.read(folder)
    for record in records:
        if record["hardware"]["device"] == chip and record["device_type"] == device.type:
            key = tuple(record[k] for k in ("name", "case", "pack", "dtype"))
            digest = "" if is_bad(record) else record["sources_sha256"]
            found.setdefault(key, {})[record["peer"]] = digest
    return found


def _hash(sources: Sequence[str]) -> str:
    return harness.source_hash(sources)
