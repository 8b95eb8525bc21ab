"""The packed batches that are measured, as grids (t, h, w) of tokens after patchify.

Goku's VAE makes one latent frame of four (the first frame alone is one too) and one cell of 8x8
pixels; a token is 2x2 cells. So 720x1280 pixels are 45x80 tokens a latent frame, 480x864 are 30x54,
288x512 are 18x32, 512x512 are 32x32 and 256x256 are 16x16.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from goku_kernels.packing import Grid

TEXT_TOKENS = 512  # of every sample, where attention crosses to text


@dataclass(frozen=True)
class Pack:
    """One packed batch: its name and the grid of every sample."""

    name: str
    grids: tuple[Grid, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sample."""
        return tuple(t * h * w for t, h, w in self.grids)

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(self.lengths)


def _mixed(*groups: tuple[int, Grid]) -> tuple[Grid, ...]:
    """So many samples of each grid, in an order that is neither sorted nor new on every run."""
    grids = [grid for count, grid in groups for _ in range(count)]
    random.Random(0).shuffle(grids)
    return tuple(grids)


HD, SD, LOW = (45, 80), (30, 54), (18, 32)  # 720x1280, 480x864, 288x512 pixels

# 16K, 64K and 220K tokens; clips of 4*t - 3 frames.
GPU_PACKS = (
    Pack("16K, one clip", ((29, *LOW),)),
    Pack("16K, mixed", _mixed((1, (9, *LOW)), (1, (5, *SD)), (2, (1, *SD)))),
    Pack("16K, many images", _mixed((32, (1, 16, 16)), (8, (1, 32, 32)))),
    Pack("64K, one clip", ((40, *SD),)),
    Pack("64K, mixed", _mixed((1, (21, *SD)), (1, (25, *LOW)), (4, (1, *HD)), (1, (1, *SD)))),
    Pack("64K, many images", _mixed((160, (1, 16, 16)), (24, (1, 32, 32)))),
    Pack("220K, one clip", ((61, *HD),)),
    Pack(
        "220K, mixed",
        _mixed((1, (31, *HD)), (1, (41, *SD)), (1, (29, *LOW)), (6, (1, *HD)), (2, (1, *SD))),
    ),
    Pack("220K, many images", _mixed((440, (1, 16, 16)), (104, (1, 32, 32)))),
)

# Samples of one length each, a fixed-length batch, and clips of those lengths in one pack: what
# packing costs (bench/fixed_length.py). For attention, whose speed depends on the lengths.
LONG_PACKS = (
    Pack("64K, clips of 4 lengths",
         _mixed((1, (20, *SD)), (1, (10, *SD)), (1, (5, *SD)), (2, (8, *LOW)))),
    Pack("64K, 14 clips of 4608", ((8, *LOW),) * 14),
    Pack("64K, 8 clips of 8100", ((5, *SD),) * 8),
    Pack("64K, 4 clips of 16200", ((10, *SD),) * 4),
    Pack("64K, 2 clips of 32400", ((20, *SD),) * 2),
)  # fmt: skip

# The same kinds at a size that a CPU does in milliseconds.
CPU_PACKS = (
    Pack("small, one clip", ((5, 6, 8),)),
    Pack("small, mixed", ((3, 6, 8), (1, 8, 8), (1, 5, 6))),
    Pack("small, many images", ((1, 4, 4),) * 12),
)


def packs(device_type: str) -> tuple[Pack, ...]:
    """What is measured on a device of this type."""
    return GPU_PACKS if device_type == "cuda" else CPU_PACKS


def named(names: Sequence[str], device_type: str) -> tuple[Pack, ...]:
    """The packs whose names contain one of `names`; all where `names` is empty.

    Raises:
        ValueError: a name that is in no pack's.
    """
    chosen = packs(device_type)
    for name in names:
        if not any(name in pack.name for pack in chosen):
            known = [pack.name for pack in chosen]
            raise ValueError(f"pack is {name!r}: allowed are parts of {known}")
    return tuple(p for p in chosen if not names or any(name in p.name for name in names))
