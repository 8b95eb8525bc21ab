"""The search behind `goku_runtime.balancing`: constructions, local search, lower bound.

Samples are positions in descending order of cost throughout.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

__all__ = ["Problem", "lower_bound", "solve"]

# A further micro-step is one more forward and backward of every layer, with its gathers and
# launches: it is opened when it saves more than this share of the step's lower bound.
_MICRO_STEP_PRICE = 0.01
# Below this distance from the lower bound, nothing more is tried.
_CLOSE_ENOUGH = 1.002
# How many numbers of micro-steps are built, and how many pairs of samples the local search looks at
# in each of them (a fraction of a microsecond apiece).
_COUNTS = 6
_SEARCH = 200_000
# The lightest packs of a micro-step that its dearest one exchanges samples with.
_PARTNERS = 4
# The times that multifit tries, over the lower bound, and how many packs a sample looks at there.
_TIMES = (1.02, 1.1, 1.25, 1.6, 2.2, 4.0)
_SCANNED = 16


@dataclass(frozen=True)
class Problem:
    """Samples in descending order of cost; everything below speaks of positions in this order."""

    lengths: list[int]
    costs: list[float]
    groups: int
    budget: int

    @property
    def fewest(self) -> int:
        """Micro-steps that no plan can do without."""
        long = sum(2 * length > self.budget for length in self.lengths)
        tokens = -(-sum(self.lengths) // (self.groups * self.budget))
        return max(tokens, -(-long // self.groups))

    @cached_property
    def long(self) -> list[float]:
        """The cost of every `groups`-th of the samples that cannot share a pack with each other."""
        pairs = zip(self.costs, self.lengths, strict=True)
        return [cost for cost, length in pairs if 2 * length > self.budget][:: self.groups]

    def step_cost(self, loads: Sequence[float]) -> float:
        """What a step of packs with these costs takes, dealt out in sorted order."""
        return math.fsum(sorted(loads, reverse=True)[:: self.groups])


class Packs:
    """groups x micro-steps packs under construction."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.samples: list[list[int]] = [[] for _ in range(count)]  # each ascending
        self.loads = [0.0] * count
        self.room = [problem.budget] * count
        self.problem = problem

    def put(self, sample: int, pack: int) -> None:
        insort(self.samples[pack], sample)
        self.loads[pack] += self.problem.costs[sample]
        self.room[pack] -= self.problem.lengths[sample]

    def take(self, sample: int, pack: int) -> None:
        self.samples[pack].remove(sample)
        self.room[pack] += self.problem.lengths[sample]
        # Summed anew: what subtracting leaves behind would differ from what adding built up.
        self.loads[pack] = math.fsum(self.problem.costs[k] for k in self.samples[pack])


