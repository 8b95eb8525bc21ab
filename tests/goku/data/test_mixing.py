"""The mixed stream: exact shares in every block, no state but the position, groups that do not touch each other."""

from __future__ import annotations

import hashlib
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.data.mixing import BLOCK, Group, MixedStream
from goku.random import Purpose, bits


def reference(groups: list[Group], seed: int, length: int) -> list[int]:
    """By a loop from position 0 on, with nothing looked up: shares, places, then the next item of each group."""
    total = sum(Fraction(group.weight) for group in groups)
    counts = [int(Fraction(group.weight) / total * BLOCK) for group in groups]
    remainders = [
        Fraction(g.weight) / total * BLOCK - c for g, c in zip(groups, counts, strict=True)
    ]
    while sum(counts) < BLOCK:
        best = max(range(len(groups)), key=lambda g: (remainders[g], -g))
        counts[best] += 1
        remainders[best] = Fraction(-1)
    seeds = [
        int.from_bytes(hashlib.sha256(f"{seed}:{group.name}".encode()).digest()[:8], "big")
        for group in groups
    ]
    queues: list[list[int]] = [[] for _ in groups]
    epochs = [0] * len(groups)
    found: list[int] = []
    block = 0
    while len(found) < length:
        words = bits(seed, block, BLOCK, Purpose.MIX).tolist()
        places = sorted(range(BLOCK), key=words.__getitem__)
        owner: dict[int, int] = {}
        for group, count in enumerate(counts):
            for _ in range(count):
                owner[places.pop(0)] = group
        for place in range(BLOCK):
            group = owner[place]
            if not queues[group]:
                size = len(groups[group].indices)
                order = bits(seeds[group], epochs[group], size, Purpose.SHUFFLE).tolist()
                queues[group] = sorted(range(size), key=order.__getitem__)
                epochs[group] += 1
            found.append(groups[group].indices[queues[group].pop(0)])
        block += 1
    return found[:length]


_groups = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.05, 20.0)), min_size=1, max_size=5
).map(
    lambda parts: [
        Group(f"g{n}", [1000 * n + i for i in range(size)], weight)
        for n, (size, weight) in enumerate(parts)
    ]
)


@settings(max_examples=5, deadline=None)
@given(groups=_groups, seed=st.integers(0, 2**63 - 1), data=st.data())
def test_it_is_the_loop_from_any_position(
    groups: list[Group], seed: int, data: st.DataObject
) -> None:
    expected = reference(groups, seed, BLOCK + 200)
    start = data.draw(st.integers(0, BLOCK + 150))
    resumed = MixedStream(groups, seed)
    assert [resumed.item(p) for p in range(start, start + 50)] == expected[start : start + 50]
    whole = MixedStream(groups, seed)
    assert [whole.item(p) for p in range(len(expected))] == expected


def test_every_block_has_the_shares() -> None:
    groups = [Group("a", range(7), 1), Group("b", range(10, 13), 2), Group("c", [20], 0.5)]
    stream = MixedStream(groups, 3)
    # 1024 / 3.5 = 292.57, 585.14, 146.29: the one place left over goes to the first.
    assert stream.counts == (293, 585, 146)
    for block in (0, 1, 12345):
        items = [stream.item(block * BLOCK + i) for i in range(BLOCK)]
        assert Counter(item // 10 for item in items) == {0: 293, 1: 585, 2: 146}
    # A group goes through its items evenly, also over the border of two blocks.
    first = Counter(i for i in map(stream.item, range(2 * BLOCK)) if i < 10)
    assert max(first.values()) - min(first.values()) <= 1


def test_places_are_shuffled_anew_in_every_block() -> None:
    stream = MixedStream([Group("a", range(512), 1), Group("b", range(512, 1024), 1)], 0)
    blocks = [tuple(stream.place(b * BLOCK + i)[0] for i in range(BLOCK)) for b in range(4)]
    assert len(set(blocks)) == 4
    # Runs of one group are as short as chance makes them: sorted places would give a run of 512.
    longest = max(len(run) for b in blocks for run in "".join(map(str, b)).split("0"))
    assert longest < 30


def test_another_group_leaves_the_order_within_the_others_alone() -> None:
    a, b = Group("a", range(50), 1), Group("b", range(100, 130), 3)
    both, more = MixedStream([a, b], 9), MixedStream([b, Group("c", [500], 2), a], 9)

    def drawn(stream: MixedStream, low: int, high: int) -> list[int]:
        items = map(stream.item, range(3 * BLOCK))
        return [item for item in items if low <= item < high][:500]

    assert drawn(both, 0, 50) == drawn(more, 0, 50)
    assert drawn(both, 100, 130) == drawn(more, 100, 130)
    assert drawn(both, 0, 50) != drawn(MixedStream([a, b], 10), 0, 50)


def test_a_far_position_costs_no_more() -> None:
    stream = MixedStream([Group("a", range(5), 1), Group("b", range(9), 1)], 1)
    assert 0 <= stream.item(10**15) < 9
    assert len(stream._layouts) == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], r"groups: \(\) is empty"),
        ([Group("a", [], 1)], "a: has weight 1 and no items"),
        ([Group("a", [1], 0)], "a: weight 0 must be finite and above 0"),
        ([Group("a", [1], float("nan"))], "a: weight nan"),
        ([Group("a", [1], 1), Group("a", [2], 1)], "a: is the name of two groups"),
        ([Group("a", [1], 3000), Group("b", [2], 1)], "b: weight 1 is 0.000333 of all, too little"),
    ],
)
def test_what_cannot_be_mixed_is_named(groups: list[Group], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedStream(groups, 0)


@pytest.mark.parametrize("position", [-1, 1.5, True])
def test_bad_position_is_named(position: int) -> None:
    with pytest.raises(ValueError, match="position must be an integer >= 0"):
        MixedStream([Group("a", [1], 1)], 0).item(position)
