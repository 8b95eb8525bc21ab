"""Pieces of tensors: each element once, in order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goku_runtime.checkpoint._boxes import Box
from goku_runtime.checkpoint.plan import Described
from goku_runtime.checkpoint.tools.slabs import batches, spans
from goku_runtime.checkpoint.tools.units import parse_size, size_text


@given(st.data())
def test_spans_are_the_elements_in_order(data: st.DataObject) -> None:
    size = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    start = tuple(data.draw(st.integers(0, 3)) for _ in size)
    shape = tuple(a + b + 1 for a, b in zip(start, size, strict=True))
    tensor = torch.arange(math.prod(shape)).view(shape)
    box = Box(start, size)
    last = data.draw(st.integers(0, box.volume))
    first = data.draw(st.integers(0, last))

    def of(part: Box) -> torch.Tensor:
        cut = tensor
        for axis, (low, length) in enumerate(zip(*part, strict=True)):
            cut = cut.narrow(axis, low, length)
        return cut.reshape(-1)

    found = list(spans(box, first, last))
    wanted = of(box)[first:last]
    assert torch.equal(torch.cat([of(part) for part in found] or [wanted[:0]]), wanted)
    assert len(found) <= max(2 * len(size) - 1, 1)


@given(
    st.lists(st.tuples(st.sampled_from([torch.uint8, torch.float32, torch.complex128]),
                       st.lists(st.integers(0, 9), max_size=3)), max_size=8),
    st.integers(64, 1000),
)  # fmt: skip
def test_batches_hold_everything_once_and_fit(
    kinds: list[tuple[torch.dtype, list[int]]], nbytes: int
) -> None:
    tensors = {str(i): Described(d, tuple(shape)) for i, (d, shape) in enumerate(kinds)}
    next_element = dict.fromkeys(tensors, 0)
    for batch in batches(tensors.items(), nbytes):
        assert batch
        end = 0
        for slab in batch:
            assert slab.offset >= end
            assert slab.offset % slab.tensor.dtype.itemsize == 0
            end = slab.offset + slab.nbytes
            assert slab.first == next_element[slab.name] < slab.last
            next_element[slab.name] = slab.last
        assert end <= nbytes
    assert next_element == {name: math.prod(each.shape) for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("65536", 65536), ("5GB", 5 * 10**9), ("64 MiB", 64 << 20), ("1.5kib", 1536)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 apples", "1e9", "0x10", "5GBps"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size is .*; allowed: bytes"):
        parse_size(text)


def test_sizes_in_words() -> None:
    found = [size_text(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 2 << 40)]
    assert found == ["0 B", "1023 B", "1.50 KiB", "5.00 MiB", "3.00 GiB", "2.00 TiB"]
