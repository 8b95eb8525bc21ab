"""Launches the kernels of modulation.py for both of its operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configs import Config, config
from .launch import Launcher, alignment
from .modulation import backward_kernel, forward_kernel, reduce_kernel


class Arguments(NamedTuple):
    """What forward and backward share; tensors as the public functions describe them."""

    op: str
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    cu_seqlens: Tensor | None
    norm: str
    weight: Tensor | None
    eps: float
    token_offset: int


class Gradients(NamedTuple):
    """One per floating argument; None where there is no such argument or nobody asked."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None


def _meta(op: str, kernel: str, x: Tensor, run: Launcher) -> tuple[Config, dict[str, int], int]:
    """The configuration, its compile options, and the rows of one program."""
    found = config(op, kernel, x.shape[1], x.dtype, run.chip)
    # Each program walks one run of rows; all of them are resident at once, so that none waits.
    programs = run.processors * found["programs"]
    rows = found["rows"] * triton.cdiv(triton.cdiv(x.shape[0], programs), found["rows"])
    return found, {"num_warps": found["num_warps"]}, max(rows, 1)


def _inner_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied if its rows are not contiguous (autograd hands on expanded gradients)."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _stride(x: Tensor | None, align: int) -> int:
    """Distance of rows in units of `align`; 0 for one row that all share."""
    return 0 if x is None or x.dim() == 1 else x.stride(0) // align


def _per_token(a: Arguments) -> bool:
    return a.cu_seqlens is None and any(
        m is not None and m.dim() == 2 for m in (a.gate, a.shift, a.scale)
    )


def forward(x: Tensor, a: Arguments, *, want_y: bool, run: Launcher) -> tuple[Tensor, Tensor]:
    """(y, residual_out); an empty tensor for what is not wanted or has no branch.

    Raises:
        ValueError: no configuration for this width.
    """
    found, options, rows = _meta(a.op, "forward", x, run)
    tokens = x.shape[0]
    y = x.new_empty(x.shape if want_y else (0,))
    out = x.new_empty(x.shape if a.branch is not None else (0,))
    align = alignment(x, a.branch, a.gate, a.shift, a.scale)
    run(
        forward_kernel,
        (triton.cdiv(tokens, rows),),
        {
            "x": x, "branch": a.branch, "gate": a.gate, "shift": a.shift, "scale": a.scale,
            "weight": a.weight, "cu_seqlens": a.cu_seqlens, "y": y if want_y else None,
            "out": out if a.branch is not None else None,
            "T": tokens, "B": _batch(a), "token_offset": a.token_offset, "run": rows,
            "x_stride": _stride(x, align), "branch_stride": _stride(a.branch, align),
            "gate_stride": _stride(a.gate, align), "shift_stride": _stride(a.shift, align),
            "scale_stride": _stride(a.scale, align),
            **_constants(x, a, found), "ALIGN": align,
        },
        **options,
    )  # fmt: skip
    return y, out


