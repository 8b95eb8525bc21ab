"""Compiles operators' launches in many processes, before a GPU is asked to run them.

Each process runs an operator on small inputs for a GPU that it does not touch (absent_gpu), so what
it leaves in Triton's cache is what a launch of the same operator in any process takes from there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import cases
from bench.candidates import Row, direction, function, options
from bench.forecast import Work, streams, work
from bench.machine_code import Loop, main_loop
from bench.packs import CPU_PACKS
from goku.workers import Lost, ordered_map
from goku_kernels.triton import configs

# In one pool's processes; more than this many would each import torch and wait for memory.
MAX_WORKERS = 32
SMALL = CPU_PACKS[1]  # of several samples; nothing of a pack is in the compiled code

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Compiling:
    """A configuration of one kernel of an operator, to be compiled beside the others' rows.

    size: width or head width of the tokens. row: whose config is `config`. rows: of the operator.
    launchers: whether Triton's launchers are built too (absent_gpu).
    """

    op: str
    size: int
    dtype: str
    chip: int
    row: Row
    config: dict[str, int]
    rows: tuple[Row, ...]
    launchers: bool = False


@dataclass(frozen=True)
class Compiled:
    """What came out, or why nothing did.

    stack_bytes: of a thread, which is where registers are spilled to. work: of one pass of `loop`,
    None for a kernel that is not bound by memory. seconds: it took. fresh: kernels that were not
    in the cache.
    """

    error: str = ""
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    threads: int = 0
    tensor_core: str = ""
    warp_specialized: bool = False
    loop: Loop | None = None
    work: Work | None = None
    seconds: float = 0.0
    fresh: int = 0


@contextlib.contextmanager
def overridden(op: str, rows: Sequence[Row]) -> Iterator[None]:
    """Within it, operator `op` takes its configurations from `rows`."""
    shipped = configs.table

    def table(name: str) -> tuple[Row, ...]:
        return tuple(rows) if name == op else shipped(name)

    configs.table = table  # type: ignore[assignment]
    try:
        yield
    finally:
        configs.table = shipped


def with_config(rows: Sequence[Row], row: Row, config: dict[str, int]) -> list[Row]:
    """`rows` with `config` in the place of that of `row`, which is one of them and is used.

    Rows of "<kernel>_specialised", which would run in its place, are left out.
    """
    return [
        r
        for r in with_use(rows, row, True, config)
        if r["kernel"] != f"{row['kernel']}_specialised"
    ]


def with_use(
    rows: Sequence[Row], row: Row, used: bool, config: dict[str, int] | None = None
) -> list[Row]:
    """`rows` with `row`, which is one of them, used or "unused", and `config` for its own."""
    changed: dict[str, Any] = {k: v for k, v in row.items() if k != "unused"}
    changed |= ({} if config is None else {"config": config}) | ({} if used else {"unused": True})
    keys = ("kernel", "size", "chip", "dtypes")
    return [changed if all(r[k] == row[k] for k in keys) else r for r in rows]


def shipped(op: str, chip: int) -> Iterator[tuple[str, Callable[[Any], object]]]:
    """What triton/<op>.py's shipped() gives: (name, what launches it); and all of it again with the

    rows in use that are "unused", where the chip has some: a tuner may choose them.
    """
    module = importlib.import_module(f"goku_kernels.triton.{op}")
    yield from module.shipped(chip)
    rows = configs.table(op)
    used = [{k: v for k, v in row.items() if k != "unused"} for row in rows]
    if not any(row.get("unused") and row["chip"] == chip for row in rows):
        return
    for name, run in module.shipped(chip):

        def case(launcher: Any, run: Callable[[Any], object] = run) -> None:
            with overridden(op, used):
                run(launcher)

        yield f"{name}, all in use", case


def compile_one(task: Compiling) -> Compiled:
    """Compile what the operator launches up to the kernel of `task.row`, and look at that."""
    began = time.perf_counter()
    found, error, fresh = _launches(task)
    if error:
        return Compiled(error=error)
    backward = direction(task.row["kernel"]) == "backward"
    name = function(task.op, task.row["kernel"])
    launched = [
        x
        for x in found
        if x.kernel == name and (x.arguments.get("q_grad") is not None) == (backward and _turns(x))
    ]
    if not launched:
        return Compiled(error=f"{name} was not launched")
    last = launched[-1]
    facts = inspect(last.compiled)
    loop = facts.pop("loop")
    done = None
    if streams(name) and task.op != "varlen_attention":
        done = work(name, last.arguments, loop, task.config.get("programs", 0))
    return Compiled(**facts, loop=loop, work=done, seconds=time.perf_counter() - began, fresh=fresh)


def warm_one(task: Compiling) -> Compiled:
    """Only fill the cache: compile_one without a look at what came out."""
    began = time.perf_counter()
    _, error, fresh = _launches(task)
    return Compiled(error, seconds=time.perf_counter() - began, fresh=fresh)


def _launches(task: Compiling) -> tuple[list[Any], str, int]:
    """What the operator launches with the task's configuration, why it cannot, and how many compiled anew."""
    from bench.absent_gpu import AbsentGpu

    module = importlib.import_module(f"bench.{task.op}")
    problem = module.tuning(task.size, getattr(torch, task.dtype), SMALL)
    run = module.function("triton", **options(task.op, task.row["kernel"]))
    rows = with_config(task.rows, task.row, task.config)
    error = ""
    gpu = AbsentGpu(task.chip, launchers=task.launchers)
    with counting() as fresh:
        try:
            with overridden(task.op, rows), gpu:
                run_small(problem, run, direction(task.row["kernel"]) == "backward")
        except cases.REFUSALS as refusal:
            error = f"{type(refusal).__name__}: {refusal}"[:200]
    return gpu.launched, error, len(fresh)


