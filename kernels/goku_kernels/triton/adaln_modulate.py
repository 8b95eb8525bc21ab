"""Launches adaln_modulate (its kernels: modulation.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from . import modulation_launch as modulation
from .launch import Launcher

OP = "adaln_modulate"


def _arguments(
    shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int,
) -> modulation.Arguments:  # fmt: skip
    return modulation.Arguments(
        OP, None, None, shift, scale, cu_seqlens, norm, weight, eps, token_offset
    )


def forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, norm: str,
    weight: Tensor | None, eps: float, token_offset: int, *, run: Launcher,
) -> Tensor:  # fmt: skip
    """y; arguments as those of the operator."""
    a = _arguments(shift, scale, cu_seqlens, norm, weight, eps, token_offset)
    return modulation.forward(x, a, want_y=True, run=run)[0]


def backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None,
    norm: str, weight: Tensor | None, eps: float, token_offset: int, *, run: Launcher,
) -> modulation.Gradients:  # fmt: skip
    """Gradients from that of y, (T, d)."""
    a = _arguments(shift, scale, cu_seqlens, norm, weight, eps, token_offset)
    return modulation.backward(dy, None, x, a, run=run)


def shipped(chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration, for compile-only tests."""
    return modulation.shipped(OP, chip)
