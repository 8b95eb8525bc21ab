"""Two lists side by side: media paths in one text file, captions in another, line i to line i."""

from __future__ import annotations

from pathlib import Path

from goku.data.errors import DataError, Problem
from goku.data.links import Root, no_file_name
from goku.data.record import MEDIA_SUFFIXES, Record, Scan, counted

MEDIA_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
CAPTION_LISTS = ("prompt.txt", "prompts.txt", "caption.txt", "captions.txt")


def find_lists(folder: Path) -> tuple[Path, Path] | None:
    """(media list, caption list) of the folder, None when it has not both. DataError when one of them is not single.

    A file that is the sidecar caption of a media file (video.txt beside video.mp4) is no list.
    """
    stems = {file.stem for file in folder.iterdir() if file.suffix.lower() in MEDIA_SUFFIXES}

    def present(names: tuple[str, ...]) -> list[Path]:
        files = (folder / name for name in names)
        return [file for file in files if file.is_file() and file.stem not in stems]

    media, captions = present(MEDIA_LISTS), present(CAPTION_LISTS)
    if not media or not captions:
        return None
    for files in (media, captions):
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise DataError(f"{folder}: holds both {names}; keep one")
    return media[0], captions[0]


def scan_lists(media: Path, captions: Path, root: Root) -> Scan:
    """Every line that is not blank in both lists; paths are relative to root.folder, or absolute. DataError when the
    counts of lines differ (blank lines at the end aside) or there is no line."""
    contents = {file: file.read_bytes() for file in (media, captions)}
    paths, texts = _lines(contents[media]), _lines(contents[captions])
    for longer, shorter in ((paths, texts), (texts, paths)):
        while len(longer) > len(shorter) and not longer[-1].strip():
            longer.pop()
    if len(paths) != len(texts):
        raise DataError(
            f"{root.folder}: {media.name} has {counted(len(paths), 'line')} and {captions.name} {len(texts)}; "
            "line i of one belongs to line i of the other"
        )
    records: list[Record] = []
    problems: list[Problem] = []
    for number, (path, text) in enumerate(zip(paths, texts, strict=True), start=1):
        if not path.strip() and not text.strip():
            continue
        found = _record(path, text, number, media, captions, root)
        if isinstance(found, Record):
            records.append(found)
        else:
            problems.append(found)
    if not records and not problems:
        raise DataError(f"{media}: lists no items")
    files = {str(file): len(content) for file, content in contents.items()}
    return Scan(tuple(records), tuple(problems), files=files)


def _record(
    path: bytes, text: bytes, number: int, media: Path, captions: Path, root: Root
) -> Record | Problem:
    where = f"{media.name}:{number}"
    try:
        name = path.decode().strip()
    except UnicodeDecodeError as error:
        return Problem(where, f"the line is not UTF-8: {error}", "listing")
    if not name:
        return Problem(where, "missing media path: the line is blank", "listing")
    fault = no_file_name(name)
    if fault is not None:
        return Problem(where, fault, "listing")
    file = root.folder / name
    if file.suffix.lower() not in MEDIA_SUFFIXES:
        reason = f"{file.suffix or 'no suffix'} is not a media file; allowed are "
        return Problem(name, reason + " ".join(MEDIA_SUFFIXES), "listing")
    link = root.leads_out(file)
    if link is not None:
        return Problem(name, link, "outside")
    try:
        caption = text.decode().strip()
    except UnicodeDecodeError as error:
        reason = f"its caption, line {number} of {captions.name}, is not UTF-8: {error}"
        return Problem(name, reason, "caption")
    if not caption:
        reason = f"missing caption: line {number} of {captions.name} is blank"
        return Problem(name, reason, "caption")
    remarks = ("lies outside the dataset's folder",) if root.is_outside(file) else ()
    return Record(path=str(file), text=caption, name=name, remarks=remarks)


def _lines(content: bytes) -> list[bytes]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines[:-1] if not lines[-1] else lines
