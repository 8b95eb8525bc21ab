"""Which bytes of a stored box make up a part of another one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from goku_runtime.checkpoint._boxes import Box

__all__ = ["Run", "StoredPart", "runs"]


class StoredPart(NamedTuple):
    """A box of a tensor: the number of its file and where its payload begins there, in bytes."""

    file: int
    offset: int
    box: Box


class Run(NamedTuple):
    """Rows of bytes to read: row r is file bytes [offset + r * file_stride, + row_bytes), and belongs
    at memory_offset + r * memory_stride of the wanted box, laid out row-major without gaps."""

    file: int
    offset: int
    row_bytes: int
    rows: int
    file_stride: int
    memory_offset: int
    memory_stride: int


def runs(part: StoredPart, common: Box, wanted: Box, itemsize: int) -> Iterator[Run]:
    """The runs for the elements that a part and the wanted box have in common."""
    offset, memory = part.offset, 0
    # Loops from the inside out: (count, bytes from one to the next in the file, and in memory).
    loops: list[tuple[int, int, int]] = []
    row, file_step, memory_step = itemsize, itemsize, itemsize
    for axis in reversed(range(len(common.size))):
        offset += (common.start[axis] - part.box.start[axis]) * file_step
        memory += (common.start[axis] - wanted.start[axis]) * memory_step
        count = common.size[axis]
        if not loops and file_step == memory_step == row:
            row *= count
        elif (
            loops
            and loops[-1][0] * loops[-1][1] == file_step
            and loops[-1][0] * loops[-1][2] == memory_step
        ):
            loops[-1] = (loops[-1][0] * count, *loops[-1][1:])
        elif count > 1:
            loops.append((count, file_step, memory_step))
        file_step *= part.box.size[axis]
        memory_step *= wanted.size[axis]
    # The longest loop becomes the rows of a run, the others one run for each of their rounds.
    rows = max(range(len(loops)), key=lambda i: loops[i][0], default=-1)
    count, file_stride, memory_stride = loops.pop(rows) if loops else (1, row, row)
    total = math.prod(each[0] for each in loops)
    for number in range(total):
        at, place, rest = offset, memory, number
        for each, file_step, memory_step in loops:
            rest, step = divmod(rest, each)
            at += step * file_step
            place += step * memory_step
        yield Run(part.file, at, row, count, file_stride, place, memory_stride)
