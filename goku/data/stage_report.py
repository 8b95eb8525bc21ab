"""The doctor's findings on the stages of a recipe (or on one run) as data, as a readable table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from goku.data.layout import PackingReport
from goku.data.mixing import BLOCK
from goku.data.record import counted
from goku.data.report import bars, in_bytes, packing_lines, some_lines, three

_NAME_COLUMN = 12


@dataclass(frozen=True)
class SourceReport:
    """What a stage makes of one dataset: listed = images + videos (both used) + dropped + quarantined."""

    name: str
    path: str
    listed: int
    images: int
    videos: int
    dropped: int
    quarantined: int


@dataclass(frozen=True)
class DroppedReport:
    """Sound items of a source that one limit leaves out: how many, and the names of the first three."""

    source: str
    reason: str
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class GroupReport:
    """One group of a stage's mix, named SOURCE/MODALITY. asked: its weight's share of all weights; drawn: its places
    in every 1,024; token_share: its share of the tokens; passes: how often the stage goes through its items."""

    name: str
    items: int
    asked: float
    drawn: int
    token_share: float
    passes: float


@dataclass(frozen=True)
class CacheReport:
    """Predicted bytes of the caches, and their files, whose headers (less than 1 kB each) come on top.

    latents: mean and logvar, fp32; frames: of single frames encoded alone; texts: embeddings; shared: bytes of all
    these that an earlier stage has already. texts_measured: counted by the tokenizer, not reckoned from the captions'
    length.
    """

    latents: int = 0
    latent_files: int = 0
    frames: int = 0
    frame_files: int = 0
    texts: int = 0
    text_files: int = 0
    shared: int = 0
    texts_measured: bool = True

    @property
    def total(self) -> int:
        return self.latents + self.frames + self.texts

    def words(self) -> str:
        """One line."""
        about = "" if self.texts_measured else " (by length)"
        parts = [f"latents {in_bytes(self.latents)}"]
        parts += [f"single frames {in_bytes(self.frames)}"] if self.frame_files else []
        parts += [f"text {in_bytes(self.texts)}{about}"]
        shared = f"; {in_bytes(self.shared)} of it shared with stages before" if self.shared else ""
        return f"{in_bytes(self.total)}: {', '.join(parts)}{shared}"


@dataclass(frozen=True)
class NamedReport:
    """What is said of one item, and in which stages. kind: of a quarantined item, "" for a remark."""

    source: str
    name: str
    text: str
    stages: tuple[str, ...]
    kind: str = ""

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        kind = f" [{self.kind}]" if self.kind else ""
        return f"{where}{self.name}:{kind} {self.text}"


@dataclass(frozen=True)
class StageReport:
    """What one stage would do with its data.

    Attributes:
        start: what it starts from, "" for a fresh model; steps: train.steps.
        reasons: why it cannot train; notes: what its owner may not expect.
        sources: its datasets; unseen: the held-out one, None without.
        dropped: by source and limit; quarantined: items of its sources by kind.
        sizes: (modality frames x height x width as trained, items), the most frequent first; durations: (seconds of
            clips as trained, clips); tokens: (tokens of a sample, items); all three for histograms.
        seconds, tokens_per_sample: {min, median, max}, of clips and of all items; tokens_in_all: of all items.
        packing: None where no steps can be laid out.
        samples: that train.steps take; samples_counted: False where they were reckoned from the mean step; epochs:
            samples / used items.
        groups: of the mix; () without one.
    """

    name: str
    start: str
    steps: int
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    sources: tuple[SourceReport, ...]
    unseen: SourceReport | None
    dropped: tuple[DroppedReport, ...]
    quarantined: dict[str, int]
    sizes: tuple[tuple[str, int], ...]
    durations: tuple[tuple[str, int], ...]
    tokens: tuple[tuple[str, int], ...]
    seconds: dict[str, float]
    tokens_per_sample: dict[str, float]
    tokens_in_all: int
    packing: PackingReport | None
    samples: int
    samples_counted: bool
    epochs: float
    groups: tuple[GroupReport, ...]
    cache: CacheReport

    @property
    def ok(self) -> bool:
        return not self.reasons

    def sums(self) -> dict[str, int]:
        """listed, images, videos, dropped and quarantined of all sources."""
        keys = ("listed", "images", "videos", "dropped", "quarantined")
        return {key: sum(getattr(source, key) for source in self.sources) for key in keys}

    @property
    def used(self) -> int:
        return sum(source.images + source.videos for source in self.sources)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        content = asdict(self)
        for key in ("sizes", "durations", "tokens"):
            content[key] = dict(content[key])
        return {
            "name": self.name,
            "ok": self.ok,
            **self.sums(),
            **{
                key: value
                for key, value in content.items()
                if key not in ("name", "dropped", "quarantined")
            },
            "dropped_by_limit": content["dropped"],
            "quarantined_by_kind": self.quarantined,
            "cache": {**content["cache"], "total": self.cache.total},
        }


@dataclass(frozen=True)
class RecipeReport:
    """What `goku.recipe_doctor.doctor_recipe` found. `ok` when every stage can train.

    quarantined: every item that some stage sets aside; remarks: on used items; cache: of all stages together, each
    file counted once.
    """

    path: str
    quick: bool
    stages: tuple[StageReport, ...]
    quarantined: tuple[NamedReport, ...]
    remarks: tuple[NamedReport, ...]
    cache: CacheReport
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(stage.ok for stage in self.stages)

    @property
    def verdict(self) -> str:
        """The last line of the text."""
        bad = [stage.name for stage in self.stages if not stage.ok]
        if not bad:
            return "Every stage can train." if len(self.stages) > 1 else "Ready for training."
        if len(self.stages) == 1:
            return "Not ready for training."
        return f"{len(bad)} of {len(self.stages)} stages cannot train: {', '.join(bad)}."

    def to_json(self) -> str:
        """Everything but the sound items themselves, as one JSON object."""
        content = {
            "path": self.path,
            "ok": self.ok,
            "quick": self.quick,
            "stages": [stage.content() for stage in self.stages],
            "quarantined": [asdict(each) for each in self.quarantined],
            "remarks": [asdict(each) for each in self.remarks],
            "cache": {**asdict(self.cache), "total": self.cache.total},
            "notes": list(self.notes),
        }
        # ASCII, so that a name that is no Unicode is JSON's own escape, whatever it is printed or written to.
        return json.dumps(content, indent=2)

    def to_text(self) -> str:
        """A table of the stages, then each of them, then every quarantined item and the first remarks."""
        how = "headers only" if self.quick else "everything decoded"
        lines = [f"{self.path} ({how})", "", *_table(self.stages)]
        for stage in self.stages:
            lines += ["", *_stage_lines(stage)]
        lines += ["", f"Caches of all stages: {self.cache.words()}"]
        everywhere = tuple(stage.name for stage in self.stages)
        if self.notes:
            lines += ["", "Notes", *(f"  {note}" for note in self.notes)]
        if self.remarks:
            rows = [_with_stages(each, everywhere) for each in self.remarks]
            lines += ["", "Remarks on used items", *some_lines(rows)]
        if self.quarantined:
            rows = [_with_stages(each, everywhere) for each in self.quarantined]
            lines += ["", "Quarantined", *(f"  {row}" for row in rows)]
        return "\n".join([*lines, "", self.verdict])


def stage_row(stage: StageReport) -> list[str]:
    """The cells of a stage under `STAGE_HEAD`."""
    sums, packing = stage.sums(), stage.packing
    cells = [stage.name, stage.start or "-"]
    cells += [f"{sums[key]:,}" for key in ("images", "videos", "dropped", "quarantined")]
    if packing is None:
        cells += ["-"] * 4
    else:
        cells += [
            f"{packing.tokens_in_step:,.0f}",
            f"{packing.samples_per_step:,.1f}",
            f"{packing.packs_per_step:,.1f}",
            f"{packing.efficiency:.0%}",
        ]
    cells.append(f"{stage.steps:,}")
    cells.append("-" if packing is None else f"{stage.epochs:,.1f}")
    return [*cells, in_bytes(stage.cache.total), "yes" if stage.ok else "NO"]


STAGE_HEAD = (
    "stage", "from", "images", "videos", "dropped", "quarantined", "tokens/step", "samples/step", "packs/step",
    "full", "steps", "epochs", "cache", "can train",
)  # fmt: skip


def _table(stages: Sequence[StageReport]) -> list[str]:
    rows = [list(STAGE_HEAD), *(stage_row(stage) for stage in stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _stage_lines(stage: StageReport) -> list[str]:
    lines = [stage.name, *(f"  cannot train    {reason}" for reason in stage.reasons)]
    for source in (*stage.sources, *((stage.unseen,) if stage.unseen else ())):
        lines.append(f"  {source_words(source)}")
    for left in stage.dropped:
        lines.append(f"  dropped         {dropped_words(left)}")
    if stage.quarantined:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in stage.quarantined.items())
        lines.append(f"  quarantined     {kinds}")
    for group in stage.groups:
        lines.append(f"  mix             {group_words(group)}")
    if stage.seconds:
        lines.append(f"  clip seconds    {three(stage.seconds, '.2f')} (min / median / max)")
    if stage.tokens_per_sample:
        tokens = three(stage.tokens_per_sample, ",.0f")
        lines.append(f"  tokens/sample   {tokens}, {stage.tokens_in_all:,} in all")
    if stage.packing is not None:
        lines += [*packing_lines(stage.packing), f"  {steps_words(stage)}"]
    lines.append(f"  cache           {stage.cache.words()}")
    if stage.sizes:
        lines += ["  as trained (frames x height x width)"]
        lines += [f"  {line}" for line in bars(stage.sizes)]
    return [*lines, *(f"  note            {note}" for note in stage.notes)]


def source_words(source: SourceReport) -> str:
    """One line about a dataset of a stage."""
    return (
        f"{source.name or 'data':<{_NAME_COLUMN}}    {counted(source.images, 'image')} and "
        f"{counted(source.videos, 'video')} used of {source.listed:,} listed, {source.dropped:,} dropped, "
        f"{source.quarantined:,} quarantined ({source.path})"
    )


def dropped_words(left: DroppedReport) -> str:
    """One line about what a limit leaves out."""
    names = ", ".join(left.names) + (", ..." if left.count > len(left.names) else "")
    where = f"{left.source}: " if left.source else ""
    return f"{left.count:,}  {left.reason} ({where}{names})"


def group_words(group: GroupReport) -> str:
    """One line about a group of the mix."""
    return (
        f"{group.name}: {group.asked:.1%} of samples asked, {group.drawn} of {BLOCK} drawn, {group.token_share:.1%} "
        f"of tokens; its {counted(group.items, 'item')} {group.passes:,.1f} times"
    )


def steps_words(stage: StageReport) -> str:
    """One line about how far train.steps go."""
    about = "" if stage.samples_counted else "about "
    return (
        f"{counted(stage.steps, 'step')} take {about}{counted(stage.samples, 'sample')}, {stage.epochs:,.2f} epochs "
        f"of {counted(stage.used, 'item')}"
    )


def _with_stages(each: NamedReport, everywhere: tuple[str, ...]) -> str:
    return str(each) if each.stages == everywhere else f"{each} ({', '.join(each.stages)})"
