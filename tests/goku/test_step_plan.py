"""A step's plan: every sample once, in packs of the right size, for every group of processes."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goku import step_plan
from goku.packing import PackingConfig
from goku.step_plan import LIVES, StepPlan, StepPlanner, rounds

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
        StepPlanner(stream, tokens, items, packing, costs, (rank, groups), math.inf).plan(position)
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


# ---- planned ahead

TOKENS_OF_20 = [1 + 7 * k % 19 for k in range(20)]
GROUP = (1, 3)


def _arguments() -> tuple[Any, ...]:
    items: list[Any] = [SimpleNamespace(weight=1.0 + k / 8) for k in range(20)]
    packing = PackingConfig(tokens_per_step=200, tokens_per_pack=20)
    return (
        _Stream(20), TOKENS_OF_20, items, packing, lambda lengths: [float(n * n) for n in lengths], GROUP,
    )  # fmt: skip


def _alone(position: int) -> StepPlan:
    return StepPlanner(*_arguments(), math.inf).plan(position)


@pytest.fixture
def planner() -> Iterator[StepPlanner]:
    """To which every step takes long."""
    planner = StepPlanner(*_arguments(), patience=-1.0)
    yield planner
    planner.close()


def _following(plan: StepPlan) -> int:
    return plan.positions[-1] + 1


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first lengths of the steps that this process shares out itself."""
    seen: list[int] = []
    partition: Callable[..., Any] = step_plan.partition

    def spied(lengths: list[int], *arguments: Any) -> Any:
        seen.append(lengths[0])
        return partition(lengths, *arguments)

    monkeypatch.setattr(step_plan, "partition", spied)
    return seen


def test_the_process_plans_all_steps_but_the_first_and_the_same(
    planner: StepPlanner, shared_out: list[int]
) -> None:
    plans = [planner.plan(4)]
    assert planner.process is not None
    pid = planner.process.pid
    for _ in range(5):
        plans.append(planner.plan(_following(plans[-1])))
    assert planner.process.pid == pid
    assert len(shared_out) == 1
    assert plans == [_alone(plan.positions[0]) for plan in plans]


def _two_steps(planner: StepPlanner, position: int) -> StepPlan:
    plan = planner.plan(position)
    assert plan == _alone(position)
    position = _following(plan)
    plan = planner.plan(position)
    assert plan == _alone(position)
    return plan


def test_steps_that_take_no_time_need_no_process(shared_out: list[int]) -> None:
    planner = StepPlanner(*_arguments(), patience=math.inf)
    plan = planner.plan(0)
    planner.plan(_following(plan))
    assert planner.process is None
    assert len(shared_out) == 2


def test_a_resume_at_another_step_takes_nothing_of_the_one_begun(planner: StepPlanner) -> None:
    planner.plan(0)
    assert planner.plan(7) == _alone(7)
    assert planner.plan(7) == _alone(7)  # the one behind it was begun
    following = _following(_alone(7))
    assert planner.plan(following) == _alone(following)


def test_a_lost_process_is_replaced_and_then_no_more(
    planner: StepPlanner, shared_out: list[int]
) -> None:
    plan = planner.plan(0)
    for lost in range(1, LIVES + 1):
        assert planner.process is not None
        position = _following(plan)
        os.kill(planner.process.pid, signal.SIGKILL)
        end = "and all from now on" if lost == LIVES else "plans a step itself$"
        with pytest.warns(UserWarning, match=f"ended with exit code -9.*{end}"):
            plan = _two_steps(planner, position)  # in case that it had answered
        position = _following(plan)
    assert planner.process is None
    before = len(shared_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = planner.plan(position)
    assert plan == _alone(position)
    assert len(shared_out) == before + 2  # here, and alone


def test_a_process_that_cannot_start_is_told_and_the_step_planned(
    planner: StepPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    for position in range(LIVES):
        with pytest.warns(UserWarning, match="could not start"):
            assert planner.plan(position) == _alone(position)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planner.plan(0) == _alone(0)


def test_what_is_closed_begins_anew(planner: StepPlanner) -> None:
    plan = planner.plan(0)
    assert planner.process is not None
    pid = planner.process.pid
    planner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    following = _following(plan)
    assert planner.plan(following) == _alone(following)
    assert planner.process is not None


def test_bad_samples_are_named(planner: StepPlanner) -> None:
    planner._tokens = [30] * 20
    with pytest.raises(ValueError, match="sample 0 has 30 tokens, more than tokens_per_pack=20"):
        planner.plan(0)
