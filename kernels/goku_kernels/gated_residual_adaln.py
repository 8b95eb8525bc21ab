"""gated_residual_adaln: add a gated branch to the residual stream, then normalise and modulate it.

Letters in shapes: T tokens, B samples, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import reference
from .adaln_modulate import (
    Norm,
    absent,
    adaln_modulate_flops,
    check_modulation,
    like,
    triton_refusal,
)

_OP = "gated_residual_adaln"
_BACKENDS = ("torch", "triton")


@torch.library.custom_op("goku_kernels::gated_residual_adaln", mutates_args=())
def _forward(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, cu_seqlens: Tensor | None, norm: str, weight: Tensor | None, eps: float,
    token_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton import gated_residual_adaln as kernels
    from .triton.launch import launcher

    return kernels.forward(
        residual, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset,
        run=launcher(residual),
    )  # fmt: skip


@_forward.register_fake
def _(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, cu_seqlens: Tensor | None, norm: str, weight: Tensor | None, eps: float,
    token_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plain = is_plain_sum(norm, shift, scale)
    return absent(residual) if plain else like(residual, residual), like(residual, residual)


@torch.library.custom_op("goku_kernels::gated_residual_adaln_backward", mutates_args=())
def _backward(
    dy: Tensor | None, dout: Tensor | None, out: Tensor, branch: Tensor, gate: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton import gated_residual_adaln as kernels
    from .triton.launch import launcher

    grads = kernels.backward(
        dy, dout, out, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset,
        run=launcher(out),
    )  # fmt: skip
    others = (absent(out) if g is None else g for g in grads[1:])
    dbranch, dgate, dshift, dscale, dweight = others
    return grads.x, dbranch, dgate, dshift, dscale, dweight


@_backward.register_fake
def _(
    dy: Tensor | None, dout: Tensor | None, out: Tensor, branch: Tensor, gate: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    own = branch if _has_own_gradient(branch, out, gate) else None
    dbranch, dgate, dshift, dscale, dweight = (
        like(argument, out) for argument in (own, gate, shift, scale, weight)
    )
    return like(out, out), dbranch, dgate, dshift, dscale, dweight


def is_plain_sum(norm: str, shift: Tensor | None, scale: Tensor | None) -> bool:
    """Whether y is residual_out, bit for bit; the operator then leaves y out."""
    return norm == "none" and shift is None and scale is None


def _has_own_gradient(branch: Tensor, residual: Tensor, gate: Tensor | None) -> bool:
    """Whether the branch's gradient differs from the residual's."""
    return gate is not None or branch.dtype != residual.dtype


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], branch, gate, shift, scale, cu_seqlens, weight)
    ctx.options = (norm, eps, token_offset)


def _differentiate(ctx: Any, dy: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    out, branch, gate, shift, scale, cu_seqlens, weight = ctx.saved_tensors
    norm, eps, token_offset = ctx.options
    if is_plain_sum(norm, shift, scale):
        dy = None  # y is empty
    dx, dbranch, *rows, dweight = _backward(
        dy, dout, out, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset
    )
    if not _has_own_gradient(branch, out, gate):
        dbranch = dx
    arguments = (gate, shift, scale)
    drows = (None if m is None else row for m, row in zip(arguments, rows, strict=True))
    return dx, dbranch, *drows, None, None, None if weight is None else dweight, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def gated_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    norm: Norm = "layer",
    weight: Tensor | None = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """residual_out = residual + gate * branch;  y = norm(residual_out) * (1 + scale) + shift.

    Equal to the sum followed by adaln_modulate: the norm reads residual_out as it is stored, in the
    residual's dtype. Computed in promote(residual's dtype, float32); differentiable in every
    floating argument. Rows at or past cu_seqlens[-1] are padding: zero in outputs and gradients.

    Args:
        residual: (T, d) floating, unit inner stride.
        branch: (T, d), output of attention or FFN; its dtype may be narrower (bf16 beside fp32).
        gate, shift, scale: (B, d) with cu_seqlens; (d,) or (T, d) without; None where absent (gate
            1).
        cu_seqlens: int32 (B+1,), global offsets of the samples, or None.
        norm: "layer" (LayerNorm without bias), "rms" or "none"; with "none" and no modulation y is
            residual_out itself.
        weight: (d,), gain of the norm before the modulation, or None.
        eps: added to the variance or mean square.
        token_offset: global row of the first token (a shard may begin inside a sample).
        backend: None, "torch" or "triton".

    Returns:
        (y, residual_out), both (T, d) of residual's dtype.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    check.check_dense(_OP, "residual", residual, (None, None))
    check.check_dense(_OP, "branch", branch, tuple(residual.shape))
    check.check_device(_OP, "branch", branch, residual.device)
    if torch.promote_types(check.compute_dtype(residual), branch.dtype) != check.compute_dtype(
        residual
    ):
        raise ValueError(
            f"{_OP}: branch has dtype {branch.dtype}: beside a {residual.dtype} residual at most "
            f"{check.compute_dtype(residual)}"
        )
    modulation = {"gate": gate, "shift": shift, "scale": scale}
    check_modulation(_OP, residual, modulation, cu_seqlens, norm, weight, eps, token_offset)
    if (
        check.choose_backend(_OP, backend, _BACKENDS, residual, triton_refusal(residual))
        == "triton"
    ):
        y, out = _forward(
            residual, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset
        )
        return (out if is_plain_sum(norm, shift, scale) else y), out
    return reference.gated_residual_adaln(
        residual, branch, gate, shift, scale, cu_seqlens,
        norm=norm, weight=weight, eps=eps, token_offset=token_offset,
    )  # fmt: skip


def gated_residual_adaln_flops(
    tokens: int, dim: int, *, norm: Norm = "layer", backward: bool = False
) -> int:
    """Arithmetic of one call: the gated sum (2 per element) and adaln_modulate's (backward: 2x)."""
    gated = 2 * tokens * dim * (2 if backward else 1)
    return gated + adaln_modulate_flops(tokens, dim, norm=norm, backward=backward)


def gated_residual_adaln_bytes(
    tokens: int, dim: int, *, itemsize: int, backward: bool = False
) -> int:
    """Least memory traffic of one call in bytes: two inputs read and two outputs written once.

    The backward reads residual_out, branch and two output gradients, and writes two gradients.
    """
    return tokens * dim * itemsize * (6 if backward else 4)
