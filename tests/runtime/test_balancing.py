"""Pack balancing: exact cover, the budget, lock step against brute force, and the lower bound."""

import hashlib
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_runtime import _pack_search
from goku_runtime._pack_search import Packs, Problem
from goku_runtime.balancing import (
    balance,
    balance_packs,
    efficiency,
    step_cost,
    step_cost_bound,
)

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from packing_bound import Proof

BUDGET = 64
DIM = 3072  # Goku-8B's


def attention_cost(length: int, linear: int = 7 * DIM) -> int:
    """length^2 for attention and a linear term for the projections (goku.packing.sample_cost)."""
    return length * (length + linear)


def is_complete(plan: list[list[list[int]]], lengths: list[int], groups: int, budget: int) -> bool:
    packs = [pack for group in plan for pack in group]
    return (
        len(plan) == groups
        and len({len(group) for group in plan}) == 1
        and sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        and all(sum(lengths[i] for i in pack) <= budget for pack in packs)
        and all(pack == sorted(pack) for pack in packs)
        # No micro-step in which nobody has anything to do.
        and all(any(group[m] for group in plan) for m in range(len(plan[0])))
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), max_size=40),
    groups=st.integers(1, 9),
    linear=st.integers(0, 300),
    data=st.data(),
)
def test_every_sample_once_within_the_budget_and_above_the_bound(
    lengths: list[int], groups: int, linear: int, data: st.DataObject
) -> None:
    costs: list[float] = [float(attention_cost(n, linear)) for n in lengths]
    if data.draw(st.booleans()):  # costs that have nothing to do with lengths
        size = len(lengths)
        costs = data.draw(st.lists(st.floats(1e-3, 1e6), min_size=size, max_size=size))
    plan = balance_packs(lengths, costs, groups, BUDGET)
    assert is_complete(plan, lengths, groups, BUDGET)
    # The sums are rounded in another order.
    bound = step_cost_bound(lengths, costs, groups, BUDGET)
    assert step_cost(plan, costs) >= bound * (1 - 1e-12)
    assert plan == balance_packs(tuple(lengths), tuple(costs), groups, BUDGET)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=30),
    groups=st.integers(1, 5),
    data=st.data(),
)
def test_the_order_of_the_samples_does_not_matter(
    lengths: list[int], groups: int, data: st.DataObject
) -> None:
    """Equal samples are interchangeable; otherwise the packs are the same ones."""
    order = data.draw(st.permutations(range(len(lengths))))
    costs = [attention_cost(n, 20) for n in lengths]
    plan = balance_packs(lengths, costs, groups, BUDGET)
    other = balance_packs([lengths[i] for i in order], [costs[i] for i in order], groups, BUDGET)
    described = [[sorted(lengths[i] for i in pack) for pack in group] for group in plan]
    assert described == [
        [sorted(lengths[order[i]] for i in pack) for pack in group] for group in other
    ]


def optimum(lengths: list[int], costs: list[int], groups: int, budget: int) -> float:
    """The least time of a step with any number of packs, by trying all of them.

    Samples are put into packs in every way (set partitions within the budget). The best micro-steps
    of given packs are found by trying every order in which runs of `groups` packs form micro-steps,
    so that nothing here rests on the sorted dealing that is under test.
    """
    best = math.inf
    packs: list[list[int]] = []

    def micro_steps(rest: tuple[int, ...]) -> float:
        """The cheapest way to cut packs (their costs) into micro-steps of up to `groups`."""
        if not rest:
            return 0
        first, others = rest[0], rest[1:]
        least = math.inf
        for size in range(min(groups - 1, len(others)) + 1):
            for chosen in itertools.combinations(range(len(others)), size):
                left = tuple(c for i, c in enumerate(others) if i not in chosen)
                here = max(first, *(others[i] for i in chosen), 0)
                least = min(least, here + micro_steps(left))
        return least

    def place(sample: int) -> None:
        nonlocal best
        if sample == len(lengths):
            best = min(best, micro_steps(tuple(sum(costs[i] for i in p) for p in packs)))
            return
        for pack in list(packs):
            if sum(lengths[i] for i in pack) + lengths[sample] <= budget:
                pack.append(sample)
                place(sample + 1)
                pack.pop()
        packs.append([sample])
        place(sample + 1)
        packs.pop()

    place(0)
    return best


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=6),
    groups=st.integers(1, 3),
    linear=st.sampled_from([0, 20, 200]),
)
def test_against_brute_force(lengths: list[int], groups: int, linear: int) -> None:
    costs = [attention_cost(n, linear) for n in lengths]
    best = optimum(lengths, costs, groups, BUDGET)
    assert step_cost_bound(lengths, costs, groups, BUDGET) <= best * (1 + 1e-12)
    plan = balance_packs(lengths, costs, groups, BUDGET)
    # No bound is proven for this search. The worst of 4,000 drawn cases was 1.042.
    assert best * (1 - 1e-12) <= step_cost(plan, costs) <= 1.15 * best


