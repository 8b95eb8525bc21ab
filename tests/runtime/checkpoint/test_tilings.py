"""Boxes that tile a tensor, how cuts say them, and the runs of bytes that bring one together."""

from __future__ import annotations

import math
import random
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from goku_runtime.checkpoint._boxes import Box, fault, intersection, whole
from goku_runtime.checkpoint._runs import Run, StoredPart
from goku_runtime.checkpoint._runs import runs as runs_of
from goku_runtime.checkpoint._tilings import Cut, IndexTensor, Tiling, cuts_of

# --- tilings ----------------------------------------------------------------------------------------


def divided(shape: tuple[int, ...], cuts: int, seed: int) -> list[Box]:
    """A tiling by random cuts of random boxes."""
    choice = random.Random(seed)
    boxes = [whole(shape)]
    for _ in range(cuts):
        box = boxes.pop(choice.randrange(len(boxes)))
        axes = [axis for axis, size in enumerate(box.size) if size > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = choice.choice(axes)
        place = choice.randrange(1, box.size[axis])
        low, high = list(box.size), list(box.size)
        start = list(box.start)
        low[axis], high[axis] = place, box.size[axis] - place
        start[axis] += place
        boxes += [Box(box.start, tuple(low)), Box(tuple(start), tuple(high))]
    choice.shuffle(boxes)
    return boxes


def pinwheels(count: int) -> tuple[tuple[int, int], list[Box]]:
    """Five boxes around a middle, which no straight cut divides, count x count times."""
    wheel = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    boxes = [
        Box((3 * i + start[0], 3 * j + start[1]), size)
        for i in range(count)
        for j in range(count)
        for start, size in wheel
    ]
    return (3 * count, 3 * count), boxes


@settings(max_examples=300)
@given(
    st.lists(st.integers(1, 6), max_size=3).map(tuple), st.integers(0, 9), st.integers(0, 10**6), st.data()
)  # fmt: skip
def test_faults_of_tilings(
    shape: tuple[int, ...], cuts: int, seed: int, data: st.DataObject
) -> None:
    boxes = divided(shape, cuts, seed)
    assert fault(shape, boxes) is None
    changed = list(boxes)
    i = data.draw(st.integers(0, len(boxes) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "move", "swap"]))
    if kind == "drop":
        del changed[i]
    elif kind == "double":
        changed.append(boxes[i])
    elif kind == "move":
        room = [n - size for n, size in zip(shape, boxes[i].size, strict=True)]
        start = tuple(data.draw(st.integers(0, each)) for each in room)
        changed[i] = Box(start, boxes[i].size)
    else:
        changed[i] = boxes[data.draw(st.integers(0, len(boxes) - 1))]
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in changed:
        counts[tuple(slice(s, s + n) for s, n in zip(*box, strict=True))] += 1
    wrong = fault(shape, changed)
    assert (wrong is None) == bool((counts == 1).all())
    if wrong is not None:
        region = counts[tuple(slice(s, s + n) for s, n in zip(*wrong.where, strict=True))]
        assert bool((region == 0).all() if wrong.kind == "gap" else (region > 1).all())
        assert all(intersection(changed[k], wrong.where) == wrong.where for k in wrong.boxes)
        assert len(wrong.boxes) == (0 if wrong.kind == "gap" else 2)


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((512, 280), [Box((4 * i, 4 * j), (4, 4)) for i in range(128) for j in range(70)]),
        ((4096, 4096, 64), divided((4096, 4096, 64), 8000, 0)),
        pinwheels(40),
    ],
)
def test_thousands_of_parts_are_no_matter(shape: tuple[int, ...], boxes: list[Box]) -> None:
    """Pair by pair, 8,000 boxes take a minute; 0.6 s at most was measured."""
    begin = time.process_time()
    assert fault(shape, boxes) is None
    moved = [*boxes[:77], boxes[78], *boxes[78:]]
    assert fault(shape, moved) is not None
    assert time.process_time() - begin < 6


