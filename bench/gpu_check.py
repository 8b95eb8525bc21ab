"""Everything that only a GPU can show, in one command and under 8 minutes.

    python bench/gpu_check.py [all|correctness|speed] [--out DIR]      (or: bench/gpu_check ...)

Needs torch, triton, numpy and pytest, no installation. Builds the native modules where cmake, ninja,
pybind11 and setuptools are there, runs tests/gpu, then every benchmark listed here, whose rows go
to one folder.

Exit codes: 0 all well, 1 a step failed, 2 wrong arguments, 3 no GPU on this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 460.0  # for all steps together: under 8 minutes
BUILD_SECONDS, TEST_SECONDS = 90.0, 240.0

# Benchmarks in the order they run, with the seconds each may take.
BENCHMARKS = {"block": 120.0}


def environment() -> dict[str, str]:
    """This process's environment with the three packages on the path, uninstalled."""
    ours = [str(ROOT / "kernels"), str(ROOT / "runtime"), str(ROOT)]
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*ours, *before])}


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded or its tool is there."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def build_command() -> list[str] | None:
    """How to build the native modules in place, or None where a tool for it is missing."""
    tools = all(shutil.which(tool) for tool in ("cmake", "ninja"))
    modules = all(importlib.util.find_spec(name) for name in ("pybind11", "setuptools"))
    if not tools or not modules:
        return None
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def test_command() -> list[str]:
    """pytest on tests/gpu alone.

    The project's own pytest settings ask for plugins that a GPU machine need not have, so none of
    them are read: no configuration file, no conftest outside tests/gpu.
    """
    folder = str(ROOT / "tests" / "gpu")
    quiet = ["-q", "-ra", "--import-mode=importlib", "-p", "no:cacheprovider"]
    alone = ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", folder]
    marker = ["-o", "markers=gpu: needs an accelerator"]
    return [sys.executable, "-m", "pytest", *quiet, *alone, *marker, folder]


def run_step(name: str, command: Sequence[str], seconds: float) -> bool:
    """Run one step in the repository's root; False if it fails or takes longer than `seconds`."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment(), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"== {name}: stopped after {seconds:.0f} s", flush=True)
        return False
    took = time.monotonic() - began
    print(f"== {name}: {'well' if code == 0 else f'exit code {code}'}, {took:.0f} s", flush=True)
    return code == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure on this machine's GPU")
    parser.add_argument("what", nargs="?", default="all", choices=["all", "correctness", "speed"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)

    if importlib.util.find_spec("torch") is None:
        if has_nvidia_driver():
            print(f"gpu_check: torch is not installed for {sys.executable}; set PYTHON to another")
            return 1
        print("gpu_check: no CUDA device on this machine (no NVIDIA driver), and no torch")
        return 3
    import torch  # here, so that --help needs nothing

    if not torch.cuda.is_available():
        if has_nvidia_driver():
            print(
                f"gpu_check: torch {torch.__version__} of {sys.executable} cannot use this GPU; set PYTHON to another"
            )
            return 1
        print("gpu_check: no CUDA device on this machine, nothing was checked or measured")
        return 3
    print(f"gpu_check: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)

    steps: list[tuple[str, list[str], float]] = []
    build = build_command()
    if build is None:
        print(
            "gpu_check: cmake, ninja, pybind11 or setuptools is missing, no native module is built"
        )
    else:
        steps.append(("build", build, BUILD_SECONDS))
    if options.what != "speed":
        steps.append(("tests/gpu", test_command(), TEST_SECONDS))
    if options.what != "correctness":
        out = ["--out", str(options.out.resolve())]
        steps += [
            (f"bench/{name}", [sys.executable, "-m", f"bench.{name}", *out], seconds)
            for name, seconds in BENCHMARKS.items()
        ]
    deadline = time.monotonic() + SECONDS
    done = [
        run_step(name, command, min(seconds, max(1.0, deadline - time.monotonic())))
        for name, command, seconds in steps
    ]
    failed = [name for (name, _, _), good in zip(steps, done, strict=True) if not good]
    print(f"gpu_check: failed: {', '.join(failed)}" if failed else "gpu_check: all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
