"""`goku doctor` on a recipe or a run: what every stage would do with its data, before any of them trains.

Every file is decoded once for all stages (see `goku.data.survey`). A stage is then arithmetic by the functions that
`prepare` and the trainer use: limits, duplicates, the mix, the cut to a pack, the stream, steps and packs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from goku.batch import trained_grid
from goku.data import DataConfig, DataError, Dataset, MixedDataset, MixedStream, Problem
from goku.data.cached import CachedDataset
from goku.data.dataset import dataset_of, joined, nothing_left
from goku.data.doctor import item_report
from goku.data.errors import SKIP_BAD
from goku.data.layout import Layout, lay_out
from goku.data.listings import Scans
from goku.data.mixing import BLOCK
from goku.data.record import counted
from goku.data.report import ItemReport, as_trained, durations, findings, octaves, spread
from goku.data.sources import Source
from goku.data.stage_report import (
    DroppedReport,
    GroupReport,
    NamedReport,
    RecipeReport,
    SourceReport,
    StageReport,
)
from goku.data.survey import Survey
from goku.packing import sample_cost
from goku.parallelize import ParallelDims
from goku.predicted_cache import PredictedCache
from goku.prepare import unseen_data
from goku.recipe import Recipe
from goku.run_config import RunConfig
from goku.validation import Cases, read_validation

__all__ = ["doctor_recipe"]

# Items that a stage's reasons name one by one.
_NAMED = 3
UNSEEN = "unseen"
"""What the held-out dataset is called among the sources."""


def doctor_recipe(
    recipe: Recipe | RunConfig,
    *,
    stage: str | None = None,
    quick: bool = False,
    ranks: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    path: str = "",
) -> RecipeReport:
    """Examine the data of every stage, or of the stage `stage` alone; a run counts as one stage.

    Args:
        quick: read headers only, in seconds; misses damage inside files and equal files.
        ranks: processes that will train; None: the fewest that each stage's `parallel` can mean.
        workers: decoding processes; None: the most that a stage's data.workers says.
        progress: called as progress(done, total) after every file.
        path: the recipe's file, for the report.

    Faults of the data are in the report, not raised. ValueError for a stage that is none, or ranks < 1. Nothing is
    written.
    """
    if ranks is not None and ranks < 1:
        raise ValueError(f"ranks is {ranks}; allowed: 1 or more")
    stages = _stages(recipe, stage)
    scans = Scans()
    held = [_Held.of(each.config, scans) for each in stages]
    configs = [each.config.data for each in stages] + [h.data for h in held if h.data is not None]
    survey = Survey(configs, quick=quick, workers=workers, progress=progress, scans=scans)
    cache = PredictedCache([each.config for each in stages], quick=quick)
    named = _Named()
    reports = tuple(
        _Examination(each, held_out, survey, cache, named, ranks).report()
        for each, held_out in zip(stages, held, strict=True)
    )
    return RecipeReport(
        path=path,
        quick=quick,
        stages=reports,
        quarantined=named.rows(quarantined=True),
        remarks=named.rows(quarantined=False),
        cache=cache.total(),
        notes=_notes(stages, survey),
    )


@dataclass(frozen=True)
class _Stage:
    name: str
    start: str
    config: RunConfig


def _stages(recipe: Recipe | RunConfig, only: str | None) -> list[_Stage]:
    if isinstance(recipe, Recipe):
        chosen = recipe.stages if only is None else (recipe.stage(only),)
        return [_Stage(each.name, each.start or "", each.config) for each in chosen]
    if only is not None:
        raise ValueError(f"stage is {only!r}, but a run has none; allowed: with a recipe")
    return [_Stage("run", "", recipe)]


def _notes(stages: Sequence[_Stage], survey: Survey) -> tuple[str, ...]:
    """What the listings passed by, once for each dataset."""
    notes: dict[str, None] = {}
    for stage in stages:
        try:
            sources = survey.sources(stage.config.data)
        except DataError:
            continue  # the stage's reasons say it
        for source in sources:
            where = f"{source.name}: " if source.name else ""
            notes.update(dict.fromkeys(where + note for note in source.notes))
    return tuple(notes)


@dataclass(frozen=True)
class _Held:
    """A stage's held-out data as training would take it; error: why it cannot."""

    data: DataConfig | None
    error: DataError | None = None

    @classmethod
    def of(cls, config: RunConfig, scans: Scans) -> _Held:
        try:
            return cls(unseen_data(config, scans))
        except DataError as error:
            return cls(None, error)