# --- cuts -------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.data())
def test_cuts_are_the_boxes_of_a_grid(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Row by row in the order of the axes, against loops; found again from the boxes alone."""
    cuts: list[Cut] = []
    axes = []
    for length in shape:
        inner = data.draw(st.sets(st.integers(1, max(1, length - 1)))) if length > 1 else set()
        starts = sorted({0, *(inner if math.prod(shape) else ())})
        even = len(starts) > 1 and starts == list(range(0, length, starts[1]))
        cuts.append(starts[1] if even else max(1, length) if len(starts) == 1 else tuple(starts))
        axes.append([(a, b - a) for a, b in pairwise([*starts, length])])
    wanted = [Box((), ())]
    for axis in axes:
        wanted = [
            Box((*box.start, start), (*box.size, size)) for box in wanted for start, size in axis
        ]
    tiling = Tiling(shape, cuts=tuple(cuts))
    assert tiling.boxes == wanted
    assert tiling.count == len(wanted) == len(tiling.volumes)
    assert tiling.volumes.tolist() == [box.volume for box in wanted]
    assert fault(shape, wanted) is None
    assert cuts_of(shape, wanted) == tiling.cuts
    assert [tiling.number_of(box) for box in wanted] == list(range(len(wanted)))
    assert tiling.number_of(Box(tuple(n + 1 for n in shape), shape)) is None or not shape
    if len(wanted) > 1:
        swapped = [wanted[1], wanted[0], *wanted[2:]]
        assert cuts_of(shape, swapped) is None
        given = Tiling(shape, swapped)
        assert given.volumes.tolist() == [box.volume for box in swapped]
        assert given.number_of(wanted[0]) == 1


def test_boxes_that_are_no_grid() -> None:
    assert cuts_of(*pinwheels(1)) is None
    halves = [Box((0, 0), (1, 4)), Box((1, 0), (1, 1)), Box((1, 1), (1, 3))]
    assert cuts_of((2, 4), halves) is None
    # Two starts a billion apart: not one number for each element between.
    far = [Box((0,), (1,)), Box((1,), (10**12 - 1,))]
    assert cuts_of((10**12,), far) == ((0, 1),)


def test_boxes_of_a_row_of_files() -> None:
    """A place stands for boxes one after another, in files one after another."""
    tiling = Tiling((10, 4), cuts=(2, 4))
    tensor = IndexTensor(torch.int16, tiling, (0, 3, 4), (7, 2, 0), (64, 0, 640))
    assert [(part.file, part.offset) for part in tensor.parts] == [
        (7, 64), (8, 64), (9, 64), (2, 0), (0, 640)
    ]  # fmt: skip
    assert [part.box for part in tensor.parts] == tiling.boxes
    assert tensor.stored_as(Box((4, 0), (2, 4))) == tensor.parts[2]
    assert tensor.stored_as(Box((4, 0), (2, 3))) is None
    for file in range(11):
        assert list(tensor.in_file(file)) == [part for part in tensor.parts if part.file == file]
    assert [part.file for part, _ in tensor.touching(Box((3, 1), (4, 2)))] == [8, 9, 2]


# --- runs -------------------------------------------------------------------------------------------


def stored(tensor: Tensor, boxes: list[Box], seed: int) -> tuple[IndexTensor, list[bytearray]]:
    """The tensor's boxes in two files, at random places."""
    choice = random.Random(seed)
    files, parts = [bytearray(), bytearray()], []
    for box in boxes:
        file = choice.randrange(2)
        files[file] += bytes(choice.randrange(9))
        parts.append(StoredPart(file, len(files[file]), box))
        files[file] += payload(tensor, box)
    return IndexTensor.of(tensor.dtype, tuple(tensor.shape), parts), files


def payload(tensor: Tensor, box: Box) -> bytes:
    piece = tensor[tuple(slice(s, s + n) for s, n in zip(*box, strict=True))]
    return bytes(piece.contiguous().view(-1).view(torch.uint8).tolist())


def gathered(runs: list[Run], files: list[bytearray], nbytes: int) -> bytes:
    """What the runs bring together; no byte may come twice."""
    memory, written = bytearray(nbytes), bytearray(nbytes)
    for run in runs:
        for row in range(run.rows):
            source = run.offset + row * run.file_stride
            target = run.memory_offset + row * run.memory_stride
            piece = files[run.file][source : source + run.row_bytes]
            assert len(piece) == run.row_bytes
            memory[target : target + run.row_bytes] = piece
            for k in range(target, target + run.row_bytes):
                written[k] += 1
    assert written == b"\1" * nbytes
    return bytes(memory)


@settings(max_examples=300)
@given(st.integers(0, 4), st.integers(0, 2**32), st.booleans())
def test_runs_gather_what_is_wanted(axes: int, seed: int, empty: bool) -> None:
    choice = random.Random(seed)
    shape = tuple(choice.randrange(1, 6) for _ in range(axes))
    dtype = choice.choice([torch.int8, torch.int16, torch.int64])
    tensor = torch.arange(math.prod(shape)).to(dtype).view(shape)
    index, files = stored(tensor, divided(shape, choice.randrange(8), seed), seed)
    start = tuple(choice.randrange(n) // choice.randrange(1, 3) for n in shape)
    size = tuple(choice.randrange(not empty, n - s + 1) for s, n in zip(start, shape, strict=True))
    wanted = Box(start, size)
    runs = index.runs(wanted)
    assert gathered(runs, files, wanted.volume * dtype.itemsize) == payload(tensor, wanted)
    # At most one run for each combination of all axes but the last (a row) and the longest before.
    for part, common in index.touching(wanted):
        outer = common.size[:-1]
        limit = math.prod(outer) // max((1, *outer))
        assert len(list(runs_of(part, common, wanted, dtype.itemsize))) <= limit
    assert wanted.volume or not runs


def test_few_runs() -> None:
    shape = (8, 6, 10)
    tensor = IndexTensor.of(torch.float32, shape, [StoredPart(3, 640, whole(shape))])
    assert tensor.runs(whole(shape)) == [Run(3, 640, 1920, 1, 1920, 0, 1920)]
    rows = tensor.runs(Box((2, 0, 0), (4, 6, 10)))
    assert rows == [Run(3, 640 + 480, 960, 1, 960, 0, 960)]
    columns = tensor.runs(Box((0, 0, 3), (8, 6, 4)))  # 48 rows with one stride
    assert columns == [Run(3, 640 + 12, 16, 48, 40, 0, 16)]
    assert len(tensor.runs(Box((0, 1, 3), (8, 2, 4)))) == 2  # of eight rows each
    assert len(tensor.runs(Box((1, 1, 3), (2, 5, 4)))) == 2  # of five rows each


@pytest.mark.parametrize(
    "box", [Box((0,), (1,)), Box((0, 1), (4, 7)), Box((-1, 0), (1, 1)), Box((0, 0), (1, -1))]
)
def test_boxes_outside_are_refused(box: Box) -> None:
    tensor = IndexTensor.of(torch.int8, (4, 7), [StoredPart(0, 0, whole((4, 7)))])
    with pytest.raises(ValueError, match=r"allowed: boxes in a tensor of \(4, 7\)"):
        tensor.runs(box)


def test_a_box_among_thousands_of_parts() -> None:
    """Found by its place, not by looking at each: 1,500 tensors with 256 parts are usual."""
    parts = [StoredPart(i, 64, Box((2 * i, 0), (2, 8))) for i in range(20_000)]
    tensor = IndexTensor.of(torch.int8, (40_000, 8), parts)
    tensor.runs(Box((0, 0), (1, 1)))
    begin = time.process_time()
    for i in range(2000):
        (run,) = tensor.runs(Box((2 * i, 0), (2, 8)))
        assert run == Run(i, 64, 16, 1, 16, 0, 16)
    assert time.process_time() - begin < 2
