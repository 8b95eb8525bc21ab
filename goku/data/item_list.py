"""The items that a run began with, kept beside its checkpoints: what a run that goes on is held to.

Which items a dataset gives depends on what can be read when it is asked; the order of training depends on which they
are. So the list decides: what is not on it is left out, and what is on it and cannot be had any more keeps its place.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from goku.data.errors import Dropped, Problem
from goku.data.filler import FROM_CACHE, Entry, Filler
from goku.data.latents import FileIdentity, Plan
from goku.data.record import Record, counted
from goku.data.sources import Source
from goku.data.transform import Geometry
from goku.whole_file import write_whole

FILE_NAME = "items.json.gz"
"""What the list is called in a run's folder."""

LEFT_OUT = "is not among the items that the run began with"
"""Why an item is left out that has come since."""

_VERSION = 1
_SHOWN = 3

_fields = attrgetter(*Geometry.__dataclass_fields__)
"""`dataclasses.astuple` of a geometry, in a thirtieth of its time."""

Row = list[Any]
"""[name, caption, weight, key of the latent], and [[caption, weight], ...] where there are several captions."""


def row_of(entry: Entry) -> Row:
    """What training sees of an item."""
    record = entry.record
    row: Row = [record.name, record.text, record.weight, entry.key]
    if record.captions:
        row.append([list(pair) for pair in record.captions])
    return row


