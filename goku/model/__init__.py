"""The Goku transformer (arXiv 2502.04896) on packed batches of images and clips."""

from __future__ import annotations

from .block import GokuBlock
from .config import PRESETS, KernelConfig, ModelConfig, split_axes
from .initialise import initial_value
from .patches import patch_grid, patchify, unpatchify
from .shard import TokenShard
from .transformer import GokuTransformer

__all__ = [
    "PRESETS",
    "GokuBlock",
    "GokuTransformer",
    "KernelConfig",
    "ModelConfig",
    "TokenShard",
    "initial_value",
    "patch_grid",
    "patchify",
    "split_axes",
    "unpatchify",
]
