"""Fused operators for packed (varlen) diffusion transformers.

Every operator works on the tokens of all samples laid end to end, with `cu_seqlens` giving where
each sample begins. `Packing` builds and validates those offsets once per batch; `reference` states
each operator in readable eager PyTorch. Nothing happens at import.
"""

from __future__ import annotations

import torch

from ._flop_formulas import FLOP_FORMULAS
from .adaln_modulate import adaln_modulate, adaln_modulate_bytes, adaln_modulate_flops
from .gated_residual_adaln import (
    gated_residual_adaln,
    gated_residual_adaln_bytes,
    gated_residual_adaln_flops,
)
from .packing import Packing
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_bytes, qk_norm_rope_flops
from .rectified_flow_noise import (
    rectified_flow_noise,
    rectified_flow_noise_bytes,
    rectified_flow_noise_flops,
)
from .varlen_attention import (
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_bytes,
    varlen_attention_flops,
    varlen_attention_forward,
)
from .velocity_loss import velocity_loss, velocity_loss_bytes, velocity_loss_flops

# What selective activation checkpointing can name. With backend="torch" only varlen_attention is
# one operator; the others are then the PyTorch operations that they consist of. Noising is not among
# them: it makes data outside the model, has no gradient and nothing to save.
OPERATORS = (
    torch.ops.goku_kernels.adaln_modulate.default,
    torch.ops.goku_kernels.gated_residual_adaln.default,
    torch.ops.goku_kernels.qk_norm_rope.default,
    torch.ops.goku_kernels.varlen_attention.default,
    torch.ops.goku_kernels.velocity_loss.default,
)

__all__ = [
    "FLOP_FORMULAS",
    "OPERATORS",
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
    "rectified_flow_noise",
    "rectified_flow_noise_bytes",
    "rectified_flow_noise_flops",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_bytes",
    "varlen_attention_flops",
    "varlen_attention_forward",
    "velocity_loss",
    "velocity_loss_bytes",
    "velocity_loss_flops",
]
