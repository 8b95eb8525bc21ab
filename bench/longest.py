"""The longest sequence that one device trains: as many tokens as fit, then one step on a clip of them.

    python -m bench.longest [--preset goku-2b] [--policies full ...] [--seconds 200]

Memory depends on how many tokens a pack has, and not on how they are divided into samples: the search
takes packs of clips of 8,192 tokens, whose attention is quick, and looks at what a step allocates at its
most. From two measurements a line, from the line the next length, until 2% more would not fit, by a
trial or by the line. Then one clip of that length takes a whole step, where that is expected to take
less than --seconds. Rows go to bench/results/step.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import harness, step, timing
from bench.packs import Pack
from bench.policy_runs import POLICIES
from goku.model import PRESETS, GokuTransformer

PACK = "the longest clip"
GRAIN = 512  # tokens: what lengths are multiples of
CLIP = 8192
CLOSE = 0.02  # the search ends when lengths that fit and that do not are so near to each other
MOST_TRIALS = 10

# Tokens -> bytes that a step of them allocates at its most, or None where they did not fit.
Trial = Callable[[int], int | None]


def many_clips(tokens: int) -> Pack:
    """`tokens`, a multiple of GRAIN, as clips of CLIP and one that is shorter."""
    whole, rest = divmod(tokens, CLIP)
    grids = [(CLIP // GRAIN, 16, 32)] * whole + ([(rest // GRAIN, 16, 32)] if rest else [])
    return Pack("clips", tuple(grids))


def one_clip(tokens: int) -> Pack:
    """`tokens`, a multiple of GRAIN, as one clip."""
    return Pack(PACK, ((tokens // GRAIN, 16, 32),))


def longest(trial: Trial, room: int, first: int) -> tuple[int, int]:
    """(tokens, bytes at most) of the longest pack that fits into `room` bytes.

    Args:
        first: tokens to begin with, at least 2 * GRAIN; where it does not fit, half of it and so on.

    Raises:
        ValueError: not even GRAIN tokens fit.
    """
    fits: dict[int, int] = {}
    misses: list[int] = []
    tokens = _rounded(first)
    for _ in range(MOST_TRIALS):
        found = trial(tokens)
        if found is None:
            misses.append(tokens)
        else:
            fits[tokens] = found
        following = _following(fits, misses, room)
        if following is None:
            break
        tokens = following
    if not fits:
        raise ValueError(f"not even {min(misses):,} tokens fit into {room:,} bytes")
    most = max(fits)
    return most, fits[most]


def _following(fits: dict[int, int], misses: list[int], room: int) -> int | None:
    """The next length to try; None where none is left."""
    if not fits:
        half = _rounded(min(misses) // 2)
        return None if half in misses else half
    most = max(fits)
    enough = most * (1 + CLOSE)
    wanted = _rounded(_guess(fits, room))
    if wanted <= enough:
        return None
    if misses:  # keep away from what did not fit
        wanted = min(wanted, _rounded((most + min(misses)) // 2))
    return wanted if wanted > most and min(misses, default=wanted) > enough else None


def _guess(fits: dict[int, int], room: int) -> int:
    """Where the line through the two longest that fit reaches `room`, no more than 4 times the longest."""
    first, *others = sorted(fits, reverse=True)
    if not others:
        return max(first * 9 // 8, first + GRAIN)
    slope = (fits[first] - fits[others[0]]) / (first - others[0])
    if slope <= 0:  # the weights alone decide yet
        return 2 * first
    return min(4 * first, first + math.floor((room - fits[first]) / slope))


def _rounded(tokens: int) -> int:
    return max(GRAIN, tokens // GRAIN * GRAIN)


def estimated(preset: str, policy: str, room: int) -> int:
    """How many tokens the estimate of `goku train --dry-run` says fit into `room` bytes; GRAIN at least."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GokuTransformer(PRESETS[preset]).parameters())

    def bytes_of(tokens: int) -> float:
        return step.Setting(preset, one_clip(tokens), policy).memory(parameters).peak

    low, high = GRAIN, 2**24
    while high - low > GRAIN:
        middle = _rounded((low + high) // 2)
        low, high = (middle, high) if bytes_of(middle) <= room else (low, middle)
    return low


def try_tokens(preset: str, policy: str, device: torch.device) -> Trial:
    """The trial on a GPU: two steps, since the first makes the optimizer's states."""

    def peak(setting: step.Setting) -> int | None:
        try:
            run, batch = step.Run(setting, device), step.Batch.draw(setting, device)
            run.step(batch)
            return step.peak_bytes(run, batch, device)
        except torch.OutOfMemoryError:
            return None

    def trial(tokens: int) -> int | None:
        began = time.monotonic()
        found = peak(step.Setting(preset, many_clips(tokens), policy))
        torch.cuda.empty_cache()  # only now has nobody the model any more
        if found is None:
            print(f"{policy}: {tokens:,} tokens do not fit", flush=True)
            return None
        seconds = time.monotonic() - began
        print(f"{policy}: {tokens:,} tokens: {found / 2**30:.2f} GiB, {seconds:.0f} s", flush=True)
        return found

    return trial


def measure(
    preset: str, policy: str, device: torch.device, ceilings: timing.Ceilings, seconds: float
) -> harness.Row:
    """The row of one policy: the clip's step where it is expected to take less than `seconds`, else the search's."""
    free, _ = torch.cuda.mem_get_info(device)
    first = estimated(preset, policy, free)
    tokens, most = longest(try_tokens(preset, policy, device), free, _rounded(first * 9 // 10))
    torch.cuda.empty_cache()
    found: dict[str, float] = {
        "longest_tokens": tokens,
        "estimated_tokens": first,
        "peak_memory_bytes": most,
    }
    setting = step.Setting(preset, one_clip(tokens), policy)
    expected_ms = float(
        step.expected(setting, 0, ceilings, 0.4 * ceilings.matmul.value)["expected_ms"]
    )
    if expected_ms > 1e3 * seconds:
        note = (
            f"{tokens:,} tokens fit; a clip of them was not run: about {1e-3 * expected_ms:.0f} s"
        )
        return step.row(setting, ceilings, status="absent", note=note, extra=found)
    run, batch = step.Run(setting, device), step.Batch.draw(setting, device)
    began = time.monotonic()
    peak = step.peak_bytes(run, batch, device)
    took = 1e3 * (time.monotonic() - began)
    note = "one step, the first: its launches are in the time, and no repetition"
    found = found | {"peak_memory_bytes": max(most, peak), "tokens_per_s": tokens / took * 1e3}
    return step.row(
        setting, ceilings, timing=timing.Timing(took, took, took, 1), note=note, extra=found
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.longest", description="The longest sequence that one GPU trains."
    )
    parser.add_argument("--preset", default="goku-2b", choices=list(PRESETS))
    parser.add_argument("--policies", nargs="+", default=["full"], choices=list(POLICIES))
    parser.add_argument("--seconds", type=float, default=200.0,
                        help="that the clip's step may be expected to take (200)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench.longest: needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    ceilings = timing.measure_ceilings(device, 0.5)
    for policy in options.policies:
        row = measure(options.preset, policy, device, ceilings, options.seconds)
        for record in harness.write([row], device, options.out):
            print(harness.describe(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
