"""Launches gated_residual_adaln (its kernels: modulation.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from goku_kernels.gated_residual_adaln import is_plain_sum

from . import modulation_launch as modulation
from .launch import Launcher

OP = "gated_residual_adaln"


def forward(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, cu_seqlens: Tensor | None, norm: str, weight: Tensor | None, eps: float,
    token_offset: int, *, run: Launcher,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, residual_out); y is empty where it would be residual_out itself."""
    a = modulation.Arguments(
        OP, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset
    )
    return modulation.forward(residual, a, want_y=not is_plain_sum(norm, shift, scale), run=run)


def backward(
    dy: Tensor | None, dout: Tensor | None, out: Tensor, branch: Tensor, gate: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int, *, run: Launcher,
) -> modulation.Gradients:  # fmt: skip
    """Gradients from those of y and of residual_out (either may be None); `out` is the latter."""
    a = modulation.Arguments(
        OP, branch, gate, shift, scale, cu_seqlens, norm, weight, eps, token_offset
    )
    return modulation.backward(dy, dout, out, a, run=run)


def shipped(chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration, for compile-only tests."""
    return modulation.shipped(OP, chip)