class _Named:
    """What is said of single items, each thing once with the stages that say it."""

    def __init__(self) -> None:
        self._stages: dict[tuple[bool, str, str, str, str], dict[str, None]] = {}

    def add(
        self, stage: str, source: str, name: str, text: str, kind: str = "", *, bad: bool
    ) -> None:
        self._stages.setdefault((bad, source, name, text, kind), {})[stage] = None

    def rows(self, *, quarantined: bool) -> tuple[NamedReport, ...]:
        return tuple(
            NamedReport(source, name, text, tuple(stages), kind)
            for (bad, source, name, text, kind), stages in self._stages.items()
            if bad == quarantined
        )


@dataclass
class _Data:
    """A data section as training would see it. dataset: None where it cannot be made; items: as they are trained."""

    sources: list[Source] = field(default_factory=list)
    parts: list[CachedDataset] = field(default_factory=list)
    dataset: Dataset | None = None
    items: list[ItemReport] = field(default_factory=list)
    fits: bool = True


class _Examination:
    """One stage."""

    def __init__(
        self,
        stage: _Stage,
        held: _Held,
        survey: Survey,
        cache: PredictedCache,
        named: _Named,
        ranks: int | None,
    ) -> None:
        self.stage, self.config = stage, stage.config
        self.held, self.survey, self.cache, self.named = held, survey, cache, named
        self.reasons: list[str] = []
        self.dims = self._dims(ranks)

    def report(self) -> StageReport:
        config, stage = self.config, self.stage
        self.reasons += self.cache.faults
        cases = Cases()
        try:
            cases = read_validation(config)
        except ValueError as error:
            self.reasons.append(str(error))
        data = self._data(config.data, "")
        unseen = None
        if self.held.data is not None:
            unseen = self._data(self.held.data, UNSEEN)
        elif self.held.error is not None:
            self._refused(self.held.error, UNSEEN)
            self._problems(self.held.error.problems, "", UNSEEN)
        layout = self._layout(data)
        samples = 0 if layout is None else layout.samples
        seconds = [item.seconds for item in data.items if item.modality == "video"]
        tokens = [item.tokens for item in data.items]
        used = len(data.items)
        packing = None if layout is None else layout.packing
        everything = [data, *([unseen] if unseen else [])]
        return StageReport(
            name=stage.name,
            start=stage.start,
            steps=config.train.steps,
            reasons=tuple(self.reasons),
            notes=(
                *findings(data.items, packing, quick=self.survey.quick),
                *self._without_unseen(unseen),
            ),
            sources=tuple(
                _counts(*each, "") for each in zip(data.sources, data.parts, strict=True)
            ),
            unseen=_counts(unseen.sources[0], unseen.parts[0], UNSEEN)
            if unseen and unseen.parts
            else None,
            dropped=_dropped(data),
            quarantined=dict(
                Counter(p.kind for part in data.parts for p in part.report.problems).most_common()
            ),
            sizes=tuple(as_trained(data.items)),
            durations=tuple(durations(seconds)),
            tokens=tuple(octaves(tokens)),
            seconds=spread(seconds),
            tokens_per_sample=spread(tokens),
            tokens_in_all=sum(tokens),
            packing=packing,
            samples=samples,
            samples_counted=layout is None or layout.counted,
            epochs=samples / used if used else 0.0,
            groups=_groups(data, samples, config.seed) if layout is not None else (),
            cache=self.cache.stage(
                config, [(d.sources, d.parts) for d in everything], cases.prompts
            ),
        )

    def _without_unseen(self, unseen: _Data | None) -> list[str]:
        path = self.config.unseen
        if path is None or self.held.error is not None or (unseen and unseen.items):
            return []
        if unseen is not None and unseen.dataset is None:
            return []  # the reasons say it
        return [f"nothing of {path} is left by the mix and the limits: no unseen loss"]

    def _dims(self, ranks: int | None) -> ParallelDims:
        parallel = self.config.parallel
        fewest = parallel.dp_replicate * max(1, parallel.dp_shard) * parallel.sp
        try:
            return parallel.resolve(fewest if ranks is None else ranks)
        except ValueError as error:
            self.reasons.append(f"parallel: {error}")
            return parallel.resolve(fewest)

    def _data(self, data: DataConfig, called: str) -> _Data:
        """The section as training takes it; what keeps it from training goes to the reasons."""
        try:
            sources = self.survey.sources(data)
        except DataError as error:
            self._refused(error, called)
            return _Data()
        found = _Data(sources)
        for source in sources:
            part = dataset_of(source, self.survey.outcomes(source))
            found.parts.append(part)
            name = called or source.name
            self._problems(part.report.problems, source.prefix, name)
            for remark in part.report.remarks:
                bare = remark.name.removeprefix(source.prefix)
                self.named.add(self.stage.name, name, bare, remark.text, bad=False)
        built = list(zip(sources, found.parts, strict=True))
        for config in (data, replace(data, skip_bad=True)):
            try:
                # Of held-out items the limits may leave none: there is no such loss then.
                found.dataset = joined(config, built, may_be_empty=called == UNSEEN)
                break
            except DataError as error:
                self._refused(error, called, skip_bad=config.skip_bad)
        if found.dataset is None:
            # Where no source has an item left, the unusable ones are all that `joined` speaks of.
            for source, part in built:
                if part.report.dropped and not part.items:
                    self._refused(nothing_left(source, part.report), called)
        self._items(found, called)
        return found

    def _items(self, found: _Data, called: str) -> None:
        """Every item as it is trained."""
        config = self.config
        last = config.model.condition == "frames" and -1 in config.conditioning.frames
        refused: list[str] = []
        for part in found.parts:
            for item, entry in zip(part.items, part.entries, strict=True):
                grid = item.grid
                try:
                    grid = trained_grid(item, config.packing, self.dims.sp, last)
                except ValueError as error:
                    refused.append(str(error))
                found.items.append(
                    item_report(item.name, entry.record, entry.plan, part.config, grid)
                )
        found.fits = not refused
        where = f"{called}: " if called else ""
        self.reasons += [where + reason for reason in refused[:_NAMED]]
        if len(refused) > _NAMED:
            more = counted(len(refused) - _NAMED, "more item")
            self.reasons.append(f"{where}the same of {more}")

    def _refused(self, error: DataError, called: str, *, skip_bad: bool = False) -> None:
        where = f"{called}: " if called else ""
        told = SKIP_BAD in error.summary or skip_bad or self.config.data.skip_bad
        reason = f"{where}{error.summary}{SKIP_BAD if error.problems and not told else ''}"
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _problems(self, problems: Sequence[Problem], prefix: str, source: str) -> None:
        for problem in problems:
            bare = problem.name.removeprefix(prefix)
            self.named.add(self.stage.name, source, bare, problem.reason, problem.kind, bad=True)

    def _layout(self, data: _Data) -> Layout | None:
        config, model = self.config, self.config.model
        if data.dataset is None or not data.items:
            return None
        try:
            stream = data.dataset.stream(config.seed)
        except ValueError as error:  # a weight too small for one place in 1024
            self.reasons.append(f"mix: {error}")
            return None
        if not data.fits:
            return None
        return lay_out(
            [item.tokens for item in data.items],
            stream,
            config.packing,
            self.dims.dp_replicate * self.dims.dp_shard,
            lambda length: sample_cost(length, model.dim, text_dim=model.text_dim),
            config.train.steps,
        )


