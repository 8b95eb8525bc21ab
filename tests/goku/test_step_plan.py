"""A step's plan: every sample once, in packs of the right size, for every group of processes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from goku.packing import PackingConfig
from goku.step_plan import plan_step, rounds

TOKENS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


class _Stream:
    """Item 3p mod the number of items at position p."""

    def __init__(self, items: int) -> None:
        self.items = items

    def item(self, position: int) -> int:
        return 3 * position % self.items


@given(
    tokens=TOKENS, position=st.integers(0, 50), groups=st.integers(1, 4), budget=st.integers(20, 60)
)
def test_every_sample_once_and_as_many_rounds_for_all(
    tokens: list[int], position: int, groups: int, budget: int
) -> None:
    items: list[Any] = [SimpleNamespace(weight=1.0 + k / 8) for k in range(len(tokens))]
    stream: Any = _Stream(len(tokens))
    packing = PackingConfig(tokens_per_step=budget, tokens_per_pack=20)

    def costs(lengths: list[int]) -> list[float]:
        return [float(n * n) for n in lengths]

    plans = [
        plan_step(position, stream, tokens, items, packing, costs, (rank, groups))
        for rank in range(groups)
    ]
    first = plans[0]
    found = [stream.item(p) for p in first.positions]
    assert list(first.positions) == list(range(position, position + len(found)))
    assert first.lengths == [tokens[i] for i in found]
    assert sum(first.lengths) <= budget
    assert sum(first.lengths) + tokens[stream.item(position + len(found))] > budget
    assert first.weight_sum == math.fsum(items[i].weight for i in found)
    for plan in plans:
        assert (plan.positions, plan.shares) == (first.positions, first.shares)
        assert len(plan.packs) == len(first.packs)
        for pack in plan.packs:
            assert list(pack.indices) == [stream.item(p) for p in pack.positions]
            assert 0 < sum(tokens[i] for i in pack.indices) <= 20
    counted = [p for plan in plans for pack in plan.packs if not pack.idle for p in pack.positions]
    assert sorted(counted) == list(first.positions)


def test_a_group_without_work_repeats_the_shortest_sample() -> None:
    shares = [[[0, 2], [1]], [[3]]]
    lengths = [5, 7, 2, 4]
    assert rounds(shares, lengths, 0) == [([0, 2], False), ([1], False)]
    assert rounds(shares, lengths, 1) == [([3], False), ([2], True)]
    assert rounds([[[0]], []], [5], 1) == [([0], True)]
