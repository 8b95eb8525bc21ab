"""How a call is timed, peers against each other, and what the hardware does best in the same run.

Peers are interleaved: every round calls each of them once, so that a clock that falls or a neighbour
that wakes falls on all of them. Inputs rotate through more copies than the second-level cache holds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.filler import Filler

# A call to be timed: prepare(i), which is not timed, and run(what prepare returned), which is.
Call = tuple[Callable[[int], Any], Callable[[Any], object]]

MAX_COPIES = 64  # of the inputs; tiny ones would otherwise be copied by the thousand
SLOW_ROUND_SECONDS = 2.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over `repeats` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class Ceiling:
    """What the hardware did best in the same run: `value` in `unit` ("FLOP/s" or "byte/s")."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Ceilings:
    """The two ceilings of one run."""

    matmul: Ceiling
    copy: Ceiling

    def of(self, unit: str) -> Ceiling:
        """The ceiling for work counted in `unit` ("FLOP" or "byte")."""
        return {"FLOP": self.matmul, "byte": self.copy}[unit]


def measure_ceilings(device: torch.device, seconds: float = 1.0) -> Ceilings:
    """Both ceilings, `seconds` of timing each."""
    return Ceilings(matmul_ceiling(device, seconds=seconds), copy_ceiling(device, seconds=seconds))


def interleaved(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float, warm_up: int = 2,
    min_rounds: int = 3, copies: int = 1,
) -> dict[str, Timing]:  # fmt: skip
    """Time all `calls` in rounds, one call of each a round, for about `seconds` in total.

    Args:
        calls: by name; prepare(i) gets the number of the inputs' copy to use.
        device: CUDA calls lie between two events on the current stream.
        seconds: of timing, all calls together.
        warm_up: rounds that do not count; one is enough where it takes SLOW_ROUND_SECONDS.
        min_rounds: rounds that are timed even if they take longer.
        copies: of the inputs; round r uses copy r % copies.
    """
    if not calls:
        return {}
    filler = Filler(device)
    launching = dict.fromkeys(calls, 0.0)
    for r in range(warm_up):
        started = time.perf_counter()
        for name, (prepare, run) in calls.items():
            state = prepare(r % copies)
            synchronise(device)
            began = time.perf_counter()
            run(state)
            launching[name] = time.perf_counter() - began
            del state
        synchronise(device)
        if time.perf_counter() - started > SLOW_ROUND_SECONDS:
            break
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for r in itertools.count(warm_up):
        if r - warm_up >= min_rounds and time.perf_counter() >= deadline:
            break
        for name, (prepare, run) in calls.items():
            state = prepare(r % copies)
            times[name].append(_time(run, state, device, filler, launching[name]))
            del state
    return {name: summary(values) for name, values in times.items()}


def _time(
    run: Callable[[Any], object], state: Any, device: torch.device, filler: Filler, launching: float
) -> float:
    """Milliseconds of one run(state); `launching` is how long the host took to launch it before."""
    if device.type != "cuda":
        began = time.perf_counter()
        run(state)
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    filler.run(2 * launching)
    begin.record()
    run(state)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_calls(
    work: Callable[[], object], device: torch.device, *, seconds: float, warm_up: int = 3
) -> Timing:
    """Time single calls of `work` for about `seconds`, after `warm_up` calls that do not count."""
    call: Call = (lambda i: None, lambda state: work())
    return interleaved({"": call}, device, seconds=seconds, warm_up=warm_up)[""]


def summary(times_ms: Sequence[float]) -> Timing:
    """Median (of an even number the mean of the middle two), 20th and 80th percentile by nearest rank."""
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    p20, p80 = (ordered[round(share * last)] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), p20, p80, len(ordered))


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_past_cache(bytes_per_copy: int, device: torch.device) -> int:
    """Copies of the inputs that together pass twice the L2 cache; 1 on a CPU, at most MAX_COPIES.

    Twice, since a cache that keeps half of what passes through would still serve some of it.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return copies_past(bytes_per_copy, cache)


def copies_past(bytes_per_copy: int, cache_bytes: int) -> int:
    """Copies of `bytes_per_copy` that exceed twice `cache_bytes`, from 1 to MAX_COPIES."""
    return max(1, min(MAX_COPIES, 2 * cache_bytes // max(1, bytes_per_copy) + 1))


def matmul_ceiling(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, size: int | None = None,
    seconds: float = 1.0,
) -> Ceiling:  # fmt: skip
    """FLOP/s of a large square matrix product of random operands."""
    n = size or (8192 if device.type == "cuda" else 512)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timing = time_calls(lambda: a @ b, device, seconds=seconds)
    name = str(dtype).removeprefix("torch.")
    return Ceiling(f"{name} matmul {n}x{n}x{n}", 2 * n**3 / (timing.median_ms * 1e-3), "FLOP/s")


def copy_ceiling(device: torch.device, *, size: int | None = None, seconds: float = 1.0) -> Ceiling:
    """Bytes read and written per second by a copy far larger than the caches."""
    n = size or (2**30 if device.type == "cuda" else 2**26)
    source = torch.randint(256, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_calls(lambda: target.copy_(source), device, seconds=seconds)
    return Ceiling(f"copy of {n} bytes", 2 * n / (timing.median_ms * 1e-3), "byte/s")
