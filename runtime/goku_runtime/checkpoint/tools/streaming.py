"""Writing a file that is laid out beforehand, piece by piece, with tensors read as they are needed.

A window of the file is filled while the ones before it are being written: the memory is that of a few
windows, whatever the size of the file and of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from goku_runtime.checkpoint._boxes import Box
from goku_runtime.checkpoint.manifest import FileSum
from goku_runtime.checkpoint.options import CHUNK
from goku_runtime.checkpoint.staging import Memory, windows
from goku_runtime.checkpoint.tools.slabs import SLAB_BYTES, Wanted, aligned, empty_buffer, wanted
from goku_runtime.checkpoint.tools.source import Source

if TYPE_CHECKING:
    from goku_runtime._io import Engine, FileWriter

__all__ = ["Elements", "FileStream", "Piece"]

# One window being filled, the others being written.
_RING = 3
# Elements that are converted at once.
_BLOCK = 1 << 18


class Elements(NamedTuple):
    """A box of a stored tensor, row-major, as elements of `dtype`."""

    name: str
    box: Box
    dtype: torch.dtype


class Piece(NamedTuple):
    """Bytes [offset, offset + nbytes) of a file."""

    offset: int
    nbytes: int
    content: bytes | Elements

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class FileStream:
    """Writes files out of pieces.

    Args:
        engine: that reads and writes.
        source: of the tensors.
        window_bytes: a multiple of 64 KiB; three are in memory, and what one of them is read from while
            dtypes are converted.
    """

    def __init__(self, engine: Engine, source: Source, *, window_bytes: int = SLAB_BYTES) -> None:
        if window_bytes < CHUNK or window_bytes % CHUNK:
            raise ValueError(
                f"window_bytes is {window_bytes}; allowed: positive multiples of {CHUNK}"
            )
        self._engine = engine
        self._source = source
        self._window_bytes = window_bytes
        self._ring: list[Memory] = []
        self._aside = empty_buffer(0)

    def write(
        self,
        path: Path,
        pieces: Sequence[Piece],
        *,
        fsync: bool = True,
        advance: Callable[[int], None] = lambda nbytes: None,
    ) -> tuple[FileSum, bytes]:
        """Writes a new file.

        Args:
            path: that does not exist.
            pieces: in order, without gaps.
            fsync: hand it to the device.
            advance: called with the bytes of each window.

        Returns:
            Size and CRC-32C of the file, and its chunks' CRCs as `FileWriter.chunk_crcs` gives them.

        Raises:
            CheckpointError: damage in the source, named.
            ValueError: a value that the dtype asked for cannot hold.
            OSError: the disk is full or fails; what was written is left for the caller to remove.
        """
        nbytes = pieces[-1].end
        writer = self._engine.create(str(path), nbytes, chunk=CHUNK, fsync=fsync)
        try:
            self._submit(writer, nbytes, pieces, advance)
            size, crc = writer.finish()
            return FileSum(size, crc), writer.chunk_crcs()
        except BaseException:
            writer.cancel()
            with suppress(OSError, RuntimeError):
                writer.finish()  # the memory is free once nothing is in flight
            raise

    def _submit(
        self,
        writer: FileWriter,
        nbytes: int,
        pieces: Sequence[Piece],
        advance: Callable[[int], None],
    ) -> None:
        tickets: list[int] = []
        first = 0
        for number, (start, stop) in enumerate(windows(nbytes, self._window_bytes)):
            if number >= _RING:
                writer.wait(tickets[number - _RING])
            slot = number % _RING
            if slot == len(self._ring):
                self._ring.append(Memory(self._window_bytes))
            memory = self._ring[slot]
            while pieces[first].end <= start:
                first += 1
            self._fill(memory, start, stop, pieces, first)
            tickets.append(writer.submit(memory.address, start, stop - start))
            advance(stop - start)

    def _fill(
        self, memory: Memory, start: int, stop: int, pieces: Sequence[Piece], first: int
    ) -> None:
        """Puts bytes [start, stop) of the file into memory; `first` is the first piece that is in it."""
        requests: list[Wanted] = []
        aside: list[tuple[Tensor, Elements, int, int, int]] = []
        aside_bytes = 0
        view = memoryview(memory.buffer)
        for number in range(first, len(pieces)):
            piece = pieces[number]
            if piece.offset >= stop:
                break
            low, high = max(start, piece.offset), min(stop, piece.end)
            content = piece.content
            if isinstance(content, bytes):
                view[low - start : high - start] = content[low - piece.offset : high - piece.offset]
                continue
            target = memory.bytes[low - start : high - start]
            item, stored = content.dtype.itemsize, self._source.tensors[content.name].dtype
            begin, end = (low - piece.offset) // item, -(-(high - piece.offset) // item)
            if stored == content.dtype and piece.offset % item == 0:
                requests += wanted(content.name, content.box, begin, end, item, target)
            else:  # to be converted; or elements that lie across the windows' borders
                aside.append((target, content, begin, end, low - piece.offset - begin * item))
                aside_bytes += aligned((end - begin) * stored.itemsize)
        if aside_bytes > self._aside.numel():
            self._aside = empty_buffer(0)  # before the next is made: both may not fit
            self._aside = empty_buffer(aside_bytes)
        read: list[Tensor] = []
        at = 0
        for _, content, begin, end, _ in aside:
            stored = self._source.tensors[content.name].dtype
            data = self._aside[at : at + (end - begin) * stored.itemsize]
            at += aligned(data.numel())
            requests += wanted(content.name, content.box, begin, end, stored.itemsize, data)
            read.append(data.view(stored))
        self._source.read(self._engine, requests)
        for elements, (target, content, _, _, skipped) in zip(read, aside, strict=True):
            _convert(target, elements, content, skipped)


def _convert(target: Tensor, elements: Tensor, content: Elements, skipped: int) -> None:
    """Puts elements, in the dtype asked for, into bytes, of which the first are left out.

    Raises:
        ValueError: finite ones would become infinite.
    """
    most = torch.finfo(content.dtype).max if content.dtype.is_floating_point else 0
    narrower = content.dtype != elements.dtype and most < torch.finfo(elements.dtype).max
    at = -skipped
    for block in elements.split(_BLOCK):
        converted = block.to(content.dtype)
        if narrower and bool(converted.isinf().any()):
            wide = block if block.dtype.itemsize > 1 else block.float()
            beyond = converted.isinf() & wide.isfinite()
            if bool(beyond.any()):
                found = float(wide[beyond].abs().max())
                raise ValueError(
                    f"{content.name}: holds {found:g}; allowed: up to {most:g}, the most that "
                    f"{content.dtype} holds"
                )
        data = converted.view(torch.uint8)
        low, high = max(at, 0), min(at + data.numel(), target.numel())
        target[low:high].copy_(data[low - at : high - at])
        at += data.numel()
