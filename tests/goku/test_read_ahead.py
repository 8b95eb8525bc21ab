"""Samples read ahead: the right ones, no more than asked for; what cannot be read is left to who can mend it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from goku.read_ahead import THREADS, ReadAhead


class FakeDataset:
    """`cached` answers with what it was asked for, once `gate` is open; `begun` is what it was asked for so far."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[tuple[int, int]] = []
        self.some = threading.Semaphore(0)
        self.seconds = 0.0

    def cached(self, index: int, caption: int) -> Any:
        self.begun.append((index, caption))
        self.some.release()
        assert self.gate.wait(60)
        time.sleep(self.seconds if index >= 100 else 0)
        if index == 13:
            return None
        if index == 14:
            raise MemoryError("no room")
        return index, caption


@pytest.fixture
def dataset() -> Iterator[FakeDataset]:
    found = FakeDataset()
    yield found
    found.gate.set()  # or its threads would wait on


@pytest.fixture
def reader(dataset: FakeDataset) -> Iterator[ReadAhead]:
    found = ReadAhead(dataset)  # type: ignore[arg-type]
    yield found
    dataset.gate.set()
    found.close()


A, B, C = [(0, 0), (1, 2)], [(3, 0)], [(4, 1), (0, 0), (13, 0)]


def test_what_is_asked_for_is_read_meanwhile(dataset: FakeDataset, reader: ReadAhead) -> None:
    reader.ask([A, B])  # returns, though no read is done
    for _ in (*A, *B):
        assert dataset.some.acquire(timeout=60)
    assert sorted(dataset.begun) == sorted([*A, *B])
    dataset.gate.set()
    assert reader.take(A) == A
    assert reader.take(B) == B
    assert len(dataset.begun) == 3


def test_what_was_not_asked_for_or_cannot_be_read_is_none(
    dataset: FakeDataset, reader: ReadAhead
) -> None:
    dataset.gate.set()
    assert reader.take(A) == [None, None]
    assert dataset.begun == []
    reader.ask([C])
    assert reader.take(C) == [(4, 1), (0, 0), None]
    assert reader.take(C) == [None, None, None]  # once taken it is gone
    reader.ask([[(14, 0)]])
    with pytest.raises(MemoryError, match="no room"):
        reader.take([(14, 0)])


def test_nothing_is_read_twice_and_equal_packs_are_two(
    dataset: FakeDataset, reader: ReadAhead
) -> None:
    dataset.gate.set()
    reader.ask([A, B])
    reader.ask([A, B, B])  # as a group without work of its own has them
    assert [reader.take(pack) for pack in (A, B, B, B)] == [A, B, B, [None]]
    assert sorted(dataset.begun) == sorted([*A, *B, *B])


def test_what_is_no_longer_asked_for_is_given_up(dataset: FakeDataset, reader: ReadAhead) -> None:
    first = [(100 + k, 0) for k in range(THREADS)]
    reader.ask([first, A])
    for _ in first:
        assert dataset.some.acquire(timeout=60)
    reader.ask([B])  # all threads are busy, so that A was not begun
    dataset.gate.set()
    assert reader.take(B) == B
    assert dataset.begun == [*first, *B]
    assert reader.take(A) == [None, None]


def test_closing_gives_up_and_asking_begins_anew(dataset: FakeDataset, reader: ReadAhead) -> None:
    first = [(100 + k, 0) for k in range(THREADS)]
    reader.ask([first, A])
    for _ in first:
        assert dataset.some.acquire(timeout=60)
    reader.close()  # does not wait for reads that hang
    dataset.gate.set()
    assert reader.take(A) == [None, None]
    reader.ask([B])
    assert reader.take(B) == B
    assert dataset.begun == [*first, *B]
    reader.close()
    reader.close()


def test_an_interrupted_wait_gives_the_rest_up(dataset: FakeDataset, reader: ReadAhead) -> None:
    """Else a process that is to leave at once would first read all that it had asked for."""
    first = [(14, 0), *((100 + k, 0) for k in range(50))]
    reader.ask([first])
    for _ in range(THREADS):
        assert dataset.some.acquire(timeout=60)
    dataset.seconds = 0.1
    dataset.gate.set()
    with pytest.raises(MemoryError, match="no room"):
        reader.take(first)
    pool = reader._executor
    assert pool is not None
    reader.close()
    pool.shutdown(wait=True)
    assert len(dataset.begun) < 40
