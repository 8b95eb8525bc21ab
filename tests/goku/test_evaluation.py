"""Which items a run is looked at by."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from goku.data import Item
from goku.evaluation import spread

GROUPS = [("stills", "image"), ("clips", "image"), ("clips", "video")]


def _item(number: int, source: str, modality: str) -> Item:
    frames = 1 if modality == "image" else 5
    grid = (1 if frames == 1 else 2, 2, 2)
    return Item(
        name=str(number), caption="", frames=frames, height=32, width=32, grid=grid, tokens=grid[0] * 4,
        modality=modality, weight=1.0, source=source,
    )  # fmt: skip


@given(st.lists(st.sampled_from(GROUPS), max_size=20), st.integers(1, 25))
def test_every_source_and_modality_has_its_turn(groups, count):
    items = [_item(number, *group) for number, group in enumerate(groups)]
    chosen = spread(items, count)
    assert len(chosen) == len(set(chosen)) == min(count, len(items))
    of_group = Counter(groups[index] for index in chosen)
    whole = Counter(groups)
    for group, taken in of_group.items():
        # Nobody has two more than another that has any left.
        assert all(
            taken <= of_group[other] + 1 or of_group[other] == whole[other] for other in whole
        )
        assert [i for i in chosen if groups[i] == group] == [
            i for i, each in enumerate(groups) if each == group
        ][:taken]
    if len(set(groups)) <= 1:
        assert chosen == list(range(len(chosen)))  # as they come
