"""Which samples make a step, and how ranks share them (NaViT-style packing, no buckets).

Images and clips of any size lie end to end in one sequence (Dehghani et al., "Patch n' Pack",
arXiv 2307.06304; Goku, arXiv 2502.04896, section on image-video joint training). Three functions
follow each other:

1. `cut_grid` checks one sample against the budget before training begins;
2. `step_positions` takes the next stream positions until the step's GLOBAL budget is full, without
   knowing how many ranks there are;
3. `partition` shares the step's samples among ranks and packs. It changes who computes a sample,
   never which samples a step has.

Everything is a pure function of its arguments: every rank computes the same plan on its own.
Lengths are in tokens (after patchify), grids are (t, h, w) in tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Overlong = Literal["error", "cut"]
Grid = tuple[int, int, int]

# One more pack per rank is one more forward (and its collectives) on all ranks. It is opened only
# when the best balance without it is worse than this times the balance with unlimited packs.
_BALANCE_TOLERANCE = 1.05


@dataclass(frozen=True)
class PackingConfig:
    """Token budgets.

    tokens_per_step: most tokens of one optimizer step over ALL ranks together.
    tokens_per_pack: most tokens of one forward on one rank; the bound on activation memory.
    overlong: what happens to a sample larger than `tokens_per_pack`: "error" refuses it by name,
        "cut" drops its last latent frames.

    Raises ValueError when a budget is not a positive integer, or the pack's exceeds the step's
    (a sample could then fit a pack and yet no step).
    """

    tokens_per_step: int
    tokens_per_pack: int
    overlong: Overlong = "error"

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "tokens_per_pack"):
            _check_positive(name, getattr(self, name))
        if self.tokens_per_pack > self.tokens_per_step:
            raise ValueError(
                f"tokens_per_pack={self.tokens_per_pack} must not exceed "
                f"tokens_per_step={self.tokens_per_step}"
            )
        _check_overlong(self.overlong)


def cut_grid(grid: Grid, tokens_per_pack: int, name: str, overlong: Overlong) -> Grid:
    """The grid that sample `name` is trained with: `grid` itself wherever it fits.

    With overlong="cut" the sample keeps its first tokens_per_pack // (h * w) latent frames.
    Raises ValueError naming the sample when it does not fit and may not be cut, or when even one
    latent frame is too large.
    """
    _check_overlong(overlong)
    frames, height, width = grid
    if min(grid) < 1:
        raise ValueError(f"{name}: grid (t, h, w) = {tuple(grid)} must be positive")
    tokens = frames * height * width
    if tokens <= tokens_per_pack:
        return grid
    size = (
        f"{name}: {frames} x {height} x {width} = {tokens} tokens, "
        f"over tokens_per_pack={tokens_per_pack}"
    )
    if overlong == "error":
        raise ValueError(f'{size}; raise the budget, shrink the sample, or set overlong to "cut"')
    kept = tokens_per_pack // (height * width)
    if kept == 0:
        raise ValueError(
            f"{size}; one latent frame alone has {height * width} tokens, so cutting cannot help"
        )
    return (kept, height, width)


def step_positions(
    position: int, length_of: Callable[[int], int], tokens_per_step: int
) -> list[int]:
    """The stream positions of the step that begins at `position`; the next step begins after them.

    Consecutive positions are taken while they fit the budget, and always at least one. Nothing is
    skipped or reordered, so the steps depend on the stream alone, not on ranks.

    length_of: tokens of the sample at a stream position (after `cut_grid`).
    """
    _check_positive("tokens_per_step", tokens_per_step)
    taken = [position]
    total = _check_positive(f"length at stream position {position}", length_of(position))
    while True:
        following = position + len(taken)
        total += _check_positive(f"length at stream position {following}", length_of(following))
        if total > tokens_per_step:
            return taken
        taken.append(following)


def sample_cost(
    length: int, dim: int, *, text_length: int = 0, text_dim: int = 0, mlp_ratio: int = 4
) -> int:
    """Relative cost of a sample in one Goku block, in units of 4 * dim FLOPs; exact.

    length^2 for self-attention, length * text_length for cross-attention, and the projections
    (self 4 dim^2, cross 2 dim^2, FFN 2 mlp_ratio dim^2 multiply-adds per token; keys and values of
    the text 2 text_dim dim per text token). For balancing only; FLOPs are counted in goku.flops.
    """
    linear = (3 + mlp_ratio) * dim
    return length * (length + text_length + linear) + text_length * text_dim


def partition(
    lengths: Sequence[int],
    costs: Sequence[float],
    ranks: int,
    tokens_per_pack: int,
    *,
    names: Sequence[str] | None = None,
) -> list[list[list[int]]]:
    """Share samples among ranks: result[rank][pack] lists sample indices, ascending in each pack.

    Every sample appears exactly once and every pack holds at most `tokens_per_pack` tokens. The
    largest cost goes first, each to the least loaded rank that has room in one of its packs
    (longest-processing-time rule, Graham 1969; first fit within the rank). The packs per rank are
    as few as keep the slowest rank within 5% of what unlimited packs give, hence within
    1.05 * (4/3 - 1/(3 ranks)) of the optimum. Ranks may hold different numbers of packs; with
    fewer samples than ranks some have none.

    costs: of each sample, any unit (see `sample_cost`). names: used in errors.
    Raises ValueError naming the sample that exceeds the budget or whose cost is not positive.
    """
    _check_positive("ranks", ranks)
    _check_positive("tokens_per_pack", tokens_per_pack)
    if len(costs) != len(lengths) or (names is not None and len(names) != len(lengths)):
        raise ValueError(
            f"lengths, costs and names must have one entry per sample, got {len(lengths)}, "
            f"{len(costs)} and {None if names is None else len(names)}"
        )
    for index, (length, cost) in enumerate(zip(lengths, costs, strict=True)):
        name = f"sample {index}" if names is None else names[index]
        _check_positive(f"length of {name}", length)
        if length > tokens_per_pack:
            raise ValueError(
                f"{name} has {length} tokens, more than tokens_per_pack={tokens_per_pack}"
            )
        if not 0 < cost < float("inf"):
            raise ValueError(f"cost of {name} must be positive and finite, got {cost!r}")

    # Ties fall to the longer sample, then to the lower index: a total order, so one result.
    order = sorted(range(len(lengths)), key=lambda i: (-costs[i], -lengths[i], i))

    def assign(packs_per_rank: int) -> tuple[float, list[list[list[int]]]] | None:
        return _assign(order, lengths, costs, ranks, tokens_per_pack, packs_per_rank)

    unlimited = assign(len(lengths))
    assert unlimited is not None, "a pack per sample always fits"
    slowest, plan = unlimited
    most_packs = max(len(packs) for packs in plan)
    for packs_per_rank in range(-(-sum(lengths) // (ranks * tokens_per_pack)), most_packs):
        limited = assign(packs_per_rank)
        if limited is not None and limited[0] <= _BALANCE_TOLERANCE * slowest:
            plan = limited[1]
            break
    return [sorted(sorted(pack) for pack in packs) for packs in plan]


def _assign(
    order: Sequence[int],
    lengths: Sequence[int],
    costs: Sequence[float],
    ranks: int,
    tokens_per_pack: int,
    packs_per_rank: int,
) -> tuple[float, list[list[list[int]]]] | None:
    """(cost of the slowest rank, plan), or None when a sample finds no room anywhere."""
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    room: list[list[int]] = [[] for _ in range(ranks)]
    least_loaded: list[tuple[float, int]] = [(0, rank) for rank in range(ranks)]
    for index in order:
        full: list[tuple[float, int]] = []
        while least_loaded:
            load, rank = heapq.heappop(least_loaded)
            pack = next((p for p, free in enumerate(room[rank]) if free >= lengths[index]), None)
            if pack is None and len(room[rank]) < packs_per_rank:
                pack = len(room[rank])
                room[rank].append(tokens_per_pack)
                plan[rank].append([])
            if pack is not None:
                room[rank][pack] -= lengths[index]
                plan[rank][pack].append(index)
                heapq.heappush(least_loaded, (load + costs[index], rank))
                break
            full.append((load, rank))
        else:
            return None
        for entry in full:
            heapq.heappush(least_loaded, entry)
    return max(load for load, _ in least_loaded), plan


def efficiency(
    packs: Sequence[Sequence[int]], lengths: Sequence[int], tokens_per_pack: int
) -> float:
    """Share of the packs' token budget that holds tokens, in (0, 1]; 1.0 without any pack.

    packs: one rank's packs, or all ranks' packs chained into one list.
    """
    _check_positive("tokens_per_pack", tokens_per_pack)
    if not packs:
        return 1.0
    return sum(lengths[i] for pack in packs for i in pack) / (len(packs) * tokens_per_pack)


def balance(plan: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> float:
    """Mean cost of a rank over the slowest rank's, in (0, 1]: the share of time ranks are busy.

    plan: what `partition` returned. 1.0 when there are no samples.
    """
    loads = [sum(costs[i] for pack in packs for i in pack) for packs in plan]
    slowest = max(loads, default=0)
    return sum(loads) / (len(loads) * slowest) if slowest else 1.0


def _check_positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def _check_overlong(value: str) -> None:
    if value not in get_args(Overlong):
        raise ValueError(f"overlong must be one of {get_args(Overlong)}, got {value!r}")
