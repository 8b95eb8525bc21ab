"""varlen_attention by the package flash-attn (2.7 or newer), where it is installed.

Its low-level pair is called instead of flash_attn_varlen_func, because a custom op's forward and
backward are two calls: `_flash_attn_varlen_forward` and `_flash_attn_varlen_backward`, whose argument
names are the same in 2.7 and 2.8. (2.6 had other ones; flash-attn 3 and 4 are other packages.)

What the contract says and flash-attn does not do is done here: rows past the last offset are zero, a
query without keys has lse -inf (flash-attn: +inf). A gradient through lse it cannot give.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def check_available(operator: str, q: Tensor) -> None:
    """Raise unless flash-attn can be imported and takes queries like q.

    Raises:
        RuntimeError: it cannot be imported, with the import's own error.
        ValueError: q is neither fp16 nor bf16.
    """
    # torch.compile cannot trace an import; the operator itself then meets the error.
    absent = None if torch.compiler.is_compiling() else _import_error()
    if absent is not None:
        raise RuntimeError(
            f"{operator}: backend 'flash' is not available: {absent}; "
            'backend="torch" or None always is'
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f'{operator}: q has dtype {q.dtype}: allowed with backend="flash" are fp16 and bf16'
        )


def _import_error() -> str | None:
    try:
        _interface()
    except (ImportError, OSError) as error:  # OSError: a library of another CUDA
        return f"importing flash-attn gave {type(error).__name__}: {error}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (Tq, H, D) and lse (H, Tq) as the public function describes them."""
    out, lse, *_ = _interface()._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=softmax_scale, causal=False,
    )  # fmt: skip
    padding = _padding(q, cu_seqlens_q)
    out = out.masked_fill(padding[:, None, None], 0)
    return out, lse.masked_fill(padding | lse.isposinf(), float("-inf"))


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv).

    Raises:
        RuntimeError: dlse is given.
    """
    if dlse is not None:
        raise RuntimeError(
            'varlen_attention: backend "flash" has no gradient through lse: '
            'backend="torch" and "triton" have'
        )
    # Zeros: flash-attn writes the rows of samples alone.
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    _interface()._flash_attn_varlen_backward(
        dout.to(q.dtype).contiguous(), q, k, v, out.to(q.dtype).contiguous(), lse.contiguous(),
        dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=softmax_scale, causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=deterministic,
    )  # fmt: skip
    for x, cu_seqlens in ((dq, cu_seqlens_q), (dk, cu_seqlens_k), (dv, cu_seqlens_k)):
        x.masked_fill_(_padding(x, cu_seqlens)[:, None, None], 0)
    return dq, dk, dv


def _padding(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which rows of x lie past the last offset: bool (T,), found without waiting for the device."""
    return torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]
