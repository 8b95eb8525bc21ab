"""index.json: what is written comes back, what is damaged is refused by field, runs gather the right bytes."""

from __future__ import annotations

import gc
import json
import math
import random
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from goku_runtime.checkpoint import CheckpointError
from goku_runtime.checkpoint._boxes import Box, fault, intersection, whole
from goku_runtime.checkpoint._runs import runs as runs_of
from goku_runtime.checkpoint.index import IndexTensor, Run, StoredPart, parse, to_json
from goku_runtime.checkpoint.plan import (
    Described,
    GlobalPlan,
    Mesh,
    data_file,
    make_plan,
)

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from mutations import mutated
from parsers import content_of, refused_or_faithful

MESH = Mesh((2, 2), (0, 1, 2, 3), ("r", "s"))


def small_plan() -> GlobalPlan:
    return make_plan(
        {
            "model.w": Described(torch.bfloat16, (5, 3), MESH, (Replicate(), Shard(0))),
            "model.grid": Described(torch.float32, (4, 6), MESH, (Shard(0), Shard(1))),
            "scalar": Described(torch.float64, ()),
            "nothing": Described(torch.int64, (0, 2), MESH, (Replicate(), Shard(0))),
            'odd "name"\n\ud800é': Described(torch.bool, (3,), Mesh((3,), (3, 0, 1)), (Shard(0),)),
        },
        world=5,
    )


def sizes_of(plan: GlobalPlan) -> dict[str, int]:
    return {data_file(rank): size for rank, size in enumerate(plan.sizes) if size}


PLAN = small_plan()
SIZES = sizes_of(PLAN) | {"state.json": 10}
TEXT = to_json(PLAN)


# --- writing and reading back -----------------------------------------------------------------------


def test_comes_back_as_it_was_planned() -> None:
    index = parse(TEXT, SIZES)
    assert json.dumps(content_of(index)) == json.dumps(json.loads(TEXT))
    assert list(index.tensors) == list(PLAN.entries)
    for name, entry in PLAN.entries.items():
        tensor = index.tensors[name]
        assert (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape)
        found = [(index.files[part.file], part.offset, part.box) for part in index.boxes(name)]
        assert found == [(data_file(p.rank), p.payload, p.box) for p in entry.parts()]
    assert index.writer["ranks"] == 5
    assert index.writer["torch"] == torch.__version__
    assert index.writer["meshes"] == [{"dims": [["r", 2], ["s", 2]]}, {"dims": [[None, 3]]}]
    assert index.chunk == 65536


def test_a_line_for_each_tensor() -> None:
    lines = TEXT.decode().splitlines()
    assert sum(line.startswith('"model.') for line in lines) == 2
    assert len(lines) == 3 + len(PLAN.entries) + 1
    assert to_json(small_plan()) == TEXT


def test_an_empty_state() -> None:
    index = parse(to_json(make_plan({}, world=3)), {})
    assert (index.files, dict(index.tensors)) == ((), {})
    with pytest.raises(KeyError):
        index.boxes("w")


def test_the_spelling_is_free() -> None:
    again = json.dumps(json.loads(TEXT), indent=3, sort_keys=True).encode()
    assert content_of(parse(again, SIZES)) == content_of(parse(TEXT, SIZES))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.data()), max_size=4))
def test_as_json_would_write_it(drawn: list[tuple[list[int], st.DataObject]]) -> None:
    """The lines are put together by hand: json, given the parts one by one, writes the same."""
    tensors = {}
    for i, (shape, data) in enumerate(drawn):
        shards = [Shard(axis) for axis in range(len(shape))]
        placements = tuple(data.draw(st.sampled_from([Replicate(), *shards])) for _ in range(2))
        tensors[f'w"{i}é'] = Described(torch.int16, tuple(shape), MESH, placements)
    plan = make_plan(tensors, world=4)
    lines = to_json(plan).decode().splitlines()
    numbers = {rank: i for i, rank in enumerate(r for r, size in enumerate(plan.sizes) if size)}
    wanted = []
    for name, entry in plan.entries.items():
        parts = [[numbers[p.rank], p.payload, p.box.start, p.box.size] for p in entry.parts()]
        value = {"dtype": "int16", "shape": entry.shape, "parts": parts}
        wanted.append(f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}")
    assert "\n".join(lines[3:-1]) == ",\n".join(wanted)
    assert list(parse(to_json(plan), sizes_of(plan)).tensors) == list(tensors)


