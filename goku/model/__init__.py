"""The Goku transformer (arXiv 2502.04896) on packed batches of images and clips."""

from __future__ import annotations

from .block import GokuBlock
from .config import PRESETS, KernelConfig, ModelConfig, split_axes
from .patches import patch_grid, patchify, unpatchify
from .transformer import GokuTransformer

__all__ = [
    "PRESETS",
    "GokuBlock",
    "GokuTransformer",
    "KernelConfig",
    "ModelConfig",
    "patch_grid",
    "patchify",
    "split_axes",
    "unpatchify",
]
