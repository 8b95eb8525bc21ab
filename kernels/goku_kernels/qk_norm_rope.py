"""qk_norm_rope: RMSNorm of queries and keys, then 3D rotary embedding from each sample's grid.

Letters in shapes: T tokens, B samples, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _checks as check
from . import reference

_OP = "qk_norm_rope"
_BACKENDS = ("torch", "triton")

Norm = Literal["full", "head", "none"]
Pairing = Literal["interleaved", "half"]


@overload
def qk_norm_rope(
    q: Tensor, k: None = None, q_weight: Tensor | None = None, k_weight: Tensor | None = None, *,
    cu_seqlens: Tensor, grid_sizes: Tensor | None, axes_dim: Sequence[int], norm: Norm = ...,
    pairing: Pairing = ..., rotate_k: bool = ..., theta: float = ..., eps: float = ...,
    positions: Tensor | None = ..., position_offset: Tensor | None = ...,
    position_scale: Tensor | None = ..., token_offset: int = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None, *,
    cu_seqlens: Tensor, grid_sizes: Tensor | None, axes_dim: Sequence[int], norm: Norm = ...,
    pairing: Pairing = ..., rotate_k: bool = ..., theta: float = ..., eps: float = ...,
    positions: Tensor | None = ..., position_offset: Tensor | None = ...,
    position_scale: Tensor | None = ..., token_offset: int = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    grid_sizes: Tensor | None,
    axes_dim: Sequence[int],
    norm: Norm = "full",
    pairing: Pairing = "interleaved",
    rotate_k: bool = True,
    theta: float = 10000.0,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    position_offset: Tensor | None = None,
    position_scale: Tensor | None = None,
    token_offset: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS-normalise q and k and rotate them by their place (t, h, w) in their sample's grid.

    Computed in promote(dtype, float32); differentiable in q, k and the weights. Sources: the block
    published with Goku (arXiv 2502.04896) for the full-width norm; RoPE, arXiv 2104.09864.

    Args:
        q: (T, H, D) floating, unit inner stride. T need not be cu_seqlens[-1]: a shard holds fewer
            rows, a padded pack more.
        k: (T, Hk, D) of q's dtype, or None. With rotate_k=False it may have any number of rows.
        q_weight, k_weight: gain of the norm, (heads*D,) for "full", (D,) for "head", or None (no
            gain).
        cu_seqlens: int32 (B+1,), global offsets of the samples. Rows of q (and of a rotated k) at
            or past cu_seqlens[-1] are padding: zero in outputs and gradients.
        grid_sizes: int32 (B, 3), (t, h, w) with t*h*w tokens, row-major; None only with
            `positions`.
        axes_dim: channels of D given to t, h and w, in that order along D: even, adding up to D.
        norm: "full" (over all H*D channels of a token), "head" (over D) or "none".
        pairing: which channels turn together: "interleaved" (2i, 2i+1), or "half" (i, i + d_axis/2)
            inside each axis's slice, so that no pair straddles two axes.
        rotate_k: False only normalises k (cross-attention).
        theta: RoPE base; freq_i = theta^(-2i/d_axis).
        eps: added to the mean square.
        positions: (T, 3) of any integer or floating dtype, the positions of these rows; overrides
            the grids. A row that must not turn has 0 on every axis.
        position_offset, position_scale: (3,) or (B, 3); position = index in the grid * scale +
            offset. Constants (no gradient); not together with `positions`.
        token_offset: global row of q's first token (a shard may begin inside a sample).
        backend: None, "torch" or "triton".

    Returns:
        q, or (q, k), of the inputs' shapes and dtypes.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    check.check_choice(_OP, "norm", norm, ("full", "head", "none"))
    check.check_choice(_OP, "pairing", pairing, ("interleaved", "half"))
    check.check_dense(_OP, "q", q, (None, None, None))
    _check_key(q, k, k_weight, rotate_k)
    _check_weight("q_weight", q_weight, q, norm)
    if k is not None:
        _check_weight("k_weight", k_weight, k, norm)
    check.check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, q.device)
    _check_positions(q, cu_seqlens, grid_sizes, positions, position_offset, position_scale)
    _check_axes(axes_dim, q.shape[-1])
    check.check_positive(_OP, "theta", theta)
    check.check_positive(_OP, "eps", eps)
    check.check_count(_OP, "token_offset", token_offset)
    if check.choose_backend(_OP, backend, _BACKENDS, q, _refusal(q, k)) == "triton":
        q_out, k_out = torch.ops.goku_kernels.qk_norm_rope(
            q, k, q_weight, k_weight, cu_seqlens, grid_sizes, list(axes_dim), norm, pairing,
            rotate_k, float(theta), float(eps), positions, position_offset, position_scale,
            token_offset,
        )  # fmt: skip
        return q_out if k is None else (q_out, k_out)
    return reference.qk_norm_rope(
        q, k, q_weight, k_weight,
        cu_seqlens=cu_seqlens, grid_sizes=grid_sizes, axes_dim=axes_dim, norm=norm, pairing=pairing,
        rotate_k=rotate_k, theta=theta, eps=eps, positions=positions,
        position_offset=position_offset, position_scale=position_scale, token_offset=token_offset,
    )  # fmt: skip


# Channels of a token that the Triton kernels hold at once, heads and head_dim rounded up to powers
# of two: the largest size in triton/configs/qk_norm_rope.json.
_LARGEST = 8192


def _refusal(q: Tensor, k: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take q and k; None if they can."""
    if q.dtype == torch.float64:
        return "q has dtype torch.float64: backend 'triton' takes float16, bfloat16 and float32"
    for name, x in (("q", q), ("k", k)):
        if x is not None:
            if 0 in x.shape[1:]:
                return f"{name} has shape {tuple(x.shape)}: backend 'triton' wants channels"
            tile = _padded(x.shape[1]) * _padded(x.shape[2])
            if tile > _LARGEST:
                return (
                    f"{name} has {x.shape[1]} heads of {x.shape[2]} channels, {tile} with "
                    f"both rounded up to powers of two: backend 'triton' takes up to {_LARGEST}"
                )
    return None


