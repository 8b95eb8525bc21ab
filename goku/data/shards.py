"""WebDataset: samples in uncompressed tar files. The files of a sample share their name up to the first dot.

Media are known by their suffix; the caption is in KEY.txt or KEY.caption, or in KEY.json with the columns of
`goku.data.tables`, which may also give weight, motion score and range. Members are read in place, through a window on
the archive: nothing is unpacked.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from goku.data.errors import DataError, Problem
from goku.data.links import Root
from goku.data.record import MEDIA_SUFFIXES, Member, Record, Scan, captions_of, some
from goku.data.tables import ALIASES, row_captions, row_fields, row_range, row_scores

_CAPTION_SUFFIXES = (".txt", ".caption")
# A caption file larger than this is no caption.
_LARGEST_TEXT = 1 << 20
_RANGE = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")
# Columns of a sample's .json. Its own file is the media: paths, sizes and names that other tools write are not read.
_READ = tuple(
    name
    for field in ("text", "captions", "start_frame", "num_frames", "weight", "motion")
    for name in ALIASES[field]
)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_shard_name(path: str) -> bool:
    """True for a .tar, compressed or not, and for name-{0000..0099}.tar."""
    return path.lower().endswith((".tar", *_COMPRESSED))


def expand(path: str) -> list[Path]:
    """The archives that name-{0000..0099}.tar stands for (bounds included), or the one path. DataError for a range
    that runs backwards."""
    parts = _RANGE.match(path)
    if parts is None:
        return [Path(path)]
    before, first, last, after = parts.groups()
    if int(first) > int(last):
        raise DataError(f"{path}: the range {first}..{last} runs backwards")
    width = len(first)
    return [Path(f"{before}{n:0{width}d}{after}") for n in range(int(first), int(last) + 1)]


def scan_shards(archives: Sequence[Path], root: Root) -> Scan:
    """Every sample of the archives, in their order. A file of an archive that cannot be used is one problem.

    DataError when an archive is compressed (it allows no random access), or nothing is found.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    notes: list[str] = []
    files: dict[str, int] = {}
    for archive in archives:
        if archive.name.lower().endswith(_COMPRESSED):
            raise DataError(
                f"{archive}: compressed archives allow no random access; unpack it to .tar"
            )
        name = archive.name
        if not root.is_outside(archive):
            name = archive.relative_to(root.folder).as_posix()
        link = root.leads_out(archive)
        if link is not None:
            problems.append(Problem(name, link, "outside"))
        elif not archive.is_file():
            problems.append(Problem(name, "the archive is missing"))
        else:
            found = _scan_archive(archive, name)
            records += found.records
            problems += found.problems
            notes += found.notes
            files |= found.files
    if not records and not problems:
        raise DataError(f"{root.folder}: no samples in {some([str(path) for path in archives])}")
    return Scan(tuple(records), tuple(problems), tuple(notes), files=files)


_Text = str | dict[str, object] | ValueError
"""A caption file's text, a .json's columns that are read, or what is wrong with it."""


@dataclass
class _Sample:
    """The files of one sample by suffix, and the first thing that is wrong with one of them."""

    media: list[Member] = field(default_factory=list)
    texts: dict[str, _Text] = field(default_factory=dict)
    problem: Problem | None = None


def _scan_archive(archive: Path, name: str) -> Scan:
    try:
        with archive.open("rb") as file:  # once: a shared file system is asked at every opening
            return _scan_open(file, archive, name)
    except OSError as error:
        return Scan((), (Problem(name, f"cannot be read: {error.strerror or error}"),))


