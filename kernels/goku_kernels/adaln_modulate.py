"""adaln_modulate: normalise tokens and modulate them by their sample's shift and scale.

Letters in shapes: T tokens, B samples, d width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import _checks as check
from . import reference

_OP = "adaln_modulate"
_BACKENDS = ("torch", "triton")

Norm = Literal["layer", "rms", "none"]


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
    backend = check.choose_backend(_OP, backend, _BACKENDS)
    check.check_dense(_OP, "x", x, (None, None))
    modulation = {"shift": shift, "scale": scale}
    check_modulation(_OP, x, modulation, cu_seqlens, norm, weight, eps, token_offset)
    return reference.adaln_modulate(
        x, shift, scale, cu_seqlens, norm=norm, weight=weight, eps=eps, token_offset=token_offset
    )


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
