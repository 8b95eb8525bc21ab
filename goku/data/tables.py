"""A table of items: .jsonl, .json or .csv, one row an item. One bad row is one problem, not the end of the table.

Columns (either name of an alias; other columns are ignored):
    path        path, media_path, video, file_name, media, image, image_path, video_path, file_path
                relative to the table's folder, or absolute
    text        text, caption, prompt, cap            a string, a list of strings, or a list of {text, weight}
    captions    captions                              the same as JSON text, for .csv
    id          id, name                              optional, unique; else the path (and range)
    start_frame, num_frames                           optional range of source frames
    weight                                            optional sampling-independent loss weight > 0
    motion      motion_score, motion                  optional, finite
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from goku.data.errors import DataError, Kind, Problem
from goku.data.links import Root, no_file_name
from goku.data.record import (
    MEDIA_SUFFIXES,
    Record,
    Scan,
    captions_of,
    finite,
    positive,
    some,
)

ALIASES: dict[str, tuple[str, ...]] = {
    "path": (
        *("path", "media_path", "video", "file_name"),
        *("media", "image", "image_path", "video_path", "file_path"),
    ),
    "text": ("text", "caption", "prompt", "cap"),
    "captions": ("captions",),
    "id": ("id", "name"),
    "start_frame": ("start_frame",),
    "num_frames": ("num_frames",),
    "weight": ("weight",),
    "motion": ("motion_score", "motion"),
}
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json")
# Facts about the media that other tools write; we measure them, so they are not read.
_MEASURED = ("height", "width", "fps", "aspect_ratio", "resolution", "duration")
# Where a row stands, and its columns, or what is wrong with it.
_Row = tuple[str, "Mapping[str, object] | _Bad"]


class _Bad(ValueError):
    """What is wrong with a row, and of which kind."""

    def __init__(self, reason: str, kind: Kind = "listing") -> None:
        self.kind: Kind = kind
        super().__init__(reason)


def scan_table(table: Path, root: Root, *, whole_folder: bool) -> Scan:
    """Every row of the table, whose paths are relative to root.folder. whole_folder: note the media of the folder that
    no row names. DataError when it lists nothing or is no table."""
    read = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}[table.suffix.lower()]
    content = table.read_bytes()
    # Before the rows, which then need not ask of each file whether it is a link.
    files = root.files() if whole_folder else []
    listed = list(read(table, content))
    records: list[Record] = []
    problems: list[Problem] = []
    for where, row in listed:
        try:
            if isinstance(row, _Bad):
                raise row
            records.append(_record(row, root))
        except _Bad as error:
            problems.append(Problem(where, str(error), error.kind))
        except ValueError as error:
            problems.append(Problem(where, str(error), "listing"))
    if not listed:
        raise DataError(f"{table}: the manifest lists no items")
    notes = _unlisted(table, root, listed, files) if whole_folder else ()
    return Scan(tuple(records), tuple(problems), notes, files={str(table): len(content)})


def row_fields(row: Mapping[str, object]) -> dict[str, object]:
    """The row's value of every field of ALIASES, None where it gives none. ValueError when two columns differ or one
    is misspelt."""
    for column in row:
        meant = _misspelt(column)
        if meant is not None:
            raise ValueError(f"unknown column {column!r}; did you mean {meant!r}?")
    return {field: _alias(row, field) for field in ALIASES}


@lru_cache(1024)  # a table's rows have the same columns
def _misspelt(column: str) -> str | None:
    """The column that an unknown one seems to mean."""
    if any(column in names for names in (*ALIASES.values(), _MEASURED)):
        return None
    near = difflib.get_close_matches(column, ("start_frame", "num_frames", "weight"), 1, 0.8)
    return near[0] if near else None


def row_captions(values: Mapping[str, object]) -> tuple[tuple[str, float], ...]:
    """The captions of `row_fields`, the heaviest first. ValueError when there is none."""
    text, several = values["text"], values["captions"]
    if isinstance(several, str):
        try:
            several = json.loads(several)
        except (ValueError, RecursionError) as error:
            raise _Bad(f"captions: not JSON: {error}", "caption") from error
    if several is not None and isinstance(text, str) and not text.strip():
        text = None
    if text is not None and several is not None:
        raise _Bad("columns text and captions are both given; keep one", "caption")
    value = text if several is None else several
    try:
        return captions_of(value)
    except ValueError as error:
        if str(error).startswith("missing caption"):
            raise _Bad(_missing("caption", "text", value), "caption") from error
        raise _Bad(str(error), "caption") from error


def row_range(
    row: Mapping[str, object], values: Mapping[str, object]
) -> tuple[int, int | None, bool]:
    """(start_frame, num_frames, at_most): a length without a start is what another tool says of the file."""
    start = _integer("start_frame", values["start_frame"], 0)
    count = _integer("num_frames", values["num_frames"], 1)
    return start or 0, count, count is not None and row.get("start_frame") is None


def row_scores(values: Mapping[str, object]) -> tuple[float, float | None]:
    """(loss weight, motion score or None)."""
    weight, motion = values["weight"], values["motion"]
    return (
        1.0 if weight is None else positive("weight", weight),
        None if motion is None else finite("motion_score", motion),
    )


def _record(row: Mapping[str, object], root: Root) -> Record:
    values = row_fields(row)
    path = values["path"]
    if not isinstance(path, str) or not path.strip():
        raise ValueError(_missing("media path", "path", path))
    fault = no_file_name(path)
    if fault is not None:
        raise ValueError(fault)
    try:
        captions = row_captions(values)
    except _Bad as error:
        raise _Bad(f"{path}: {error}", error.kind) from error
    media = _located(path, root.folder)
    if media.suffix.lower() not in MEDIA_SUFFIXES:
        raise ValueError(
            f"{path}: {media.suffix or 'no suffix'} is not a media file; allowed are "
            f"{' '.join(MEDIA_SUFFIXES)}"
        )
    link = root.leads_out(media)
    if link is not None:
        raise _Bad(f"{path}: {link}", "outside")
    start, count, at_most = row_range(row, values)
    name = values["id"]
    if name is not None and not isinstance(name, (str, int)):
        raise ValueError(f"id: {name!r} must be text or a whole number")
    if name is None:
        # A range tells apart clips of one file.
        name = path.strip()
        if values["start_frame"] is not None or (count is not None and "start_frame" in row):
            name += f"[{start}:{'' if count is None else start + count}]"
    weight, motion = row_scores(values)
    outside = root.is_outside(media)
    return Record(
        path=str(media),
        text=captions[0][0],
        name=str(name),
        start_frame=start,
        num_frames=count,
        weight=weight,
        captions=captions if len(captions) > 1 else (),
        motion=motion,
        remarks=("lies outside the dataset's folder",) if outside else (),
        at_most=at_most,
    )


def _unlisted(
    table: Path, root: Root, rows: Sequence[_Row], files: Sequence[tuple[Path, Path]]
) -> tuple[str, ...]:
    """A note on the media in the table's folder, which holds `files`, that no row names, a bad row included."""
    listed = set()
    for _, row in rows:
        given = [] if isinstance(row, _Bad) else [row.get(name) for name in ALIASES["path"]]
        for value in given:
            if isinstance(value, str):
                try:
                    listed.add(os.path.normpath(_located(value, root.folder)))
                except ValueError:
                    continue  # a home folder that nobody has: no file of this folder
    others = [
        relative.as_posix()
        for relative, file in files
        if file.suffix.lower() in MEDIA_SUFFIXES and os.path.normpath(file) not in listed
    ]
    if not others:
        return ()
    return (f"{len(others)} media not listed in {table.name}: {some(others)}",)


