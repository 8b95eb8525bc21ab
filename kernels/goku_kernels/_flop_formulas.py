"""What torch's FlopCounterMode counts for our operators, if it is told.

A custom operator is one call to it, so without a formula the attention would count nothing. The
other operators multiply no matrices, which is all that it counts. Not registered with torch, since
importing its registry imports Triton.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .varlen_attention import varlen_attention_flops


def _lengths(cu_seqlens: Tensor) -> list[int]:
    return [b - a for a, b in itertools.pairwise(cu_seqlens.tolist())]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """The matrix arithmetic of the segments; reads their lengths, which waits for a GPU."""
    return varlen_attention_flops(
        _lengths(cu_seqlens_q), _lengths(cu_seqlens_k), heads=q.shape[1], head_dim=q.shape[2]
    )


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Twice the forward: what is computed again is not counted."""
    return varlen_attention_flops(
        _lengths(cu_seqlens_q), _lengths(cu_seqlens_k), heads=q.shape[1], head_dim=q.shape[2],
        backward=True,
    )  # fmt: skip


# The counter hands the tensors themselves, not their shapes, to a function with this attribute.
_forward._get_raw = True  # type: ignore[attr-defined]
_backward._get_raw = True  # type: ignore[attr-defined]

# For FlopCounterMode(custom_mapping=FLOP_FORMULAS).
FLOP_FORMULAS: dict[Any, Any] = {
    torch.ops.goku_kernels.varlen_attention: _forward,
    torch.ops.goku_kernels.varlen_attention_backward: _backward,
}
