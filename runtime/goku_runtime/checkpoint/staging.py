"""How tensors get into the image of a rank's data file.

The image is known to the byte before anything is copied (`goku_runtime.checkpoint.plan`): records one
after another, each a skeleton around a payload. A `Window` is a piece of it in page-aligned memory. Its
skeletons are written once; copying tensors into it is then a single call for all of them, which
can be repeated for later saves of the same layout. That call is all that training waits for.
"""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goku_runtime.checkpoint.native import needs_io

if TYPE_CHECKING:
    from goku_runtime._io import Buffer, FileWriter
    from goku_runtime.checkpoint.plan import Image, Record

__all__ = ["Extents", "Memory", "Window", "copyable", "windows", "write_windows"]


# Those of one byte that torch cannot copy, but for tensors that are contiguous.
_UNCOPYABLE = {getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}


def copyable(tensor: Tensor) -> Tensor:
    """The tensor, or a view of its bytes if torch cannot copy its dtype."""
    return tensor.view(torch.uint8) if tensor.dtype in _UNCOPYABLE else tensor


class Memory:
    """Page-aligned host memory; registered with CUDA, so that copies from a GPU need not wait.

    Args:
        nbytes: how much; rounded up to whole pages by the system.
        pin: register it with CUDA. Pinned memory cannot be swapped out: give a node's ranks
            together less than it has.

    Raises:
        OSError: there is not that much memory.
        RuntimeError: CUDA refuses to register it.
    """

    def __init__(self, nbytes: int, *, pin: bool = False) -> None:
        with needs_io():
            from goku_runtime import _io

        self.buffer: Buffer = _io.Buffer(max(nbytes, 1))
        self.address = self.buffer.address
        self.nbytes = nbytes
        self.bytes = torch.frombuffer(self.buffer, dtype=torch.uint8)
        self._pinned = False
        if pin:
            code = torch.cuda.cudart().cudaHostRegister(self.address, nbytes, 0)
            if int(code) != 0:
                raise RuntimeError(f"cudaHostRegister of {nbytes} bytes: {code}")
            self._pinned = True

    def touch(self) -> None:
        """Has the system give all of it now, by as many threads as torch has, not at the first copy."""
        self.bytes.zero_()

    def close(self) -> None:
        """Unregisters the memory; it is freed with the last tensor that looks into it."""
        if self._pinned:
            self._pinned = False
            torch.cuda.cudart().cudaHostUnregister(self.address)


@dataclass(frozen=True)
class _Part:
    """Bytes [start, stop) of a tensor's payload, and where they go."""

    target: Tensor
    tensor: int
    start: int
    stop: int


class Window:
    """Bytes [start, stop) of an image, in the first bytes of a memory.

    Args:
        image: the rank's layout.
        start, stop: which bytes.
        memory: at least stop - start bytes.
        views: make what torch copies into now, not at the first copy: for tensors on a GPU.
    """

    def __init__(
        self, image: Image, start: int, stop: int, memory: Memory, *, views: bool = False
    ) -> None:
        self.start, self.stop = start, stop
        self._all = stop - start == image.nbytes
        self._memory = memory
        self._whole: list[tuple[int, Record]] = []
        self._parts: list[_Part] = []
        view = memoryview(memory.buffer)
        for number, end in _touched(image, start, stop):
            record = image.records[number]
            first, last = record.payload, record.payload + record.nbytes
            # The gap to the next record is zeros: the memory may have held another window.
            tail = record.skeleton.after.ljust(end - last, b"\0")
            for at, data in ((record.offset, record.skeleton.before), (last, tail)):
                low, high = max(at, start), min(at + len(data), stop)
                if low < high:
                    view[low - start : high - start] = data[low - at : high - at]
            low, high = max(first, start), min(last, stop)
            if low >= high:
                continue
            if high - low == record.nbytes:
                self._whole.append((number, record))
            else:
                target = memory.bytes[low - start : high - start]
                self._parts.append(_Part(target, number, low - first, high - first))
        # For `_io.copy`, but for where the tensors are.
        base = memory.address - start
        self._moves = array("q")
        for _, record in self._whole:
            self._moves.extend((base + record.payload, 0, record.nbytes))
        # Kept: a window of all of the image is copied again and again, and to make a view takes longer
        # than to copy a small tensor.
        self._views: dict[int, Tensor] = {}
        if views:
            for place in range(len(self._whole)):
                self._view(place)

    def _view(self, place: int) -> Tensor:
        """Of self._whole: the payload as a tensor."""
        view = self._views.get(place)
        if view is None:
            record = self._whole[place][1]
            begin = record.payload - self.start
            target = self._memory.bytes[begin : begin + record.nbytes]
            view = self._views[place] = target.view(record.dtype).view(record.shape)
        return view

    def copy(self, sources: Sequence[Tensor], *, non_blocking: bool = False) -> None:
        """Copies what this window holds of the tensors, in the order of the image's records.

        Args:
            sources: the local tensors, any strides, any device.
            non_blocking: return before copies from a GPU are done.
        """
        from goku_runtime import _io

        # Windows are copied one after another while the engine's threads sum and write the ones
        # before: more threads, which wait for each other, would lose more than they gain.
        threads = torch.get_num_threads() if self._all else 1
        found = [sources[number] for number, _ in self._whole]
        # 0: what is no plain memory of this process, or asked for without waiting, is torch's to copy.
        addresses = [0 if non_blocking or not _is_dense(s) else s.data_ptr() for s in found]
        others = [place for place, address in enumerate(addresses) if not address]
        moves = self._moves[:]
        moves[1::3] = array("q", addresses)
        for place in others:
            moves[3 * place + 2] = 0
        kept = []  # the views, until they were copied
        with torch.no_grad():
            for part in self._parts:
                source = sources[part.tensor]
                if not source.is_contiguous():
                    # Each window takes what it holds: to make all of the tensor dense for each of its
                    # windows would copy it as often as there are windows.
                    _copy_range(copyable(source), part, non_blocking=non_blocking)
                    continue
                piece = source.reshape(-1).view(torch.uint8)[part.start : part.stop]
                # Address 0: zeros that have no memory.
                if not non_blocking and _is_dense(piece) and piece.data_ptr():
                    moves.extend((part.target.data_ptr(), piece.data_ptr(), piece.nbytes))
                    kept.append(piece)
                else:
                    part.target.copy_(piece, non_blocking=non_blocking)
            if others:
                # One call: 20,000 tensors of 400 bytes take 11 ms, one by one ten times that.
                torch._foreach_copy_(
                    [copyable(self._view(place)) for place in others],
                    [copyable(found[place]) for place in others],
                    non_blocking=non_blocking,
                )
            _io.copy(moves, threads)


