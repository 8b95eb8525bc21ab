"""Launchers of qk_norm_rope: which tensors go to which kernel, and how its work is divided."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .configs import config
from .launch import Launcher, alignment
from .qk_norm_rope_kernels import rows_kernel, weight_kernel

_OP = "qk_norm_rope"
# Dtypes of positions that the kernel reads as they are.
_POSITIONS = (torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)


class Turn(NamedTuple):
    """How q and k are normed, and by what they are turned: as in the public function."""

    cu_seqlens: Tensor
    grid_sizes: Tensor | None
    axes_dim: Sequence[int]
    norm: str
    pairing: str
    rotate_k: bool
    theta: float
    eps: float
    positions: Tensor | None
    position_offset: Tensor | None
    position_scale: Tensor | None
    token_offset: int


class Side(NamedTuple):
    """q or k: tokens (T, H, D) with unit inner stride, gain, and for a backward the rest.

    grad: gradient of the output, of any strides. wanted: whether the gain's gradient is.
    """

    x: Tensor
    weight: Tensor | None
    grad: Tensor | None = None
    wanted: bool = False


def forward(sides: Sequence[Side], turn: Turn, run: Launcher) -> list[Tensor]:
    """The output of every side (q, or q and k), contiguous."""
    return [out for out, _ in _launch("forward", sides, turn, run)]


def backward(
    sides: Sequence[Side], turn: Turn, run: Launcher
) -> list[tuple[Tensor, Tensor | None]]:
    """Of every side the gradients of its tokens (contiguous) and of its gain, if wanted."""
    sides = [side._replace(grad=_inner(side.grad)) for side in sides if side.grad is not None]
    return _launch("backward", sides, turn, run)


def _launch(
    kernel: str, sides: Sequence[Side], turn: Turn, run: Launcher
) -> list[tuple[Tensor, Tensor | None]]:
    """Output, or gradient, of every side, and the gradient of its gain."""
    x = sides[0].x
    found = config(_OP, kernel, max(_tile(side.x) for side in sides), x.dtype, run.chip)
    axes = tuple(turn.axes_dim)
    align = alignment(*[side.x for side in sides], *[side.grad for side in sides])
    arguments: dict[str, Any] = {
        "ALIGN": align, "AXES": axes, "RUN": math.gcd(8, *[n // 2 for n in axes]),
        "LOG2_THETA": math.log2(turn.theta), "EPS": turn.eps, "NORM": turn.norm,
        "HALF": turn.pairing == "half", "ROTATE_K": turn.rotate_k,
        "BLOCK_D": triton.next_power_of_2(x.shape[2]), "STAGES": found["stages"],
    }  # fmt: skip
    arguments |= _positions(turn)
    # All programs are resident at once, so that none waits: q and k share them by their work.
    work = [side.x.shape[0] * _tile(side.x) for side in sides]
    grid = 0
    results: list[tuple[Tensor, Tensor | None]] = []
    for name, side in zip(("q", "k"), (*sides, None), strict=False):
        if side is None:
            arguments |= _side(name, None, None, None, 0, align)
            continue
        T = side.x.shape[0]
        share = found["programs"] * run.processors * work[len(results)] // max(sum(work), 1)
        rows = max(found["rows"], triton.cdiv(T, max(share, 1)))
        programs = triton.cdiv(T, rows)
        out = torch.empty_like(side.x, memory_format=torch.contiguous_format)
        partial = None
        if side.wanted and side.weight is not None:
            partial = x.new_empty(programs, side.weight.shape[0], dtype=torch.float32)
        arguments |= _side(name, side, out, partial, rows, align)
        arguments.setdefault("q_programs", programs)
        grid += programs
        results.append((out, partial))
    run(rows_kernel, (grid,), arguments, num_warps=found["num_warps"])
    return [
        (out, None if partial is None else _sum(partial, side, run))
        for side, (out, partial) in zip(sides, results, strict=True)
    ]


def _side(
    name: str, side: Side | None, out: Tensor | None, partial: Tensor | None, rows: int, align: int
) -> dict[str, Any]:
    """The kernel's arguments for q or k, `name`; None for a launch without k."""
    x = weight = grad = None
    if side is not None:
        x, weight, grad, _ = side
    T, heads = (0, 1) if x is None else x.shape[:2]
    row, head = (0, 0) if x is None else x.stride()[:2]
    grad_row, grad_head = (0, 0) if grad is None else grad.stride()[:2]
    return {
        name: x, f"{name}_weight": weight, f"{name}_grad": grad, f"{name}_out": out,
        f"{name}_partial": partial, f"{name}_T": T, f"{name}_rows": rows,
        f"{name}_row": row // align, f"{name}_head": head // align,
        f"{name}_grad_row": grad_row // align, f"{name}_grad_head": grad_head // align,
        f"HEADS_{name.upper()}": heads, f"BLOCK_{name.upper()}": triton.next_power_of_2(heads),
    }  # fmt: skip


