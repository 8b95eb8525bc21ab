"""Compile recorded launches for a chip that this machine does not have, and read what came out.

    for case, launch, report in compile_shipped(adaln_modulate, chip=90):
        print(case, report)             # registers, spills, shared memory, class of instructions

A launcher function that is given a `Recorder` and tensors on the meta device says what it would run.

Needs no GPU: Triton carries its own ptxas and cuobjdump. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, Recorder, interpreted

# Shared memory one block may ask for (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_ARCHITECTURE = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs.

    registers, spill_bytes, stack_bytes: per thread, as ptxas says; spill_bytes is stores + loads.
    shared_bytes: per block. threads: per block.
    tensor_core: the widest class of matrix instruction in the machine code: "HGMMA" (sm_90's
        warpgroup), "UTCMMA" (sm_100), "HMMA" or "none".
    warp_specialized: whether the intermediate code has ttg.warp_specialize.
    asm: the stages' texts (ttir, ttgir, llir, ptx) and "sass".
    """

    kernel: str
    chip: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    tensor_core: str
    warp_specialized: bool
    asm: Mapping[str, str] = field(repr=False)


def compile_shipped(module: ModuleType, chip: int) -> Iterator[tuple[str, Launch, Report]]:
    """(case, launch, report) of every kernel of the shipped configurations of `triton/<op>.py`.

    Launches that would compile to the same thing are compiled once.
    """
    return compile_cases(module.shipped(chip), chip)


def compile_cases(
    cases: Iterable[tuple[str, Callable[[Recorder], object]]], chip: int
) -> Iterator[tuple[str, Launch, Report]]:
    """As `compile_shipped`, of (case, what launches it) as `triton/<op>.py`'s shipped() gives them."""
    seen = set()
    for case, run in cases:
        recorder = Recorder(chip)
        run(recorder)
        assert recorder.launches, f"{case} launches nothing"
        for launch in recorder.launches:
            key = _compiled_from(launch)
            if key not in seen:
                seen.add(key)
                yield case, launch, compile_launch(launch, chip)


def _compiled_from(launch: Launch) -> tuple[object, ...]:
    """All that decides what a launch compiles to."""
    constants = {p.name for p in launch.kernel.params if p.is_constexpr}
    arguments = [
        (name, str(value.dtype) if isinstance(value, torch.Tensor) else value)
        for name, value in sorted(launch.arguments.items())
        if value is None or isinstance(value, torch.Tensor) or name in constants
    ]
    return (launch.kernel.fn.__name__, *sorted(launch.options.items()), *arguments)


def compile_launch(launch: Launch, chip: int) -> Report:
    """Compile one recorded launch for `chip` (80, 90, 100).

    Raises:
        RuntimeError: under Triton's interpreter, whose kernels cannot be compiled.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    kernel = launch.kernel
    signature, constants, attributes = _signature(kernel, launch.arguments)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", chip, 32), options=dict(launch.options)
    )
    asm = {name: text for name, text in compiled.asm.items() if isinstance(text, str)}
    registers, spills, stack = _ptxas(asm["ptx"], chip)
    sass = _sass(compiled.asm["cubin"])
    asm["sass"] = sass
    return Report(
        kernel=kernel.fn.__name__,
        chip=chip,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        threads=32 * _warps(asm["ttgir"], compiled.metadata.num_warps),
        tensor_core=_tensor_core(sass),
        warp_specialized="ttg.warp_specialize" in asm["ttgir"],
        asm=asm,
    )


def _signature(
    kernel: Any, arguments: Mapping[str, Any]
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """What a launch on a device would specialise on: types, constants, alignment of pointers."""
    bound = inspect.signature(kernel.fn).bind(**arguments)
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in kernel.params:
        name, value = parameter.name, bound.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name] = "constexpr"
            constants[(parameter.num,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            # Recorded tensors are on the meta device; torch allocates on 512 bytes.
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = parameter.annotation_type
            assert signature[name], f"{kernel.fn.__name__}: {name} has no type, so it would vary"
    return signature, constants, attributes


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _ptxas(ptx: str, chip: int) -> tuple[int, int, int]:
    """Registers, spilled bytes (stores + loads) and stack bytes, as `ptxas -v` says."""
    tool = _tool("ptxas-blackwell" if chip >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        done = subprocess.run(
            [tool, "-v", f"-arch={_ARCHITECTURE[chip]}", str(file), "-o", str(file.with_suffix(""))],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    words = done.stdout + done.stderr
    used = re.search(r"Used (\d+) registers", words)
    spills = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", words
    )
    if used is None or spills is None:
        raise RuntimeError(f"ptxas said nothing of registers and spills: {words}")
    return int(used[1]), int(spills[2]) + int(spills[3]), int(spills[1])


def _sass(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run(
            [_tool("cuobjdump"), "-sass", str(file)],
            check=True, capture_output=True, text=True,
            env={"PATH": str(Path(_tool("cuobjdump")).parent) + ":/usr/bin:/bin"},
        )  # fmt: skip
    return done.stdout


def _tensor_core(sass: str) -> str:
    for name, pattern in (("UTCMMA", r"\bUTC\w*MMA"), ("HGMMA", r"\bHGMMA"), ("HMMA", r"\bHMMA")):
        if re.search(pattern, sass):
            return name
    return "none"


def _warps(ttgir: str, default: int) -> int:
    """Warps of a block, those of warp-specialised partitions included."""
    total = re.search(r'"ttg.total-num-warps" = (\d+)', ttgir)
    return int(total[1]) if total else default