def _located(path: str, folder: Path) -> Path:
    media = Path(path.strip())
    if path.strip().startswith("~"):
        try:
            media = media.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from error
    return media if media.is_absolute() else folder / media


# Bytes that are not UTF-8 come as lone surrogates, so that they spoil their own row alone.


def _text(content: bytes) -> str:
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


_NO_UTF8 = re.compile("[\udc80-\udcff]")


def _is_utf8(text: str) -> bool:
    return _NO_UTF8.search(text) is None


def _row(value: object) -> Mapping[str, object] | _Bad:
    if not isinstance(value, dict):
        return _Bad(f"a JSON object is needed, not {type(value).__name__}")
    # "" in an optional column means "not given", as an empty cell does in a .csv.
    return {k: v for k, v in value.items() if v != "" or k in ALIASES["path"] + ALIASES["text"]}


def _jsonl_rows(path: Path, content: bytes) -> Iterator[_Row]:
    for number, line in enumerate(_text(content).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        if not _is_utf8(line):
            yield where, _Bad("the line is not UTF-8 text", "caption")
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield where, _Bad(f"not JSON: {error}")
            continue
        yield where, _row(row)


def _json_rows(path: Path, content: bytes) -> Iterator[_Row]:
    text = _text(content)
    whole = _is_utf8(text)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise DataError(f'{path}: a list of items is needed, or {{"data": [...]}}')
    for number, value in enumerate(values):
        # Where the file is UTF-8, such a character was written as an escape, as in a .jsonl.
        spoilt = not whole and not _is_utf8(json.dumps(value, ensure_ascii=False))
        bad = _Bad("the item is not UTF-8 text", "caption")
        yield f"{path.name}[{number}]", bad if spoilt else _row(value)


def _csv_rows(path: Path, content: bytes) -> Iterator[_Row]:
    # Not splitlines: it also splits at U+2028, U+0085, VT and FF, which a caption may hold.
    lines = list(io.StringIO(_text(content), newline=""))
    rows = _csv_fields(lines)
    columns = next((fields for _, fields in rows if isinstance(fields, list)), [])
    for field in ("path", "text"):
        names = ALIASES[field] + (ALIASES["captions"] if field == "text" else ())
        if not set(names) & set(columns):
            raise DataError(
                f"{path}: no {field} column among {', '.join(columns) or '(none)'}; "
                f"name it one of {', '.join(names)}"
            )
    for number, fields in rows:
        where = f"{path.name}:{number}"
        if isinstance(fields, _Bad):
            yield where, fields
        elif not all(map(_is_utf8, fields)):
            yield where, _Bad("the line is not UTF-8 text", "caption")
        elif len(fields) > len(columns):
            yield where, _Bad(f"has more fields than the header's {len(columns)}")
        else:
            # An empty or absent cell of an optional column means "not given".
            cells = zip(columns, fields, strict=False)
            yield where, {column: cell for column, cell in cells if cell != ""}


def _csv_fields(lines: Sequence[str]) -> Iterator[tuple[int, list[str] | _Bad]]:
    """(line number, fields) of every row. A row that is not CSV costs its first line alone: a quote that is never
    closed must not swallow the rows after it."""
    position = 0

    def feed() -> Iterable[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1]

    reader = csv.reader(feed(), strict=True)
    while True:
        start = position
        try:
            fields = next(reader, None)
        except csv.Error as error:
            position = start + 1
            reader = csv.reader(feed(), strict=True)
            yield position, _Bad(f"not CSV: {error}")
            continue
        if fields is None:
            return
        if fields:
            yield position, fields


def _alias(row: Mapping[str, object], field: str) -> object:
    given = [name for name in ALIASES[field] if row.get(name) is not None]
    if field == "path" and len(given) > 1:
        given = [name for name in given if row[name] != ""] or given[:1]
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
