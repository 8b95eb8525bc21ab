"""Measures launch configurations of an operator's kernels for the GPU at hand.

Rows of kernels/goku_kernels/triton/configs/<op>.json are improved one after the other by coordinate
descent: every number of a configuration is tried at its neighbours (powers of two halved and
doubled, counts one more and one less, flags turned), and the best is the next start, until none is
better by more than noise. A candidate that gives wrong results or does not compile or fit is passed over.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases, harness, timing
from bench.packs import GPU_PACKS
from goku_kernels.triton import configs

Row = Mapping[str, Any]
Config = Mapping[str, int]
# Milliseconds of a candidate, None if it cannot be used.
Measure = Callable[[Row, Config], float | None]

FOLDER = harness.ROOT / "kernels" / "goku_kernels" / "triton" / "configs"
GAIN = 0.99  # a candidate has to take less than this share of the best so far
MAX_CANDIDATES = 60  # of one row
# Numbers that are 0 or 1; that go up by one; and the ends of those that have others than 1 and
# _LARGEST. Everything else goes by powers of two.
_FLAGS = ("tma", "specialise", "together")
_COUNTED = ("num_stages", "stages", "programs")
_BOUNDS = {"num_warps": (1, 16), "num_stages": (1, 6), "stages": (1, 6), "programs": (1, 32)}
_LARGEST = 1024
_JUDGED_ON = ("64K, one clip", "64K, many images")


@contextlib.contextmanager
def overridden(op: str, rows: Sequence[Row]) -> Iterator[None]:
    """Within it, operator `op` takes its configurations from `rows`."""
    shipped = configs.table

    def table(name: str) -> tuple[Row, ...]:
        return tuple(rows) if name == op else shipped(name)

    configs.table = table  # type: ignore[assignment]
    try:
        yield
    finally:
        configs.table = shipped


def neighbours(config: Config) -> Iterator[dict[str, int]]:
    """Configurations that differ from `config` in one number by one step, or in some flags.

    With flags, the warps too: warp specialisation wants 4 where the plain path wants 8.
    """
    for key, value in config.items():
        if key in _FLAGS:
            continue
        low, high = _BOUNDS.get(key, (1, _LARGEST))
        if key in _COUNTED:
            steps = [value - 1, value + 1]
        else:
            steps = [value // 2, value * 2] if value & (value - 1) == 0 else []
        for step in steps:
            if low <= step <= high:
                yield {**config, key: step}
    flags = [key for key in config if key in _FLAGS]
    for values in itertools.product((0, 1), repeat=len(flags)):
        chosen = dict(zip(flags, values, strict=True))
        if any(config[key] != value for key, value in chosen.items()):
            for warps in {config.get("num_warps"), 4, 8} if "num_warps" in config else {None}:
                yield {**config, **chosen, **({} if warps is None else {"num_warps": warps})}


def improve(row: Row, measure: Measure, say: Callable[[str], None] = print) -> Row:
    """`row` with the best configuration found from its own on.

    Raises:
        ValueError: its own configuration cannot be used.
    """
    best = dict(row["config"])
    first = measure(row, best)
    what = f"{row['kernel']} at {row['size']}"
    if first is None:
        raise ValueError(f"{what}: the configuration there is, {best}, cannot be used")
    best_ms, known = first, {_key(best): first}
    while True:
        found = None
        for candidate in neighbours(best):
            if _key(candidate) in known or len(known) >= MAX_CANDIDATES:
                continue
            ms = measure(row, candidate)
            known[_key(candidate)] = math.inf if ms is None else ms
            if ms is not None and ms < GAIN * best_ms and (found is None or ms < found[0]):
                found = (ms, candidate)
        if found is None:
            break
        best_ms, best = found
    say(f"{what}: {first:.4f} -> {best_ms:.4f} ms after {len(known)} candidates: {best}")
    return {**row, "config": best}


def tune(
    rows: list[Row], chip: int, kernels: Sequence[str], measure: Measure,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Improve, in place, the `rows` of `chip` (and of `kernels`, where given), one after the other.

    Raises:
        ValueError: no row is of this chip and these kernels, or one cannot be used as it is.
    """
    mine = [
        i
        for i, row in enumerate(rows)
        if row["chip"] == chip and (not kernels or row["kernel"] in kernels)
    ]
    if not mine:
        there = sorted({(row["chip"], row["kernel"]) for row in rows})
        raise ValueError(f"no row of chip {chip} and kernels {list(kernels)}: there are {there}")
    for i in mine:
        rows[i] = improve(rows[i], measure, say)


def _key(config: Config) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(config.items()))


def measurer(
    op: str, rows: Sequence[Row], device: torch.device, seconds: float,
    say: Callable[[str], None] = print,
) -> Measure:  # fmt: skip
    """The measure for a GPU: geometric mean over two packs of the direction that the kernel is in.

    A kernel whose name begins with "forward" is measured in the forward, any other in the backward.
    Rows of "<kernel>_specialised", which would run in its place, are left out meanwhile.
    """
    module = importlib.import_module(f"bench.{op}")
    peer = next(p for p in module.PEERS if p.name == "goku triton")
    packs = [pack for pack in GPU_PACKS if pack.name in _JUDGED_ON]
    unused = timing.Ceiling("not measured", 1.0, "")
    ceilings = timing.Ceilings(unused, unused)

    def measure(row: Row, config: Config) -> float | None:
        keys = ("kernel", "size", "chip", "dtypes")
        table = [
            {**r, "config": config} if all(r[k] == row[k] for k in keys) else r
            for r in rows
            if r["kernel"] != f"{row['kernel']}_specialised"
        ]
        name = "bfloat16" if "bfloat16" in row["dtypes"] else row["dtypes"][0]
        direction = "forward" if row["kernel"].startswith("forward") else "backward"
        times = []
        with overridden(op, table):
            for pack in packs:
                problem = module.tuning(row["size"], getattr(torch, name), pack)
                if direction not in problem.directions:
                    direction = problem.directions[0]
                for found in cases.measure(problem, [peer], device, ceilings, seconds=seconds):
                    if found.timing is None:
                        say(f"  {config}: {found.status}: {found.note}")
                        return None
                    if found.direction == direction:
                        times.append(found.timing.median_ms)
        return math.exp(sum(map(math.log, times)) / len(times))

    return measure


def text(rows: Sequence[Row]) -> str:
    """configs/<op>.json, one row a line."""
    return '{"rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]}\n"


def main(
    op: str, seconds: float, kernels: Sequence[str], *, write: bool, folder: Path = FOLDER
) -> None:
    """Tune operator `op` for this machine's GPU and rewrite its rows of that chip.

    Raises:
        ValueError: no GPU, no configurations of `op`, or no row of this chip.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device, and there is none on this machine")
    file = folder / f"{op}.json"
    if not file.is_file():
        raise ValueError(f"OP is {op!r}: there is no {file.name} to tune")
    from goku_kernels.triton.launch import launcher

    device = torch.device("cuda")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    chip = launcher(torch.empty(0, device=device)).chip
    # `measure` sees the same list change: each row is tuned beside the improved ones before it.
    tune(rows, chip, kernels, measurer(op, rows, device, seconds))
    if write:
        file.write_text(text(rows), encoding="utf-8")
        print(f"{file} is written")
    else:
        print(text(rows), end="")
