"""Where the bytes of a record's media file are: a file, or a window on an archive; and what they say it is."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, cast

from goku.data.errors import DecodeError
from goku.data.record import MEDIA_SUFFIXES, Record

_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG image"),
    (0, b"\xff\xd8\xff", "JPEG image"),
    (0, b"BM", "BMP image"),
    (0, b"GIF8", "GIF image"),
    (0, b"II*\0", "TIFF image"),
    (0, b"MM\0*", "TIFF image"),
    (8, b"WEBP", "WebP image"),
    (8, b"AVI ", "AVI video"),
    (4, b"ftypqt", "QuickTime video"),
    (4, b"ftypheic", "HEIC image"),
    (4, b"ftypavif", "AVIF image"),
    (4, b"ftyp", "MP4 video"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (0, b"\0\0\1\xba", "MPEG video"),
    (0, b"PK\x03\x04", "ZIP archive"),
    (0, b"%PDF", "PDF document"),
)


class Window(io.RawIOBase):
    """Bytes `offset` to `offset + size` of an open file, which it closes, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size = file, offset, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}, before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_media(record: Record) -> BinaryIO:
    """The media file's bytes, to read and seek. DecodeError when it cannot be opened."""
    member = record.member
    try:
        file = open(member.archive if member else record.path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DecodeError(record.path, f"cannot be read: {error.strerror}") from error
    if member is None:
        return file
    return cast(BinaryIO, io.BufferedReader(Window(file, member.offset, member.size)))


def media_size(record: Record) -> int:
    """Bytes of the media file. OSError when it is missing."""
    return record.member.size if record.member else os.stat(record.path).st_size


def stored_in(record: Record) -> str:
    """The path of the file on disk that holds the media: the media file, or the archive."""
    return record.member.archive if record.member else record.path


def check_file(record: Record) -> None:
    """DecodeError unless the record names a regular media file that is not empty."""
    path = Path(record.path)
    if path.suffix.lower() not in MEDIA_SUFFIXES:
        raise DecodeError(record.path, f"{path.suffix or 'no suffix'} is not a media file")
    try:
        found = os.stat(stored_in(record))
    except OSError as error:
        raise DecodeError(record.path, f"media file missing: {error.strerror}") from error
    stored = found.st_size
    if not stat.S_ISREG(found.st_mode):
        raise DecodeError(record.path, "media file missing: not a regular file")
    if (record.member.size if record.member else stored) == 0:
        raise DecodeError(record.path, "the file is empty (0 bytes)")
    if record.member and record.member.offset + record.member.size > stored:
        raise DecodeError(record.path, "truncated tar: the archive has become shorter")


def content_kind(head: bytes) -> str | None:
    """What a file is by its first 16 bytes, such as "PNG image"; None when they say nothing."""
    for offset, magic, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    return None


def misnamed(record: Record, wanted: str) -> str:
    """ ", holds MP4 video, is named .png" for a file whose content is no `wanted` ("image", "video"), else ""."""
    with open_media(record) as file:
        kind = content_kind(file.read(16))
    if kind is None or kind.endswith(wanted):
        return ""
    return f"holds {kind}, is named {Path(record.path).suffix}"
