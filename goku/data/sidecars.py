"""A folder of media, each with its caption in a .txt file of the same name beside it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from goku.data.errors import DataError, Problem
from goku.data.links import Root
from goku.data.record import MEDIA_SUFFIXES, Record, Scan, counted, some


def scan_sidecars(root: Root, otherwise: str) -> Scan:
    """Every media file of the folder that is not hidden, by name. DataError when there is none; `otherwise` says what
    else was looked for."""
    folder = root.folder
    records: list[Record] = []
    problems: list[Problem] = []
    other: list[str] = []
    captions: Counter[Path] = Counter()
    files = root.files()
    names = {file for _, file in files}
    for relative, file in files:
        suffix = file.suffix.lower()
        if suffix == ".txt":
            continue
        name = relative.as_posix()
        if suffix not in MEDIA_SUFFIXES:
            other.append(name)
            continue
        sidecar = file.with_suffix(".txt")
        if sidecar not in names and (capitals := file.with_suffix(".TXT")) in names:
            sidecar = capitals  # as cameras and old systems name both
        captions[sidecar] += 1
        link = root.leads_out(file)
        if link is not None:
            problems.append(Problem(name, link, "outside"))
            continue
        text = _caption(sidecar, root)
        if isinstance(text, str):
            records.append(Record(path=str(file), text=text, name=name))
        else:
            problems.append(Problem(name, text.reason, text.kind))
    if not records and not problems:
        raise DataError(
            f"{folder}: no media found; looked for {' '.join(MEDIA_SUFFIXES)} with sidecar .txt "
            f"captions, or for {otherwise}"
        )
    orphans = [
        relative.as_posix()
        for relative, file in files
        if file.suffix.lower() == ".txt" and file not in captions
    ]
    notes = []
    if other:
        notes.append(f"passed by, {len(other)} of other kinds: {some(other)}")
    if orphans:
        notes.append(f"passed by, {len(orphans)} .txt without a media file: {some(orphans)}")
    linked = root.linked_folders()
    if linked:
        notes.append(
            f"passed by, {counted(len(linked), 'linked folder')}: {some(linked)}; follow_links: true reads them"
        )
    shared = [file.relative_to(folder).as_posix() for file, users in captions.items() if users > 1]
    if shared:
        notes.append(f"{counted(len(shared), 'caption')} for several media files: {some(shared)}")
    return Scan(tuple(records), tuple(problems), tuple(notes))


def _caption(sidecar: Path, root: Root) -> str | Problem:
    name = sidecar.name
    if not root.is_plain(sidecar) and not sidecar.is_file():
        return Problem(name, f"missing caption: no {name} beside it", "caption")
    link = root.leads_out(sidecar)
    if link is not None:
        return Problem(name, f"its caption {name} is a {link}", "outside")
    try:
        text = sidecar.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return Problem(name, f"caption {name} is not UTF-8: {error}", "caption")
    except OSError as error:
        return Problem(name, f"caption {name} cannot be read: {error.strerror}", "caption")
    return text or Problem(name, f"missing caption: {name} is empty", "caption")