def _positions(turn: Turn) -> dict[str, Any]:
    """The kernel's arguments about samples and places."""
    arguments: dict[str, Any] = {
        "cu_seqlens": turn.cu_seqlens, "B": turn.cu_seqlens.shape[0] - 1,
        "token_offset": turn.token_offset, "grid_sizes": None, "positions": None,
        "position_offset": None, "position_scale": None, "offset_step": 0, "scale_step": 0,
    }  # fmt: skip
    if turn.positions is not None:
        # (T, 3) numbers are next to nothing beside the tokens.
        p = turn.positions if turn.positions.dtype in _POSITIONS else turn.positions.double()
        return arguments | {"positions": p.contiguous()}
    arguments["grid_sizes"] = turn.grid_sizes
    for name, x in (("offset", turn.position_offset), ("scale", turn.position_scale)):
        if x is not None:
            arguments |= {f"position_{name}": x.contiguous(), f"{name}_step": int(x.dim() == 2)}
    return arguments


def _sum(partial: Tensor, side: Side, run: Launcher) -> Tensor:
    """The gradient of a gain from its parts."""
    assert side.weight is not None
    out = torch.empty_like(side.weight, memory_format=torch.contiguous_format)
    programs, width = partial.shape
    found = config(_OP, "weight", width, side.x.dtype, run.chip)
    arguments = {
        "partial": partial, "out": out, "programs": programs, "WIDTH": width,
        "BLOCK": found["block"], "CHUNK": found["chunk"],
    }  # fmt: skip
    grid = (triton.cdiv(width, found["block"]),)
    run(weight_kernel, grid, arguments, num_warps=found["num_warps"])
    return out


def _tile(x: Tensor) -> int:
    """Elements of a token's tile; the size of a configuration."""
    return triton.next_power_of_2(x.shape[1]) * triton.next_power_of_2(x.shape[2])


def _inner(grad: Tensor | None) -> Tensor | None:
    """`grad` with unit inner stride: a view that has none (of one number, transposed) is copied."""
    if grad is None or grad.stride(-1) == 1:
        return grad
    return grad.contiguous()


def shipped(chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration: (name, what runs forward and backward on meta tensors).

    Goku's 2B and 8B (and 1152, a width with padded heads) and Wan's 14B, as views of a fused
    projection; at 3072 also the other norms, keys that do not turn, and fewer of them.
    """
    assert chip
    half, single = torch.bfloat16, torch.float32
    for heads, axes in _SHAPES:
        for dtype, pairing in ((half, "interleaved"), (half, "half"), (single, "interleaved")):
            yield _case(heads, heads, axes, dtype, pairing)
    heads, axes = _SHAPES[2]
    yield _case(heads, heads, axes, torch.float16, "interleaved")
    yield _case(heads, heads, axes, half, "interleaved", norm="head")
    yield _case(heads, heads, axes, half, "interleaved", norm="none")
    yield _case(heads, heads, axes, half, "interleaved", rotate_k=False)
    yield _case(heads, heads // 4, axes, half, "interleaved")


_SHAPES = (
    (16, (24, 24, 24)),
    (28, (16, 24, 24)),
    (48, (16, 24, 24)),
    (40, (44, 42, 42)),
)


def _case(
    heads: int, kv_heads: int, axes: tuple[int, int, int], dtype: torch.dtype, pairing: str,
    norm: str = "full", rotate_k: bool = True,
) -> tuple[str, Callable[[Launcher], object]]:  # fmt: skip
    D = sum(axes)

    def case(run: Launcher) -> None:
        qkv = torch.empty((4096, heads + 2 * kv_heads, D), dtype=dtype, device="meta")
        cu_seqlens, grids = (
            torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((5,), (4, 3))
        )
        turn = Turn(
            cu_seqlens, grids, axes, norm, pairing, rotate_k, 10000.0, 1e-6, None, None, None, 0
        )
        sides = []
        for x in qkv.split((heads, kv_heads, kv_heads), dim=1)[:2]:
            width = {"full": x.shape[1] * D, "head": D, "none": 0}[norm]
            weight = torch.empty(width, device="meta") if width else None
            sides.append(Side(x, weight, torch.empty_like(x), wanted=True))
        forward([side._replace(grad=None, wanted=False) for side in sides], turn, run)
        backward(sides, turn, run)

    keys = "" if kv_heads == heads else f", {kv_heads} of keys"
    words = f"{heads} heads of {D}{keys}, {str(dtype).removeprefix('torch.')} {pairing} {norm}"
    return words + ("" if rotate_k else ", keys not turned"), case
