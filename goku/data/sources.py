"""The datasets of a data section, one after the other: `sources_of`, `list_records`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from goku.data.config import DataConfig, SourceConfig
from goku.data.errors import DataError, Dropped, Problem
from goku.data.limits import dropped_by_suffix
from goku.data.manifest import scan
from goku.data.record import Record, with_motion


@dataclass(frozen=True)
class Source:
    """One dataset as its listing says. prefix: what its items' names get; config: the data section; records: those that
    the mix wants, their captions final; dropped: the others; notes: on what the listing passed by."""

    name: str
    prefix: str
    path: str
    config: DataConfig
    records: Sequence[Record]
    problems: Sequence[Problem]
    dropped: Sequence[Dropped]
    notes: Sequence[str]

    @property
    def listed(self) -> int:
        return len(self.records) + len(self.problems) + len(self.dropped)


def sources_of(config: DataConfig) -> list[Source]:
    """Every dataset of the section, in the file's order; with a mix those that have a weight. DataError as `scan`."""
    if config.sources is None:
        return [_source("", SourceConfig(path=config.path or ""), config, several=False)]
    names = [
        name
        for name in config.sources
        if config.mix is None or (name in config.mix and _has_weight(config, name))
    ]
    several = len(config.sources) > 1
    return [_source(name, config.sources[name], config, several=several) for name in names]


def list_records(config: DataConfig) -> list[Record]:
    """Every record of every source, as `prepare` would try them. DataError listing the bad ones, unless skip_bad leaves
    them out and there are others."""
    sources = sources_of(config)
    records = [
        replace(record, name=source.prefix + record.name)
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
        raise DataError(f"{where}: {len(problems)} of {listed} items cannot be used", problems)
    return records


def _has_weight(config: DataConfig, name: str) -> bool:
    weights = (config.mix or {})[name]
    return weights.image > 0 or weights.video > 0


def _source(name: str, own: SourceConfig, config: DataConfig, *, several: bool) -> Source:
    follow = config.follow_links if own.follow_links is None else own.follow_links
    template = own.motion_caption or config.motion_caption
    found = scan(own.path, own.form, follow_links=follow)
    records: list[Record] = []
    dropped: list[Dropped] = []
    for record in found.records:
        reason = dropped_by_suffix(record, config, name)
        if reason is None:
            records.append(with_motion(record, template))
        else:
            dropped.append(Dropped(record.name, reason))
    prefix = f"{name}:" if several else ""
    return Source(name, prefix, own.path, config, records, found.problems, dropped, found.notes)
