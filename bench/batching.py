"""Short calls are timed several at a time: an event on either side of one adds microseconds.

A launch between two events takes 2 to 4 us longer than the kernel, which a kernel of 10 us shows as
a quarter of its speed, while the ceiling, a copy of 1 GiB, does not. So all peers are called as often
one after the other, on copies of the inputs that no cache holds, that the fastest takes TOGETHER_MS,
and the time is divided. What they return is kept until the last: memory that was just freed would
be written again while it is still in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench import timing
from bench.timing import Call, Timing

TOGETHER_MS = 0.3  # of the calls between two events, at least about so much
MOST_CALLS = 64  # between two events
_TRIAL_ROUNDS = 3  # of single calls, from which is decided how many


@dataclass(frozen=True)
class Batched:
    """timing: milliseconds of one call. calls: how many were between two events."""

    timing: Timing
    calls: int


def calls_together(fastest_ms: float) -> int:
    """How many calls of `fastest_ms` milliseconds take TOGETHER_MS: from 1 to MOST_CALLS."""
    if fastest_ms * MOST_CALLS <= TOGETHER_MS:
        return MOST_CALLS
    return max(1, math.ceil(TOGETHER_MS / fastest_ms))


def divided(found: Timing, calls: int) -> Timing:
    """Milliseconds of one call, from those of `calls` one after the other."""
    return Timing(
        found.median_ms / calls, found.p20_ms / calls, found.p80_ms / calls, found.repeats
    )


def several(call: Call, calls: int, copies: int) -> Call:
    """`calls` calls in one; the i-th takes up the rotation where the one before it ended."""
    prepare, run = call

    def prepare_all(i: int) -> list[Any]:
        return [prepare((i * calls + j) % copies) for j in range(calls)]

    def run_all(states: list[Any]) -> list[object]:
        return [run(state) for state in states]

    return prepare_all, run_all


def timed(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float, copies: int
) -> dict[str, Batched]:  # fmt: skip
    """Time all `calls` beside each other, each as often between two events as the others.

    Args:
        calls, device, seconds, copies: as of `timing.interleaved`.
    """
    together = 1
    if device.type == "cuda" and calls:  # elsewhere there are no events
        alone = timing.interleaved(
            calls, device, seconds=0.0, min_rounds=_TRIAL_ROUNDS, copies=copies
        )
        together = calls_together(min(found.median_ms for found in alone.values()))
        # Slow calls have had their time by then: to measure them once more took a third of a whole run.
        spent = 1e-3 * _TRIAL_ROUNDS * sum(found.median_ms for found in alone.values())
        if together == 1 and spent >= seconds:
            return {name: Batched(found, 1) for name, found in alone.items()}
    chosen = {name: several(call, together, copies) for name, call in calls.items()}
    found = timing.interleaved(chosen, device, seconds=seconds, copies=copies)
    return {name: Batched(divided(each, together), together) for name, each in found.items()}
