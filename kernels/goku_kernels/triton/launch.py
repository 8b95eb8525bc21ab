"""How a kernel gets onto a chip: at once, or recorded, so that it can be compiled without one.

A launcher function (`triton/<op>.py`) allocates outputs and hands every kernel with its grid and
arguments to a `Launcher`. `Live` runs it; `Recorder` only keeps it, so that the very same code says
what has to be compiled for a chip that this machine does not have (`goku_kernels.triton.compiling`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton

# Chips that configurations are shipped for, by compute capability * 10. Others take the next lower.
CHIPS = (80, 90, 100)
# Chips with 99 KiB of shared memory for a block (CUDA C++ Programming Guide): of the configurations
# sm_80's alone fit, and of these not fp32 attention at head_dim 128.
_SMALL_SHARED_MEMORY = (86, 89, 120, 121)


class Launcher(Protocol):
    """Where kernels go.

    chip: 80, 90 or 100, the newest of CHIPS that the device is not older than.
    processors: streaming multiprocessors of the device.
    """

    @property
    def chip(self) -> int: ...
    @property
    def processors(self) -> int: ...

    def __call__(
        self, kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], **options: int
    ) -> None:
        """Launch `kernel` over `grid` (1 to 3 sizes); nothing happens where a size is 0."""


@dataclass(frozen=True)
class Live:
    """Launches on the current stream of a device (or in Triton's interpreter)."""

    device: torch.device
    chip: int
    processors: int

    def __call__(
        self, kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], **options: int
    ) -> None:
        if min(grid) == 0:
            return
        if self.device.type != "cuda":
            kernel[tuple(grid)](**arguments, **options)
            return
        with torch.cuda.device(self.device):
            kernel[tuple(grid)](**arguments, **options)


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]


@dataclass(frozen=True)
class Recorder:
    """Keeps launches instead of running them; for tensors on the meta device."""

    chip: int
    processors: int = 132
    launches: list[Launch] = field(default_factory=list)

    def __call__(
        self, kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], **options: int
    ) -> None:
        self.launches.append(Launch(kernel, tuple(grid), dict(arguments), dict(options)))


def launcher(x: torch.Tensor) -> Launcher:
    """The launcher for the device of `x`.

    Raises:
        RuntimeError: a CPU tensor outside Triton's interpreter, or a GPU older than sm_80.
    """
    if x.device.type == "cuda":
        return _live(x.device.index if x.device.index is not None else torch.cuda.current_device())
    if interpreted():
        # Few processors, so that small tests meet every case of the division of work.
        return Live(x.device, chip=80, processors=3)
    raise RuntimeError(
        f"Triton kernels run on CUDA devices: the tokens are on {x.device} "
        "(TRITON_INTERPRET=1 before the first use interprets them on a CPU)"
    )


@functools.cache
def _live(index: int) -> Live:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    chips = [chip for chip in CHIPS if chip <= capability]
    if capability in _SMALL_SHARED_MEMORY:
        chips = chips[:1]
    if not chips:
        raise RuntimeError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}: "
            "the Triton kernels need 8.0 or newer"
        )
    return Live(torch.device("cuda", index), chips[-1], properties.multi_processor_count)


def interpreted() -> bool:
    """Whether Triton kernels are interpreted: TRITON_INTERPRET=1 when they were imported."""
    return bool(triton.knobs.runtime.interpret)


def alignment(*tensors: torch.Tensor | None) -> int:
    """Elements that every row of all tensors is a multiple of: 8 or 1, from pointers and strides.

    A kernel multiplies row strides that it gets in units of this number, so that the compiler knows
    that a row starts on 16 bytes (16-bit elements) and loads 16 bytes at a time. Two variants at
    most; no other value of an integer reaches the compiled code.
    """
    for x in tensors:
        if x is None:
            continue
        # 8 elements of any of our dtypes are a multiple of 16 bytes.
        if not x.is_meta and x.data_ptr() % 16:
            return 1
        if any(s % 8 for s in x.stride()[:-1]):
            return 1
    return 8
