"""Argument checks shared by the operators, and the choice of the backend.

Order of the checks: dtype, shape, device, stride, then values. Values of `cu_seqlens` and
`grid_sizes` are read where that is free (CPU tensors outside torch.compile); on a CUDA device
`Packing` has validated them once per batch from the host.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Looked for once, without importing it: torch.compile cannot trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_ABSENT = {
    "cuda": "the CUDA extension goku_kernels._cuda comes with a later release of goku_kernels",
}


def choose_backend(
    operator: str,
    backend: str | None,
    allowed: Sequence[str],
    x: Tensor,
    refusal: str | None = None,
) -> str:
    """Name of the backend to run: None means the best one for `x` on this installation.

    Args:
        operator: for the errors.
        backend: what the caller asked for.
        allowed: the operator's backends, "torch" among them.
        x: a tensor of the tokens; its device decides.
        refusal: why the Triton kernels cannot take these arguments, None if they can. None as
            `backend` then means "torch".

    Raises:
        ValueError: `backend` is no backend of this operator, or "triton" and `refusal` is given; or `x` has no
            memory.
        RuntimeError: it is one, but this installation or device does not have it.
    """
    if x.device.type == "meta":
        raise ValueError(
            f"{operator}: the tokens are on meta: allowed are devices with memory (shapes alone: "
            "torch._subclasses.FakeTensorMode)"
        )
    if backend is None:
        usable = refusal is None and x.is_cuda and triton_absent(x.device.type) is None
        # The kernels are shipped for sm_80 and newer.
        usable = usable and torch.cuda.get_device_capability(x.device) >= (8, 0)
        return "triton" if usable else "torch"
    if backend not in allowed:
        raise ValueError(f"{operator}: backend is {backend!r}: allowed are None, {list(allowed)}")
    absent = _ABSENT.get(backend)
    if backend == "triton":
        absent = triton_absent(x.device.type)
        if absent is None and refusal is not None:
            raise ValueError(f"{operator}: {refusal}")
    if absent is not None:
        raise RuntimeError(
            f"{operator}: backend {backend!r} is not available: {absent}; "
            'backend="torch" or None always is'
        )
    return backend


def triton_absent(device_type: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this type of device; None if they can."""
    if not _HAS_TRITON:
        return "the package triton is not installed (the extra [gpu] brings it)"
    if device_type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device_type == "cpu" else f"the interpreter has no {device_type} tensors"
    return (
        f"it needs a CUDA device, the tokens are on {device_type} (TRITON_INTERPRET=1, set before "
        "the first use, interprets the kernels on a CPU)"
    )


def width_refusal(name: str, x: Tensor, largest: int) -> str:
    """Why the Triton kernels cannot take rows as wide as those of `x`."""
    return f'{name} has width {x.shape[-1]}: allowed with backend="triton" are 1 to {largest}'


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """promote(dtype of every tensor, float32): what an operator computes in."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_choice(operator: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{operator}: {name} is {value!r}: allowed are {list(allowed)}")


def check_count(operator: str, name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer >= 0 (a symbolic one passes)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < 0:
        raise ValueError(f"{operator}: {name} is {value!r}: allowed are integers >= 0")


def check_positive(operator: str, name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number > 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{operator}: {name} is {value!r}: allowed are finite numbers > 0")


def check_tensor(operator: str, name: str, x: object) -> None:
    """Raise ValueError unless `x` is a tensor (a list of offsets is a likely slip)."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{operator}: {name} is a {type(x).__name__}: allowed is a torch.Tensor")


def check_dense(operator: str, name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """Check a token tensor: floating dtype, `shape` (None: any size), unit inner stride."""
    check_tensor(operator, name, x)
    if x.dtype not in FLOATS:
        raise ValueError(f"{operator}: {name} has dtype {x.dtype}: allowed are {list(FLOATS)}")
    check_shape(operator, name, x, shape)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{operator}: {name} has inner stride {x.stride(-1)}: the last axis must be contiguous"
        )


