"""The longest sequence that one device trains: as many tokens as fit, then one step on a clip of them.

    python -m bench.longest [--preset goku-2b] [--policies full ...] [--seconds 200] [--limit 400]

Memory depends on how many tokens a pack has, and not on how they are divided into samples: the search
takes packs of clips of 8,192 tokens, whose attention is quick, and looks at what a step allocates at its
most. From two measurements a line, from the line the next length, until 2% more would not fit, by a
trial or by the line, or --seconds are over. Then one clip of that length takes a whole step, or, where
that is not expected to end within --limit, a shorter one; so that the whole one may, the search ends
a trial earlier than it had to.
Rows go to bench/results/step.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
# Of the time that is left, what a shorter clip is given: the rate of its attention is a guess, and a step that is
# killed for taking longer costs the row.
SHARE_OF_REST = 0.6
# Beside a clip's step as expected: what came before the clock was started, and building the model.
SPARE_SECONDS = 15.0

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


def longest(
    trial: Trial, room: int, first: int, is_late: Callable[[], bool] = lambda: False
) -> tuple[int, int]:
    """(tokens, bytes at most) of the longest pack that fits into `room` bytes.

    Args:
        first: tokens to begin with, at least 2 * GRAIN; where it does not fit, 7/8 of it, half of that and so on.
        is_late: whether no further length is to be tried, once one has fitted.

    Raises:
        ValueError: nothing that was tried fits.
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
        if following is None or (fits and is_late()):
            break
        tokens = following
    if not fits:
        raise ValueError(f"not even {min(misses):,} tokens fit into {room:,} bytes")
    most = max(fits)
    return most, fits[most]


