"""The shuffled stream: permutations without gaps, and no state but the position."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.data.stream import ShuffledStream
from goku.random import Purpose, bits


def take(stream: ShuffledStream, start: int, count: int) -> list[int]:
    return [stream.item(position) for position in range(start, start + count)]


@settings(max_examples=25, deadline=None)
@given(num_items=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(num_items: int, seed: int, epoch: int) -> None:
    stream = ShuffledStream(num_items, seed)
    start = epoch * num_items
    assert sorted(take(stream, start, num_items)) == list(range(num_items))
    assert {stream.epoch(start + i) for i in range(num_items)} == {epoch}


def test_permutation_is_the_stable_argsort_of_the_philox_words() -> None:
    words = bits(11, 3, 50, Purpose.SHUFFLE).tolist()
    assert take(ShuffledStream(50, 11), 150, 50) == sorted(range(50), key=words.__getitem__)


@settings(max_examples=25, deadline=None)
@given(num_items=st.integers(1, 12), position=st.integers(0, 100))
def test_resuming_anywhere_gives_the_same_continuation(num_items: int, position: int) -> None:
    uninterrupted = take(ShuffledStream(num_items, 5), 0, 140)
    resumed = take(ShuffledStream(num_items, 5), position, 140 - position)
    assert resumed == uninterrupted[position:]


def test_access_in_any_order_gives_the_same_items() -> None:
    expected = take(ShuffledStream(7, 1), 0, 70)
    stream = ShuffledStream(7, 1)
    order = [(position * 37) % 70 for position in range(70)]
    assert {position: stream.item(position) for position in order} == dict(enumerate(expected))


def test_at_most_two_permutations_are_kept() -> None:
    stream = ShuffledStream(9, 0)
    take(stream, 0, 90)
    assert sorted(stream._permutations) == [8, 9]


def test_epochs_and_seeds_differ() -> None:
    # 100! orders: two of these being equal would be a fault, not chance.
    orders = [
        tuple(take(ShuffledStream(100, seed), e * 100, 100)) for seed in (0, 1) for e in range(4)
    ]
    assert len(set(orders)) == len(orders)


def test_the_first_place_is_spread_over_all_items() -> None:
    # 2000 epochs of 5 items: each item leads 400 times, standard deviation 17.9; 5 sigma = 90.
    stream = ShuffledStream(5, 3)
    leaders = [stream.item(5 * epoch) for epoch in range(2000)]
    assert all(abs(leaders.count(item) - 400) < 90 for item in range(5))


def test_one_item() -> None:
    stream = ShuffledStream(1, 0)
    assert take(stream, 0, 5) == [0] * 5
    assert [stream.epoch(p) for p in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_items", [0, -1, 2.0, True])
def test_bad_num_items_is_named(num_items: int) -> None:
    with pytest.raises(ValueError, match=r"num_items must be an integer >= 1"):
        ShuffledStream(num_items, 0)


@pytest.mark.parametrize("position", [-1, 1.5, False])
def test_bad_position_is_named(position: int) -> None:
    with pytest.raises(ValueError, match=r"position must be an integer >= 0"):
        ShuffledStream(3, 0).item(position)