def test_near_the_optimum_on_average() -> None:
    """Over 150 drawn steps of few clips: on average within 0.2% of brute force."""
    generator = random.Random(0)
    ratios = []
    for _ in range(150):
        groups = generator.choice([2, 3])
        lengths = [generator.randint(4, BUDGET) for _ in range(generator.randint(3, 6))]
        costs = [attention_cost(n, generator.choice([0, 20, 200])) for n in lengths]
        plan = balance_packs(lengths, costs, groups, BUDGET)
        ratios.append(step_cost(plan, costs) / optimum(lengths, costs, groups, BUDGET))
    assert sum(ratios) / len(ratios) <= 1.002


# ---- realistic mixes

# Tokens of Goku's shapes after patchify (8 x 16 x 16 pixels a token in latent frames): images of
# 256^2 to 960^2 pixels, clips from 2 s at 288 x 512 to 8 s at 720 x 1280.
CLIPS = (7_488, 14_976, 23_040, 46_080, 108_000, 216_000)
MIXES = {
    # name: (tokens_per_pack, share of images, smallest clip; 0: CLIPS)
    "images": (32_768, 1.0, 0),
    "images and clips of some shapes": (220_000, 0.75, 0),
    "images and clips of any length": (220_000, 0.75, 4_000),
    "mostly images": (220_000, 0.97, 4_000),
    "clips of any length": (220_000, 0.0, 20_000),
}


def draw_step(name: str, groups: int, packs: float, seed: int) -> tuple[list[int], int]:
    """Samples until the step holds `packs` full packs per group, as goku.packing takes them."""
    budget, images, smallest = MIXES[name]
    generator = random.Random(seed)
    lengths: list[int] = []
    total = 0
    while True:
        if generator.random() < images:
            length = generator.randint(256, 3_600)
        elif smallest:
            length = round(math.exp(generator.uniform(math.log(smallest), math.log(budget))))
        else:
            length = generator.choice(CLIPS)
        total += length
        if total > packs * groups * budget:
            return lengths, budget
        lengths.append(length)


def check_within_five_percent(lengths: list[int], groups: int, budget: int) -> None:
    costs = [attention_cost(n) for n in lengths]
    plan = balance_packs(lengths, costs, groups, budget)
    assert is_complete(plan, lengths, groups, budget)
    time = step_cost(plan, costs)
    bound = step_cost_bound(lengths, costs, groups, budget)
    assert bound * (1 - 1e-12) <= time
    # Where the cheap bound is loose (by up to 19% with one to two packs a group), a proof.
    if time > 1.05 * bound:
        assert Proof(lengths, costs, groups, budget).holds(time / 1.05)


