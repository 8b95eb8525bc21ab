"""The doctor's findings as data, as a readable table and as JSON."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from goku.data.errors import Problem

_BAR = 32
_ROWS = 8


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
class PackingReport:
    """Steps of one epoch for the given budgets; means over the steps that were laid out.
    `efficiency`: share of the packs' token budget that holds tokens."""

    tokens_per_step: int
    tokens_per_pack: int
    overlong: str
    ranks: int
    steps_per_epoch: int
    samples_per_step: float
    packs_per_step: float
    efficiency: float


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found. `ok` when every listed item can be used (and there is one).

    Attributes:
        listed: items that the dataset lists; = len(items) + len(unusable).
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

    @property
    def ok(self) -> bool:
        return bool(self.items) and not self.unusable

    def counts(self) -> dict[str, int]:
        """Usable items by modality."""
        return {
            modality: sum(item.modality == modality for item in self.items)
            for modality in ("image", "video")
        }

    def to_json(self) -> str:
        """Everything, items included, as one JSON object."""
        content = {
            "path": self.path,
            "ok": self.ok,
            "quick": self.quick,
            "listed": self.listed,
            "usable": self.counts(),
            "unusable": [asdict(problem) for problem in self.unusable],
            "notes": [*self.notes, *self._findings()],
            "tokens": _spread([item.tokens for item in self.items]),
            "packing": None if self.packing is None else asdict(self.packing),
            "cache_bytes": self.cache_bytes,
            "items": [asdict(item) for item in self.items],
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def to_text(self) -> str:
        """A readable page, at most 100 columns wide but for paths and reasons."""
        how = "headers only" if self.quick else "everything decoded"
        usable = " and ".join(_count(n, modality) for modality, n in self.counts().items())
        lines = [
            f"{self.path} ({how})",
            "",
            f"  items           {self.listed} listed: {usable} usable, "
            f"{len(self.unusable)} unusable",
        ]
        if self.items:
            lines += self._size_lines()
        if self.packing is not None:
            lines += _packing_lines(self.packing)
            lines.append(f"  latent cache    {_bytes(self.cache_bytes)} predicted")
        if self.items:
            lines += self._histogram_lines()
        notes = [*self.notes, *self._findings()]
        if notes:
            lines += ["", "Notes", *(f"  {note}" for note in notes)]
        if self.unusable:
            lines += ["", "Unusable", *(f"  {problem}" for problem in self.unusable)]
        lines += ["", "Ready for training." if self.ok else "Not ready for training."]
        return "\n".join(lines)

    def _size_lines(self) -> list[str]:
        lines = []
        videos = [item for item in self.items if item.modality == "video"]
        if videos:
            used = _spread([item.seconds for item in videos])
            whole = _spread([item.source_seconds for item in videos])
            frames = _spread([item.frames for item in videos])
            lines += [
                f"  clip seconds    {_three(whole, '.2f')} listed, {_three(used, '.2f')} used "
                "(min / median / max)",
                f"  clip frames     {_three(frames, '.0f')}",
            ]
        tokens = _spread([item.tokens for item in self.items])
        total = sum(item.tokens for item in self.items)
        lines.append(f"  tokens/sample   {_three(tokens, ',.0f')}, {total:,} in all")
        return lines

    def _histogram_lines(self) -> list[str]:
        trained = Counter(
            f"{item.modality} {item.frames} x {item.height} x {item.width}" for item in self.items
        )
        source = Counter(f"{item.source[1]} x {item.source[2]}" for item in self.items)
        tokens = _octaves([item.tokens for item in self.items])
        return [
            *("", "As trained (frames x height x width)", *_bars(trained.most_common())),
            *("", "In the files (height x width)", *_bars(source.most_common())),
            *("", "Tokens per sample", *_bars(tokens)),
        ]

    def _findings(self) -> list[str]:
        notes = []
        # Up to 3 frames go to the rounding to 4k+1; more went to max_frames.
        shortened = sum(item.unused_frames > 3 for item in self.items)
        if shortened:
            notes.append(
                f"{_count(shortened, 'clip')} longer than max_frames: the rest is not seen; "
                "list ranges (start_frame, num_frames) to use it"
            )
        cut = sum(item.frames < item.encoded_frames for item in self.items)
        if cut:
            notes.append(f'{_count(cut, "clip")} cut to tokens_per_pack (overlong: "cut")')
        repeats = sum(item.repeats_frames for item in self.items)
        if repeats:
            notes.append(f"{_count(repeats, 'clip')} slower than fps: frames repeat")
        if self.packing is not None and self.packing.samples_per_step > len(self.items):
            times = self.packing.samples_per_step / len(self.items)
            notes.append(
                f"the dataset is smaller than a step, which goes through it {times:.1f} times"
            )
        if self.quick:
            notes.append("damage inside files is not seen by the quick look")
        return notes


def _packing_lines(packing: PackingReport) -> list[str]:
    return [
        f"  one epoch       {_count(packing.steps_per_epoch, 'step')} of at most "
        f"{packing.tokens_per_step:,} tokens, {packing.samples_per_step:.1f} samples a step",
        f"  packs           {packing.packs_per_step:.1f} a step of at most "
        f"{packing.tokens_per_pack:,} tokens on {_count(packing.ranks, 'rank')}, "
        f"{packing.efficiency:.1%} full",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _three(spread: dict[str, float], form: str) -> str:
    return " / ".join(format(spread[name], form) for name in ("min", "median", "max"))


def _octaves(values: Sequence[int]) -> list[tuple[str, int]]:
    """Counts in ranges that double, from the least value's to the greatest's."""
    counts = Counter(value.bit_length() for value in values)
    return [
        (f"{1 << (b - 1):,} - {(1 << b) - 1:,}", counts[b])
        for b in range(min(counts), max(counts) + 1)
    ]


def _bars(rows: Sequence[tuple[str, int]]) -> list[str]:
    shown = list(rows) if len(rows) <= _ROWS else [*rows[: _ROWS - 1]]
    rest = sum(count for _, count in rows[len(shown) :])
    if rest:
        shown.append((f"{len(rows) - len(shown)} others", rest))
    widest = max(len(label) for label, _ in shown)
    most = max(count for _, count in shown)
    digits = len(f"{most:,}")
    return [
        f"  {label:>{widest}}  {count:>{digits},}  {'#' * -(-_BAR * count // most)}".rstrip()
        for label, count in shown
    ]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
