"""index.json: what is written comes back, what is damaged is refused by field."""

from __future__ import annotations

import gc
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from goku_runtime.checkpoint import CheckpointError
from goku_runtime.checkpoint._boxes import Box
from goku_runtime.checkpoint.index import parse, to_json
from goku_runtime.checkpoint.plan import (
    Described,
    Held,
    Mesh,
    data_file,
    make_plan,
    make_plan_gathered,
)

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from indices import MESH, PLAN, SIZES, delete, set_at, sizes_of, small_plan
from mutations import mutated
from parsers import content_of, outcome, refused_or_faithful

TEXT = to_json(PLAN)


# --- writing and reading back -----------------------------------------------------------------------


def test_comes_back_as_it_was_planned() -> None:
    index = parse(TEXT, SIZES)
    assert json.dumps(content_of(index)) == json.dumps(json.loads(TEXT))
    assert list(index.tensors) == list(PLAN.entries)
    for name, entry in PLAN.entries.items():
        tensor = index.tensors[name]
        assert (tensor.dtype, tensor.shape) == (entry.dtype, entry.shape)
        found = [(index.files[part.file], part.offset, part.box) for part in tensor.parts]
        assert found == [(data_file(p.rank), p.payload, p.box) for p in entry.parts()]
    assert index.writer["ranks"] == 5
    assert index.writer["torch"] == torch.__version__
    assert index.writer["meshes"] == [{"dims": [["r", 2], ["s", 2]]}, {"dims": [[None, 3]]}]
    assert index.chunk == 65536


def test_a_line_for_each_layout_and_each_tensor() -> None:
    lines = TEXT.decode().splitlines()
    assert sum(line.startswith('"model.') for line in lines) == 2
    layouts = len(json.loads(TEXT)["layouts"])
    assert layouts == len(PLAN.entries)  # no two of them are cut alike
    assert len(lines) == 3 + layouts + 2 + len(PLAN.entries) + 1
    assert to_json(small_plan()) == TEXT


def test_what_4096_ranks_shard_takes_no_more_than_what_two_do() -> None:
    """One layout for all tensors that are cut alike, and one place for all of a tensor's boxes."""

    def text(ranks: int) -> bytes:
        mesh = Mesh((ranks,), tuple(range(ranks)))
        one = Described(torch.float32, (8192, 8), mesh, (Shard(0),))
        plan = make_plan({f"w{i}": one for i in range(20)}, world=ranks)
        data = to_json(plan)
        for name, tensor in parse(data, sizes_of(plan)).tensors.items():
            parts = list(plan.entries[name].parts())
            assert tensor.parts[-1].offset == parts[-1].payload
            assert [part.box for part in tensor.parts] == [part.box for part in parts]
        return data[data.index(b'"layouts"') :]

    few, many = text(2), text(4096)
    assert json.loads(b"{" + many)["layouts"] == [{"shape": [8192, 8], "cuts": [2, 8]}]
    # Of records of fewer rows the offsets have fewer digits, their count more.
    assert abs(len(many) - len(few)) <= 20 * 4


def test_an_empty_state() -> None:
    index = parse(to_json(make_plan({}, world=3)), {})
    assert (index.files, index.layouts, dict(index.tensors)) == ((), (), {})


def test_the_spelling_is_free() -> None:
    again = json.dumps(json.loads(TEXT), indent=3, sort_keys=True).encode()
    assert content_of(parse(again, SIZES)) == content_of(parse(TEXT, SIZES))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.data()), max_size=4))
def test_as_json_would_write_it(drawn: list[tuple[list[int], st.DataObject]]) -> None:
    """The lines are put together by hand: json, given the parts one by one, writes the same. No place could
    be joined with the one before."""
    tensors = {}
    for i, (shape, data) in enumerate(drawn):
        shards = [Shard(axis) for axis in range(len(shape))]
        placements = tuple(data.draw(st.sampled_from([Replicate(), *shards])) for _ in range(2))
        tensors[f'w"{i}é'] = Described(torch.int16, tuple(shape), MESH, placements)
    plan = make_plan(tensors, world=4)
    data, content = to_json(plan), json.loads(to_json(plan))
    numbers = {rank: i for i, rank in enumerate(r for r, size in enumerate(plan.sizes) if size)}
    wanted = []
    for name, entry in plan.entries.items():
        places: list[list[int]] = []
        for part in entry.parts():
            file, offset = numbers[part.rank], part.payload
            if places and [places[-1][1] + places[-1][0], places[-1][2]] == [file, offset]:
                places[-1][0] += 1
            else:
                places.append([1, file, offset])
        layout = content["tensors"][name]["layout"]
        assert content["layouts"][layout]["shape"] == list(entry.shape)
        value = {"dtype": "int16", "layout": layout, "places": places}
        wanted.append(f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}")
    lines = data.decode().splitlines()
    assert "\n".join(lines[-1 - len(wanted) : -1]) == ",\n".join(wanted)
    assert len(lines) == 3 + max(1, len(content["layouts"])) + 2 + max(1, len(wanted)) + 1
    found = parse(data, sizes_of(plan))
    assert list(found.tensors) == list(tensors)
    for name, entry in plan.entries.items():
        parts = [(numbers[p.rank], p.payload, p.box) for p in entry.parts()]
        assert [tuple(part) for part in found.tensors[name].parts] == parts