def _following(fits: dict[int, int], misses: list[int], room: int) -> int | None:
    """The next length to try; None where none is left."""
    if not fits:
        # An estimate is a little too much before it is twice too much.
        shortest = min(misses)
        fewer = _rounded(shortest // 2 if len(misses) > 1 else shortest * 7 // 8)
        return None if fewer in misses else fewer
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


def peak(setting: step.Setting, device: torch.device) -> int | None:
    """What one step allocates at its most, the optimizer's states made before; None where it does not fit."""
    found = None
    try:
        run, batch = step.Run(setting, device), step.Batch.draw(setting, device)
        run.prepare()
        found = step.peak_bytes(lambda: run.step(batch), device)
    except torch.OutOfMemoryError:
        print(f"{setting.policy}: {setting.pack.tokens:,} tokens do not fit", flush=True)
    return found


def try_tokens(preset: str, policy: str, device: torch.device) -> Trial:
    """The trial on a GPU."""

    def trial(tokens: int) -> int | None:
        began = time.monotonic()
        found = peak(step.Setting(preset, many_clips(tokens), policy), device)
        step.release(device)
        if found is not None:
            seconds, gib = time.monotonic() - began, found / 2**30
            print(f"{policy}: {tokens:,} tokens: {gib:.2f} GiB, {seconds:.0f} s", flush=True)
        return found

    return trial


def clip_seconds(setting: step.Setting, ceilings: timing.Ceilings) -> float:
    """What a step on one clip is expected to take, and what is around it."""
    # Attention decides; that its backward multiplies seven times where four are counted is in the 0.3.
    rate = 0.3 * ceilings.matmul.value
    return 1e-3 * float(step.expected(setting, 0, ceilings, rate)["expected_ms"]) + SPARE_SECONDS


@dataclass
class Clock:
    """When the search has to end.

    Attributes:
        seconds: that it may take.
        deadline: time.monotonic() at which the clip's step has to be over.
        needed: tokens -> seconds of that step.
        cut: whether the search was ended before it was through.
    """

    seconds: float
    deadline: float
    needed: Callable[[int], float]
    cut: bool = False
    _began: float = 0.0
    _tokens: int = 0  # the most that fitted
    _trial: float = 0.0  # seconds of the longest trial

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    def timed(self, trial: Trial) -> Trial:
        """`trial`, whose time and success are kept."""

        def run(tokens: int) -> int | None:
            began = time.monotonic()
            found = trial(tokens)
            self._trial = max(self._trial, time.monotonic() - began)
            if found is not None:
                self._tokens = max(self._tokens, tokens)
            return found

        return run

    def is_late(self) -> bool:
        """Whether one more trial would take too long, or the clip's step the time that it now has."""
        now = time.monotonic()
        left, needed = self.deadline - now, self.needed(self._tokens)
        # A clip that there is no time for anyhow saves none.
        spent = needed <= left < needed + self._trial
        self.cut = (
            spent or now - self._began > 0.7 * self.seconds
        )  # a trial more takes up to the rest
        return self.cut


def measure(
    preset: str, policy: str, device: torch.device, ceilings: timing.Ceilings, seconds: float,
    deadline: float,
) -> Iterator[harness.Row]:  # fmt: skip
    """The row of what the search found, and one in its place of a step on one clip of that length.

    Args:
        seconds: that the search may take.
        deadline: time.monotonic() at which the clip's step has to be over.
    """
    step.release(device)  # what the ceilings took is torch's, and would count as taken
    free, _ = torch.cuda.mem_get_info(device)

    def setting(tokens: int) -> step.Setting:
        return step.Setting(preset, one_clip(tokens), policy)

    clock = Clock(seconds, deadline, lambda tokens: clip_seconds(setting(tokens), ceilings))
    first = estimated(preset, policy, free)
    trial = clock.timed(try_tokens(preset, policy, device))
    tokens, most = longest(trial, free, _rounded(first * 9 // 10), clock.is_late)
    found: dict[str, float] = {
        "longest_tokens": tokens, "estimated_tokens": first, "peak_memory_bytes": most
    }  # fmt: skip
    needed, left = clock.needed(tokens), max(0.0, deadline - time.monotonic())
    timed_tokens = tokens if needed <= left else within(clock.needed, tokens, SHARE_OF_REST * left)
    cut = "; the search was cut short, more may fit" if clock.cut else ""
    fit = f"{tokens:,} tokens fit{cut}"
    if timed_tokens < tokens:
        fit += f"; a step on one clip of them is expected to take {needed:.0f} s of {left:.0f}"
    yield step.row(
        setting(tokens), ceilings, status="absent", note=f"{fit}; no clip was timed", extra=found
    )
    if not timed_tokens:
        return
    clip = setting(timed_tokens)
    try:
        run, batch = step.Run(clip, device), step.Batch.draw(clip, device)
        run.prepare()
        started = time.monotonic()
        peak_bytes = step.peak_bytes(lambda: run.step(batch), device)
        took = 1e3 * (time.monotonic() - started)
    except torch.OutOfMemoryError:
        print(
            f"{policy}: one clip of {timed_tokens:,} tokens does not fit, which clips do",
            flush=True,
        )
        return
    found = found | {
        "peak_memory_bytes": max(most, peak_bytes),
        "clip_tokens": timed_tokens,
        "tokens_per_s": timed_tokens / took * 1e3,
    }
    timed = timing.Timing(took, took, took, 1)
    yield step.row(
        clip, ceilings, timing=timed, note=f"{fit}; one step on one clip of {timed_tokens:,}",
        extra=found,
    )  # fmt: skip


def within(needed: Callable[[int], float], tokens: int, seconds: float) -> int:
    """The longest clip of at most `tokens` whose step is expected to end in time; 0 where none of CLIP is.

    Args:
        needed: tokens -> seconds of a step on one clip of so many, which grow with them.
    """
    if needed(tokens) <= seconds:
        return tokens
    low, high = 0, tokens  # ends in time, does not
    while high - low > GRAIN:
        middle = _rounded((low + high) // 2)
        low, high = (middle, high) if needed(middle) <= seconds else (low, middle)
    return low if low >= CLIP else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.longest", description="The longest sequence that one GPU trains."
    )
    parser.add_argument("--preset", default="goku-2b", choices=list(PRESETS))
    parser.add_argument("--policies", nargs="+", default=["full"], choices=list(POLICIES))
    parser.add_argument("--seconds", type=float, default=200.0,
                        help="that the search of one policy may take (200)")  # fmt: skip
    parser.add_argument("--limit", type=float, default=None,
                        help="seconds for everything, the clips' steps too (twice the searches')")  # fmt: skip
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    options = parser.parse_args(arguments)
    began, count = time.monotonic(), len(options.policies)
    limit = 2 * options.seconds * count if options.limit is None else options.limit
    if not torch.cuda.is_available():
        print("python -m bench.longest: needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    ceilings = timing.measure_ceilings(device, 0.5)
    for i, policy in enumerate(options.policies, 1):
        given = (device, ceilings, options.seconds, began + limit * i / count)
        for row in measure(options.preset, policy, *given):
            for record in harness.write([row], device, options.out):
                print(harness.describe(record), flush=True)
        step.release(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
