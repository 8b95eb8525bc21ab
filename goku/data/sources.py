"""The datasets of a data section, one after the other: `sources_of`, `list_records`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from goku.data.config import DataConfig, SourceConfig
from goku.data.errors import SKIP_BAD, DataError, Dropped, Problem
from goku.data.limits import dropped_by_suffix
from goku.data.manifest import scan
from goku.data.record import Record, Scan, counted, with_motion

Scanner = Callable[..., Scan]
"""`goku.data.manifest.scan`, or what keeps its answers."""


@dataclass(frozen=True)
class Source:
    """One dataset as its listing says. prefix: what its items' names get; config: the data section; records: those that
    the mix wants, their captions final; dropped: the others; notes, place, files: as in `Scan`."""

    name: str
    prefix: str
    path: str
    config: DataConfig
    records: Sequence[Record]
    problems: Sequence[Problem]
    dropped: Sequence[Dropped]
    notes: Sequence[str]
    place: str
    files: Mapping[str, int]

    @property
    def listed(self) -> int:
        return len(self.records) + len(self.problems) + len(self.dropped)


def sources_of(config: DataConfig, scanner: Scanner = scan) -> list[Source]:
    """Every dataset of the section, in the file's order; with a mix those that have a weight. DataError as `scan`."""
    if config.sources is None:
        alone = SourceConfig(path=config.path or "")
        return [_source("", alone, config, scanner, several=False)]
    names = [
        name
        for name in config.sources
        if config.mix is None or (name in config.mix and _has_weight(config, name))
    ]
    several = len(config.sources) > 1
    return [_source(name, config.sources[name], config, scanner, several=several) for name in names]


def list_records(config: DataConfig, scanner: Scanner = scan) -> list[Record]:
    """Every record of every source, as `prepare` would try them. DataError listing the bad ones, unless skip_bad leaves
    them out and there are others."""
    sources = sources_of(config, scanner)
    records = [
        replace(record, name=source.prefix + record.name) if source.prefix else record
        for source in sources
        for record in source.records
    ]
    problems = [
        replace(problem, name=source.prefix + problem.name, source=source.name)
        for source in sources
        for problem in source.problems
    ]
    if problems and not (config.skip_bad and records):
        listed = sum(source.listed for source in sources)
        where = config.path or "data.sources"
        what = f"{where}: {len(problems)} of {counted(listed, 'item')} cannot be used, by what is listed alone "
        what += "(goku doctor opens the files, too)"
        raise DataError(what + ("" if config.skip_bad else SKIP_BAD), problems)
    return records


def check_listing(config: DataConfig, scanner: Scanner = scan) -> None:
    """DataError where the listings alone show that `prepare` must refuse: a source that cannot be listed, bad items
    that may not be left out, a source without any item, clips drawn from a source that has none. Decodes nothing."""
    list_records(config, scanner)
    for source in sources_of(config, scanner):
        if not source.records:
            reasons = "; ".join(entry.reason for entry in source.dropped[:3])
            why = f": {reasons}" if reasons else ""
            raise DataError(
                f"{source.path}: none of {counted(source.listed, 'item')} can be used{why}"
            )
        weights = (config.mix or {}).get(source.name)
        # A clip of one usable frame is drawn as a still, so that of stills nothing is known yet.
        if weights is not None and weights.video > 0 and all(r.is_image for r in source.records):
            raise DataError(
                f"mix.{source.name}.video is {weights.video:g}, but {source.path} lists no video"
            )


def _has_weight(config: DataConfig, name: str) -> bool:
    weights = (config.mix or {})[name]
    return weights.image > 0 or weights.video > 0


def _source(
    name: str, own: SourceConfig, config: DataConfig, scanner: Scanner, *, several: bool
) -> Source:
    follow = config.follow_links if own.follow_links is None else own.follow_links
    template = own.motion_caption or config.motion_caption
    found = scanner(own.path, own.form, follow_links=follow)
    records: list[Record] = []
    dropped: list[Dropped] = []
    for record in found.records:
        reason = dropped_by_suffix(record, config, name)
        if reason is None:
            records.append(with_motion(record, template))
        else:
            dropped.append(Dropped(record.name, reason))
    prefix = f"{name}:" if several else ""
    return Source(
        name, prefix, own.path, config, records, found.problems, dropped,
        found.notes, found.place, found.files,
    )  # fmt: skip
