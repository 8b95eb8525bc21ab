"""Everything that only a GPU can show, in one command; each of its parts under 8 minutes.

    python bench/gpu_check.py [correctness|memory|attention|block|step|all] [--out DIR] [--fresh]

    correctness  builds, runs tests/gpu file by file, then 50 training steps of a Goku-2B
    memory       benchmarks of the memory-bound operators
    attention    benchmark of the packed attention
    block        benchmark of one block, forward and backward
    step         whole steps of a Goku-2B, and the longest sequence that the GPU trains
    all          these five, one after the other

Needs torch, triton, numpy and pytest, no installation. Resumable: a step that went well with these
sources on this GPU, as `gpu_check.json` in the folder of results says, is not done again, and a
benchmark that was stopped goes on with what it had not measured; --fresh does everything again. The
folder then holds that file, `gpu_check.log` with what every step said, and one of rows for each
benchmark: no more than 8 after any one part.

Exit codes: 0 all well, 1 a step failed, 2 wrong arguments, 3 no GPU on this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 460.0  # for all steps of one part together: under 8 minutes
STATUS = "gpu_check.json"
LOG = "gpu_check.log"  # what every step said
LOG_CHARACTERS, SHOWN_CHARACTERS = 200_000, 6_000  # of one step, in the log and here
PARTS = ("correctness", "memory", "attention", "block", "step")

# Of each part: benchmark, and the seconds it may take. A benchmark begins nothing new when its time
# is nearly up (MARGIN) and is stopped when it is.
BENCHMARKS = {
    "memory": {
        "adaln_modulate": 110.0, "gated_residual_adaln": 110.0, "qk_norm_rope": 140.0,
        "rectified_flow_noise": 50.0, "velocity_loss": 50.0,
    },
    "attention": {"varlen_attention": 460.0},
    "block": {"block": 460.0},
    "step": {"step": 280.0},
}  # fmt: skip
MARGIN = 25.0
BUILD_SECONDS, TEST_SECONDS, TRAIN_SECONDS = 60.0, 240.0, 120.0
HANG_SECONDS = 120  # one test that takes longer (a kernel that waits for ever) ends its file
# Of which the clip itself may take half: its attention grows with the square of what the card holds.
LONGEST_SECONDS = 180.0
# What the steps of `correctness` depend on.
TESTED = (
    "kernels/goku_kernels",
    "runtime/goku_runtime",
    "goku",
    "bench",
    "tests/gpu",
    "setup.py",
    "CMakeLists.txt",
)
_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".json", ".txt")


@dataclass(frozen=True)
class Step:
    """One command of a part. known: skipped if it went well before with the same sources."""

    name: str
    command: Sequence[str]
    seconds: float
    known: bool = True


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


def test_files() -> list[Path]:
    """The test files of tests/gpu, those of the block behind those of its parts."""
    found = (ROOT / "tests" / "gpu").glob("test_*.py")
    return sorted(found, key=lambda path: (path.stem == "test_block", path.name))


def test_command(*paths: Path) -> list[str]:
    """pytest on files of tests/gpu, all of them by default.

    The project's own pytest settings ask for plugins that a GPU machine need not have, so none of
    them are read: no configuration file, no conftest outside tests/gpu.
    """
    folder = ROOT / "tests" / "gpu"
    quiet = ["-q", "-ra", "--import-mode=importlib", "-p", "no:cacheprovider"]
    alone = ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(folder)]
    marker = ["-o", "markers=gpu: needs an accelerator\nxdist_group: tests that one process runs"]
    hang = ["-o", f"faulthandler_timeout={HANG_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    # Two processes where pytest can: half of a file's time compiles kernels. Tests that want much
    # of the GPU's memory are a group, which one of them runs alone.
    two = ["-n", "2", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    chosen = [str(path) for path in paths or (folder,)]
    return [sys.executable, "-m", "pytest", *quiet, *alone, *marker, *hang, *two, *chosen]


def steps(part: str, out: Path, fresh: bool) -> Iterator[Step]:
    """The steps of one part in the order they run."""
    if part == "correctness":
        build = build_command()
        if build is None:
            print("gpu_check: cmake, ninja, pybind11 or setuptools is missing: nothing is built")
        else:
            yield Step("build", build, BUILD_SECONDS, known=False)
        for path in test_files():
            yield Step(f"tests/gpu/{path.name}", test_command(path), TEST_SECONDS)
        yield Step("training", [sys.executable, "-m", "bench.training"], TRAIN_SECONDS)
        return
    for name, seconds in BENCHMARKS[part].items():
        # It knows itself what it has measured.
        resume = [] if fresh else ["--resume"]
        limits = ["--limit", str(seconds - MARGIN), "--seconds", "0.5", "--out", str(out)]
        command = [sys.executable, "-m", "bench", "run", name, *limits, *resume]
        yield Step(f"bench/{name}", command, seconds, known=False)
    if part == "step":
        clip = ["--seconds", str(LONGEST_SECONDS / 2), "--out", str(out)]
        yield Step("longest", [sys.executable, "-m", "bench.longest", *clip], LONGEST_SECONDS)


def run_step(name: str, command: Sequence[str], seconds: float, out: Path) -> bool:
    """Run one step in the repository's root; False if it fails or takes longer than `seconds`.

    What it says goes to the log in `out`, and when it has ended to the standard output: each time
    its beginning and its end, if it says much.
    """
    print(f"== {name}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (out / LOG).open("a+b") as log:
        log.write(f"== {name}\n".encode())
        log.flush()
        start = log.tell()
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment(), timeout=seconds, stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code, ended = 1, f"stopped after {seconds:.0f} s"
        else:
            took = time.monotonic() - began
            ended = f"{'well' if code == 0 else f'exit code {code}'}, {took:.0f} s"
        log.seek(start)
        said = log.read().decode("utf-8", "replace")
        log.truncate(start)
        log.write(f"{shortened(said, LOG_CHARACTERS)}\n== {name}: {ended}\n\n".encode())
    print(shortened(said, SHOWN_CHARACTERS))
    print(f"== {name}: {ended}", flush=True)
    return code == 0


def shortened(text: str, most: int) -> str:
    """`text`, or `most` of its characters: a quarter from its beginning, the rest from its end."""
    if len(text) <= most:
        return text.strip("\n")
    head, tail = most // 4, most - most // 4
    left = len(text) - head - tail
    return f"{text[:head]}\n[{left} characters are left out]\n{text[-tail:]}".strip("\n")


def run_part(part: str, out: Path, device: str, *, fresh: bool, sources: str) -> list[str]:
    """Run one part; returns the names of the steps that failed.

    Args:
        out: folder of results, whose status file is read and written.
        device: the GPU's name.
        fresh: do again what went well before.
        sources: hash of what the steps depend on.
    """
    deadline = time.monotonic() + PART_SECONDS
    failed = []
    for step in steps(part, out, fresh):
        known = read_status(out).get(step.name, {})
        if step.known and not fresh and known == {"sources_sha256": sources, "device": device}:
            print(
                f"== {step.name}: well before with these sources, skipped (--fresh does it again)"
            )
            continue
        left = deadline - time.monotonic()
        if left <= 1:
            print(f"== {step.name}: no time is left; call again to go on")
            failed.append(step.name)
        elif run_step(step.name, step.command, min(step.seconds, left), out):
            if step.known:
                write_status(out, step.name, {"sources_sha256": sources, "device": device})
        else:
            failed.append(step.name)
    return failed


def read_status(out: Path) -> dict[str, dict[str, str]]:
    """Steps that went well: name -> hash of the sources and GPU."""
    file = out / STATUS
    found: dict[str, dict[str, str]] = {}
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_status(out: Path, name: str, entry: dict[str, str]) -> None:
    """Note that a step went well."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{STATUS}.partial"
    partial.write_text(json.dumps(read_status(out) | {name: entry}, indent=1), encoding="utf-8")
    partial.replace(out / STATUS)


def source_hash() -> str:
    """SHA-256 over names and contents of everything in TESTED that can change a result."""
    digest = hashlib.sha256()
    for place in TESTED:
        root = ROOT / place
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for path in files:
            if path.is_file() and path.suffix in _SUFFIXES and "results" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--fresh", action="store_true", help="do again what went well before")
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
                f"gpu_check: torch {torch.__version__} of {sys.executable} cannot use this GPU; "
                "set PYTHON to another"
            )
            return 1
        print("gpu_check: no CUDA device on this machine, nothing was checked or measured")
        return 3
    device = torch.cuda.get_device_name()
    print(f"gpu_check: {device}, torch {torch.__version__}", flush=True)
    chosen = PARTS if options.what == "all" else (options.what,)
    sources, out = source_hash(), options.out.resolve()
    failed = [
        name
        for part in chosen
        for name in run_part(part, out, device, fresh=options.fresh, sources=sources)
    ]
    print(f"gpu_check: failed: {', '.join(failed)}" if failed else "gpu_check: all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
