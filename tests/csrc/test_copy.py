"""_io.copy: every byte arrives where it should, and none beside it changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goku_runtime import _io

MIB = 1 << 20


def rows(moves: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(moves, dtype=np.int64).reshape(-1, 3)


lengths = st.one_of(st.integers(0, 200), st.integers(4090, 4200), st.integers(0, 3 * MIB))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.large_base_example])
@given(
    pieces=st.lists(st.tuples(lengths, st.integers(0, 70), st.integers(0, 70)), max_size=12),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_are_where_they_should_be(pieces, threads, seed):
    """Pieces in any order, (length, gap before it in the target, in the source); 8 MiB at times."""
    drawn = np.random.default_rng(seed)
    source = drawn.integers(0, 256, sum(n + gap for n, _, gap in pieces) + 1, dtype=np.uint8)
    target = drawn.integers(0, 256, sum(n + gap for n, gap, _ in pieces) + 1, dtype=np.uint8)
    wanted, moves = target.copy(), []
    to = of = 0
    for length, gap_to, gap_of in pieces:
        to, of = to + gap_to, of + gap_of
        wanted[to : to + length] = source[of : of + length]
        moves.append((target.ctypes.data + to, source.ctypes.data + of, length))
        to, of = to + length, of + length
    drawn.shuffle(moves)
    _io.copy(rows(moves), threads)
    np.testing.assert_array_equal(target, wanted)


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_much_at_once(threads):
    """Past the caches, with a long and many short moves, whose ends share lines."""
    drawn = np.random.default_rng(threads)
    source = drawn.integers(0, 256, 24 * MIB + 12345, dtype=np.uint8)
    target = np.zeros_like(source)
    cuts = sorted({0, 17 * MIB + 5, len(source), *drawn.integers(17 * MIB, len(source), 5000)})
    moves = [
        (target.ctypes.data + begin, source.ctypes.data + begin, end - begin)
        for begin, end in itertools.pairwise(cuts)
    ]
    _io.copy(rows(moves), threads)
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize(
    ("moves", "threads", "words"),
    [
        (rows([]), 0, "threads is 0; allowed is 1 and above"),
        (rows([(0, 0, -1)]), 1, "the length of a move is -1; allowed is 0 and above"),
        (np.zeros(4, np.int64), 1, "moves has 32 bytes of format 'l'; allowed are rows of three"),
        (rows([(0, 0, 0)]).astype(">i8"), 1, "format '>q'; allowed are rows of three int64"),
        (np.zeros((2, 3), np.float64), 1, "format 'd'; allowed are rows of three int64"),
    ],
)
def test_refused(moves, threads, words):
    with pytest.raises(ValueError, match=words):
        _io.copy(moves, threads)