def _padded(n: int) -> int:
    size = 1
    while size < n:
        size *= 2
    return size


# ---- the custom operators: Triton only -----------------------------------------------------------

_TURN = (
    "Tensor cu_seqlens, Tensor? grid_sizes, int[] axes_dim, str norm, str pairing, bool rotate_k, "
    "float theta, float eps, Tensor? positions, Tensor? position_offset, Tensor? position_scale, "
    "SymInt token_offset"
)


@torch.library.custom_op(
    "goku_kernels::qk_norm_rope",
    mutates_args=(),
    schema=f"(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, {_TURN})"
    " -> (Tensor, Tensor)",
)
def _qk_norm_rope(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, *turn: Any
) -> tuple[Tensor, Tensor]:
    """q and k, normed and turned; an empty tensor for k=None."""
    from .triton import qk_norm_rope as kernels
    from .triton.launch import launcher

    sides = [kernels.Side(q, q_weight)] + ([] if k is None else [kernels.Side(k, k_weight)])
    outs = kernels.forward(sides, kernels.Turn(*turn), launcher(q))
    return outs[0], q.new_empty(0) if k is None else outs[1]


@_qk_norm_rope.register_fake
def _(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, *turn: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


@torch.library.custom_op(
    "goku_kernels::qk_norm_rope_backward",
    mutates_args=(),
    schema="(Tensor dq_out, Tensor? dk_out, Tensor q, Tensor? k, Tensor? q_weight, "
    f"Tensor? k_weight, bool want_q_weight, bool want_k_weight, {_TURN})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _qk_norm_rope_backward(
    dq_out: Tensor, dk_out: Tensor | None, q: Tensor, k: Tensor | None, q_weight: Tensor | None,
    k_weight: Tensor | None, want_q_weight: bool, want_k_weight: bool, *turn: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and their weights; an empty tensor for what is absent or not wanted."""
    from .triton import qk_norm_rope as kernels
    from .triton.launch import launcher

    sides = [kernels.Side(q, q_weight, dq_out, want_q_weight)]
    if k is not None:
        sides.append(kernels.Side(k, k_weight, dk_out, want_k_weight))
    grads = kernels.backward(sides, kernels.Turn(*turn), launcher(q))
    empty = q.new_empty
    dq, dq_weight = grads[0]
    dk, dk_weight = (empty(0), None) if k is None else grads[1]
    return (
        dq,
        dk,
        empty(0) if dq_weight is None else dq_weight,
        empty(0) if dk_weight is None else dk_weight,
    )


@_qk_norm_rope_backward.register_fake
def _(
    dq_out: Tensor, dk_out: Tensor | None, q: Tensor, k: Tensor | None, q_weight: Tensor | None,
    k_weight: Tensor | None, want_q_weight: bool, want_k_weight: bool, *turn: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape),
        q.new_empty(0 if k is None else k.shape),
        q_weight.new_empty(q_weight.shape)
        if want_q_weight and q_weight is not None
        else q.new_empty(0),
        k_weight.new_empty(k_weight.shape)
        if want_k_weight and k_weight is not None
        else q.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _gradient(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = iter(ctx.saved_tensors)
    q, k, q_weight, k_weight, *turn = (next(tensors) if x is None else x[0] for x in ctx.others)
    wanted = ctx.needs_input_grad
    dq, dk, dq_weight, dk_weight = torch.ops.goku_kernels.qk_norm_rope_backward(
        dq_out, None if k is None else dk_out, q, k, q_weight, k_weight, wanted[2], wanted[3], *turn
    )
    return (
        dq,
        None if k is None else dk,
        dq_weight if wanted[2] else None,
        dk_weight if wanted[3] else None,
        *[None] * len(turn),
    )


_qk_norm_rope.register_autograd(_gradient, setup_context=_save)


def _check_key(q: Tensor, k: Tensor | None, k_weight: Tensor | None, rotate_k: bool) -> None:
    if k is None:
        if k_weight is not None:
            raise ValueError(f"{_OP}: k_weight is given without k: allowed is None")
        return
    check.check_dense(_OP, "k", k, (q.shape[0] if rotate_k else None, None, q.shape[2]))
    check.check_device(_OP, "k", k, q.device)
    if k.dtype != q.dtype:
        raise ValueError(f"{_OP}: k has dtype {k.dtype}: q has {q.dtype}, and they must be equal")


def _check_weight(name: str, weight: Tensor | None, x: Tensor, norm: Norm) -> None:
    if weight is None:
        return
    if norm == "none":
        raise ValueError(f'{_OP}: {name} is given with norm="none": allowed is None')
    width = x.shape[1] * x.shape[2] if norm == "full" else x.shape[2]
    check.check_parameter(_OP, name, weight, x, (width,))


def _check_positions(
    q: Tensor,
    cu_seqlens: Tensor,
    grid_sizes: Tensor | None,
    positions: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
) -> None:
    if grid_sizes is not None:
        check.check_grid_sizes(_OP, grid_sizes, cu_seqlens)
    elif positions is None:
        raise ValueError(f"{_OP}: grid_sizes is None without positions: one of them must be given")
    if positions is not None:
        check.check_tensor(_OP, "positions", positions)
        if positions.dtype == torch.bool or positions.is_complex():
            raise ValueError(
                f"{_OP}: positions has dtype {positions.dtype}: allowed are integers and floats"
            )
        check.check_shape(_OP, "positions", positions, (q.shape[0], 3))
        check.check_device(_OP, "positions", positions, q.device)
    for name, x in (("position_offset", offset), ("position_scale", scale)):
        if x is None:
            continue
        check.check_tensor(_OP, name, x)
        if positions is not None:
            raise ValueError(f"{_OP}: {name} is given with positions: they already are final")
        batch = cu_seqlens.shape[0] - 1
        check.check_parameter(_OP, name, x, q, (3,) if x.dim() == 1 else (batch, 3))


def _check_axes(axes_dim: Sequence[int], head_dim: int) -> None:
    axes = tuple(axes_dim)
    if len(axes) != 3 or any(n < 0 or n % 2 for n in axes) or sum(axes) != head_dim:
        raise ValueError(
            f"{_OP}: axes_dim is {axes}: allowed are 3 even integers >= 0 that add up to {head_dim}"
        )


def qk_norm_rope_flops(
    tokens_q: int,
    tokens_k: int = 0,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    norm: Norm = "full",
    rotate_k: bool = True,
    backward: bool = False,
) -> int:
    """Arithmetic of one call: 4 per normalised element (square, sum, scale, gain), 3 per rotated.

    The backward counts twice the forward; sines and cosines are not counted.
    """
    elements_q = tokens_q * heads * head_dim
    elements_k = tokens_k * (kv_heads or heads) * head_dim
    normed = 0 if norm == "none" else 4 * (elements_q + elements_k)
    rotated = 3 * (elements_q + (elements_k if rotate_k else 0))
    return (normed + rotated) * (2 if backward else 1)


def qk_norm_rope_bytes(
    tokens_q: int,
    tokens_k: int = 0,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    itemsize: int,
    backward: bool = False,
) -> int:
    """Least memory traffic of one call in bytes: q and k read and written once.

    The backward reads inputs and output gradients and writes input gradients. Weights, offsets and
    grids are left out: they are a vanishing part.
    """
    elements = (tokens_q * heads + tokens_k * (kv_heads or heads)) * head_dim
    return elements * itemsize * (3 if backward else 2)
