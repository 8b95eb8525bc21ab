"""What a dataset lists, in whichever of the common forms: `scan` -> `Record`s.

sidecars     a folder of media, each with a .txt of the same name             goku.data.sidecars
table        metadata.jsonl, metadata.json or metadata.csv, or such a file    goku.data.tables
lists        videos.txt beside prompt.txt, line to line                       goku.data.lists
webdataset   a .tar, a folder of them, or name-{0000..0099}.tar               goku.data.shards
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from goku.data.errors import DataError
from goku.data.links import Root
from goku.data.lists import CAPTION_LISTS, MEDIA_LISTS, find_lists, scan_lists
from goku.data.record import (
    IMAGE_SUFFIXES,
    MEDIA_SUFFIXES,
    VIDEO_SUFFIXES,
    Member,
    Record,
    Scan,
    counted,
    unique,
    with_sound_captions,
)
from goku.data.shards import expand, is_shard_name, scan_shards
from goku.data.sidecars import scan_sidecars
from goku.data.tables import ALIASES, TABLES, scan_table

__all__ = [
    "ALIASES",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Form",
    "Member",
    "Record",
    "Scan",
    "read_records",
    "scan",
]

Form = Literal["auto", "sidecars", "table", "lists", "webdataset"]

_ALLOWED = "a folder, or a .jsonl, .json, .csv or .tar file"


def read_records(
    path: str | Path, form: Form = "auto", *, follow_links: bool = False
) -> list[Record]:
    """Every record of the dataset at `path`; DataError that lists every bad one otherwise."""
    found = scan(path, form, follow_links=follow_links)
    if found.problems:
        raise DataError(
            f"{path}: {len(found.problems)} of {counted(found.listed, 'item')} cannot be used",
            found.problems,
        )
    return list(found.records)


def scan(path: str | Path, form: Form = "auto", *, follow_links: bool = False) -> Scan:
    """As `read_records`, with bad items set aside instead of raised.

    form: "auto" goes by what is there; two listings in one folder are an error that names both. follow_links: use media
    that are links out of the dataset's folder. DataError only when nothing can be said about items at all: no such
    path, another kind of file, an empty folder, a table without the path or text column, lists of unequal length.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; allowed: {', '.join(get_args(Form))}")
    source = find_dataset(path)
    found = unique(with_sound_captions(_scan(source, form, follow_links)))
    return replace(found, place=str(source))


def find_dataset(path: str | Path) -> Path:
    """The absolute path of a dataset, as it is where it names a range of archives. DataError when nothing is there."""
    source = Path(path).expanduser().absolute()
    archives = expand(str(source)) if is_shard_name(source.name) else []
    if not any(file.exists() for file in archives or [source]):
        raise DataError(f"{source}: no such file or folder; allowed: {_ALLOWED}")
    return source


def _scan(source: Path, form: Form, follow_links: bool) -> Scan:
    """What the listing says, as it says it."""
    if source.is_dir():
        return _scan_folder(Root(source, follow_links), form)
    root = Root(source.parent, follow_links)
    archives = expand(str(source)) if is_shard_name(source.name) else []
    if archives and form in ("auto", "webdataset"):
        return scan_shards(archives, root)
    if source.suffix.lower() in (".jsonl", ".json", ".csv") and form in ("auto", "table"):
        return scan_table(source, root, whole_folder=False)
    if form != "auto":
        raise DataError(f"{source}: is no dataset of the form {form}")
    raise DataError(f"{source}: is no dataset; allowed: {_ALLOWED}")


def _scan_folder(root: Root, form: Form) -> Scan:
    folder = root.folder
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    lists = find_lists(folder) if form in ("auto", "lists") else None
    if form in ("auto", "table") and len(tables) > 1:
        names = " and ".join(file.name for file in tables)
        raise DataError(f"{folder}: holds both {names}; keep one")
    if form == "auto" and tables and lists:
        raise DataError(f"{folder}: holds both {tables[0].name} and {lists[0].name}; keep one")
    if tables and form in ("auto", "table"):
        return scan_table(tables[0], root, whole_folder=True)
    if lists is not None:
        return scan_lists(*lists, root)
    if form in ("auto", "webdataset"):
        files = [file for _, file in root.files()]
        archives = [file for file in files if is_shard_name(file.name)]
        media = any(file.suffix.lower() in MEDIA_SUFFIXES for file in files)
        if archives and (form == "webdataset" or not media):
            return scan_shards(archives, root)
    otherwise = f"{', '.join(TABLES)}, {MEDIA_LISTS[0]} beside {CAPTION_LISTS[0]}, or .tar archives"
    if form in ("auto", "sidecars"):
        return scan_sidecars(root, otherwise)
    raise DataError(f"{folder}: is no dataset of the form {form}; looked for {otherwise}")
