"""Runs our operators for a GPU that is not here: everything compiles as for it, nothing is launched.

    with AbsentGpu(90) as gpu:
        adaln_modulate(x, shift, scale, cu_seqlens, backend="triton")     # tensors on the CPU
    gpu.launched[0].compiled.asm["ttgir"]

It replaces Triton's driver, so every kernel goes through Triton's own way to a launch: the same
specialisation, the same key in the cache on disk. What was compiled here, a launch on such a GPU
finds, if Triton, its cache's folder and our sources are the same. Results are what was in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from goku_kernels import _checks
from goku_kernels.triton import launch
from goku_kernels.triton.compiling import SHARED_LIMIT


@dataclass(frozen=True)
class Launched:
    """One launch that did not happen, with what was compiled for it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    compiled: Any


@dataclass
class AbsentGpu:
    """Within it, backend "triton" takes tensors of the CPU and compiles for `chip`.

    chip: 80, 90 or 100. processors: which the launchers divide work among.
    launchers: build Triton's launcher of every kernel too, a C extension that the host's compiler
        makes in some tenths of a second; for that libcuda.so.1 has to be found.
    launched: what was to be launched, in order.
    """

    chip: int
    processors: int = 132
    launchers: bool = False
    launched: list[Launched] = field(default_factory=list)
    _exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> AbsentGpu:
        before = driver._active
        driver.set_active(_Driver(self.chip, self.launchers))
        # Not reset_active: that would look for a real one.
        self._exits.callback(setattr, driver, "_active", before)
        for target, name, value in (
            (launch, "launcher", lambda x: self),
            (_checks, "choose_backend", _choose),
        ):
            self._exits.enter_context(mock.patch.object(target, name, value))
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def __call__(
        self, kernel: Any, grid: Sequence[int], arguments: Mapping[str, Any], **options: int
    ) -> None:
        """As `Live` launches it."""
        if min(grid) == 0:
            return
        compiled = kernel[tuple(grid)](**arguments, **options)
        name = kernel.fn.__name__
        self.launched.append(Launched(name, tuple(grid), dict(arguments), compiled))


def _choose(
    operator: str, backend: str | None, allowed: Sequence[str], x: Any, refusal: str | None = None
) -> str:
    """What is asked for: refusals of a CPU's tensors are the interpreter's."""
    return backend or ("torch" if refusal else "triton")


class _Driver:
    """As much of a driver as Triton asks on the way to a launch."""

    def __init__(self, chip: int, launchers: bool) -> None:
        self.chip, self.launchers, self.utils = chip, launchers, _Tools(chip)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        if self.launchers:
            build_launcher(source, metadata)
        return lambda *arguments: None


class _Tools:
    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.chip], "multiprocessor_count": 132}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads


def build_launcher(source: Any, metadata: Any) -> bool:
    """Put Triton's launcher of a kernel into its cache; False where there is none to build.

    Built against a stand-in for libcuda (TRITON_LIBCUDA_PATH) it may not be loadable here, but it is
    in the cache by then. From 3.7 on Triton has one launcher for all kernels.
    """
    from triton.backends.nvidia import driver as nvidia

    return hasattr(nvidia, "make_launcher") and _built(nvidia.CudaLauncher, source, metadata)


def build_driver() -> bool:
    """Put Triton's own extension for CUDA into its cache; False where libcuda cannot be found."""
    from triton.backends.nvidia import driver as nvidia

    return _built(nvidia.CudaUtils)


def _built(make: Any, *arguments: Any) -> bool:
    try:
        make(*arguments)
    except ImportError:
        return True
    except AssertionError:  # libcuda cannot be found
        return False
    return True