def solve(problem: Problem) -> list[list[int]]:
    """The packs that hold samples, of the best plan found."""
    count = len(problem.lengths)
    if count == 0:
        return []
    bound = lower_bound(problem)
    price, enough = _MICRO_STEP_PRICE * bound, _CLOSE_ENOUGH * bound
    best: tuple[float, list[list[int]]] | None = None
    built = 0
    # One pack per sample always has room, so the last round builds something.
    for micro_steps in range(problem.fewest, -(-count // problem.groups) + 1):
        if best is not None and (built == _COUNTS or bound + price * micro_steps >= best[0]):
            break
        packs = _construct(problem, micro_steps, bound)
        if packs is None:
            continue
        built += 1
        _level(problem, packs)
        _relieve(problem, packs, enough)
        total = problem.step_cost(packs.loads) + price * micro_steps
        if best is None or total < best[0]:
            best = total, [pack for pack in packs.samples if pack]
    assert best is not None
    return best[1]


def _construct(problem: Problem, micro_steps: int, bound: float) -> Packs | None:
    """The best of several constructions; None when none found room for every sample."""
    best: Packs | None = None
    time = math.inf

    def consider(packs: Packs | None) -> None:
        nonlocal best, time
        if packs is not None and (found := problem.step_cost(packs.loads)) < time:
            best, time = packs, found

    levels = (0.0, math.fsum(problem.costs) / (micro_steps * problem.groups))
    # Within a single micro-step the target changes nothing.
    for level in levels[: 1 if micro_steps == 1 else 2]:
        consider(_longest_first(problem, micro_steps, level))
    if time <= _CLOSE_ENOUGH * bound:
        return best
    in_order = range(len(problem.costs))
    full: Packs | None = None
    if best is None:
        by_length = sorted(in_order, key=lambda k: (-problem.lengths[k], k))
        full = _best_fit(problem, [math.inf] * micro_steps, by_length)
        if full is None:
            return None

    # Multifit: the first micro-step takes as long as the dearest sample, no other is shorter than
    # its long sample, and they rise together to fill a time that is tried.
    long = problem.long
    least = [problem.costs[0], *(cost for m in range(1, micro_steps) for cost in long[m : m + 1])]
    least += [0.0] * (micro_steps - len(least))
    for factor in _TIMES:
        level = _water_level(least, factor * bound)
        packs = _best_fit(problem, [max(level, base) for base in least], in_order)
        if packs is not None:
            _level(problem, packs)
            consider(packs)
    return best or full


def _water_level(ground: Sequence[float], volume: float) -> float:
    """The level at which max(level, ground), summed over the descending ground, is the volume."""
    under = 0.0
    for above, height in enumerate(ground):
        level = (volume - under) / (len(ground) - above)
        if level >= height:
            return level
        under += height
    return 0.0


def _longest_first(
    problem: Problem, micro_steps: int, level: float, limit: float = math.inf
) -> Packs | None:
    """Each sample to the pack that is furthest below its micro-step's target; None without room.

    A micro-step takes at least as long as its dearest sample, and up to that its other packs cost
    nothing: the m-th target is max(level, c_(m groups)). level=0 fills dear micro-steps first,
    a level of the mean load makes all packs alike. None, too, once a pack costs `limit`.
    """
    groups = problem.groups
    count = groups * micro_steps
    packs = Packs(problem, count)
    contents, loads, rooms = packs.samples, packs.loads, packs.room
    targets = [
        target
        for m in range(micro_steps)
        for target in [max([level, *problem.costs[m * groups : m * groups + 1]])] * groups
    ]
    open_packs = [(-target, pack) for pack, target in enumerate(targets)]
    heapq.heapify(open_packs)
    # Packs without room for a sample wait here, most room first, until a sample fits again. Lengths
    # mostly fall as costs do, so a pack rarely waits twice without having been filled in between.
    waiting: list[tuple[int, int]] = []
    patience = 16 * (len(problem.lengths) + count)
    for sample, (length, cost) in enumerate(zip(problem.lengths, problem.costs, strict=True)):
        while waiting and -waiting[0][0] >= length:
            pack = heapq.heappop(waiting)[1]
            heapq.heappush(open_packs, (loads[pack] - targets[pack], pack))
        while open_packs:
            pack = open_packs[0][1]
            room = rooms[pack]
            if room >= length:
                contents[pack].append(sample)
                rooms[pack] = room - length
                loads[pack] = load = loads[pack] + cost
                if load >= limit:
                    return None
                heapq.heapreplace(open_packs, (load - targets[pack], pack))
                break
            heapq.heappop(open_packs)
            heapq.heappush(waiting, (-room, pack))
            patience -= 1
        else:
            return None
        if patience < 0:
            return None
    return packs


def _best_fit(problem: Problem, heights: Sequence[float], order: Sequence[int]) -> Packs | None:
    """Each sample to the first micro-step, and there to the fullest pack, that has room and time.

    heights: the time of each micro-step. None when a sample fits nowhere.
    """
    groups, lengths, costs = problem.groups, problem.lengths, problem.costs
    count = groups * len(heights)
    packs = Packs(problem, count)
    contents, loads, rooms = packs.samples, packs.loads, packs.room
    # Ascending (room, pack) per micro-step, as one number, room * count + pack.
    rows = [
        [problem.budget * count + pack for pack in range(m * groups, (m + 1) * groups)]
        for m in range(len(heights))
    ]
    steps = list(zip(rows, heights, strict=True))
    for sample in order:
        cost = costs[sample]
        least = lengths[sample] * count
        for row, height in steps:
            start = bisect_left(row, least)
            # Beyond a few packs without time, the next micro-step is tried.
            for at, entry in enumerate(row[start : start + _SCANNED], start):
                pack = entry % count
                load = loads[pack] + cost
                if load <= height:
                    del row[at]
                    insort(row, entry - least)
                    contents[pack].append(sample)
                    loads[pack] = load
                    break
            else:
                continue
            break
        else:
            return None
    for row in rows:
        for entry in row:
            rooms[entry % count] = entry // count
    for content in contents:
        content.sort()
    return packs


def _level(problem: Problem, packs: Packs) -> None:
    """Share each micro-step's samples among its packs anew, longest first, where that is faster."""
    if len(packs.loads) == problem.groups:
        return  # that is how `_construct` begins
    ranked = sorted(range(len(packs.loads)), key=packs.loads.__getitem__, reverse=True)
    for start in range(0, len(ranked), problem.groups):
        row = ranked[start : start + problem.groups]
        dearest = packs.loads[row[0]]
        if len(packs.samples[row[0]]) < 2:
            continue  # whatever the others do, a sample alone takes as long
        samples = sorted(k for pack in row for k in packs.samples[pack])
        part = Problem(
            [problem.lengths[k] for k in samples],
            [problem.costs[k] for k in samples],
            problem.groups,
            problem.budget,
        )
        shared = _longest_first(part, 1, 0.0, limit=dearest)
        if shared is not None:
            for at, pack in enumerate(row):
                packs.samples[pack] = [samples[k] for k in shared.samples[at]]
                packs.loads[pack] = shared.loads[at]
                packs.room[pack] = shared.room[at]


def _relieve(problem: Problem, packs: Packs, enough: float) -> None:
    """Local search: the dearest pack of a micro-step gives to a pack that has time to spare.

    The receiver is among the lightest of the same micro-step and stays below what the giver cost,
    or the lightest of another one and stays within that one's time; so no step makes it worse.
    """
    groups, left = problem.groups, _SEARCH
    while left > 0 and problem.step_cost(packs.loads) > enough:
        ranked = sorted(range(len(packs.loads)), key=packs.loads.__getitem__)
        # Ascending (cost, pack) per micro-step; they are dealt out anew in each round.
        rows = [
            [(packs.loads[b], b) for b in ranked[k : k + groups]]
            for k in range(0, len(ranked), groups)
        ]
        changed = False
        for here, row in enumerate(rows):
            while left > 0:
                top, giver = row[-1]
                # (row, receiver, most that it may gain, what it should gain)
                partners = [
                    (here, b, top - load, (top - load) / 2)
                    for load, b in row[:_PARTNERS]
                    if b != giver
                ]
                spare = [(r[-1][0] - r[0][0], k) for k, r in enumerate(rows) if k != here]
                left -= len(spare) + 1
                for slack, k in heapq.nlargest(_PARTNERS, spare):
                    partners.append((k, rows[k][0][1], slack, slack))
                for there, receiver, most, wanted in partners:
                    left -= len(packs.samples[giver]) + len(packs.samples[receiver])
                    pair = _exchange(problem, packs, giver, receiver, most, wanted, there == here)
                    if pair is not None:
                        break
                else:
                    break  # the dearest pack cannot be relieved, so neither can the micro-step
                for pack, k in ((giver, here), (receiver, there)):
                    del rows[k][bisect_left(rows[k], (packs.loads[pack], pack))]
                give, back = pair
                packs.take(give, giver)
                packs.put(give, receiver)
                if back is not None:
                    packs.take(back, receiver)
                    packs.put(back, giver)
                for pack, k in ((giver, here), (receiver, there)):
                    insort(rows[k], (packs.loads[pack], pack))
                changed = True
        if not changed:
            return


def _exchange(
    problem: Problem,
    packs: Packs,
    giver: int,
    receiver: int,
    most: float,
    wanted: float,
    strict: bool,
) -> tuple[int, int | None] | None:
    """(sample to give, sample to get back or None) that moves a cost near `wanted`, at most `most`.

    strict: less than `most`. Changes below a billionth of the giver's cost are none.
    """
    lengths, costs = problem.lengths, problem.costs
    least = 1e-9 * packs.loads[giver]
    below = most - least if strict else math.inf
    most_tokens, least_tokens = packs.room[receiver], -packs.room[giver]
    others = packs.samples[receiver]
    count = len(others)
    # The last of them is none.
    back_costs = [costs[k] for k in others] + [0.0]
    back_lengths = [lengths[k] for k in others] + [0]
    descending = [-costs[k] for k in others]
    best: tuple[int, int] | None = None
    distance = math.inf
    for give in packs.samples[giver]:
        cost, length = costs[give], lengths[give]
        near = bisect_left(descending, wanted - cost)
        for position in (near - 2, near - 1, near, near + 1, count):
            if not 0 <= position <= count:
                continue
            moved = cost - back_costs[position]
            if (
                least < moved <= most
                and moved < below
                and least_tokens <= length - back_lengths[position] <= most_tokens
                and abs(moved - wanted) < distance
            ):
                best, distance = (give, position), abs(moved - wanted)
    if best is None:
        return None
    give, position = best
    return give, (others[position] if position < count else None)


def lower_bound(problem: Problem) -> float:
    """`step_cost_bound`."""
    return max(_height_bound(problem), _waste_bound(problem))


def _waste_bound(problem: Problem) -> float:
    """The second bound of `step_cost_bound`."""
    budget, groups = problem.budget, problem.groups
    if not problem.costs:
        return 0.0
    # Of samples of one length the dearest, which come first, and so overwrite the others.
    dearest = dict(zip(reversed(problem.lengths), reversed(problem.costs), strict=True))
    lengths = sorted(dearest)
    densities = [0.0, *accumulate((dearest[length] / length for length in lengths), max)]

    def fill(room: int) -> float:
        return room * densities[bisect_right(lengths, room)]

    most = sorted(
        (
            cost + fill(budget - length)
            for cost, length in zip(problem.costs, problem.lengths, strict=True)
            if 2 * length > budget
        ),
        reverse=True,
    )
    least = [problem.costs[0], *problem.long[1:]]
    without = budget * densities[bisect_right(lengths, budget // 2)]
    most = sorted([*most, *[without] * (len(least) * groups)], reverse=True)
    waste = math.fsum(
        max(least[pack // groups] - most[pack], 0.0) for pack in range(len(least) * groups)
    )
    return (math.fsum(problem.costs) + waste) / groups


def _height_bound(problem: Problem) -> float:
    """The first bound of `step_cost_bound`, at up to 256 heights and 64 values of k."""
    lengths, costs, groups = problem.lengths, problem.costs, problem.groups
    if not costs or groups == 1:
        return math.fsum(costs)
    sums = [0.0, *accumulate(costs)]
    long = problem.long
    # min(c_i, h length_i / C) is c_i up to the breakpoint h_i = c_i C / length_i.
    # Few samples differ: most are images of a few thousand lengths.
    breaks = sorted(
        (cost * problem.budget / length, number * cost, number * length / problem.budget)
        for (length, cost), number in Counter(zip(lengths, costs, strict=True)).items()
    )
    points = [point for point, _, _ in breaks]
    below = [0.0, *accumulate(cost for _, cost, _ in breaks)]
    shares = [0.0, *accumulate(share for _, _, share in breaks)]
    descending = [-cost for cost in costs]
    heights = sorted({0.0, *long, *points})
    best = 0.0
    for height in [*heights[:: -(-len(heights) // 256)], heights[-1]]:
        at = bisect_right(points, height)
        filled = (below[at] + height * (shares[-1] - shares[at])) / groups
        above = math.fsum(cost - height for cost in long if cost > height)
        dearer = bisect_left(descending, -height)  # samples that cost more than the height
        for k in range(min(64, -(-len(costs) // groups))):
            first, last = k * groups - k, min(k * groups + 1, dearer)
            if first >= last:
                break
            above = max(above, sums[last] - sums[first] - (last - first) * height)
        best = max(best, above + filled)
    return best