@pytest.mark.parametrize("chunk", [0, -4096, 4095, 65537])
def test_chunks_are_whole_pages(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed"):
        to_json(PLAN, chunk=chunk)
    assert parse(to_json(PLAN, chunk=8192), SIZES).chunk == 8192


# --- damage -----------------------------------------------------------------------------------------


def set_at(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            node: Any = content
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value

        return change

    return to


def delete(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


W = ("tensors", "model.w")
FIRST = (*W, "parts", 0)
BIG = 1 << 62


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_at("format")("x"), "format: not"),
        (set_at("version")(2), "version: 2; this program reads 1"),
        (set_at("version")(True), "version: True"),
        (delete("chunk"), "index: lacks 'chunk'"),
        (set_at("more")(1), "index: unknown field 'more'"),
        (set_at("chunk")(0), "chunk: 0"),
        (set_at("chunk")(4097), "chunk: 4097; must be a multiple of 4096"),
        (set_at("writer")([]), "writer: a list of 0; must be an object"),
        (set_at("writer", "ranks")(0), "writer.ranks: 0"),
        (set_at("writer", "torch")(2), "writer.torch: 2; must be a string"),
        (set_at("writer", "meshes", 0, "dims", 0)(["r"]), r"writer.meshes\[0\].dims: a list of 1"),
        (set_at("writer", "meshes", 0, "x")(1), r"writer.meshes\[0\]: unknown field 'x'"),
        (set_at("files")({}), "files: a dict of 0; must be a list"),
        (set_at("files", 1)("../up"), r"files\[1\]: '../up' is no file of the checkpoint"),
        (set_at("files", 1)("__0_0.distcp"), "files: a name is there twice"),
        (set_at("tensors")([]), "tensors: a list of 0; must be an object"),
        (set_at(*W)(3), r"tensors\['model.w'\]: 3; must be an object"),
        (set_at(*W, "x")(3), r"tensors\['model.w'\]: unknown field 'x'"),
        (delete(*W, "dtype"), r"tensors\['model.w'\]: lacks 'dtype'"),
        (set_at(*W, "dtype")("load"), r"tensors\['model.w'\].dtype: 'load'; allowed: bool"),
        (set_at(*W, "shape")([5]), r"parts\[0\]: start \[0, 0\]; must be 1 integers"),
        (set_at(*W, "shape")([5, 2]), r"parts: a part is \[0:3, 0:3\], outside of the tensor"),
        (set_at(*W, "shape")([5, 4]), r"parts: no part holds"),
        (set_at(*W, "shape")([1] * 65), "shape: .*at most 64 integers"),
        (set_at(*W, "shape")([5, 10**30]), r"shape: \[5, an integer beyond 64 bits\]"),
        (set_at(*W, "parts")([]), r"parts: no part holds \[0:5, 0:3\]"),
        (set_at(*FIRST)([0, 0, [0]]), r"parts\[0\]: a list of 3; must be \[file, offset"),
        (set_at(*FIRST, 0)(99), r"parts\[0\]: file 99; must be an integer from 0 to"),
        (set_at(*FIRST, 0)(-1), r"parts\[0\]: file -1"),
        (set_at(*FIRST, 1)(-1), r"parts\[0\]: offset -1"),
        (set_at(*FIRST, 1)(BIG), r"parts\[0\]: 18 bytes at 4611686018427387904 of file"),
        (set_at(*FIRST, 1)("0"), r"parts\[0\]: offset '0'"),
        (set_at(*FIRST, 2)([0, -1]), r"parts\[0\]: start \[0, -1\]"),
        (
            set_at(*FIRST, 3)([0, 3]),
            r"parts: a part is \[0:0, 0:3\], outside of the tensor or empty",
        ),
        (set_at(*FIRST, 3)(None), r"parts\[0\]: size None"),
        (set_at(*FIRST, 3)([4, 3]), r"parts: two parts hold \[3:4, 0:3\]"),
        (set_at(*FIRST, 3)([True, 3]), r"parts\[0\]: size \[True, 3\]"),
        (
            set_at("tensors", "nothing", "parts")([]),
            r"'nothing'\].parts: no part holds \[0:0, 0:2\]",
        ),
        (set_at("tensors", "nothing", "shape")([0, 3]), r"'nothing'\].parts: a part is"),
    ],
)
def test_the_field_is_named(change: Callable[[dict[str, Any]], None], text: str) -> None:
    content = json.loads(TEXT)
    change(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        parse(json.dumps(content).encode(), SIZES, "c/index.json")
    assert str(caught.value).startswith("c/index.json is damaged: ")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "Expecting value"),
        (b"[]", "format"),
        (b"\xff\xfe", "utf-8"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":65536,"chunk":65536'), "'chunk': twice in one object"),
        (TEXT.replace(b'"scalar":', b'"model.w":'), "'model.w': twice in one object"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":NaN'), "the number NaN"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":65536.0'), "the number 65536.0"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":1e400'), "the number 1e400"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":' + b"9" * 5000), "digits"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":' + b"9" * 4000), "an integer beyond 64 bits"),
        (b"[" * 100_000, "recursion"),
        (TEXT.replace(b'"chunk":65536', b'"chunk":' + b'{"a":' * 100_000), "recursion"),
        (TEXT[:-3], "Expecting"),
        (TEXT + b"x", "Extra data"),
        (TEXT.decode().encode("utf-16"), "utf-8"),
    ],
)  # fmt: skip
def test_what_is_no_index(data: bytes, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse(data, SIZES)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        parse(TEXT, SIZES)
        with pytest.raises(CheckpointError):
            parse(TEXT[:-3], SIZES)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def huge(shape: list[int], start: list[int], *, parts: int = 1) -> bytes:
    content = json.loads(TEXT)
    content["tensors"] = {
        "w": {"dtype": "int8", "shape": shape, "parts": [[0, 0, start, shape]] * parts}
    }
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "data",
    [
        huge([BIG], [0]),
        huge([BIG] * 64, [0] * 64),
        huge([1 << 31, 1 << 31], [0, 0]),
        huge([1] * 60 + [1 << 40], [0] * 61),
    ],
)
def test_no_more_than_the_files_hold(data: bytes) -> None:
    parse(TEXT, SIZES)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="bytes at 0 of file 0, which has"):
            parse(data, SIZES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_does_not_stand_for_more_than_it_holds() -> None:
    """A thousand tensors that are all the same bytes."""
    content = json.loads(TEXT)
    half = SIZES["__0_0.distcp"] // 2
    one = {"dtype": "int8", "shape": [half], "parts": [[0, 0, [0], [half]]]}
    content["tensors"] = {"a": one, "b": one}
    parse(json.dumps(content).encode(), SIZES)
    content["tensors"] = {f"w{i}": one for i in range(1000)}
    with pytest.raises(CheckpointError, match=r"'w2'\].parts\[0\]: with it, parts hold more than"):
        parse(json.dumps(content).encode(), SIZES)


@settings(max_examples=400)
@given(st.randoms(use_true_random=False))
def test_mutations_are_refused_or_taken_as_they_are(draw: random.Random) -> None:
    refused_or_faithful(json.dumps(mutated(json.loads(TEXT), draw)).encode(), SIZES)


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_what_is_said_does_not_depend_on_the_way(draw: random.Random) -> None:
    """Tensors in one part are read in a way of their own: the other way gives the same."""
    data = json.dumps(mutated(json.loads(TEXT), draw)).encode()
    found = outcome(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goku_runtime.checkpoint.index._single", lambda *_: None)
        assert outcome(data) == found
    assert not str(found).endswith("malformed"), "that is said where no cause is found"


def outcome(data: bytes) -> Any:
    """The content of an index, or what is wrong with it."""
    try:
        return content_of(parse(data, SIZES))
    except CheckpointError as error:
        return str(error)


def test_boxes_that_many_tensors_have() -> None:
    """What was made of one tensor's boxes serves others of its shape only where it is the same."""

    def halves(offset: int, cut: int) -> dict[str, Any]:
        parts = [[0, offset, [0], [cut]], [1, offset, [cut], [4 - cut]]]
        return {"dtype": "int8", "shape": [4], "parts": parts}

    content = json.loads(TEXT)
    content["tensors"] = {f"w{i}": halves(64 * i, 1 + i % 3 // 2) for i in range(9)}
    index = parse(json.dumps(content).encode(), SIZES)
    assert content_of(index)["tensors"] == content["tensors"]
    assert index.tensors["w0"].parts[1].box is index.tensors["w1"].parts[1].box
    last = halves(SIZES["__1_0.distcp"] - 3, 1)
    content["tensors"]["last"] = last
    with pytest.raises(CheckpointError, match=r"'last'\].parts\[0\]: 1 bytes at"):
        parse(json.dumps(content).encode(), {**SIZES, "__0_0.distcp": 64 * 9})
    content["tensors"]["last"] = last | {"dtype": "float64"}  # more bytes in the same boxes
    with pytest.raises(CheckpointError, match=r"'last'\].parts\[.\]: (8|24) bytes at"):
        parse(json.dumps(content).encode(), SIZES)
    for wrong, text in (
        (True, r"parts\[1\]: size \[True\]"),
        (2, r"parts: a part is \[3:5\], outside of the tensor"),
    ):
        content["tensors"]["last"] = halves(0, 3)
        parse(json.dumps(content).encode(), SIZES)
        content["tensors"]["last"]["parts"][1][3] = [wrong]
        with pytest.raises(CheckpointError, match=text):
            parse(json.dumps(content).encode(), SIZES)


@settings(max_examples=400)
@given(st.integers(0, len(TEXT) - 1), st.binary(max_size=3), st.integers(0, 3))
@example(TEXT.index(b'"chunk"'), b"", 1)
def test_damaged_bytes_are_refused_or_taken_as_they_are(at: int, put: bytes, gone: int) -> None:
    refused_or_faithful(TEXT[:at] + put + TEXT[at + gone :], SIZES)


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
    return IndexTensor(tensor.dtype, tuple(tensor.shape), tuple(parts)), files


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
    tensor = IndexTensor(torch.float32, shape, (StoredPart(3, 640, whole(shape)),))
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
    tensor = IndexTensor(torch.int8, (4, 7), (StoredPart(0, 0, whole((4, 7))),))
    with pytest.raises(ValueError, match=r"allowed: boxes in a tensor of \(4, 7\)"):
        tensor.runs(box)


def test_a_box_among_thousands_of_parts() -> None:
    """Found by its place, not by looking at each: 1,500 tensors with 256 parts are usual."""
    parts = tuple(StoredPart(i, 64, Box((2 * i, 0), (2, 8))) for i in range(20_000))
    tensor = IndexTensor(torch.int8, (40_000, 8), parts)
    tensor.runs(Box((0, 0), (1, 1)))
    begin = time.process_time()
    for i in range(2000):
        (run,) = tensor.runs(Box((2 * i, 0), (2, 8)))
        assert run == Run(i, 64, 16, 1, 16, 0, 16)
    assert time.process_time() - begin < 2
