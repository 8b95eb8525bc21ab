"""The doctor's findings on one dataset as data, as a readable table and as JSON; words and bars for all its reports."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from goku.data.errors import SKIP_BAD, Dropped, Problem, Remark
from goku.data.layout import PackingReport
from goku.data.record import counted

_BAR = 32
_ROWS = 8
_SHOWN = 20


@dataclass(frozen=True)
class ItemReport:
    """One usable item. `source` = (frames, height, width) of its range in the file, upright;
    `frames`, `height`, `width`, `tokens`: as trained (`encoded_frames` before an overlong cut);
    `unused_frames`: of the range, at the training rate, beyond what is encoded, as headers state.
    `repeats_frames`: the requested fps is above the source's."""

    name: str
    modality: Literal["image", "video"]
    source: tuple[int, int, int]
    source_seconds: float
    encoded_frames: int
    unused_frames: int
    frames: int
    height: int
    width: int
    seconds: float
    tokens: int
    repeats_frames: bool


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found. `ok` when every listed item can be used (and there is one).

    Attributes:
        listed: items that the dataset lists; = len(items) + len(unusable) + len(dropped).
        dropped: sound items that the limits leave out.
        remarks: on items that are used.
        packing: None when no item is usable.
        cache_bytes: predicted size of the latents (mean and logvar, fp32) without file headers.
    """

    path: str
    quick: bool
    listed: int
    items: tuple[ItemReport, ...]
    unusable: tuple[Problem, ...]
    notes: tuple[str, ...]
    packing: PackingReport | None
    cache_bytes: int
    dropped: tuple[Dropped, ...] = ()
    remarks: tuple[Remark, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not ready for training, a sentence each; () when it is."""
        reasons = []
        if self.unusable:
            reasons.append(f"{counted(len(self.unusable), 'item')} cannot be used")
        if not self.items:
            of = f"{len(self.dropped):,} of {counted(self.listed, 'item')}"
            dropped = f"; the limits dropped {of}" if self.dropped else ""
            reasons.append(f"nothing is left to train on{dropped}")
        return tuple(reasons)

    def counts(self) -> dict[str, int]:
        """Usable items by modality."""
        return {
            modality: sum(item.modality == modality for item in self.items)
            for modality in ("image", "video")
        }

    def all_notes(self) -> list[str]:
        """What the listing passed by, and what the items show."""
        return [*self.notes, *findings(self.items, self.packing, quick=self.quick)]

    def to_json(self) -> str:
        """Everything, items included, as one JSON object."""
        content = {
            "path": self.path,
            "ok": self.ok,
            "quick": self.quick,
            "listed": self.listed,
            "usable": self.counts(),
            "unusable": [asdict(problem) for problem in self.unusable],
            "dropped": [asdict(dropped) for dropped in self.dropped],
            "remarks": [asdict(remark) for remark in self.remarks],
            "notes": self.all_notes(),
            "tokens": spread([item.tokens for item in self.items]),
            "packing": None if self.packing is None else asdict(self.packing),
            "cache_bytes": self.cache_bytes,
            "items": [asdict(item) for item in self.items],
        }
        # ASCII, so that a name that is no Unicode is JSON's own escape, whatever it is printed or written to.
        return json.dumps(content, indent=2)

    def to_text(self) -> str:
        """A readable page, at most 100 columns wide but for paths and reasons."""
        how = "headers only" if self.quick else "everything decoded"
        usable = " and ".join(counted(n, modality) for modality, n in self.counts().items())
        dropped = f", {len(self.dropped)} dropped by limits" if self.dropped else ""
        lines = [
            f"{self.path} ({how})",
            "",
            f"  items           {self.listed} listed: {usable} usable, "
            f"{len(self.unusable)} unusable{dropped}",
        ]
        if self.items:
            lines += self._size_lines()
        if self.packing is not None:
            lines += packing_lines(self.packing)
            lines.append(f"  latent cache    {in_bytes(self.cache_bytes)} predicted")
        if self.items:
            lines += self._histogram_lines()
        notes = self.all_notes()
        if notes:
            lines += ["", "Notes", *(f"  {note}" for note in notes)]
        if self.remarks:
            lines += ["", "Remarks on used items", *some_lines(self.remarks)]
        if self.dropped:
            lines += ["", "Dropped", *some_lines(self.dropped)]
        if self.unusable:
            lines += ["", "Unusable", *(f"  {problem}" for problem in self.unusable)]
        verdict = (
            "Ready for training."
            if self.ok
            else f"Not ready for training: {'; '.join(self.reasons)}."
        )
        if self.unusable and self.items:
            verdict = verdict[:-1] + SKIP_BAD + "."
        lines += ["", verdict]
        return "\n".join(lines)

    def _size_lines(self) -> list[str]:
        lines = []
        videos = [item for item in self.items if item.modality == "video"]
        if videos:
            used = spread([item.seconds for item in videos])
            whole = spread([item.source_seconds for item in videos])
            frames = spread([item.frames for item in videos])
            lines += [
                f"  clip seconds    {three(whole, '.2f')} listed, {three(used, '.2f')} used "
                "(min / median / max)",
                f"  clip frames     {three(frames, '.0f')}",
            ]
        tokens = spread([item.tokens for item in self.items])
        total = sum(item.tokens for item in self.items)
        lines.append(f"  tokens/sample   {three(tokens, ',.0f')}, {total:,} in all")
        return lines

    def _histogram_lines(self) -> list[str]:
        source = Counter(f"{item.source[1]} x {item.source[2]}" for item in self.items)
        tokens = octaves([item.tokens for item in self.items])
        return [
            *("", "As trained (frames x height x width)", *bars(as_trained(self.items))),
            *("", "In the files (height x width)", *bars(source.most_common())),
            *("", "Tokens per sample", *bars(tokens)),
        ]