def _copy_range(source: Tensor, part: _Part, *, non_blocking: bool) -> None:
    """Copies a part of a strided tensor. Windows and payloads begin at whole elements."""
    size = source.element_size()
    first = part.start // size
    flat = part.target.view(source.dtype)
    for begin, piece in _boxes(source, first, part.stop // size):
        target = flat[begin - first : begin - first + piece.numel()]
        target.view(piece.shape).copy_(piece, non_blocking=non_blocking)


def _boxes(source: Tensor, start: int, stop: int, base: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Cuts elements [start, stop) of a tensor, row-major, into views: (the first element's number, view).

    Rows that are whole are one view; the rows at the two ends, of which only a part is wanted, are cut in turn.
    """
    if source.dim() < 2:
        yield base + start, source[start:stop]
        return
    row = source[0].numel()
    first, last = -(-start // row), stop // row
    if first > last:  # all within one row
        inner = base + last * row
        yield from _boxes(source[last], start - last * row, stop - last * row, inner)
        return
    if start < first * row:
        before = first - 1
        yield from _boxes(source[before], start - before * row, row, base + before * row)
    if first < last:
        yield base + first * row, source[first:last]
    if last * row < stop:
        yield from _boxes(source[last], 0, stop - last * row, base + last * row)


def _is_dense(source: Tensor) -> bool:
    """Whether its bytes lie in this process's memory as they go into a record.

    Then memmove copies them: in the calling thread and without the interpreter's lock.
    """
    kind = type(source) is Tensor or type(source) is torch.nn.Parameter
    plain = kind and source.is_cpu and source.is_contiguous()
    return plain and not (source.is_conj() or source.is_neg())


class Extents:
    """Where the bytes of an image lie if its tensors are dense and in host memory: nothing is copied.

    Made once for a layout; `of` fills in where the tensors of a save are.

    Args:
        image: the rank's layout.
    """

    def __init__(self, image: Image) -> None:
        places: dict[bytes, int] = {}
        for record in image.records:
            for edge in (record.skeleton.before, record.skeleton.after):
                places.setdefault(edge, 0)
        at = 0
        for edge in places:
            places[edge], at = at, at + len(edge)
        self._edges = ctypes.create_string_buffer(b"".join(places), at)
        base = ctypes.addressof(self._edges)
        self._rows = array("q")
        for record in image.records:
            before, after = record.skeleton.before, record.skeleton.after
            last = record.payload + record.nbytes
            self._rows.extend((
                record.offset, len(before), base + places[before],
                record.payload, record.nbytes, 0,
                last, len(after), base + places[after],
            ))  # fmt: skip

    def of(self, sources: Sequence[Tensor]) -> memoryview | None:
        """Rows for `FileWriter.gather`; None if the bytes of a tensor do not lie as in a record."""
        if not all(map(_is_dense, sources)):
            return None
        addresses = array("q", [source.data_ptr() for source in sources])
        # Zeros that have no memory, as PyTorch makes for gradients.
        if 0 in addresses and any(s.numel() and not s.data_ptr() for s in sources):
            return None
        self._rows[5::9] = addresses
        return memoryview(self._rows)


def windows(nbytes: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts an image into windows of `size` bytes: (start, stop) each."""
    for start in range(0, nbytes, size):
        yield start, min(start + size, nbytes)


def write_windows(
    image: Image,
    ring: Sequence[Memory],
    size: int,
    writer: FileWriter,
    copy: Callable[[Window], None],
) -> list[int]:
    """Hands an image to a writer in windows, each copied while those before are written.

    Args:
        image: of the whole file.
        ring: memories of at least `size` bytes, taken in turn.
        size: of a window, in bytes.
        writer: of the image's file.
        copy: fills a window and returns when its bytes are there.

    Returns:
        The tickets of the last windows, whose memory is still being written.
    """
    tickets: list[int] = []
    for number, (start, stop) in enumerate(windows(image.nbytes, size)):
        if len(tickets) == len(ring):
            writer.wait(tickets.pop(0))
        memory = ring[number % len(ring)]
        copy(Window(image, start, stop, memory))
        tickets.append(writer.submit(memory.address, start, stop - start))
    return tickets


def _touched(image: Image, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The records that lie in [start, stop): (number, where the next one begins)."""
    records = image.records
    number = max(bisect_right(records, start, key=lambda record: record.offset) - 1, 0)
    while number < len(records) and records[number].offset < stop:
        last = number + 1 == len(records)
        yield number, image.nbytes if last else records[number + 1].offset
        number += 1