def _scan_open(file: BinaryIO, archive: Path, name: str) -> Scan:
    samples: dict[str, _Sample] = {}
    others: list[str] = []
    size = os.fstat(file.fileno()).st_size
    end: Problem | None = None
    for member in _members(file, name):
        if isinstance(member, Problem):
            end = member
            break
        path = PurePosixPath(member.name)
        if member.isdir() or path.name.startswith("."):
            continue
        suffix = path.suffix.lower()
        if suffix not in (*MEDIA_SUFFIXES, *_CAPTION_SUFFIXES, ".json"):
            others.append(f"{name}/{_printable(member.name)}")
            continue
        sample = samples.setdefault(str(path.parent / path.name.split(".", 1)[0]), _Sample())
        shown = f"{name}/{_printable(member.name)}"
        if not member.isreg() or member.issparse():
            sample.problem = Problem(shown, "is no plain file in the archive (a link, or sparse)")
        elif member.offset_data + member.size > size:
            missing = member.offset_data + member.size - size
            reason = f"truncated tar: the archive {name} ends {missing} bytes before the file does"
            sample.problem = Problem(shown, reason)
        elif suffix in MEDIA_SUFFIXES:
            where = Member(str(archive), member.name, member.offset_data, member.size)
            sample.media.append(where)
        else:
            # Now, where the file stands: behind the header that was read.
            sample.texts[suffix] = _read(file, member)
    truncated = False
    records: list[Record] = []
    problems: list[Problem] = []
    for key, sample in samples.items():
        if sample.problem is not None:
            truncated = truncated or sample.problem.reason.startswith("truncated")
            problems.append(sample.problem)
            continue
        found = _record(archive, name, key, sample)
        (records if isinstance(found, Record) else problems).append(found)  # type: ignore[arg-type]
    if end is not None and not truncated:
        problems.append(end)
    notes = (f"passed by, {len(others)} of other kinds: {some(others)}",) if others else ()
    return Scan(tuple(records), tuple(problems), notes, files={str(archive): size})


def _members(file: BinaryIO, name: str) -> Iterator[tarfile.TarInfo | Problem]:
    """The archive's members, each when the file stands behind its header; at last a Problem when it does not end as a
    tar does."""
    try:
        last = 0
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while True:
                member = tar.next()
                if member is None:
                    break
                yield member
                last = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, ValueError, OverflowError) as error:
        yield Problem(name, f"truncated tar, or none: {error}")
        return
    except OSError as error:
        yield Problem(name, f"cannot be read: {error.strerror or error}")
        return
    file.seek(last)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        # tarfile takes a header that is cut off, or not there at all, for the end.
        yield Problem(name, "truncated tar: the mark of its end is missing, samples may be too")


def _record(archive: Path, name: str, key: str, sample: _Sample) -> Record | Problem:
    shown = f"{name}/{_printable(key)}"
    if not sample.media:
        return Problem(shown, "has no media file", "listing")
    if len(sample.media) > 1:
        names = some([_printable(PurePosixPath(m.name).name) for m in sample.media])
        return Problem(shown, f"has several media files: {names}", "listing")
    media = sample.media[0]
    shown = f"{name}/{_printable(media.name)}"
    row: dict[str, object] = {}
    try:
        if ".json" in sample.texts:
            found = _sound(sample.texts[".json"])
            assert isinstance(found, dict)
            row = found
        values = row_fields(row)
        plain = next((sample.texts[s] for s in _CAPTION_SUFFIXES if s in sample.texts), None)
        if plain is not None:
            captions = captions_of(_sound(plain))
        elif ".json" in sample.texts:
            captions = row_captions(values)
        else:
            raise ValueError("missing caption: the archive has no .txt, .caption or .json of it")
    except ValueError as error:
        return Problem(shown, str(error), "caption")
    try:
        start, count, at_most = row_range(row, values)
        weight, motion = row_scores(values)
    except ValueError as error:
        return Problem(shown, str(error), "listing")
    return Record(
        path=f"{archive}/{media.name}",
        text=captions[0][0],
        name=shown,
        start_frame=start,
        num_frames=count,
        weight=weight,
        captions=captions if len(captions) > 1 else (),
        motion=motion,
        member=media,
        at_most=at_most,
    )


def _read(file: BinaryIO, member: tarfile.TarInfo) -> _Text:
    what = PurePosixPath(member.name).name
    try:
        if member.size > _LARGEST_TEXT:
            raise ValueError(f"caption {what} has {member.size:,} bytes, over {_LARGEST_TEXT:,}")
        file.seek(member.offset_data)
        content = file.read(member.size)
        return _json(content, what) if what.lower().endswith(".json") else _text(content, what)
    except ValueError as error:
        return error.with_traceback(None)  # which would hold the content


def _sound(text: _Text) -> str | dict[str, object]:
    if isinstance(text, ValueError):
        raise text
    return text


def _text(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"caption {_printable(what)} is not UTF-8: {error}") from error


def _json(content: bytes, what: str) -> dict[str, object]:
    try:
        row = json.loads(_text(content, what))
    except RecursionError as error:
        raise ValueError(f"{what}: not JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{what}: a JSON object is needed, not {type(row).__name__}")
    return {name: value for name, value in row.items() if name in _READ and value != ""}


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