def _counts(source: Source, part: CachedDataset, called: str) -> SourceReport:
    images = sum(item.modality == "image" for item in part.items)
    return SourceReport(
        name=called or source.name,
        path=source.path,
        listed=part.report.listed,
        images=images,
        videos=len(part.items) - images,
        dropped=len(part.report.dropped),
        quarantined=len(part.report.problems),
    )


def _dropped(data: _Data) -> tuple[DroppedReport, ...]:
    rows = []
    for source, part in zip(data.sources, data.parts, strict=True):
        names: dict[str, list[str]] = {}
        for dropped in part.report.dropped:
            # The limit is what the sentence ends with; the item's own numbers stand before it.
            limit = dropped.reason.rpartition(", ")[2]
            names.setdefault(limit, []).append(dropped.name.removeprefix(source.prefix))
        rows += [
            DroppedReport(source.name, limit, len(found), tuple(found[:_NAMED]))
            for limit, found in names.items()
        ]
    return tuple(rows)


def _groups(data: _Data, samples: int, seed: int) -> tuple[GroupReport, ...]:
    if not isinstance(data.dataset, MixedDataset):
        return ()
    groups = data.dataset.groups()
    if not groups:
        return ()
    stream = MixedStream(groups, seed)
    total = sum(group.weight for group in groups)
    tokens = [
        drawn * sum(data.items[i].tokens for i in group.indices) / len(group.indices)
        for group, drawn in zip(groups, stream.counts, strict=True)
    ]
    return tuple(
        GroupReport(
            name=group.name,
            items=len(group.indices),
            asked=group.weight / total,
            drawn=drawn,
            token_share=own / sum(tokens),
            passes=samples * drawn / BLOCK / len(group.indices),
        )
        for group, drawn, own in zip(groups, stream.counts, tokens, strict=True)
    )
