"""Sharing a step's samples among data-parallel groups that run in lock step.

With sharded parameters every group gathers the same block at the same moment, so all groups run
their m-th pack together and wait for the slowest: a step takes the sum over m of the largest cost
among the m-th packs (`step_cost`). Balancing the sum per group alone does not make that small.

Samples become packs of at most `tokens_per_pack` tokens, packs become micro-steps of one pack per
group. Given the packs, the best micro-steps come from sorting them by cost and cutting the row into
runs of `groups`. What is left is to choose the packs, which is NP-hard; `balance_packs` does it so:

1. constructions over groups x micro-steps: longest-processing-time (Graham 1969) with a target per
   micro-step, and multifit (Coffman, Garey, Johnson 1978), then longest-processing-time once more
   within each micro-step;
2. a bounded local search of moves and swaps that relieve the dearest pack of a micro-step;
3. both for several numbers of micro-steps; one more has to save 1% of the step to be worth it.

Everything is a pure function of its arguments, with ties decided by a total order, so every rank
computes the same plan alone. The time is that of sorting, of samples x micro-steps, and of the
search's budget: half a second for 30,000 samples and 2,048 groups, some five for 120,000 in four
micro-steps. `goku_runtime.pack_process` takes it off the calling thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from goku_runtime._pack_search import Problem, lower_bound, solve

__all__ = ["balance", "balance_packs", "efficiency", "step_cost", "step_cost_bound"]


def balance_packs(
    lengths: Sequence[int],
    costs: Sequence[float],
    groups: int,
    tokens_per_pack: int,
    *,
    names: Sequence[str] | None = None,
) -> list[list[list[int]]]:
    """Share samples among groups: result[group][pack] lists sample indices, ascending in each pack.

    Every sample appears exactly once, every pack holds at most `tokens_per_pack` tokens, and every
    group has the same number of packs. A group with nothing to do in a micro-step has an empty
    pack there: it still has to join the others' collectives. The dearest micro-step comes first.

    Args:
        lengths: tokens of each sample.
        costs: of each sample, in any unit of time, such as length^2 + linear * length.
        groups: how many data-parallel groups share the samples (dp_replicate * dp_shard; the sp
            ranks of a group work on the same pack).
        tokens_per_pack: most tokens of a pack, over all sp ranks of a group together.
        names: of the samples, for errors.

    Raises:
        ValueError: a sample is longer than the budget or its cost is not positive (it is named), or
            another argument is out of range.
    """
    check_samples(lengths, costs, groups, tokens_per_pack, names)
    costs = [float(cost) for cost in costs]
    # Ties fall to the longer sample, then to the lower index: a total order, so one result.
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    order.sort(key=costs.__getitem__, reverse=True)
    problem = Problem(
        [lengths[i] for i in order], [costs[i] for i in order], groups, tokens_per_pack
    )
    packs = sorted((-math.fsum(problem.costs[k] for k in pack), pack) for pack in solve(problem))

    plan: list[list[list[int]]] = [[] for _ in range(groups)]
    loads = [0.0] * groups
    for start in range(0, len(packs), groups):
        # Who takes which pack of a micro-step changes nothing in lock step. The dearest goes to the
        # group with least work so far, which helps where groups do not wait for each other.
        by_load = sorted(range(groups), key=lambda g: (loads[g], g))
        for group, at in zip(by_load, range(start, start + groups), strict=True):
            negative, pack = packs[at] if at < len(packs) else (0.0, [])
            plan[group].append(sorted(order[k] for k in pack))
            loads[group] -= negative
    return plan


def step_cost(plan: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> float:
    """What a step costs when groups run in lock step: the dearest m-th pack, summed over m."""
    micro_steps = max((len(packs) for packs in plan), default=0)
    return math.fsum(
        max(math.fsum(costs[i] for i in packs[m]) for packs in plan if m < len(packs))
        for m in range(micro_steps)
    )


def step_cost_bound(
    lengths: Sequence[int], costs: Sequence[float], groups: int, tokens_per_pack: int
) -> float:
    """A number that `step_cost` of no plan can be below, whatever its number of packs.

    The larger of two bounds. Let c_0 >= c_1 >= ... be the costs, G the groups, C the token budget,
    x_m the time of the m-th dearest micro-step. Samples longer than C / 2, the long ones, never
    share a pack: where e_0 >= e_1 >= ... are their costs, x_m >= e_(mG).

    By height. For every h >= 0 the step takes sum x_m = sum max(x_m - h, 0) + sum min(x_m, h).

    - With v_i = max(c_i - h, 0), a pack's max(cost - h, 0) is at least the sum of its samples' v.
      Of the k G + 1 dearest samples one group holds k + 1, so the first sum is at least
      v_(kG-k) + ... + v_(kG) for every k; and at least the sum of max(e_(mG) - h, 0).
    - The second sum is at least 1/G of the sum over packs of min(cost, h), and a pack's min(cost, h)
      is at least the sum over its samples of min(c_i, h length_i / C).

    A large h gives the mean cost of a group, h = 0 the dearest and the long samples, and heights in
    between what the many short samples add that find no room beside the few long ones.

    By waste. G sum x_m is the cost of all samples and the time that packs wait for their micro-step.
    A pack with long sample i costs at most U_i = c_i + r d(r), where r = C - length_i is the room
    beside it and d(r) the largest cost per token among samples of at most r tokens; one without, at
    most C d(C/2). With all these in descending order, U_0 >= U_1 >= ..., the waiting is at least the
    sum of max(e_(j // G * G) - U_j, 0), since matching both in order makes it least.
    (e_0 may be replaced by c_0.)

    Raises:
        ValueError: as `balance_packs`.
    """
    check_samples(lengths, costs, groups, tokens_per_pack)
    order = sorted(range(len(lengths)), key=costs.__getitem__, reverse=True)
    return lower_bound(
        Problem(
            [lengths[i] for i in order], [float(costs[i]) for i in order], groups, tokens_per_pack
        )
    )


def efficiency(
    packs: Sequence[Sequence[int]], lengths: Sequence[int], tokens_per_pack: int
) -> float:
    """Share of the packs' token budget that holds tokens, in (0, 1]; 1.0 without any pack.

    Empty packs do not count: no forward of that size runs for them. What waiting costs is `balance`.

    Args:
        packs: one group's packs, or all groups' packs chained into one list.
        lengths: tokens of each sample.
        tokens_per_pack: the budget of a pack.

    Raises:
        ValueError: tokens_per_pack is not a positive integer.
    """
    _check_positive("tokens_per_pack", tokens_per_pack)
    filled = [pack for pack in packs if pack]
    if not filled:
        return 1.0
    return sum(lengths[i] for pack in filled for i in pack) / (len(filled) * tokens_per_pack)


def balance(plan: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> float:
    """The share of a step's time in which groups are busy, in (0, 1]: mean cost over `step_cost`.

    plan: what `balance_packs` returned. 1.0 when there are no samples.
    """
    step = step_cost(plan, costs)
    work = math.fsum(costs[i] for packs in plan for pack in packs for i in pack)
    return work / (len(plan) * step) if step else 1.0


# ---- arguments


def check_samples(
    lengths: Sequence[int],
    costs: Sequence[float],
    groups: int,
    tokens_per_pack: int,
    names: Sequence[str] | None = None,
) -> None:
    """Raises ValueError as `balance_packs`."""
    _check_positive("groups", groups)
    _check_positive("tokens_per_pack", tokens_per_pack)
    if len(costs) != len(lengths) or (names is not None and len(names) != len(lengths)):
        raise ValueError(
            f"lengths, costs and names must have one entry per sample, got {len(lengths)}, "
            f"{len(costs)} and {None if names is None else len(names)}"
        )
    if (
        set(map(type, lengths)) <= {int}
        and 1 <= min(lengths, default=1) <= max(lengths, default=1) <= tokens_per_pack
        and all(0 < cost < math.inf for cost in costs)
    ):
        return
    for index, (length, cost) in enumerate(zip(lengths, costs, strict=True)):
        name = f"sample {index}" if names is None else names[index]
        _check_positive(f"length of {name}", length)
        if length > tokens_per_pack:
            raise ValueError(
                f"{name} has {length} tokens, more than tokens_per_pack={tokens_per_pack}"
            )
        if not 0 < cost < float("inf"):
            raise ValueError(f"cost of {name} must be positive and finite, got {cost!r}")


def _check_positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value
