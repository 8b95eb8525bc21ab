"""Runs files of tests/gpu so that a fault of the GPU costs one test and not all behind it.

    python -m bench.gpu_tests [FILE ...]

After an illegal access, CUDA answers every call of that process with the same error; a kernel that
waits for ever is ended with its process. So pytest runs in a process of its own, and where it ends
in the middle of a test, another one takes the tests that have not begun. That is done here and not
by pytest-xdist: it gives the test that ended one process to the next, and with loadgroup waits for
ever afterwards (3.8.0).

Tests that fail, and do not hang, are run once more with the ptxas of an installed CUDA toolkit: see `check`.

Exit codes: pytest's of the last process; 1 where a test of any failed or ended its process; 2 bad
input.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One test that takes longer (a kernel that waits for ever) ends its process. An operator's takes a few
# seconds, and some 30 where it compiles all of its kernels; the block's waits for torch.compile twice.
HANG_SECONDS = {"test_block": 120, "test_specialised_warps": 45}
OTHERS_HANG_SECONDS = 60
NOTES = "GOKU_GPU_NOTES"
AGAIN = 4  # tests that failed and are run with another assembler: its kernels are compiled anew


@dataclass(frozen=True)
class Ran:
    """code: pytest's of the last process. failed: tests that failed or ended their process; stuck: those
    of them that said nothing of why, as they hung or crashed. count: of all tests."""

    code: int
    failed: list[str]
    stuck: list[str]
    count: int


@dataclass(frozen=True)
class Tests:
    """Files of tests in `folder`, where the conftest.py lies; none are all. hang_seconds: of one test."""

    __test__ = False  # what pytest takes for tests

    files: tuple[Path, ...] = ()
    folder: Path = ROOT / "tests" / "gpu"
    root: Path = ROOT
    hang_seconds: int = OTHERS_HANG_SECONDS

    def command(self, *chosen: str) -> list[str]:
        """pytest on the files, or on the tests of these ids.

        The project's own pytest settings ask for plugins that a GPU machine need not have, so none
        of them are read: no configuration file, no conftest outside the folder, no xdist.
        """
        quiet = ["-q", "-ra", "--import-mode=importlib", "-p", "no:cacheprovider"]
        alone = ["-c", os.devnull, "--rootdir", str(self.root), "--confcutdir", str(self.folder)]
        marker = ["-p", "no:xdist", "-o", "markers=gpu: needs an accelerator"]
        hang = ["-o", f"faulthandler_timeout={self.hang_seconds}"]
        hang += ["-o", "faulthandler_exit_on_timeout=true"]
        places = chosen or [str(path) for path in self.files or (self.folder,)]
        return [sys.executable, "-m", "pytest", *quiet, *alone, *marker, *hang, *places]

    def run(self, *chosen: str, **variables: str) -> Ran:
        """Run them until each has begun in some process.

        Args:
            chosen: ids of tests.
            variables: of the environment.
        """
        with tempfile.TemporaryDirectory() as temporary:
            notes = Path(temporary) / "notes.jsonl"
            environment = os.environ | {NOTES: str(notes)} | variables
            ended: list[str] = []
            while True:
                done = subprocess.run(
                    self.command(*chosen), cwd=self.root, env=environment, check=False
                )
                events = _events(notes)
                left = [test for test in events["begun"] if test not in events["done"]]
                if len(left) == len(ended):
                    break
                ended = left
                words = f"ended its process with code {done.returncode}; going on behind it"
                print(f"{left[-1]}: {words}", flush=True)
        stuck = [test for test in ended if test not in events["failed"]]
        failed = [test for test in events["begun"] if test in events["failed"] or test in stuck]
        return Ran(done.returncode, failed, stuck, len(events["begun"]))


def check(tests: Tests, assembler: Path | None) -> int:
    """Run the tests, and those that failed (the first few) with another ptxas; the exit code.

    That of CUDA 12.8, which Triton 3.6 and 3.7 bring, makes wrong code of some correct kernels for
    Hopper (github.com/fla-org/flash-linear-attention, pull request 1262): the first thing to know of
    a failure is whether it is of that kind.
    """
    ran = tests.run()
    if not ran.failed:
        return ran.code
    for test in ran.failed:
        print(f"FAILED {test}")
    # One that hung would take its time once more.
    again = [test for test in ran.failed if test not in ran.stuck][:AGAIN]
    if assembler is not None and again:
        print(f"== the first {len(again)} of them with {assembler} for an assembler", flush=True)
        still = tests.run(*again, TRITON_PTXAS_PATH=str(assembler)).failed
        for test in again:
            print(f"{'fails as well' if test in still else 'passes'} with {assembler}: {test}")
    print(f"{len(ran.failed)} of {ran.count} tests failed")
    return 1


def installed_ptxas() -> Path | None:
    """The ptxas of an installed CUDA toolkit; Triton's own is another."""
    found = [shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas"]
    return next((Path(path) for path in found if path and os.access(path, os.X_OK)), None)


def _events(notes: Path) -> dict[str, dict[str, None]]:
    """The tests of each kind of event, in their order."""
    found: dict[str, dict[str, None]] = {"begun": {}, "done": {}, "failed": {}}
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
    for event, test in map(json.loads, lines):
        found[event][test] = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    paths = [Path(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    for path in paths:
        if not path.exists():
            print(
                f"python -m bench.gpu_tests: FILE is {str(path)!r}: there is none", file=sys.stderr
            )
            return 2
    files = tuple(path.absolute() for path in paths or (Tests().folder,))
    return check(Tests(files, hang_seconds=hang_seconds(files)), installed_ptxas())


def hang_seconds(files: Sequence[Path]) -> int:
    """Of the tests in `files`, folders among them: the longest that one of them asks for."""
    paths = [
        path for file in files for path in (file.glob("test_*.py") if file.is_dir() else [file])
    ]
    return max(
        (HANG_SECONDS.get(p.stem, OTHERS_HANG_SECONDS) for p in paths), default=OTHERS_HANG_SECONDS
    )


if __name__ == "__main__":
    sys.exit(main())