def check_shape(operator: str, name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """Check the shape of `x`; a None in `shape` allows any size there."""
    matches = x.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(x.shape, shape, strict=True)
    )
    if not matches:
        wanted = str(tuple(shape)).replace("None", "any")
        raise ValueError(f"{operator}: {name} has shape {tuple(x.shape)}: wanted {wanted}")


def check_device(operator: str, name: str, x: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `x` is on `device`."""
    if x.device != device:
        raise ValueError(f"{operator}: {name} is on {x.device}: the tokens are on {device}")


def check_parameter(
    operator: str, name: str, x: Tensor, tokens: Tensor, shape: Sequence[int | None]
) -> None:
    """Check a weight or modulation beside `tokens`.

    Its dtype may differ from the tokens' (bf16 tokens with fp32 modulation), but must not be wider
    than promote(tokens, float32), in which the operator computes.
    """
    check_dense(operator, name, x, shape)
    compute = compute_dtype(tokens)
    if torch.promote_types(compute, x.dtype) != compute:
        raise ValueError(
            f"{operator}: {name} has dtype {x.dtype}: with {tokens.dtype} tokens at most {compute}"
        )
    check_device(operator, name, x, tokens.device)


def readable(index: Tensor) -> bool:
    """Whether reading the values of `index` is free: on the CPU, and not while compiling."""
    return index.device.type == "cpu" and not torch.compiler.is_compiling()


def check_cu_seqlens(operator: str, name: str, cu: Tensor, device: torch.device) -> None:
    """Check segment offsets: int32 (B+1,) with B >= 1, contiguous; from 0, never decreasing."""
    check_tensor(operator, name, cu)
    if cu.dtype != torch.int32:
        raise ValueError(f"{operator}: {name} has dtype {cu.dtype}: allowed is torch.int32")
    if cu.dim() != 1 or cu.shape[0] < 2:
        raise ValueError(f"{operator}: {name} has shape {tuple(cu.shape)}: wanted (B+1,), B >= 1")
    check_device(operator, name, cu, device)
    if not cu.is_contiguous():
        raise ValueError(f"{operator}: {name} has stride {cu.stride()}: it must be contiguous")
    if readable(cu):
        offsets = cu.tolist()
        if offsets[0] != 0:
            raise ValueError(f"{operator}: {name}[0] is {offsets[0]}: it must be 0")
        for i in range(1, len(offsets)):
            if offsets[i] < offsets[i - 1]:
                raise ValueError(
                    f"{operator}: {name} decreases from {offsets[i - 1]} to {offsets[i]} at {i}"
                )


def check_grid_sizes(operator: str, grid_sizes: Tensor, cu: Tensor) -> None:
    """Check grids beside checked `cu`: int32 (B, 3), contiguous; t*h*w is the segment's length."""
    check_tensor(operator, "grid_sizes", grid_sizes)
    if grid_sizes.dtype != torch.int32:
        raise ValueError(
            f"{operator}: grid_sizes has dtype {grid_sizes.dtype}: allowed is torch.int32"
        )
    check_shape(operator, "grid_sizes", grid_sizes, (cu.shape[0] - 1, 3))
    check_device(operator, "grid_sizes", grid_sizes, cu.device)
    if not grid_sizes.is_contiguous():
        raise ValueError(
            f"{operator}: grid_sizes has stride {grid_sizes.stride()}: it must be contiguous"
        )
    if readable(grid_sizes):
        offsets = cu.tolist()
        for i, (t, h, w) in enumerate(grid_sizes.tolist()):
            length = offsets[i + 1] - offsets[i]
            if min(t, h, w) < 0 or t * h * w != length:
                raise ValueError(
                    f"{operator}: grid_sizes[{i}] is {(t, h, w)} with {t * h * w} tokens: "
                    f"cu_seqlens gives that sample {length}"
                )