@pytest.mark.parametrize("groups", [2, 8, 64, 512])
@pytest.mark.parametrize("name", MIXES)
def test_within_five_percent_of_the_bound(name: str, groups: int) -> None:
    sizes = (0.9, 2.8, 8.0) if groups < 512 else (0.9, 2.8)
    for packs, seed in itertools.product(sizes, range(3 if groups < 64 else 1)):
        lengths, budget = draw_step(name, groups, packs, seed)
        if len(lengths) <= 35_000:  # or for another test
            check_within_five_percent(lengths, groups, budget)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 3, 4, 16])
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, 10), marks=pytest.mark.long)], ids=str
)
def test_small_steps_are_within_five_percent_too(name: str, groups: int, seeds: range) -> None:
    """Few samples a group, where rounding to whole packs and micro-steps weighs most."""
    for packs, seed in itertools.product((0.5, 0.9, 1.5), seeds):
        lengths, budget = draw_step(name, groups, packs, seed)
        if lengths:
            check_within_five_percent(lengths, groups, budget)


# SHA-256, its first half, of plans that the search made before it was made faster (2026-11-23), on x86-64. A process on
# another machine that made others would train on other samples; whoever means to change the search changes these.
DIGESTS = {
    "images": "0e9e242ee23d0f94",
    "images and clips of some shapes": "bcb757d9995fcbcb",
    "images and clips of any length": "a163db4450336e40",
    "mostly images": "152be89e286d6082",
    "clips of any length": "4c7b84ae6b00539e",
}


@pytest.mark.parametrize("name", MIXES)
def test_the_plans_are_those_of_all_machines_and_of_before(name: str) -> None:
    plans = []
    for groups, packs in ((16, 1.0), (16, 2.8), (64, 0.9)):
        lengths, budget = draw_step(name, groups, packs, 0)
        plans.append(balance_packs(lengths, [attention_cost(n) for n in lengths], groups, budget))
    assert hashlib.sha256(json.dumps(plans).encode()).hexdigest()[:16] == DIGESTS[name]


def test_the_plans_of_costs_without_relation_to_lengths() -> None:
    plans = []
    for seed in range(60):
        generator = random.Random(seed)
        lengths = [generator.randint(5, 32) for _ in range(40)]
        costs = [float(generator.randint(1, 1_000)) for _ in lengths]
        plans.append(balance_packs(lengths, costs, 4, BUDGET))
    digest = hashlib.sha256(json.dumps(plans).encode()).hexdigest()
    assert digest[:16] == "d3690d15964672cf"  # as above


def test_a_step_that_cannot_fit_is_given_up_by_one_best_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are cut to the groups' budget, and their last tokens mostly need one more micro-step."""
    tried: list[int] = []
    best_fit = _pack_search._best_fit

    def counted(problem: Problem, heights: Sequence[float], order: Sequence[int]) -> Packs | None:
        packs = best_fit(problem, heights, order)
        tried.append(len(heights))
        assert packs is None or len(heights) > 1
        return packs

    monkeypatch.setattr(_pack_search, "_best_fit", counted)
    lengths = [3] * 20  # 60 tokens, two samples a pack
    plan = balance_packs(lengths, [float(n) for n in lengths], 8, 8)
    assert is_complete(plan, lengths, 8, 8)
    assert tried.count(1) == 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=6),
    groups=st.integers(1, 3),
    linear=st.sampled_from([0, 20, 200]),
)
def test_the_proof_against_brute_force(lengths: list[int], groups: int, linear: int) -> None:
    """It never holds beyond the optimum."""
    costs = [attention_cost(n, linear) for n in lengths]
    best = optimum(lengths, costs, groups, BUDGET)
    proof = Proof(lengths, costs, groups, BUDGET)
    assert not proof.holds(1.001 * best)
    assert proof.holds(max(costs))


def test_thousands_of_ranks_in_seconds() -> None:
    """512 groups (4,096 ranks with sp=8) and 20,000 samples: every rank computes this for each step."""
    generator = random.Random(1)
    lengths = [
        generator.randint(256, 3_600) if generator.random() < 0.75 else generator.choice(CLIPS)
        for _ in range(20_000)
    ]
    costs = [attention_cost(n) for n in lengths]
    started = time.perf_counter()
    plan = balance_packs(lengths, costs, 512, 220_000)
    # About 2 s alone on a core of 2020; the rest is for a busy machine.
    assert time.perf_counter() - started < 15
    assert step_cost(plan, costs) <= 1.05 * step_cost_bound(lengths, costs, 512, 220_000)


