"""varlen_attention: full (non-causal) attention inside every sample of a packed batch.

Letters in shapes: Tq queries, Tk keys, B samples, H query heads, Hk key/value heads, D head_dim.
The arguments are those of flash_attn_varlen_func.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import _checks as check
from . import reference

_OP = "varlen_attention"
_BACKENDS = ("torch", "triton", "cuda", "flash")


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, softmax_scale: float | None = ..., deterministic: bool = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, softmax_scale: float | None = ..., deterministic: bool = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v, where queries of a sample see its keys, all and only those.

    Differentiable in q, k and v, through lse too. Under autocast q, k and v are cast to its dtype,
    as torch's own attention does (fp64 stays).

    Args:
        q: (Tq, H, D) floating, unit inner stride.
        k, v: (Tk, Hk, D) of q's dtype; Hk divides H, and head i reads key/value head i // (H/Hk).
        cu_seqlens_q, cu_seqlens_k: int32 (B+1,). Rows at or past the last offset are padding:
            output and gradients zero, lse -inf.
        max_seqlen_q, max_seqlen_k: upper bounds of the segments' lengths; never change the result.
        softmax_scale: default 1/sqrt(D).
        deterministic: equal bits on every run, backward included (on a CPU the reference always is;
            on a GPU it then takes torch's plain attention with the scores in memory).
        return_lse: also return the natural log of the sum of exponentials.
        backend: None, "torch", "triton", "cuda" or "flash".

    Returns:
        out (Tq, H, D) of q's dtype, or (out, lse) with lse (H, Tq) in promote(dtype, float32). A
        query without keys has out 0 and lse -inf.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    backend = check.choose_backend(_OP, backend, _BACKENDS)
    q, k, v = _as_autocast(q, k, v)
    scale = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    return reference.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=scale, return_lse=return_lse,
        deterministic=deterministic,
    )  # fmt: skip


@torch.no_grad()
def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward half of varlen_attention for callers that differentiate themselves.

    Ring attention (arXiv 2310.01889) merges the (out, lse) of several key blocks and calls
    `varlen_attention_backward` per block. Arguments, result and errors as varlen_attention with
    return_lse=True; records no graph.
    """
    return varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, deterministic=deterministic, return_lse=True, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward half: gradients for this k and v from the output and lse of ALL keys.

    Args:
        dout: (Tq, H, D), gradient of out.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        deterministic,
            backend: as in varlen_attention.
        out: (Tq, H, D) as returned by the forward (or merged over key blocks).
        lse: (H, Tq) likewise.
        dlse: (H, Tq), gradient of lse, or None for zero.

    Returns:
        (dq, dk, dv) of the inputs' shapes and dtypes.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    backend = check.choose_backend(_OP, backend, _BACKENDS)
    dtypes = [x.dtype for x in (q, k, v)]
    # As the forward did: its lse belongs to these values of q and k.
    q, k, v, dout, out = _as_autocast(q, k, v, dout, out)
    scale = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    for name, x in (("dout", dout), ("out", out)):
        # Any strides: autograd hands on expanded and transposed gradients.
        if x.dtype not in check.FLOATS:
            raise ValueError(f"{_OP}: {name} has dtype {x.dtype}: allowed are {list(check.FLOATS)}")
        check.check_shape(_OP, name, x, tuple(q.shape))
        check.check_device(_OP, name, x, q.device)
    for name, rows in (("lse", lse), ("dlse", dlse)):
        if rows is not None:
            check.check_shape(_OP, name, rows, (q.shape[1], q.shape[0]))
            check.check_device(_OP, name, rows, q.device)
            if rows.dtype != check.compute_dtype(q):
                raise ValueError(
                    f"{_OP}: {name} has dtype {rows.dtype}: allowed is {check.compute_dtype(q)}"
                )
    gradients = reference.varlen_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale=scale, dlse=dlse
    )
    dq, dk, dv = (x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))
    return dq, dk, dv


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the active autocast dtype, if any; fp64 and what is no float stay as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    keep = (torch.float64,)
    return tuple(x if x.dtype in keep or not x.is_floating_point() else x.to(low) for x in tensors)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
) -> float:
    """Check the arguments and return the softmax scale."""
    check.check_dense(_OP, "q", q, (None, None, None))
    check.check_dense(_OP, "k", k, (None, None, q.shape[2]))
    check.check_dense(_OP, "v", v, tuple(k.shape))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(
                f"{_OP}: {name} has dtype {x.dtype}: q has {q.dtype}, they must be equal"
            )
        check.check_device(_OP, name, x, q.device)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_OP}: k has {k.shape[1]} heads: allowed are divisors of q's {q.shape[1]}"
        )
    check.check_cu_seqlens(_OP, "cu_seqlens_q", cu_seqlens_q, q.device)
    check.check_cu_seqlens(_OP, "cu_seqlens_k", cu_seqlens_k, q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{_OP}: cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}: cu_seqlens_q has "
            f"{tuple(cu_seqlens_q.shape)}, they must be equal"
        )
    _check_lengths("q", q.shape[0], cu_seqlens_q, max_seqlen_q)
    _check_lengths("k", k.shape[0], cu_seqlens_k, max_seqlen_k)
    if softmax_scale is None:
        return float(q.shape[2]) ** -0.5
    check.check_positive(_OP, "softmax_scale", softmax_scale)
    return softmax_scale


def _check_lengths(name: str, rows: int, cu: Tensor, max_seqlen: int) -> None:
    check.check_count(_OP, f"max_seqlen_{name}", max_seqlen)
    if not check.readable(cu):
        return
    offsets = cu.tolist()
    if offsets[-1] > rows:
        raise ValueError(f"{_OP}: cu_seqlens_{name} ends at {offsets[-1]}: {name} has {rows} rows")
    longest = max(b - a for a, b in itertools.pairwise(offsets))
    if longest > max_seqlen:
        raise ValueError(
            f"{_OP}: max_seqlen_{name} is {max_seqlen}: the longest segment has {longest} tokens"
        )


def varlen_attention_flops(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    heads: int,
    head_dim: int,
    backward: bool = False,
) -> int:
    """Matrix arithmetic of one call: 4 * heads * head_dim * sum(len_q * len_k).

    The backward counts twice the forward: no recomputation (flash-attn's tables count 2.5 times).

    Raises:
        ValueError: the two lists have different lengths.
    """
    if len(lengths_q) != len(lengths_k):
        raise ValueError(f"lengths_q has {len(lengths_q)} samples and lengths_k {len(lengths_k)}")
    pairs = sum(a * b for a, b in zip(lengths_q, lengths_k, strict=True))
    return 4 * heads * head_dim * pairs * (2 if backward else 1)


def varlen_attention_bytes(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    itemsize: int,
    backward: bool = False,
) -> int:
    """Least memory traffic of one call in bytes: q, k, v read, out written; backward twice that.

    The fp32 lse counts 4 bytes per query and head in each direction.
    """
    elements = 2 * tokens_q * heads + 2 * tokens_k * (kv_heads or heads)
    return elements * head_dim * itemsize * (2 if backward else 1) + 4 * tokens_q * heads
