"""The tensors as version 2 of index.json has them: layouts, which tensors share, and in which files their
boxes lie. All of it is checked before it is used."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from operator import add
from typing import Any

import torch
from torch import Tensor

from goku_runtime.checkpoint._boxes import Box, fault
from goku_runtime.checkpoint._index_fields import (
    MOST,
    Bad,
    are_sides,
    check_shape,
    fields,
    integer,
    listed,
    short,
    sides_text,
    stored_dtype,
)
from goku_runtime.checkpoint._tilings import Cut, IndexTensor, Tiling
from goku_runtime.checkpoint.records import DTYPES

__all__ = ["PlaceReader", "read_layout"]

# Sums of sizes and offsets stay within int64.
_MOST_BYTES = 1 << 62


def read_layout(value: Any, field: str, files: int) -> Tiling:
    """A layout of the index.

    Args:
        value: as JSON has it.
        field: its name in messages.
        files: how many there are: the boxes of a grid lie in as many, so that a few numbers cannot stand
            for more boxes than there are files.

    Raises:
        Bad: it is malformed, or its boxes do not tile its shape.
    """
    if not isinstance(value, dict) or "boxes" not in value:
        sides, cuts = fields(value, field, "shape", "cuts")
        shape = check_shape(sides, f"{field}.shape")
        return _grid(shape, cuts, f"{field}.cuts", files)
    sides, rows = fields(value, field, "shape", "boxes")
    shape = check_shape(sides, f"{field}.shape")
    boxes = []
    for i, row in enumerate(listed(rows, f"{field}.boxes")):
        if not isinstance(row, list) or len(row) != 2:
            raise Bad(f"{field}.boxes[{i}]: {short(row)}; must be [start, size]")
        for name, each in zip(("start", "size"), row, strict=True):
            if not are_sides(each, len(shape)):
                allowed = f"{len(shape)} integers from 0 to {MOST}"
                raise Bad(f"{field}.boxes[{i}]: {name} {sides_text(each)}; must be {allowed}")
        boxes.append(Box(tuple(row[0]), tuple(row[1])))
    wrong = fault(shape, boxes)
    if wrong is not None:
        raise Bad(f"{field}.boxes: {wrong} (of shape {shape})")
    return Tiling(shape, boxes)


def _grid(shape: tuple[int, ...], value: Any, field: str, files: int) -> Tiling:
    if len(listed(value, field)) != len(shape):
        raise Bad(f"{field}: {short(value)}; must be one for each axis of the shape {shape}")
    cuts: list[Cut] = []
    for axis, (cut, length) in enumerate(zip(value, shape, strict=True)):
        where, most = f"{field}[{axis}]", max(1, length)
        if not isinstance(cut, list):
            cuts.append(integer(cut, where, 1, most))
            continue
        ends = (*cut, most)
        if (
            not are_sides(cut, len(cut))
            or ends[0] != 0
            or any(low >= high for low, high in pairwise(ends))
        ):
            raise Bad(f"{where}: {sides_text(cut)}; must be ascending from 0 and less than {most}")
        cuts.append(tuple(cut))
    tiling = Tiling(shape, cuts=tuple(cuts))
    most = files if math.prod(shape) else 1  # without elements it is one box
    if tiling.count > most:
        raise Bad(f"{field}: more boxes than the {most} that it may have")
    return tiling


class PlaceReader:
    """Reads the tensors of an index, one after another.

    Args:
        lengths: bytes of each file.
        tilings: the layouts.

    Raises:
        Bad: files that are too large together for 64 bits.
    """

    def __init__(self, lengths: Sequence[int], tilings: Sequence[Tiling]) -> None:
        self._tilings = tilings
        self._lengths = lengths
        self._longest = max(lengths, default=0)
        # Of all files, bytes that no tensor was given yet: an index cannot let small files stand for much.
        self._left = sum(lengths)
        if self._left >= _MOST_BYTES:
            raise Bad(f"files: together not less than {_MOST_BYTES} bytes")
        self._table = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        self._used = torch.zeros_like(self._table)
        # (file, bytes) of parts that are a tensor each: added up at the end, for each takes 2 us in torch.
        self._singles: list[tuple[int, int]] = []
        # Elements of the layouts of one box.
        self._whole = [math.prod(each.shape) if each.count == 1 else None for each in tilings]

    def tensor(self, value: Any, name: str) -> IndexTensor:
        """A tensor of the index.

        Args:
            value: as JSON has it.
            name: the tensor's, in messages.

        Raises:
            Bad: it is malformed, or its files cannot hold it.
        """
        single = self._single(value)
        if single is not None:
            return single
        field = f"tensors[{short(name)}]"
        kind, layout, places = fields(value, field, "dtype", "layout", "places")
        dtype = stored_dtype(kind, f"{field}.dtype")
        tiling = self._tilings[integer(layout, f"{field}.layout", 0, len(self._tilings) - 1)]
        nbytes = math.prod(tiling.shape) * dtype.itemsize
        if nbytes > self._left:
            raise Bad(f"{field}: larger than the {self._left} bytes that the files have left")
        self._left -= nbytes
        rows, where = listed(places, f"{field}.places"), f"{field}.places"
        columns = self._columns(rows, tiling.count)
        if columns is None:
            raise Bad(self._problem(rows, where, tiling.count))
        counts, files, offsets = columns
        if tiling.count == 1:
            end, length = offsets[0] + nbytes, self._lengths[files[0]]
            if end > length:
                raise Bad(_beyond(f"{where}[0]", nbytes, offsets[0], files[0], length))
            self._singles.append((files[0], nbytes))
            return IndexTensor(dtype, tiling, (0,), files, offsets)
        firsts = tuple(accumulate(counts[:-1], initial=0))
        self._take(tiling.volumes * dtype.itemsize, where, firsts, counts, files, offsets)
        return IndexTensor(dtype, tiling, firsts, files, offsets)

    def _single(self, value: Any) -> IndexTensor | None:
        """A tensor in one part, as all are that one rank saved; None: it is none, or something is wrong.

        20,000 small tensors take 90 ms this way, half of it JSON's; with names for all fields it would be 290.
        """
        try:
            kind, layout, ((count, file, offset),) = (
                value["dtype"],
                value["layout"],
                value["places"],
            )
        except (LookupError, TypeError, ValueError):
            return None
        if not (
            len(value) == 3
            and type(kind) is str
            and kind in DTYPES
            and type(layout) is type(count) is type(file) is type(offset) is int  # True is none
            and count == 1
            and 0 <= layout < len(self._whole)
            and 0 <= file < len(self._lengths)
            and offset >= 0
        ):
            return None
        elements, dtype = self._whole[layout], DTYPES[kind]
        if elements is None:
            return None
        nbytes = elements * dtype.itemsize
        if nbytes > self._left or offset + nbytes > self._lengths[file]:
            return None
        self._left -= nbytes
        self._singles.append((file, nbytes))
        return IndexTensor(dtype, self._tilings[layout], (0,), (file,), (offset,))

    def _columns(self, rows: list[Any], boxes: int) -> tuple[tuple[int, ...], ...] | None:
        """Counts, files and offsets of the rows; None where one is malformed, or they are not as many boxes."""
        if not rows or {*map(type, rows)} != {list} or {*map(len, rows)} != {3}:
            return None
        if {*map(type, chain.from_iterable(rows))} != {int}:
            return None
        counts, files, offsets = zip(*rows, strict=True)
        if min(counts) < 1 or sum(counts) != boxes:
            return None
        if min(files) < 0 or max(map(add, files, counts)) > len(self._lengths):
            return None
        if min(offsets) < 0 or max(offsets) > self._longest:
            return None
        return counts, files, offsets

    def _problem(self, rows: list[Any], field: str, boxes: int) -> str:
        """Which row is the first that is wrong, and why."""
        total = 0
        for i, row in enumerate(rows):
            where = f"{field}[{i}]"
            if not isinstance(row, list) or len(row) != 3:
                return f"{where}: {short(row)}; must be [boxes, file, offset]"
            try:
                count = integer(row[0], f"{where}: boxes", 1, len(self._lengths))
                integer(row[1], f"{where}: file", 0, len(self._lengths) - count)
                integer(row[2], f"{where}: offset", 0, self._longest)
            except Bad as error:
                return str(error)
            total += count
        return f"{field}: of {total} boxes; must be the {boxes} of the layout"

    def _take(
        self,
        nbytes: Tensor,
        field: str,
        firsts: Sequence[int],
        counts: Sequence[int],
        files: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        """Gives bytes of the files to the boxes of a tensor."""
        times = _column(counts)
        bases = _column(files) - _column(firsts)
        file = bases.repeat_interleave(times) + torch.arange(len(nbytes), device="cpu")
        offset = _column(offsets).repeat_interleave(times)
        over = offset + nbytes > self._table[file]
        if bool(over.any()):
            box = int(over.int().argmax())
            row = bisect_right(firsts, box) - 1
            name = f"{field}[{row}]: box {box}"
            length = self._lengths[int(file[box])]
            raise Bad(_beyond(name, int(nbytes[box]), offsets[row], int(file[box]), length))
        self._used.index_add_(0, file, nbytes)

    def check_files(self) -> None:
        """After the last tensor: no file has to hold more than it has bytes.

        Raises:
            Bad: one that has.
        """
        if self._singles:
            files, nbytes = zip(*self._singles, strict=True)
            self._used.index_add_(0, _column(files), _column(nbytes))
        over = self._used > self._table
        if bool(over.any()):
            file = int(over.int().argmax())
            used, length = int(self._used[file]), self._lengths[file]
            raise Bad(f"files[{file}]: parts hold {used} bytes of it; it has {length}")


def _beyond(where: str, nbytes: int, offset: int, file: int, length: int) -> str:
    return f"{where}: {nbytes} bytes at {offset} of file {file}, which has {length}"


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