def findings(
    items: Sequence[ItemReport], packing: PackingReport | None, *, quick: bool
) -> list[str]:
    """What used items show that their owner may not expect, a sentence each."""
    notes = []
    # Up to 3 frames go to the rounding to 4k+1; more went to max_frames.
    shortened = sum(item.unused_frames > 3 for item in items)
    if shortened:
        notes.append(
            f"{counted(shortened, 'clip')} longer than max_frames: the rest is not seen; "
            "list ranges (start_frame, num_frames) to use it"
        )
    cut = sum(item.frames < item.encoded_frames for item in items)
    if cut:
        notes.append(f'{counted(cut, "clip")} cut to tokens_per_pack (overlong: "cut")')
    repeats = sum(item.repeats_frames for item in items)
    if repeats:
        notes.append(f"{counted(repeats, 'clip')} slower than fps: frames repeat")
    if packing is not None and packing.samples_per_step > len(items):
        times = packing.samples_per_step / len(items)
        notes.append(
            f"the dataset is smaller than a step, which goes through it {times:.1f} times; "
            "packing.tokens_per_step sets a step's size"
        )
    if quick:
        notes.append("damage inside files is not seen by the quick look")
    return notes


def packing_lines(packing: PackingReport) -> list[str]:
    """One epoch and its packs."""
    return [
        f"  one epoch       {counted(packing.steps_per_epoch, 'step')} of at most "
        f"{packing.tokens_per_step:,} tokens, {packing.samples_per_step:.1f} samples a step",
        f"  packs           {packing.packs_per_step:.1f} a step of at most "
        f"{packing.tokens_per_pack:,} tokens on {counted(packing.ranks, 'rank')}, "
        f"{packing.efficiency:.1%} full",
    ]


def as_trained(items: Sequence[ItemReport]) -> list[tuple[str, int]]:
    """How many items have each size, the most frequent first."""
    return Counter(
        f"{item.modality} {item.frames} x {item.height} x {item.width}" for item in items
    ).most_common()


def spread(values: Sequence[float]) -> dict[str, float]:
    """{min, median, max}; {} of nothing."""
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def three(values: dict[str, float], form: str) -> str:
    """A spread as "min / median / max"."""
    return " / ".join(format(values[name], form) for name in ("min", "median", "max"))


def octaves(values: Sequence[int]) -> list[tuple[str, int]]:
    """Counts in ranges that double, from the least value's to the greatest's."""
    if not values:
        return []
    counts = Counter(value.bit_length() for value in values)
    return [
        (f"{1 << (b - 1):,} - {(1 << b) - 1:,}", counts[b])
        for b in range(min(counts), max(counts) + 1)
    ]


def durations(seconds: Sequence[float]) -> list[tuple[str, int]]:
    """Counts of clips in ranges of seconds that double; those of unknown length (0) apart, first."""
    known = Counter(math.frexp(value)[1] for value in seconds if value > 0)
    rows = [("unknown", len(seconds) - known.total())] if known.total() < len(seconds) else []
    if known:
        rows += [
            (f"{2.0 ** (e - 1):g} - {2.0**e:g} s", known[e])
            for e in range(min(known), max(known) + 1)
        ]
    return rows


def fewer(rows: Sequence[tuple[str, int]], most: int = _ROWS) -> list[tuple[str, int]]:
    """At most `most` rows: the first, and one that sums up the others."""
    if len(rows) <= most:
        return list(rows)
    shown = list(rows[: most - 1])
    rest = sum(count for _, count in rows[len(shown) :])
    return [*shown, (f"{len(rows) - len(shown)} others", rest)] if rest else shown


def bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    """A bar of text for every (label, count)."""
    shown = fewer(rows)
    widest = max(len(label) for label, _ in shown)
    most = max(count for _, count in shown)
    digits = len(f"{most:,}")
    return [
        f"  {label:>{widest}}  {count:>{digits},}  {'#' * -(-_BAR * count // most)}".rstrip()
        for label, count in shown
    ]


def some_lines(rows: Sequence[object]) -> list[str]:
    """The first twenty rows, and how many more there are."""
    lines = [f"  {row}" for row in rows[:_SHOWN]]
    if len(rows) > _SHOWN:
        lines.append(f"  ... and {len(rows) - _SHOWN:,} more (--json has all)")
    return lines


def in_bytes(count: int) -> str:
    """ "12.3 MB", decimal."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