def _turns(launched: Any) -> bool:
    return "q_grad" in launched.arguments


def run_small(problem: cases.Problem, run: cases.Function, backward: bool) -> None:
    """One forward, and backward if asked for, of a problem on the CPU."""
    inputs = problem.draw(torch.device("cpu"), 0).cast(None, backward)
    if any(x.dtype == torch.float32 for x in inputs.leaves[:1]):
        torch.set_float32_matmul_precision("high")  # attention takes fp32 only so
    outs = run(inputs)
    if backward:
        gradients = [torch.ones_like(x) for x in outs]
        torch.autograd.grad(outs, inputs.leaves, gradients, allow_unused=True)


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """Within it, names of kernels that Triton compiles instead of taking them from its cache."""
    from triton import knobs

    found: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
        if not cache_hit:
            found.append(src.name)

    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def inspect(compiled: Any) -> dict[str, Any]:
    """Registers, stack, shared memory, threads and the main loop of a compiled kernel."""
    from goku_kernels.triton.compiling import _sass, _tensor_core, _tool, _warps

    cubin, ttgir = compiled.asm["cubin"], compiled.asm["ttgir"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", str(file)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    sass = _sass(cubin)
    return {
        "registers": numbers["REG"], "stack_bytes": numbers["STACK"],
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * _warps(ttgir, compiled.metadata.num_warps),
        "tensor_core": _tensor_core(sass), "warp_specialized": "ttg.warp_specialize" in ttgir,
        "loop": main_loop(sass),
    }  # fmt: skip


# ---- many processes ----


def workers() -> int:
    """As many as this process may use processors, at most MAX_WORKERS."""
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0))))


def everywhere(
    do: Callable[[Task], Result], tasks: Sequence[Task], crashed: Callable[[Task], Result],
    say: Callable[[str], None] = print, what: str = "compiled",
) -> list[Result]:  # fmt: skip
    """do(task) of every task in processes of their own, in the tasks' order.

    A compiler that aborts takes its process along: the task runs again alone, and one that ends its
    process once more is answered by crashed(task).
    """
    began = time.monotonic()
    done = ordered_map(
        functools.partial(_alone, do), tasks, name=lambda task: f"{task!r:.200}", workers=workers(),
        ahead=len(tasks), preload=["bench.ahead", "bench.absent_gpu"],
    )  # fmt: skip
    with contextlib.closing(done):
        found = [
            crashed(task) if isinstance(result, Lost) else result
            for task, result in zip(tasks, done, strict=True)
        ]
    say(f"{len(tasks)} {what} in {time.monotonic() - began:.1f} s by {workers()} processes")
    return found


def _alone(do: Callable[[Task], Result], task: Task) -> Result:
    """do(task) in one thread: there are as many processes as processors."""
    torch.set_num_threads(1)
    return do(task)
