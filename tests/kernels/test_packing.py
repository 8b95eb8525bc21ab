"""Packing: offsets, grids and segment ids from host lengths, and what it refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goku_kernels import Packing

grids = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=6)


@given(grids)
def test_from_grids(sizes):
    packing = Packing.from_grids(sizes)
    ids = [i for i, (t, h, w) in enumerate(sizes) for _ in range(t * h * w)]
    assert packing.segment_ids().tolist() == ids
    assert packing.segment_ids().dtype == torch.int64
    assert packing.lengths == tuple(t * h * w for t, h, w in sizes)
    assert packing.cu_seqlens.tolist() == [
        ids.index(i) if i in ids else sum(packing.lengths[:i]) for i in range(len(sizes))
    ] + [len(ids)]
    assert packing.grid_sizes.tolist() == [list(size) for size in sizes]
    assert packing.grids == tuple(sizes)
    assert (packing.total, packing.batch) == (len(ids), len(sizes))
    assert packing.max_seqlen == max(packing.lengths)
    assert packing.cu_seqlens.dtype == packing.grid_sizes.dtype == torch.int32


def test_from_lengths_has_no_grids():
    packing = Packing.from_lengths([3, 0, 2])
    assert packing.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert packing.segment_ids().tolist() == [0, 0, 0, 2, 2]
    assert packing.grid_sizes is None
    assert packing.grids is None


def test_segment_ids_are_made_once_and_the_rest_is_frozen():
    packing = Packing.from_lengths([3, 2])
    assert packing.segment_ids() is packing.segment_ids()
    with pytest.raises(dataclasses.FrozenInstanceError):
        packing.max_seqlen = 7


def test_to_moves_the_tensors_and_keeps_the_host_side():
    packing = Packing.from_grids([(1, 2, 3)])
    moved = packing.to("meta")
    assert moved.cu_seqlens.is_meta
    assert moved.grid_sizes.is_meta
    assert moved.segment_ids().is_meta
    assert (moved.lengths, moved.grids, moved.max_seqlen) == ((6,), ((1, 2, 3),), 6)


@pytest.mark.parametrize(
    ("build", "argument", "message"),
    [
        (Packing.from_grids, [], "grid_sizes is empty"),
        (Packing.from_grids, [(1, 2, 3), (1, 2)], r"grid_sizes\[1\] is \(1, 2\)"),
        (Packing.from_grids, [(1, -2, 3)], r"grid_sizes\[0\] is \(1, -2, 3\)"),
        (Packing.from_grids, [(1, 2.0, 3)], r"grid_sizes\[0\]"),
        (Packing.from_grids, (1, 8, 12), r"grid_sizes\[0\] is 1: allowed are 3 integers"),
        (Packing.from_grids, 5, r"grid_sizes is 5: allowed is a sequence of \(t, h, w\)"),
        (Packing.from_lengths, 34, "lengths is 34: allowed is a sequence of integers >= 0"),
        (Packing.from_grids, [(61, 9000, 9000)], "4941000000 tokens: at most 2147483647"),
        (Packing.from_lengths, [], "lengths is empty"),
        (Packing.from_lengths, [4, -1], r"lengths\[1\] is -1"),
        (Packing.from_lengths, [True], r"lengths\[0\] is True"),
        (Packing.from_lengths, [2**31], "2147483648 tokens"),
    ],
)
def test_refusals(build, argument, message):
    with pytest.raises(ValueError, match=message):
        build(argument)