@dataclass(frozen=True)
class SourceItems:
    """The items of one source in order. geometries: the fields of each one's `Geometry`."""

    name: str
    rows: Sequence[Row]
    geometries: Sequence[Sequence[int]]

    @classmethod
    def of(cls, name: str, entries: Sequence[Entry]) -> SourceItems:
        """Those of a source's entries."""
        return cls(name, [row_of(e) for e in entries], [_fields(e.geometry) for e in entries])

    def fingerprint(self) -> str:
        """sha256 of the rows; the geometries are part of the keys."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


@dataclass(frozen=True)
class ItemList:
    """The items of a dataset. mixed: whether it names its sources; mix: the weights (image, video) of each, if any."""

    sources: Sequence[SourceItems]
    mixed: bool = False
    mix: Mapping[str, Sequence[float]] | None = None

    def fingerprint(self) -> str:
        """Hash of all that training sees: names, captions, weights, and latents by their content (VAE, geometry and
        media file), in order; of several sources their names and the mix as well."""
        if not self.mixed:
            return self.sources[0].fingerprint()
        parts = [[source.name, source.fingerprint()] for source in self.sources]
        content = [parts, None if self.mix is None else {k: list(v) for k, v in self.mix.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def source(self, name: str) -> SourceItems | None:
        """The items of the source of that name."""
        return next((source for source in self.sources if source.name == name), None)

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        content = {
            "version": _VERSION,
            "mixed": self.mixed,
            "mix": self.mix,
            "sources": [
                {"name": s.name, "rows": s.rows, "geometries": s.geometries} for s in self.sources
            ],
        }
        packed = gzip.compress(json.dumps(content).encode(), 1, mtime=0)
        write_whole(path, packed, durable=True)

    @classmethod
    def read(cls, path: Path) -> ItemList | None:
        """None where there is none, or nothing that this version can read."""
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
            if content["version"] != _VERSION:
                return None
            sources = [
                SourceItems(s["name"], s["rows"], s["geometries"]) for s in content["sources"]
            ]
            return cls(sources, content["mixed"], content["mix"])
        except (FileNotFoundError, gzip.BadGzipFile, zlib.error, EOFError):
            return None
        except (ValueError, KeyError, TypeError):  # not JSON, or other JSON
            return None

    @classmethod
    def of_run(cls, folder: Path, fingerprint: str) -> ItemList | None:
        """That in a run's folder, where it is the one whose fingerprint the run's checkpoint has; else None."""
        found = cls.read(folder / FILE_NAME)
        return found if found is not None and found.fingerprint() == fingerprint else None

    def differences(self, now: ItemList) -> list[str]:
        """What of it is otherwise in `now`, a line each: the first three items, and how many more."""
        lines: list[str] = []
        gone: list[str] = []
        new: list[str] = []
        for source in self.sources:
            other = now.source(source.name)
            prefix = f"{source.name}:" if self.mixed and len(self.sources) > 1 else ""
            found = {row[0]: row for row in other.rows} if other is not None else {}
            for row in source.rows:
                what = _difference(row, found.pop(row[0], None))
                if what:
                    (gone if what == _GONE else lines).append(f"{prefix}{row[0]}: {what}")
            new += [f"{prefix}{name}: is new" for name in found]
        lines += [*gone, *new]  # which alone are no hindrance
        more = len(lines) - _SHOWN
        return [*lines[:_SHOWN], *([f"and {counted(more, 'more item')}"] if more > 0 else [])]


_GONE = "is no longer there"


def _difference(before: Row, now: Row | None) -> str:
    if now is None:
        return _GONE
    names = ("name", "caption", "weight", "")
    for name, old, new in zip(names, before, now, strict=False):
        if old != new and name:
            return f"its {name} was {old!r}, is {new!r}"
    if before[3] != now[3]:
        return "its media, its geometry, the VAE or the decoding libraries are others"
    return "" if before == now else "its captions are others"


@dataclass(frozen=True)
class Held:
    """Outcomes that a list has been applied to. lost: by name, the items that keep their place and cannot be had."""

    outcomes: Sequence[Entry | Problem | Dropped]
    lost: Mapping[str, Problem] = field(default_factory=dict)


def hold(
    kept: SourceItems,
    source: Source,
    outcomes: Sequence[Entry | Problem | Dropped],
    filler: Filler,
) -> Held | None:
    """The outcomes of a source as the list wants them: exactly its items, in its order.

    An item that is not on it is left out, or is a duplicate where one before it has its content and captions. One
    that is on it and cannot be used now is trained from its cached latent where its media are at fault and the latent
    is there; else it is lost. So is one that is listed no more, whatever is cached of it: it may have been taken out on
    purpose, and is not to be trained on then. None when no such change gives the listed items: one of them has become
    another (its captions, its media, its name), or the limits or the mix leave it out.
    """
    rows = {row[0]: row for row in kept.rows}
    now: dict[str, Entry] = {}
    bad = {problem.name: problem for problem in source.problems}
    rest: list[Problem | Dropped] = []
    twins: list[Problem] = []
    # Of a latent, the frames that are asked of the file and captions.
    first: dict[tuple[str, int | None, tuple[str, ...]], str] = {}
    extra: set[str] = set()
    records = {record.name: record for record in source.records}
    # A run that leaves out what cannot be used has done so since it began; in another one that has come since.
    since = not source.config.skip_bad
    for outcome in outcomes:
        if isinstance(outcome, Entry):
            name = outcome.record.name
            if name in rows:
                if row_of(outcome) != rows[name]:
                    return None
                now[name] = outcome
                first.setdefault(_content(outcome), name)
            elif not since and _content(outcome) in first:
                twins.append(duplicate(name, first[_content(outcome)]))
            else:
                rest.append(Dropped(name, LEFT_OUT))
                extra.add(outcome.key)
        elif isinstance(outcome, Problem):
            bad[outcome.name] = outcome
            if outcome.name not in rows:
                # What has come since is left out, whole or not: perhaps it is still being written.
                rest.append(Dropped(outcome.name, LEFT_OUT) if since else outcome)
            elif (record := records.get(outcome.name)) is not None:
                row = rows[outcome.name]
                first.setdefault((row[3], record.num_frames, _prompts(row)), outcome.name)
        elif outcome.name in rows:
            return None
        else:
            rest.append(outcome)
    known = {problem.name for problem in source.problems}
    entries: list[Entry] = []
    lost: dict[str, Problem] = {}
    if any(dropped.name in rows for dropped in source.dropped):
        return None  # it is there, and not wanted any more
    for row, geometry in zip(kept.rows, kept.geometries, strict=True):
        name, key = row[0], row[3]
        if name in now:
            entries.append(now[name])
            continue
        if name not in records and key in extra:
            return None  # renamed
        problem = bad.get(name, Problem(name, "is no longer listed", "listing"))
        entry = _placeholder(row, Geometry(*geometry), records.get(name))
        if name in records and problem.kind == "damaged" and not filler.lacking(entry):
            remark = f"{problem.reason}: {FROM_CACHE}"
            entry = replace(entry, remarks=(remark,))
        else:
            lost[name] = problem
            if name not in known:  # the source names its own
                rest.append(problem)
        entries.append(entry)
    return Held([*entries, *rest, *twins], lost)


def duplicate(name: str, twin: str) -> Problem:
    """Of an item whose content, range and captions an earlier one has."""
    return Problem(name, f"duplicate of {twin} (same content and caption)", "duplicate")


def _content(entry: Entry) -> tuple[str, int | None, tuple[str, ...]]:
    return entry.key, entry.record.num_frames, entry.record.prompts


def _prompts(row: Row) -> tuple[str, ...]:
    """`Record.prompts` of a row."""
    return tuple(str(text) for text, _ in row[4]) if len(row) > 4 else (str(row[1]),)


def _placeholder(row: Row, geometry: Geometry, record: Record | None) -> Entry:
    """The item of a row whose media cannot be had: what training sees of it, without what they were."""
    name, text, weight, key = row[:4]
    captions = tuple((str(text), float(share)) for text, share in (row[4] if len(row) > 4 else ()))
    record = record or Record(path="", text=text, name=name)
    return Entry(
        replace(record, text=text, weight=weight, captions=captions),
        Plan(geometry, geometry.frames, 0, 0.0),
        key,
        FileIdentity(0, f"latent {key}"),  # no file's
    )