def backward(
    dy: Tensor | None, dout: Tensor | None, x: Tensor, a: Arguments, *, run: Launcher
) -> Gradients:
    """Gradients of every argument; `x` is what the forward normalised (its residual_out).

    The branch's gradient is left out where it equals x's: no gate, and the same dtype.
    """
    found, options, rows = _meta(a.op, "backward", x, run)
    tokens, width = x.shape
    dy, dout = _inner_contiguous(dy), _inner_contiguous(dout)
    per_token = _per_token(a)
    programs = triton.cdiv(tokens, rows)

    def dense(wanted: bool, like: Tensor | None) -> Tensor | None:
        return None if not wanted or like is None else like.new_empty((tokens, width))

    def sums(wanted: bool) -> Tensor | None:
        shape = (programs + _batch(a), width)
        return x.new_empty(shape, dtype=torch.float32) if wanted else None

    modulated = dy is not None
    reads_x = modulated and (a.norm != "none" or a.scale is not None)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gated = a.branch is not None and (a.gate is not None or a.branch.dtype != x.dtype)
    dbranch = dense(gated, a.branch)
    dscale = dense(per_token and modulated, a.scale)
    dgate = dense(per_token, a.gate)
    sum_shift = sums(modulated and a.shift is not None and not per_token)
    sum_scale = sums(
        modulated and (a.weight is not None or (a.scale is not None and not per_token))
    )
    sum_gate = sums(a.gate is not None and not per_token)
    align = alignment(x, a.branch, a.gate, a.scale, dy, dout)
    run(
        backward_kernel,
        (programs,),
        {
            "dy": dy, "dout": dout, "x": x if reads_x else None, "branch": None if a.gate is None else a.branch,
            "gate": a.gate, "scale": a.scale, "weight": a.weight, "cu_seqlens": a.cu_seqlens,
            "dx": dx, "dbranch": dbranch, "dscale": dscale, "dgate": dgate,
            "sum_shift": sum_shift, "sum_scale": sum_scale, "sum_gate": sum_gate,
            "T": tokens, "B": _batch(a), "token_offset": a.token_offset, "run": rows,
            "x_stride": _stride(x, align), "branch_stride": _stride(a.branch, align),
            "gate_stride": _stride(a.gate, align), "scale_stride": _stride(a.scale, align),
            "dy_stride": _stride(dy, align), "dout_stride": _stride(dout, align),
            **_constants(x, a, found), "ALIGN": align,
        },
        **options,
    )  # fmt: skip

    def folded(
        partials: Tensor | None, like: Tensor | None, by: Tensor | None = None, plain: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Per-sample sums in the shape and dtype of `like`; `plain`: in fp32, before `by`."""
        if partials is None:
            missing = like is not None and not per_token
            return (torch.zeros_like(like) if missing and like is not None else None), None
        batch = _batch(a)
        result = None if like is None or per_token else like.new_empty((batch, width))
        before = x.new_empty((batch, width), dtype=torch.float32) if plain else None
        reduce = config(a.op, "reduce", width, x.dtype, run.chip)
        run(
            reduce_kernel,
            (batch, triton.cdiv(width, reduce["columns"])),
            {
                "sums": partials, "weight": by, "cu_seqlens": a.cu_seqlens, "result": result,
                "plain": before, "T": tokens, "B": batch, "token_offset": a.token_offset,
                "run": rows, "D": width, "COLUMNS": reduce["columns"], "SLOTS": reduce["slots"],
            },
            num_warps=reduce["num_warps"],
        )  # fmt: skip
        return (None if result is None or like is None else result.view(like.shape)), before

    gate, _ = folded(sum_gate, a.gate)
    shift, _ = folded(sum_shift, a.shift)
    scale, plain = folded(sum_scale, a.scale, a.weight, plain=a.weight is not None)
    weight = None
    if a.weight is not None:
        if plain is None:
            weight = torch.zeros_like(a.weight)
        else:
            # In the forward the gain comes before (1 + scale), which is one per sample here.
            if a.scale is not None and not per_token:
                # Where: the scale of a sample without tokens here may be anything.
                plain = torch.where(plain == 0, plain, plain * (1.0 + a.scale.float()))
            weight = plain.sum(0).to(a.weight.dtype)
    if per_token:
        gate = _per_token_gradient(dgate, a.gate)
        shift = _per_token_gradient(dy, a.shift)
        scale = _per_token_gradient(dscale, a.scale)
    return Gradients(dx, dbranch, gate, shift, scale, weight)


def _per_token_gradient(dense: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient of a modulation of one row per token, or of one row beside such a one."""
    if like is None:
        return None
    if dense is None:
        return torch.zeros_like(like)
    if like.dim() == 1:
        return dense.sum(0, dtype=torch.float32).to(like.dtype)
    return dense.to(like.dtype, copy=True)


def _batch(a: Arguments) -> int:
    return 1 if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1


def _constants(x: Tensor, a: Arguments, found: Config) -> dict[str, object]:
    return {
        "D": x.shape[1],
        "BLOCK": triton.next_power_of_2(x.shape[1]),
        "ROWS": found["rows"],
        "NORM": a.norm,
        "PER_TOKEN": _per_token(a),
        "EPS": a.eps,
        "STAGES": found["num_stages"],
    }


# What Goku's block and final layer ask for, and the fullest case: (norm, weighted, modulation).
_CASES = {
    "adaln_modulate": (("layer", False, "shift scale"), ("rms", True, "shift scale")),
    "gated_residual_adaln": (
        ("rms", True, "gate"),
        ("rms", True, "shift scale"),
        ("none", False, "gate"),
        ("rms", True, "gate shift scale"),
    ),
}


def shipped(op: str, chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration: (name, what runs its kernels on meta tensors).

    At Goku's widths (1152, 1792, 3072), in bf16 and, once, in fp32.
    """
    for width in (1152, 1792, 3072):
        for dtype in (torch.bfloat16, torch.float32) if width == 3072 else (torch.bfloat16,):
            for norm, weighted, modulation in _CASES[op]:
                what = f"{norm}, {modulation}"
                yield (
                    f"{width} {str(dtype).removeprefix('torch.')} {what}",
                    partial(_record, op, width, dtype, norm, weighted, modulation.split()),
                )


def _record(
    op: str, width: int, dtype: torch.dtype, norm: str, weighted: bool, modulation: Sequence[str],
    run: Launcher,
) -> None:  # fmt: skip
    x, branch = torch.empty((2, 64, width), dtype=dtype, device="meta").unbind()
    names = ("gate", "shift", "scale")
    rows = torch.empty((3, 3 * width), device="meta").chunk(3, dim=1)
    gate, shift, scale = (
        row if name in modulation else None for name, row in zip(names, rows, strict=True)
    )
    gated = op == "gated_residual_adaln"
    a = Arguments(
        op, branch if gated else None, gate, shift, scale,
        torch.empty(4, dtype=torch.int32, device="meta"), norm,
        torch.empty(width, device="meta") if weighted else None, 1e-6, 0,
    )  # fmt: skip
    want_y = norm != "none"
    forward(x, a, want_y=want_y, run=run)
    backward(x if want_y else None, x if gated else None, x, a, run=run)
