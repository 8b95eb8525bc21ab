"""Proof that no plan of packs is faster than a given time, by column generation; independent of the search.

`step_cost_bound` is cheap and holds everywhere, and is loose for steps of one to two packs a group. Here a
linear program says more. A step's time is T_0 + T_1 + ..., with T_m the dearest pack of micro-step m,
descending. For T_0 and T_1 in small intervals it asks: with `groups` packs of cost up to the upper end of
each, and any number of further packs that cost at least a group's share (cost / groups) of their
micro-step's time and no more than T_1 each, what is the least time of the rest, samples shared out
in fractions? That is below every plan with these T_0, T_1, so where the lower ends plus that time
reach the target no such plan is faster. Intervals that do not are halved.

The program has a variable for every possible pack; those that matter are found by pricing (a knapsack with
two constraints, an integer program of its own) until the dual bound settles the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

Floats = NDArray[np.float64]

# Halving stops here, as a share of the target: what is open then counts as not proven.
FINEST = 0.002
# Pricing that ends this close to its optimum is good enough: the dual bound is lowered by as much.
GAP = 1e-4


class Proof:
    """Samples, and the packs that were of use so far."""

    def __init__(
        self, lengths: Sequence[int], costs: Sequence[float], groups: int, budget: int
    ) -> None:
        self.scale = max(costs)
        self.lengths = np.array(lengths, np.float64) / budget
        self.costs = np.array(costs, np.float64) / self.scale
        self.groups = groups
        self.packs: list[Floats] = list(np.eye(len(costs)))

    def holds(self, target: float) -> bool:
        """Whether every plan's step_cost is at least the target (False: not proven)."""
        target /= self.scale
        # T_0 is at least the dearest sample. T_1 may be 0: there may be one micro-step only.
        boxes = [((float(self.costs.max()), target), (0.0, target / 2))]
        while boxes:
            (low, high), (low_1, high_1) = boxes.pop()
            if low + low_1 >= target or low_1 > high:
                continue
            if self._rest_is_at_least(target - low - low_1, high, min(high, high_1)):
                continue
            if max(high - low, high_1 - low_1) < FINEST * target:
                return False
            if high - low > high_1 - low_1:
                middle = (low + high) / 2
                boxes += [((low, middle), (low_1, high_1)), ((middle, high), (low_1, high_1))]
            else:
                middle = (low_1 + high_1) / 2
                boxes += [((low, high), (low_1, middle)), ((low, high), (middle, high_1))]
        return True

    def _rest_is_at_least(self, rest: float, high: float, high_1: float) -> bool:
        """Whether further packs take at least `rest`, when T_0 and T_1 are at most these."""
        count, groups = len(self.costs), self.groups
        tops = (high, high_1, high_1)
        prices = (0.0, 0.0, 1 / groups)  # of a pack's cost
        while True:
            packs = np.array(self.packs)
            cost = packs @ self.costs
            kinds = [np.flatnonzero(cost <= top * (1 + 1e-9)) for top in tops]
            # What does not fit into T_1 has to be in the first micro-step: outside it costs too much.
            objective = np.concatenate(
                [price * cost[of] for price, of in zip(prices, kinds, strict=True)]
                + [np.full(count, 2 * rest + 2)]
            )
            covered = np.vstack([*(packs[of] for of in kinds), np.eye(count)])
            counted = np.zeros((2, len(covered)))
            counted[0, : len(kinds[0])] = 1
            counted[1, len(kinds[0]) : len(kinds[0]) + len(kinds[1])] = 1
            found = linprog(
                objective,
                A_ub=np.vstack([-covered.T, counted]),
                b_ub=np.concatenate([-np.ones(count), [groups, groups]]),
                method="highs",
            )
            assert found.status == 0, found.message
            if found.fun < rest * (1 - 1e-9):
                return False
            value = -found.ineqlin.marginals[:count]
            # Dual feasible by raising what a pack of a micro-step is worth to the dearest that exists.
            worth = [self._dearest(value, top) for top in tops[:2]]
            # A further pack may not be worth more than it costs: lower the values until none is.
            over, pack = self._dearest(value - self.costs / groups, high_1)
            if over <= GAP * rest / count:
                bound = value.sum() - count * max(over, 0) - groups * sum(w for w, _ in worth)
                if bound >= rest * (1 - 1e-9):
                    return True
            known = len(self.packs)
            for new in (*(p for _, p in worth), pack):
                if not any((new == old).all() for old in self.packs):
                    self.packs.append(new)
            if len(self.packs) == known:  # the program's optimum, and neither side of the target
                return False

    def _dearest(self, value: Floats, top: float) -> tuple[float, Floats]:
        """The pack of the largest value that costs at most `top`: a bound on the value, the pack."""
        fits = (self.costs <= top).astype(np.float64) * (value > 0)
        if not fits.any():
            return 0.0, np.zeros(len(value))
        found = milp(
            -value,
            constraints=LinearConstraint(np.vstack([self.lengths, self.costs / top]), -np.inf, 1),
            integrality=np.ones(len(value)),
            bounds=Bounds(0, fits),
            options={"mip_rel_gap": GAP},
        )
        assert found.status == 0, found.message
        return -float(found.mip_dual_bound), np.round(found.x)
