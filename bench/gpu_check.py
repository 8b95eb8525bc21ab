"""Everything that only a GPU can show, in one command; each of its parts under 8 minutes.

    python bench/gpu_check.py [correctness|memory|attention|block|step|all] [--out DIR] [--fresh] [--limit S]
    python bench/gpu_check.py session [--limit S] [--state FILE] [--from FILE] [--fresh]

    correctness  builds, runs tests/gpu file by file, then 50 training steps of a Goku-2B
    memory       benchmarks of the memory-bound operators
    attention    benchmark of the packed attention
    block        benchmark of one block, forward and backward
    step         whole steps of a Goku-2B, and the longest sequence that the GPU trains
    all          these five, one after the other
    session      all of it and the tuning of launch configurations, the most important first, within
                 --limit seconds; the same command goes on where the last one stopped

Needs torch, triton, numpy and pytest, no installation. Resumable: a step that went well with these
sources on this GPU, as `gpu_check.json` in the folder of results says, is not done again, and a
benchmark that was stopped goes on with what it had not measured; --fresh does everything again. The
folder then holds that file, `gpu_check.log` with what every step said, and one of rows for each
benchmark: no more than 8 after any one part. A step that takes longer than its time, which --limit
makes shorter, is killed with all that it started.

On a machine lent for an hour: `session --limit 560 --state FILE` keeps FILE, after every step, as
an archive of the results and launch configurations. Unpacked where the next call starts, or here,
it is gone on with: `session --from FILE --limit 0` does only that, without a GPU, and --from before
any other call too. A tree without git's history says its commit in GOKU_COMMIT (bench/harness.py).

Exit codes: 0 all well, 1 a step failed or time ran out, 2 wrong arguments, 3 no GPU on this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the packages lie in the repository, not beside this
    sys.path[0] = str(ROOT)

from bench import gpu_session, gpu_state  # noqa: E402
from bench.gpu_steps import (  # noqa: E402
    Status,
    Step,
    benchmark,
    correctness,
    longest,
    run_step,
)  # fmt: skip

PART_SECONDS = 460.0  # for all steps of one part together: under 8 minutes
PARTS = ("correctness", "memory", "attention", "block", "step")
# Of each part: benchmark, and the seconds it may take.
BENCHMARKS = {
    "memory": {
        "adaln_modulate": 110.0, "gated_residual_adaln": 110.0, "qk_norm_rope": 140.0,
        "rectified_flow_noise": 50.0, "velocity_loss": 50.0,
    },
    "attention": {"varlen_attention": 460.0},
    "block": {"block": 460.0},
    "step": {"step": 280.0},
}  # fmt: skip
LONGEST_SECONDS = 180.0


def steps(part: str, out: Path, fresh: bool, limit: float = PART_SECONDS) -> list[Step]:
    """The steps of one part in the order they run, the benchmarks' seconds scaled to `limit`."""
    if part == "correctness":
        return correctness(out)
    scale = limit / PART_SECONDS
    found = [
        benchmark(name, scale * seconds, out, fresh=fresh)
        for name, seconds in BENCHMARKS[part].items()
    ]
    if part == "step":
        found.append(longest(scale * LONGEST_SECONDS, out))
    return found


def run_part(part: str, status: Status, *, fresh: bool, limit: float = PART_SECONDS) -> list[str]:
    """Run one part within `limit` seconds; returns the names of the steps that failed.

    Args:
        status: of the folder of results and the GPU.
        fresh: do again what went well before.
    """
    deadline = time.monotonic() + limit
    failed = []
    for step in steps(part, status.out, fresh, limit):
        if not fresh and status.knows(step):
            print(
                f"== {step.name}: well before with these sources, skipped (--fresh does it again)"
            )
            continue
        seconds = min(step.seconds, deadline - time.monotonic())
        if seconds <= 1:
            print(f"== {step.name}: no time is left; call again to go on")
            failed.append(step.name)
            continue
        ended = run_step(step.name, step.command(seconds), seconds, status.out)
        status.note(step, ended)
        if not ended.well:
            failed.append(step.name)
    return failed


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded or its tool is there."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def absent() -> int | None:
    """Says why nothing can run here; the exit code, or None where a GPU can be used."""
    if importlib.util.find_spec("torch") is None:
        if has_nvidia_driver():
            print(f"gpu_check: torch is not installed for {sys.executable}; set PYTHON to another")
            return 1
        print("gpu_check: no CUDA device on this machine (no NVIDIA driver), and no torch")
        return 3
    import torch  # here, so that --help needs nothing

    if torch.cuda.is_available():
        return None
    if has_nvidia_driver():
        print(
            f"gpu_check: torch {torch.__version__} of {sys.executable} cannot use this GPU; "
            "set PYTHON to another"
        )
        return 1
    print("gpu_check: no CUDA device on this machine, nothing was checked or measured")
    return 3


def seconds(text: str) -> float:
    """A finite number >= 0, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: allowed are finite numbers >= 0")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: options that do not fit what is asked for.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*PARTS, "all", "session"])
    parser.add_argument("--out", type=Path, help="folder of results (bench/results)")
    parser.add_argument("--fresh", action="store_true", help="do again what went well before")
    parser.add_argument("--limit", type=seconds, help="seconds for this call altogether")
    parser.add_argument("--state", type=Path, metavar="FILE",
                        help="of a session: an archive of results and configurations")  # fmt: skip
    parser.add_argument("--from", type=Path, metavar="FILE", dest="before",
                        help="of a session: the archive to unpack first")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.what != "session":
        for name, value in (("--state", options.state), ("--from", options.before)):
            if value is not None:
                raise ValueError(f"{name} is {str(value)!r}: only a session has it")
    elif options.out is not None:
        raise ValueError(f"--out is {str(options.out)!r}: a session works on bench/results")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    stops = {s: signal.signal(s, _stopped) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        return _main(parse(arguments), began)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    finally:
        for number, before in stops.items():
            signal.signal(number, before)


def _stopped(number: int, frame: FrameType | None) -> NoReturn:
    """What runs is killed on the way out, and the state written."""
    raise SystemExit(128 + number)


def _main(options: argparse.Namespace, began: float) -> int:
    def left() -> float:
        limit = float("inf") if options.limit is None else options.limit
        return limit - (time.monotonic() - began)

    if options.before is not None:
        names = gpu_state.unpack(options.before)
        print(f"gpu_check: {len(names)} files of {options.before} are in their places", flush=True)
        if options.limit == 0:
            return 0
    code = absent()
    if code is not None:
        return code
    import torch

    from bench import harness

    device = torch.cuda.get_device_name()
    print(f"gpu_check: {device}, torch {torch.__version__}", flush=True)
    out = (options.out or ROOT / "bench" / "results").resolve()
    status = Status(out, device, harness.revision)
    if options.what == "session":
        session = gpu_session.Session(
            status, gpu_session.plan(out), left, options.state, options.fresh
        )
        good = session.run()
        print("gpu_check: all well" if good else "gpu_check: not through; call again to go on")
        return 0 if good else 1
    chosen = PARTS if options.what == "all" else (options.what,)
    failed = []
    for part in chosen:
        limit = PART_SECONDS if options.limit is None else max(0.0, left())
        # One part may have all of a long limit, five share it.
        limit = min(limit, PART_SECONDS) if len(chosen) > 1 else limit
        failed += run_part(part, status, fresh=options.fresh, limit=limit)
    print(f"gpu_check: failed: {', '.join(failed)}" if failed else "gpu_check: all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
