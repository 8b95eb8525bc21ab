"""Which samples make a step, and how ranks share them (NaViT-style packing, no buckets).

Images and clips of any size lie end to end in one sequence (Dehghani et al., "Patch n' Pack",
arXiv 2307.06304; Goku, arXiv 2502.04896, section on image-video joint training). Three functions
follow each other:

1. `cut_grid` checks one sample against the budget before training begins;
2. `step_positions` takes the next stream positions until the step's GLOBAL budget is full, without
   knowing how many ranks there are;
3. `partition` (`goku_runtime.balancing`) shares the step's samples among data-parallel groups and
   packs. It changes who computes a sample, never which samples a step has.

Everything is a pure function of its arguments: every rank computes the same plan on its own.
Lengths are in tokens (after patchify), grids are (t, h, w) in tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from goku_runtime.balancing import balance, balance_packs, efficiency

__all__ = [
    "Grid",
    "Overlong",
    "PackingConfig",
    "balance",
    "cut_grid",
    "efficiency",
    "partition",
    "sample_cost",
    "step_positions",
]

Overlong = Literal["error", "cut"]
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PackingConfig:
    """Token budgets.

    tokens_per_step: most tokens of one optimizer step over ALL ranks together.
    tokens_per_pack: most tokens of one forward on one rank, or on the sp ranks that share it; the
        bound on activation memory.
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
    total = 0
    for following in itertools.count(position):
        length = length_of(following)
        if type(length) is not int or length < 1:  # the name alone takes longer than the rest
            _check_positive(f"length at stream position {following}", length)
        total += length
        if total > tokens_per_step and following > position:
            break
    return list(range(position, following))


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

    `goku_runtime.balancing.balance_packs`, where a rank is a group of sp ranks with sequence
    parallelism: all have the same number of packs, and an empty one where there is nothing to do.

    costs: of each sample, any unit (see `sample_cost`). names: used in errors.
    Raises ValueError naming the sample that exceeds the budget or whose cost is not positive.
    """
    _check_positive("ranks", ranks)
    return balance_packs(lengths, costs, ranks, tokens_per_pack, names=names)


def _check_positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def _check_overlong(value: str) -> None:
    if value not in get_args(Overlong):
        raise ValueError(f"overlong must be one of {get_args(Overlong)}, got {value!r}")
