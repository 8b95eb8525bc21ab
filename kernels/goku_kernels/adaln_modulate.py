"""adaln_modulate: normalise tokens and modulate them by their sample's shift and scale.

Letters in shapes: T tokens, B samples, d width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks as check
from . import reference

_OP = "adaln_modulate"
_BACKENDS = ("torch", "triton")

Norm = Literal["layer", "rms", "none"]


@torch.library.custom_op("goku_kernels::adaln_modulate", mutates_args=())
def _forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int,
) -> Tensor:  # fmt: skip
    from .triton import adaln_modulate as kernels
    from .triton.launch import launcher

    return kernels.forward(
        x, shift, scale, cu_seqlens, norm, weight, eps, token_offset, run=launcher(x)
    )


@_forward.register_fake
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@torch.library.custom_op("goku_kernels::adaln_modulate_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None,
    norm: str, weight: Tensor | None, eps: float, token_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .triton import adaln_modulate as kernels
    from .triton.launch import launcher

    grads = kernels.backward(
        dy, x, shift, scale, cu_seqlens, norm, weight, eps, token_offset, run=launcher(x)
    )
    dshift, dscale, dweight = (absent(x) if g is None else g for g in grads[3:])
    return grads.x, dshift, dscale, dweight


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None,
    norm: str, weight: Tensor | None, eps: float, token_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), like(shift, x), like(scale, x), like(weight, x)


def absent(x: Tensor) -> Tensor:
    """What an operator returns in the place of a gradient that does not exist."""
    return x.new_empty(0)


def like(argument: Tensor | None, x: Tensor) -> Tensor:
    """A contiguous gradient for `argument`, for fake tensors."""
    return absent(x) if argument is None else argument.new_empty(argument.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, shift, scale, cu_seqlens, norm, weight, eps, token_offset = inputs
    ctx.save_for_backward(x, shift, scale, cu_seqlens, weight)
    ctx.options = (norm, eps, token_offset)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, shift, scale, cu_seqlens, weight = ctx.saved_tensors
    norm, eps, token_offset = ctx.options
    dx, dshift, dscale, dweight = _backward(
        dy, x, shift, scale, cu_seqlens, norm, weight, eps, token_offset
    )
    return (
        dx, None if shift is None else dshift, None if scale is None else dscale, None, None,
        None if weight is None else dweight, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def adaln_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    norm: Norm = "layer",
    weight: Tensor | None = None,
    eps: float = 1e-6,
    token_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """norm(x) * (1 + scale) + shift, rows being those of each token's sample (arXiv 2212.09748).

    Computed in promote(x's dtype, float32), cast back to x's dtype; differentiable in every
    floating argument. Rows at or past cu_seqlens[-1] are padding: zero in output and gradients.

    Args:
        x: (T, d) floating, unit inner stride.
        shift, scale: (B, d) with cu_seqlens; (d,) or (T, d) without; None where absent. Their dtype
            may differ from x's (fp32 beside bf16); views such as those of chunk(6) need no copy.
        cu_seqlens: int32 (B+1,), global offsets of the samples, or None.
        norm: "layer" (LayerNorm without bias), "rms" or "none".
        weight: (d,), gain of the norm before the modulation, or None.
        eps: added to the variance or mean square.
        token_offset: global row of x's first token (a shard may begin inside a sample).
        backend: None, "torch" or "triton".

    Returns:
        (T, d) of x's dtype.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    check.check_dense(_OP, "x", x, (None, None))
    modulation = {"shift": shift, "scale": scale}
    check_modulation(_OP, x, modulation, cu_seqlens, norm, weight, eps, token_offset)
    if check.choose_backend(_OP, backend, _BACKENDS, x, triton_refusal(x)) == "triton":
        return _forward(x, shift, scale, cu_seqlens, norm, weight, eps, token_offset)
    return reference.adaln_modulate(
        x, shift, scale, cu_seqlens, norm=norm, weight=weight, eps=eps, token_offset=token_offset
    )


_LARGEST_WIDTH = 8192


def triton_refusal(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take tokens like `x` (T, d); None if they can."""
    if x.dtype == torch.float64:
        return f'x has dtype {x.dtype}: allowed with backend="triton" are fp16, bf16 and fp32'
    if not 0 < x.shape[1] <= _LARGEST_WIDTH:
        return check.width_refusal("x", x, _LARGEST_WIDTH)
    return None


def check_modulation(
    operator: str,
    x: Tensor,
    modulation: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    norm: str,
    weight: Tensor | None,
    eps: float,
    token_offset: int,
) -> None:
    """Check what adaln_modulate and gated_residual_adaln share: rows, offsets, norm, weight.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
    """
    tokens, width = x.shape
    check.check_choice(operator, "norm", norm, ("layer", "rms", "none"))
    if cu_seqlens is not None:
        check.check_cu_seqlens(operator, "cu_seqlens", cu_seqlens, x.device)
    check.check_count(operator, "token_offset", token_offset)
    if cu_seqlens is None and token_offset != 0:
        raise ValueError(
            f"{operator}: token_offset is {token_offset} without cu_seqlens: allowed is 0"
        )
    for name, rows in modulation.items():
        if rows is None:
            continue
        shape: tuple[int, ...] = (width,) if rows.dim() == 1 else (tokens, width)
        if cu_seqlens is not None:
            shape = (cu_seqlens.shape[0] - 1, width)
        check.check_parameter(operator, name, rows, x, shape)
    if weight is not None:
        if norm == "none":
            raise ValueError(f'{operator}: weight is given with norm="none": allowed is None')
        check.check_parameter(operator, "weight", weight, x, (width,))
    check.check_positive(operator, "eps", eps)


_NORM_FLOPS = {"layer": 6, "rms": 4, "none": 0}


def adaln_modulate_flops(
    tokens: int, dim: int, *, norm: Norm = "layer", backward: bool = False
) -> int:
    """Arithmetic of one call: norm (6 per element for "layer", 4 for "rms") and modulation (2).

    The backward counts twice the forward.
    """
    return tokens * dim * (_NORM_FLOPS[norm] + 2) * (2 if backward else 1)


def adaln_modulate_bytes(tokens: int, dim: int, *, itemsize: int, backward: bool = False) -> int:
    """Least memory traffic of one call in bytes: x read and y written once.

    The backward reads x and dy and writes dx. Rows of modulation are left out (one per sample).
    """
    return tokens * dim * itemsize * (3 if backward else 2)
