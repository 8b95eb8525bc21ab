"""What a dataset lists: a folder with sidecar captions, or a JSONL/CSV manifest -> `Record`s.

Columns (either name of an alias; other columns are ignored):
    path        path, media_path, video, file_name    relative to the manifest's folder, or absolute
    text        text, caption, prompt, cap
    id          id, name                              optional, unique; else the path (and range)
    start_frame, num_frames                           optional range of source frames
    weight                                            optional sampling-independent loss weight > 0
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from goku.data.errors import DataError, Problem

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
ALIASES: dict[str, tuple[str, ...]] = {
    "path": ("path", "media_path", "video", "file_name"),
    "text": ("text", "caption", "prompt", "cap"),
    "id": ("id", "name"),
    "start_frame": ("start_frame",),
    "num_frames": ("num_frames",),
    "weight": ("weight",),
}
# Facts about the media that other tools write; we measure them, so they are not read.
_MEASURED = ("height", "width", "fps", "aspect_ratio", "resolution", "duration")
_FOLDER_MANIFESTS = ("metadata.jsonl", "metadata.csv")
# Where a row stands, and its columns, or what is wrong with it.
_Row = tuple[str, Mapping[str, object] | str]


@dataclass(frozen=True)
class Record:
    """One training item as the dataset lists it.

    Attributes:
        path: absolute path of the media file.
        text: caption, never empty.
        name: unique in the dataset; what errors and reports call the item.
        start_frame, num_frames: range of source frames in display order, before any resampling;
            None means to the end.
        weight: the sample's weight in the loss, > 0.
    """

    path: str
    text: str
    name: str
    start_frame: int = 0
    num_frames: int | None = None
    weight: float = 1.0

    @property
    def is_image(self) -> bool:
        return Path(self.path).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Scan:
    """`records` that can be tried, `problems` of those that cannot, `notes` on what was passed by
    (files that are neither media nor caption, media that a folder's manifest does not list), in
    dataset order."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def listed(self) -> int:
        return len(self.records) + len(self.problems)


def read_records(path: str | Path) -> list[Record]:
    """Every record of the dataset at `path`; DataError that lists every bad one otherwise."""
    found = scan(path)
    if found.problems:
        raise DataError(
            f"{path}: {len(found.problems)} of {found.listed} items cannot be used", found.problems
        )
    return list(found.records)


def scan(path: str | Path) -> Scan:
    """As `read_records`, with bad items set aside instead of raised.

    DataError only when nothing can be said about items at all: no such path, another kind of file,
    an empty folder, a manifest that is not text or lacks the path or text column.
    """
    source = Path(path).expanduser().absolute()
    is_folder = source.is_dir()
    if is_folder:
        present = [source / name for name in _FOLDER_MANIFESTS if (source / name).is_file()]
        if len(present) > 1:
            raise DataError(f"{source}: holds both {' and '.join(_FOLDER_MANIFESTS)}; keep one")
        if not present:
            return _unique(_scan_folder(source))
        source = present[0]
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.suffix.lower() == ".jsonl":
        rows = _jsonl_rows(source)
    elif source.suffix.lower() == ".csv":
        rows = _csv_rows(source)
    else:
        raise DataError(f"{source}: a dataset is a folder, a .jsonl or a .csv file")
    listed = list(rows)
    found = _unique(_scan_rows(source, listed))
    if not found.listed:
        raise DataError(f"{source}: the manifest lists no items")
    return replace(found, notes=_unlisted(source, listed)) if is_folder else found


def _scan_folder(folder: Path) -> Scan:
    records: list[Record] = []
    problems: list[Problem] = []
    other: list[str] = []
    captions: Counter[Path] = Counter()
    files = _files(folder)
    for relative, file in files:
        suffix = file.suffix.lower()
        if suffix == ".txt":
            continue
        if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            other.append(relative.as_posix())
            continue
        name = relative.as_posix()
        sidecar = file.with_suffix(".txt")
        captions[sidecar] += 1
        if not sidecar.is_file():
            problems.append(Problem(name, f"missing caption: no {sidecar.name} beside it"))
            continue
        try:
            text = sidecar.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            problems.append(Problem(name, f"caption {sidecar.name} is not UTF-8: {error}"))
            continue
        if not text:
            problems.append(Problem(name, f"missing caption: {sidecar.name} is empty"))
            continue
        records.append(Record(path=str(file), text=text, name=name))
    if not records and not problems:
        raise DataError(
            f"{folder}: no media found; looked for "
            f"{' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)} with sidecar .txt captions, "
            f"or for {' or '.join(_FOLDER_MANIFESTS)}"
        )
    orphans = [
        relative.as_posix()
        for relative, file in files
        if file.suffix.lower() == ".txt" and file not in captions
    ]
    notes = []
    if other:
        notes.append(f"passed by, {len(other)} of other kinds: {_some(other)}")
    if orphans:
        notes.append(f"passed by, {len(orphans)} .txt without a media file: {_some(orphans)}")
    shared = [file.relative_to(folder).as_posix() for file, users in captions.items() if users > 1]
    if shared:
        notes.append(f"{len(shared)} captions serve several media files: {_some(shared)}")
    return Scan(tuple(records), tuple(problems), tuple(notes))


def _files(folder: Path) -> list[tuple[Path, Path]]:
    """(relative, absolute) path of every file that is not hidden, sorted."""
    return sorted(
        (file.relative_to(folder), file)
        for file in folder.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _unlisted(manifest: Path, rows: Sequence[_Row]) -> tuple[str, ...]:
    """A note on the media in the manifest's folder that no row names, a bad row included."""
    listed = {
        os.path.normpath(_located(value, manifest.parent))
        for _, row in rows
        if not isinstance(row, str)
        for value in (row.get(name) for name in ALIASES["path"])
        if isinstance(value, str)
    }
    others = [
        relative.as_posix()
        for relative, file in _files(manifest.parent)
        if file.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
        and os.path.normpath(file) not in listed
    ]
    if not others:
        return ()
    return (f"{len(others)} media not listed in {manifest.name}: {_some(others)}",)


def _located(path: str, root: Path) -> Path:
    media = Path(path.strip()).expanduser()
    return media if media.is_absolute() else root / media


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the manifest is not UTF-8 text: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield where, f"not JSON: {error}"
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            yield where, f"a JSON object is needed, not {type(row).__name__}"


def _csv_rows(path: Path) -> Iterator[_Row]:
    # Not splitlines: it also splits at U+2028, U+0085, VT and FF, which a caption may hold.
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    columns = [name for name in (reader.fieldnames or []) if name]
    for field in ("path", "text"):
        if not set(ALIASES[field]) & set(columns):
            raise DataError(
                f"{path}: no {field} column among {', '.join(columns) or '(none)'}; "
                f"name it one of {', '.join(ALIASES[field])}"
            )
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
        if row is None:
            return
        where = f"{path.name}:{reader.line_num}"
        if None in row:
            yield where, f"has more fields than the header's {len(columns)}"
        else:
            # An empty or absent cell of an optional column means "not given".
            yield where, {k: v for k, v in row.items() if v not in (None, "")}


def _scan_rows(source: Path, rows: Iterable[_Row]) -> Scan:
    records: list[Record] = []
    problems: list[Problem] = []
    for where, row in rows:
        if isinstance(row, str):
            problems.append(Problem(where, row))
            continue
        try:
            records.append(_record(row, source.parent, where))
        except ValueError as error:
            problems.append(Problem(where, str(error)))
    return Scan(tuple(records), tuple(problems))


def _record(row: Mapping[str, object], root: Path, where: str) -> Record:
    values = {field: _alias(row, field) for field in ALIASES}
    known = {name for names in ALIASES.values() for name in names} | set(_MEASURED)
    for column in row:
        near = difflib.get_close_matches(column, ("start_frame", "num_frames", "weight"), 1, 0.8)
        if column not in known and near:
            raise ValueError(f"unknown column {column!r}; did you mean {near[0]!r}?")
    path, text = values["path"], values["text"]
    if not isinstance(path, str) or not path.strip():
        raise ValueError(_missing("media path", "path", path))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path}: {_missing('caption', 'text', text)}")
    media = _located(path, root)
    if media.suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        raise ValueError(
            f"{path}: {media.suffix or 'no suffix'} is not a media file; allowed are "
            f"{' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}"
        )
    start = _integer("start_frame", values["start_frame"], 0)
    count = _integer("num_frames", values["num_frames"], 1)
    name = values["id"]
    if name is not None and not isinstance(name, (str, int)):
        raise ValueError(f"id: {name!r} must be text or a whole number")
    if name is None:
        # A range tells apart clips of one file.
        name = path.strip()
        if values["start_frame"] is not None or (count is not None and "start_frame" in row):
            name += f"[{start or 0}:{'' if count is None else (start or 0) + count}]"
    return Record(
        path=str(media),
        text=text.strip(),
        name=str(name),
        start_frame=start or 0,
        num_frames=count,
        weight=_weight(values["weight"]),
    )


def _alias(row: Mapping[str, object], field: str) -> object:
    given = [name for name in ALIASES[field] if row.get(name) is not None]
    # Not for ids: datasets often carry both an id and a name; the first one counts.
    if field != "id" and len({str(row[name]) for name in given}) > 1:
        raise ValueError(f"columns {' and '.join(given)} both give the {field} and differ")
    return row[given[0]] if given else None


def _missing(what: str, field: str, value: object) -> str:
    detail = "" if value is None else f" ({value!r})"
    return f"missing {what}{detail}: give it as one of {', '.join(ALIASES[field])}"


def _integer(field: str, value: object, least: int) -> int | None:
    if value is None:
        return None
    number: object = value
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            number = value
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{field}: {value!r} must be a whole number of at least {least}")
    return number


def _weight(value: object) -> float:
    if value is None:
        return 1.0
    number: object = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = value
    if (
        not isinstance(number, (int, float))
        or isinstance(number, bool)
        or not (math.isfinite(number) and number > 0)
    ):
        raise ValueError(f"weight: {value!r} must be a finite number above 0")
    return float(number)


def _unique(found: Scan) -> Scan:
    """Duplicate names: the same media listed again with another caption gets " #2" and so on; the
    same id, or the very same item, twice is an error (the later one is the problem)."""
    records: list[Record] = []
    problems = list(found.problems)
    seen: dict[str, list[Record]] = {}
    for record in found.records:
        same = seen.setdefault(record.name, [])
        if any(other.path != record.path for other in same):
            problems.append(Problem(record.name, f"duplicate id: also names {same[0].path}"))
        elif any(
            replace(other, name="", weight=1.0) == replace(record, name="", weight=1.0)
            for other in same
        ):
            problems.append(Problem(record.name, "duplicate: listed twice with the same caption"))
        else:
            same.append(record)
            suffix = f" #{len(same)}" if len(same) > 1 else ""
            records.append(replace(record, name=record.name + suffix))
    return Scan(tuple(records), tuple(problems), found.notes)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
