"""FileWriter.gather: bytes from many places of memory become a file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHUNK = 4096
QUIET = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def rows(extents: list[tuple[int, np.ndarray]]) -> np.ndarray:
    table = [(offset, len(data), data.ctypes.data) for offset, data in extents]
    return np.array(table, dtype=np.int64).reshape(-1, 3)


@st.composite
def layouts(draw) -> tuple[int, list[tuple[int, int]]]:
    """A file's size, and (offset, length) of extents in it: small and large, empty, with gaps."""
    pieces = draw(
        st.lists(
            st.tuples(
                st.one_of(st.just(0), st.integers(1, 9000)),
                st.one_of(st.integers(0, 100), st.integers(1, 200_000)),
            ),
            max_size=20,
        )
    )
    at, found = 0, []
    for gap, length in pieces:
        found.append((at + gap, length))
        at += gap + length
    return max(1, at + draw(st.integers(0, 5000))), found


@QUIET
@given(layout=layouts(), cuts=st.integers(1, 3))
def test_the_file_is_what_the_extents_hold_and_zeros(engine, fresh, crcs_of, layout, cuts):
    size, places = layout
    extents = [(offset, noise(length, offset)) for offset, length in places]
    wanted = np.zeros(size, dtype=np.uint8)
    for offset, data in extents:
        wanted[offset : offset + len(data)] = data
    path = fresh()
    writer = engine.create(str(path), size, chunk=CHUNK, fsync=False)
    # In so many submissions, each of whole chunks, the last one first.
    step = max(CHUNK, size // cuts // CHUNK * CHUNK)
    for begin in reversed(range(0, size, step)):
        end = min(begin + step, size)
        inside = [
            (max(offset, begin), data[max(begin - offset, 0) : end - offset])
            for offset, data in extents
            if offset < end and offset + len(data) > begin
        ]
        writer.gather(rows(inside), begin, end - begin)
    assert writer.finish()[0] == size
    assert path.read_bytes() == wanted.tobytes()
    assert writer.chunk_crcs() == crcs_of(wanted, CHUNK)


def test_gathered_and_plain_submissions_mix(engine, fresh):
    data = noise(5 * CHUNK + 77)
    path = fresh()
    writer = engine.create(str(path), len(data), chunk=CHUNK, fsync=True)
    ticket = writer.gather(
        rows([(2 * CHUNK, data[2 * CHUNK : 2 * CHUNK + 9]), (2 * CHUNK + 9, data[2 * CHUNK + 9 :])]),
        2 * CHUNK, len(data) - 2 * CHUNK,
    )  # fmt: skip
    writer.submit(data.ctypes.data, 0, 2 * CHUNK)
    assert writer.wait(ticket)
    assert writer.finish()[0] == len(data)
    assert path.read_bytes() == data.tobytes()


def test_the_table_is_copied(engine, fresh):
    data = noise(64 * CHUNK)
    table = rows([(0, data)])
    path = fresh()
    writer = engine.create(str(path), len(data), chunk=CHUNK, fsync=False)
    writer.gather(table, 0, len(data))
    table[:] = 0
    writer.finish()
    assert path.read_bytes() == data.tobytes()


@pytest.mark.parametrize(
    ("table", "offset", "length", "message"),
    [
        ([(0, 10, 1), (5, 10, 1)], 0, 2 * CHUNK, "extent 1 has offset 5 and length 10; allowed"),
        ([(10, 5, 1), (0, 5, 1)], 0, 2 * CHUNK, "extent 1 has offset 0"),
        ([(0, 2 * CHUNK + 1, 1)], 0, 2 * CHUNK, "extent 0 has offset 0 and length 8193"),
        ([(0, 5, 1)], CHUNK, CHUNK, "extent 0 has offset 0"),
        ([(2**62, 2**62, 1)], 0, 2 * CHUNK, "extent 0 has offset 4611686018427387904"),
        ([(-1, 5, 1)], 0, 2 * CHUNK, r"extent 0 is \(-1, 5, 1\)"),
        ([(0, -5, 1)], 0, 2 * CHUNK, r"extent 0 is \(0, -5, 1\)"),
        ([(0, 5, 0)], 0, 2 * CHUNK, "an address above 0"),
        ([], 0, 0, "length is 0"),
        ([], 5, CHUNK, "offset is 5; allowed are multiples of the chunk"),
        ([], 0, 3 * CHUNK, "the file has 8192 bytes"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    engine, fresh, table, offset, length, message
):
    path = fresh()
    writer = engine.create(str(path), 2 * CHUNK, chunk=CHUNK, fsync=False)
    with pytest.raises(ValueError, match=message):
        writer.gather(np.array(table, dtype=np.int64).reshape(-1, 3), offset, length)
    data = noise(2 * CHUNK)
    writer.gather(rows([(0, data)]), 0, 2 * CHUNK)
    writer.finish()
    assert path.read_bytes() == data.tobytes()


@pytest.mark.parametrize("table", [np.zeros((2, 3), np.int32), np.zeros(4, np.int64)])
def test_tables_of_another_form_are_refused(engine, fresh, table):
    writer = engine.create(str(fresh()), CHUNK, chunk=CHUNK, fsync=False)
    with pytest.raises(ValueError, match=r"extents has .* allowed are rows of three int64"):
        writer.gather(table, 0, CHUNK)
    writer.cancel()
