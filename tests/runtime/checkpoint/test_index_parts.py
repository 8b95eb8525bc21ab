"""index.json of version 1, which lists every part: what it says is taken as it stands there, or refused by field."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from goku_runtime.checkpoint import CheckpointError
from goku_runtime.checkpoint.index import parse

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from indices import PLAN, SIZES, delete, listing, set_at
from mutations import mutated
from parsers import content_of, outcome, refused_or_faithful

TEXT = listing(PLAN)


def test_comes_back_as_it_stands_there() -> None:
    index = parse(TEXT, SIZES)
    assert index.version == 1
    assert content_of(index) == json.loads(TEXT)
    for name, entry in PLAN.entries.items():
        found = [
            (index.files[part.file], part.offset, part.box) for part in index.tensors[name].parts
        ]
        assert found == [(f"__{p.rank}_0.distcp", p.payload, p.box) for p in entry.parts()]


# --- damage -----------------------------------------------------------------------------------------


W = ("tensors", "model.w")
FIRST = (*W, "parts", 0)
BIG = 1 << 62


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_at("version")(2), "index: lacks 'layouts'"),
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
    found = outcome(data, SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goku_runtime.checkpoint._index_parts._single", lambda *_: None)
        assert outcome(data, SIZES) == found
    assert not str(found).endswith("malformed"), "that is said where no cause is found"


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