def test_samples_of_incommensurable_lengths_and_costs_stay_fast() -> None:
    """Costs against lengths: packs without room for the next sample have room for the one after."""
    generator = random.Random(2)
    lengths = [
        generator.choice([generator.randint(1, 50), generator.randint(900, 1_000)])
        for _ in range(6_000)
    ]
    costs = [generator.uniform(1, 2) for _ in lengths]
    started = time.perf_counter()
    plan = balance_packs(lengths, costs, 300, 1_000)
    assert time.perf_counter() - started < 15
    assert is_complete(plan, lengths, 300, 1_000)


# ---- by hand


def test_lock_step_is_what_counts() -> None:
    """Sums per group are equal in both plans; only one of them keeps the groups together."""
    costs = [8.0, 8.0, 1.0, 1.0]
    assert step_cost([[[0], [2]], [[3], [1]]], costs) == 16
    assert step_cost([[[0], [2]], [[1], [3]]], costs) == 9
    assert balance([[[0], [2]], [[3], [1]]], costs) == pytest.approx(9 / 16)
    # Two of 60 and 61 tokens fit no pack together, so there are two micro-steps.
    assert balance_packs([60, 60, 61, 61], costs, 2, 64) == [[[0], [2]], [[1], [3]]]


def test_the_bounds_by_hand() -> None:
    # Mean: 2 groups, 10 in all. Dearest sample: 7.
    assert step_cost_bound([1, 1, 1], [4.0, 3.0, 3.0], 2, 9) == 6  # pigeonhole: 3 + 3
    assert step_cost_bound([1, 1], [7.0, 3.0], 2, 9) == 7
    assert step_cost_bound([1] * 4, [3.0, 3.0, 2.0, 2.0], 2, 9) == 5
    # Three samples longer than half a pack on two groups: 9 and then at least 5.
    assert step_cost_bound([5, 5, 5], [9.0, 9.0, 5.0], 2, 9) == 14
    # One long sample that fills its pack, two short ones that fill one each: 9, then 2 in the other
    # micro-step. By height 2: (9 - 2) + (2 + 2 + 2) / 2 = 10; nothing is 11 or more.
    assert 10 <= step_cost_bound([9, 9, 9], [9.0, 2.0, 2.0], 2, 9) <= 11
    assert step_cost_bound([], [], 3, 8) == 0


def test_empty_packs_and_efficiency() -> None:
    assert balance_packs([], [], 2, 8) == [[], []]
    assert balance_packs([3], [1.0], 3, 8) == [[[0]], [[]], [[]]]
    assert efficiency([[0], [], [1]], [4, 2], 8) == pytest.approx(6 / 16)
    assert efficiency([[], []], [], 8) == 1.0
    assert balance([[[0]], [[]], [[]]], [1.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("groups", [0, -1, 1.5, True])
def test_bad_groups_are_named(groups: int) -> None:
    with pytest.raises(ValueError, match="groups must be an integer >= 1, got"):
        balance_packs([1], [1.0], groups, 8)
    with pytest.raises(ValueError, match="groups must be an integer >= 1, got"):
        step_cost_bound([1], [1.0], groups, 8)


def test_bad_samples_are_named() -> None:
    with pytest.raises(ValueError, match=r"b\.mp4 has 9 tokens, more than tokens_per_pack=8"):
        balance_packs([8, 9], [1, 1], 2, 8, names=["a.mp4", "b.mp4"])
    with pytest.raises(ValueError, match=r"cost of sample 1 must be positive and finite, got nan"):
        balance_packs([1, 1], [1.0, math.nan], 2, 8)
    with pytest.raises(ValueError, match=r"one entry per sample, got 1, 2 and None"):
        balance_packs([1], [1.0, 1.0], 2, 8)
    with pytest.raises(ValueError, match=r"tokens_per_pack must be an integer >= 1, got 0"):
        efficiency([[0]], [1], 0)
