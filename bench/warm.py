"""Fills Triton's cache with what our operators launch, in as many processes as there are processors.

    python -m bench warm [OP ...]         for the GPU at hand, or with --chip 90 for one that is not

Of every operator: its shipped configurations, what its benchmark and the tests of tests/gpu ask for,
and the launchers in C that Triton builds for each, where libcuda is found (TRITON_LIBCUDA_PATH names
a folder that holds it, or a stand-in). Without it a first run compiles one kernel after the other
on one processor.

The cache (TRITON_CACHE_DIR, else ~/.triton/cache) may be filled on another machine and carried over
if it lies at the same path on both: Triton keeps absolute paths in it. Python, Triton and our
sources have to be the same; what differs is compiled again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from bench import ahead, block, cases, checks, packs
from bench.gpu_steps import BESIDE
from bench.harness import ROOT
from bench.packs import Pack

BLOCKS = tuple(
    (preset, ahead.SMALL, dtype)
    for preset in ("goku-2b", "goku-8b")
    for dtype in (block.MIXED, block.PLAIN)
)


@dataclass(frozen=True)
class Work:
    """One piece.

    kind: "shipped", "problem", "test", "block" or "driver"; index: which of the operator's.
    """

    kind: str
    op: str
    index: int
    chip: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.kind} {self.index}"


@dataclass(frozen=True)
class Done:
    """fresh: kernels that were not in the cache."""

    fresh: int = 0
    error: str = ""
    seconds: float = 0.0


def works(ops: Sequence[str], chip: int) -> list[Work]:
    """All pieces, the longest kind (attention) first."""
    found = [Work("driver", "", 0, chip)]
    for op in sorted(ops, key=lambda name: name != "varlen_attention"):
        found += [Work("shipped", op, i, chip) for i, _ in enumerate(ahead.shipped(op, chip))]
        found += [Work("problem", op, i, chip) for i, _ in enumerate(problems(op))]
        found += [Work("test", op, i, chip) for i, _ in enumerate(tests(op))]
    if len(ops) > 1:
        found += [Work("block", "", i, chip) for i, _ in enumerate(BLOCKS)]
    return found


def problems(op: str) -> list[cases.Problem]:
    """One small problem for each case and dtype of the operator's benchmark."""
    module = importlib.import_module(f"bench.{op}")
    # One pack is enough: nothing of a pack is in the compiled code.
    return list({(p.case, p.dtype): p for p in module.problems("cpu")}.values())


def warm_one(work: Work) -> Done:
    """Compile what one piece launches."""
    from bench.absent_gpu import AbsentGpu, build_driver

    began = time.perf_counter()
    if work.kind == "driver":
        build_driver()
        return Done(seconds=time.perf_counter() - began)
    with ahead.counting() as fresh, AbsentGpu(work.chip, launchers=True) as gpu:
        try:
            if work.kind == "shipped":
                _, run = list(ahead.shipped(work.op, work.chip))[work.index]
                run(gpu)
            elif work.kind == "problem":
                problem = problems(work.op)[work.index]
                module = importlib.import_module(f"bench.{work.op}")
                ahead.run_small(problem, module.function("triton"), problem.differentiable)
            elif work.kind == "test":
                with contextlib.suppress(AssertionError):  # what it says of no result is nothing
                    tests(work.op)[work.index]()
            else:
                setting = block.Setting(*BLOCKS[work.index])
                for deterministic in (False, True):
                    made = block.make_block(setting, torch.device("cpu"), "triton", deterministic)
                    block.step(made, block.Batch.draw(setting, torch.device("cpu"), 0), setting)
        except cases.REFUSALS as error:
            return Done(len(fresh), f"{type(error).__name__}: {error}"[:200])
    return Done(len(fresh), seconds=time.perf_counter() - began)


# ---- what tests/gpu launches ----


def tests(op: str) -> list[Callable[[], None]]:
    """The tests of tests/gpu/test_<op>.py and of files BESIDE it, on small packs of a CPU.

    One for each set of parameters.

    They compare through bench.checks alone; here each of its checks only runs the operator.
    """
    small = {pack.name: Pack(pack.name, ahead.SMALL.grids) for pack in packs.GPU_PACKS}
    with (
        mock.patch.object(packs, "GPU_PACKS", tuple(small.values())),
        mock.patch.object(packs, "Pack", lambda name, grids: Pack(name, ahead.SMALL.grids)),
    ):
        modules = [_loaded(file) for file in (op, *(f for f, of in BESIDE.items() if of == op))]
    found: list[Callable[[], None]] = []
    for module in modules:
        module.DEVICE = torch.device("cpu")  # type: ignore[attr-defined]
        module.checks = _Runs  # type: ignore[attr-defined]
        for name, test in vars(module).items():
            if name.startswith("test_") and callable(test):
                marks = [m.args for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
                found += [partial(test, **given) for given in _parameters(marks)]
    return found


def _loaded(name: str) -> ModuleType:
    """A test file, that of an operator by its name, as a module of its own."""
    path = ROOT / "tests" / "gpu" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"_warm_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parameters(marks: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Arguments of a test for each of its sets, as pytest combines them."""
    axes = []
    for names, values in marks:
        split = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        axes.append([
            dict(zip(split, value if len(split) > 1 else (value,), strict=True)) for value in values
        ])  # fmt: skip
    return [
        {k: v for part in chosen for k, v in part.items()} for chosen in itertools.product(*axes)
    ]


class _Runs:
    """Stands in for bench.checks: runs what it would check."""

    shard = staticmethod(checks.shard)

    @staticmethod
    def fits(
        problem: cases.Problem, function: cases.Function, *rest: Any, **more: Any
    ) -> None:  # fmt: skip
        ahead.run_small(problem, function, problem.differentiable)

    deterministic = does_not_wait = fits

    @staticmethod
    def all_fit(
        problem: cases.Problem, functions: Sequence[cases.Function], *rest: Any
    ) -> None:  # fmt: skip
        for function in functions:
            _Runs.fits(problem, function)

    @staticmethod
    def all_of(
        problems: Sequence[cases.Problem], maker: checks.Maker, device: Any, backend: str, **more: Any
    ) -> None:  # fmt: skip
        for problem in problems:
            _Runs.fits(problem, maker(backend))

    @staticmethod
    def replays(first: cases.Problem, second: cases.Problem, function: cases.Function,
                *rest: Any, **more: Any) -> None:  # fmt: skip
        _Runs.fits(second, function)

    far_rows = replays


def chip_here() -> int:
    """What the GPU at hand is tuned as.

    Raises:
        ValueError: there is none.
    """
    from goku_kernels.triton.launch import CHIPS

    if not torch.cuda.is_available():
        raise ValueError(f"no CUDA device is on this machine: --chip takes one of {list(CHIPS)}")
    major, minor = torch.cuda.get_device_capability()
    return max(chip for chip in CHIPS if chip <= 10 * major + minor)


def main(ops: Sequence[str], chip: int | None, say: Callable[[str], None] = print) -> bool:
    """Warm the cache for `ops`; False if something could not be compiled."""
    found = works(ops, chip_here() if chip is None else chip)
    done = ahead.everywhere(warm_one, found, _crashed, say, "pieces were compiled")
    fresh = sum(each.fresh for each in done)
    seconds = sum(each.seconds for each in done)
    say(f"{fresh} kernels are new in the cache, after {seconds:.0f} s of work")
    bad = [
        f"{work.name}: {each.error}" for work, each in zip(found, done, strict=True) if each.error
    ]
    for words in bad:
        say(words)
    return not bad


def _crashed(work: Work) -> Done:
    return Done(error="the compiler ended its process")