@pytest.mark.parametrize("chunk", [0, -4096, 4095, 65537])
def test_chunks_are_whole_pages(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed"):
        to_json(PLAN, chunk=chunk)
    assert parse(to_json(PLAN, chunk=8192), SIZES).chunk == 8192


def test_boxes_that_are_no_grid() -> None:
    """As ranks may hold that were gathered, or DCP's planner chose."""
    boxes = [Box((0, 0), (1, 4)), Box((1, 0), (2, 1)), Box((1, 1), (2, 3))]
    plan = make_plan_gathered([[Held("w", torch.int8, (3, 4), box)] for box in boxes])
    content = json.loads(to_json(plan))
    assert content["layouts"] == [
        {"shape": [3, 4], "boxes": [[list(s), list(n)] for s, n in boxes]}
    ]
    found = parse(to_json(plan), sizes_of(plan))
    assert [part.box for part in found.tensors["w"].parts] == boxes
    assert content_of(found) == content


# --- damage -----------------------------------------------------------------------------------------


W = ("tensors", "model.w")
FIRST = (*W, "places", 0)
CUTS = ("layouts", 0, "cuts")
BIG = 1 << 62


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_at("format")("x"), "format: not"),
        (set_at("version")(3), "version: 3; this program reads 1 and 2"),
        (set_at("version")(True), "version: True"),
        (set_at("version")(1), "index: unknown field 'layouts'"),
        (delete("chunk"), "index: lacks 'chunk'"),
        (delete("layouts"), "index: lacks 'layouts'"),
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
        (set_at("layouts")({}), "layouts: a dict of 0; must be a list"),
        (set_at("layouts", 0)([]), r"layouts\[0\]: a list of 0; must be an object"),
        (set_at("layouts", 0, "x")(1), r"layouts\[0\]: unknown field 'x'"),
        (set_at("layouts", 0, "boxes")([]), r"layouts\[0\]: unknown field 'cuts'"),
        (delete("layouts", 0, "shape"), r"layouts\[0\]: lacks 'shape'"),
        (
            set_at("layouts", 0, "shape")([5, -1]),
            r"layouts\[0\].shape: \[5, -1\]; must be at most 64",
        ),
        (set_at("layouts", 0, "shape")([1] * 65), "shape: .*at most 64 integers"),
        (set_at("layouts", 0, "shape")([5, 10**30]), r"shape: \[5, an integer beyond 64 bits\]"),
        (
            set_at("layouts", 0, "shape")([5]),
            r"cuts: a list of 2; must be one for each axis of .*\(5,\)",
        ),
        (set_at(*CUTS)(3), r"cuts: 3; must be a list"),
        (set_at(*CUTS, 0)(0), r"cuts\[0\]: 0; must be an integer from 1 to 5"),
        (set_at(*CUTS, 0)(6), r"cuts\[0\]: 6; must be an integer from 1 to 5"),
        (set_at(*CUTS, 0)(True), r"cuts\[0\]: True; must be"),
        (set_at(*CUTS, 0)([]), r"cuts\[0\]: \[\]; must be ascending from 0 and less than 5"),
        (set_at(*CUTS, 0)([1, 3]), r"cuts\[0\]: \[1, 3\]; must be ascending from 0"),
        (set_at(*CUTS, 0)([0, 3, 3]), r"cuts\[0\]: \[0, 3, 3\]; must be ascending"),
        (
            set_at(*CUTS, 0)([0, 5]),
            r"cuts\[0\]: \[0, 5\]; must be ascending from 0 and less than 5",
        ),
        (set_at(*CUTS, 0)([0, True]), r"cuts\[0\]: \[0, True\]; must be"),
        (set_at(*CUTS, 0)(1), r"places: of 2 boxes; must be the 5 of the layout"),
        (set_at(*CUTS, 1)(1), r"layouts\[0\].cuts: more boxes than the 5"),
        (set_at("layouts", 3, "cuts", 1)(1), r"layouts\[3\].cuts: more boxes than the 1 "),
        (set_at("tensors")([]), "tensors: a list of 0; must be an object"),
        (set_at(*W)(3), r"tensors\['model.w'\]: 3; must be an object"),
        (set_at(*W, "x")(3), r"tensors\['model.w'\]: unknown field 'x'"),
        (delete(*W, "dtype"), r"tensors\['model.w'\]: lacks 'dtype'"),
        (set_at(*W, "dtype")("load"), r"tensors\['model.w'\].dtype: 'load'; allowed: bool"),
        (set_at(*W, "layout")(-1), r"layout: -1; must be an integer from 0 to 4"),
        (set_at(*W, "layout")(5), r"layout: 5; must be an integer from 0 to 4"),
        (set_at(*W, "layout")(1), r"places: of 2 boxes; must be the 4 of the layout"),
        (set_at(*W, "places")({}), "places: a dict of 0; must be a list"),
        (set_at(*W, "places")([]), "places: of 0 boxes; must be the 2 of the layout"),
        (
            set_at(*W, "places")([[2, 0, 704], []]),
            r"places\[1\]: a list of 0; must be \[boxes, file",
        ),
        (set_at(*FIRST)(7), r"places\[0\]: 7; must be \[boxes, file, offset\]"),
        (set_at(*FIRST, 0)(0), r"places\[0\]: boxes: 0; must be an integer from 1 to 5"),
        (set_at(*FIRST, 0)(BIG), r"places\[0\]: boxes: 4611686018427387904; must be"),
        (delete(*W, "places", 1), "places: of 1 boxes; must be the 2"),
        (set_at(*FIRST, 0)(2), "places: of 3 boxes; must be the 2"),
        (set_at(*FIRST, 1)(-1), r"places\[0\]: file: -1; must be an integer from 0 to 4"),
        (set_at(*FIRST, 1)(5), r"places\[0\]: file: 5; must be an integer from 0 to 4"),
        (
            set_at(*W, "places")([[2, 4, 0]]),
            r"places\[0\]: file: 4; must be an integer from 0 to 3",
        ),
        (set_at(*FIRST, 2)(-1), r"places\[0\]: offset: -1"),
        (set_at(*FIRST, 2)(BIG), r"places\[0\]: offset: 4611686018427387904; must be"),
        (set_at(*FIRST, 2)("0"), r"places\[0\]: offset: '0'"),
        (set_at("tensors", "scalar", "places", 0, 2)(10**9), "offset: 1000000000; must be"),
    ],
)
def test_the_field_is_named(change: Callable[[dict[str, Any]], None], text: str) -> None:
    content = json.loads(TEXT)
    change(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        parse(json.dumps(content).encode(), SIZES, "c/index.json")
    assert str(caught.value).startswith("c/index.json is damaged: ")
    assert len(str(caught.value)) < 600


def test_a_part_beyond_the_end_of_its_file() -> None:
    content = json.loads(TEXT)
    size = SIZES[content["files"][1]]
    content["tensors"]["model.w"]["places"] = [[1, 0, 704], [1, 1, size - 11]]  # 12 bytes
    text = rf"'model.w'\].places\[1\]: box 1: 12 bytes at {size - 11} of file 1, which has {size}"
    with pytest.raises(CheckpointError, match=text):
        parse(json.dumps(content).encode(), SIZES)
    content["tensors"]["model.w"]["places"][1][2] -= 1
    parse(json.dumps(content).encode(), SIZES)
    file = content["tensors"]["scalar"]["places"][0][1]
    size = SIZES[content["files"][file]]
    content["tensors"]["scalar"]["places"][0][2] = size - 7
    with pytest.raises(CheckpointError, match=rf"'scalar'\].places\[0\]: 8 bytes at {size - 7} of"):
        parse(json.dumps(content).encode(), SIZES)


def wheel() -> dict[str, Any]:
    """Boxes that are no grid."""
    boxes = [
        [[0, 0], [1, 2]],
        [[0, 2], [2, 1]],
        [[2, 1], [1, 2]],
        [[1, 0], [2, 1]],
        [[1, 1], [1, 1]],
    ]
    content: dict[str, Any] = json.loads(TEXT)
    content["layouts"].append({"shape": [3, 3], "boxes": boxes})
    places = [[5, 0, 704]]
    content["tensors"]["wheel"] = {"dtype": "int8", "layout": 5, "places": places}
    return content


BOX = ("layouts", 5, "boxes")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_at(*BOX)(1), r"layouts\[5\].boxes: 1; must be a list"),
        (set_at(*BOX)([]), r"boxes: no part holds \[0:3, 0:3\]"),
        (delete(*BOX, 4), r"boxes: no part holds \[1:2, 1:2\]"),
        (set_at(*BOX, 4, 1)([1, 2]), r"boxes: two parts hold \[1:2, 2:3\]"),
        (
            set_at(*BOX, 4, 1)([0, 1]),
            r"boxes: a part is \[1:1, 1:2\], outside of the tensor or empty",
        ),
        (set_at(*BOX, 4)([[1, 1]]), r"boxes\[4\]: a list of 1; must be \[start, size\]"),
        (set_at(*BOX, 4, 0)([1]), r"boxes\[4\]: start \[1\]; must be 2 integers"),
        (set_at(*BOX, 4, 1)([True, 1]), r"boxes\[4\]: size \[True, 1\]; must be 2"),
        (set_at("layouts", 5, "cuts")([1, 1]), r"layouts\[5\]: unknown field 'cuts'"),
    ],
)
def test_the_box_is_named(change: Callable[[dict[str, Any]], None], text: str) -> None:
    content = wheel()
    assert content_of(parse(json.dumps(content).encode(), SIZES)) == content
    change(content)
    with pytest.raises(CheckpointError, match=text):
        parse(json.dumps(content).encode(), SIZES)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({"shape": [BIG], "cuts": [BIG]}, r"'w'\]: larger than the \d+ bytes that the files have left"),
        ({"shape": [BIG] * 64, "cuts": [BIG] * 64}, "larger than the"),
        ({"shape": [1 << 31] * 2, "cuts": [1 << 31] * 2}, "larger than the"),
        ({"shape": [BIG], "cuts": [1]}, r"layouts\[0\].cuts: more boxes than the 5 "),
        ({"shape": [BIG] * 3, "cuts": [1] * 3}, "more boxes than the 5 "),
        ({"shape": [BIG, 0], "cuts": [1, 1]}, "more boxes than the 1 "),
    ],
)  # fmt: skip
def test_no_more_than_the_files_hold(layout: dict[str, Any], text: str) -> None:
    parse(TEXT, SIZES)
    content = json.loads(TEXT)
    content["layouts"] = [layout]
    content["tensors"] = {"w": {"dtype": "int8", "layout": 0, "places": [[1, 0, 0]]}}
    data = json.dumps(content).encode()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=text):
            parse(data, SIZES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_files_beyond_64_bits() -> None:
    with pytest.raises(CheckpointError, match="files: together not less than"):
        parse(TEXT, dict.fromkeys(SIZES, BIG))


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_does_not_stand_for_more_than_it_holds(cut: bool) -> None:
    """Tensors that are all the same bytes, in one box each or in one for each of two files."""
    content = json.loads(TEXT)
    lengths = [SIZES[name] for name in content["files"]]
    half = min(lengths[:2]) // 2
    shape, cuts = ([2 * half], [half]) if cut else ([half], [half])
    content["layouts"] = [{"shape": shape, "cuts": cuts}]
    one = {"dtype": "int8", "layout": 0, "places": [[2 if cut else 1, 0, 0]]}
    content["tensors"] = {"a": one, "b": one}
    parse(json.dumps(content).encode(), SIZES)
    content["tensors"]["c"] = one
    if lengths[0] >= 3 * half:
        content["tensors"]["d"] = one
    with pytest.raises(
        CheckpointError, match=r"files\[[01]\]: parts hold \d+ bytes of it; it has \d+"
    ):
        parse(json.dumps(content).encode(), SIZES)
    content["tensors"] = {f"w{i}": one for i in range(1000)}
    with pytest.raises(CheckpointError, match=r"tensors\['w\d+'\]: larger than the \d+ bytes"):
        parse(json.dumps(content).encode(), SIZES)


@settings(max_examples=400)
@given(st.randoms(use_true_random=False))
def test_mutations_are_refused_or_taken_as_they_are(draw: random.Random) -> None:
    refused_or_faithful(json.dumps(mutated(wheel(), draw)).encode(), SIZES)


@settings(max_examples=300)
@given(st.randoms(use_true_random=False))
def test_what_is_said_does_not_depend_on_the_way(draw: random.Random) -> None:
    """Tensors in one part are read in a way of their own: the other way gives the same."""
    data = json.dumps(mutated(wheel(), draw)).encode()
    found = outcome(data, SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goku_runtime.checkpoint._index_layouts.PlaceReader._single", lambda *_: None)
        assert outcome(data, SIZES) == found


@settings(max_examples=400)
@given(st.integers(0, len(TEXT) - 1), st.binary(max_size=3), st.integers(0, 3))
@example(TEXT.index(b'"chunk"'), b"", 1)
def test_damaged_bytes_are_refused_or_taken_as_they_are(at: int, put: bytes, gone: int) -> None:
    refused_or_faithful(TEXT[:at] + put + TEXT[at + gone :], SIZES)


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
