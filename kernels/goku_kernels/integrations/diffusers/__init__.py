"""Goku's operators in diffusers' video transformers: opt-in, and taken out again without a trace.

    from goku_kernels.integrations.diffusers import fuse, unfuse
    fuse(pipe.transformer)
    ...
    unfuse(pipe.transformer)

Supported: WanTransformer3DModel and HunyuanVideoTransformer3DModel; any other class is refused.
diffusers itself is imported when `fuse` is called, not here.
"""

from __future__ import annotations

from .swapping import fuse, fused, is_fused, unfuse

__all__ = ["fuse", "fused", "is_fused", "unfuse"]
