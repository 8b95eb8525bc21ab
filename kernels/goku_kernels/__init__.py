"""Fused operators for packed (varlen) diffusion transformers.

Every operator works on the tokens of all samples laid end to end, with `cu_seqlens` giving where
each sample begins. `Packing` builds and validates those offsets once per batch; `reference` states
each operator in readable eager PyTorch. Nothing happens at import.
"""

from __future__ import annotations

from .adaln_modulate import adaln_modulate, adaln_modulate_bytes, adaln_modulate_flops
from .gated_residual_adaln import (
    gated_residual_adaln,
    gated_residual_adaln_bytes,
    gated_residual_adaln_flops,
)
from .packing import Packing
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_bytes, qk_norm_rope_flops
from .varlen_attention import (
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_bytes,
    varlen_attention_flops,
    varlen_attention_forward,
)

__all__ = [
    "Packing",
    "adaln_modulate",
    "adaln_modulate_bytes",
    "adaln_modulate_flops",
    "gated_residual_adaln",
    "gated_residual_adaln_bytes",
    "gated_residual_adaln_flops",
    "qk_norm_rope",
    "qk_norm_rope_bytes",
    "qk_norm_rope_flops",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_bytes",
    "varlen_attention_flops",
    "varlen_attention_forward",
]
