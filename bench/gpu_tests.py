"""Runs files of tests/gpu so that a fault of the GPU costs one test and not all behind it.

    python -m bench.gpu_tests [FILE ...]

After an illegal access, CUDA answers every call of that process with the same error; a kernel that
waits for ever is ended with its process. So pytest runs in a process of its own, and where it ends
in the middle of a test, another one takes the tests that have not begun. That is done here and not
by pytest-xdist: it gives the test that ended one process to the next, and with loadgroup waits for
ever afterwards (3.8.0).

Exit codes: pytest's of the last process; 1 where a test of any failed or ended its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "gpu"
HANG_SECONDS = 90  # one test that takes longer (a kernel that waits for ever) ends its process
NOTES = "GOKU_GPU_NOTES"


def command(paths: Sequence[Path], folder: Path = FOLDER, hang_seconds: int = HANG_SECONDS) -> list[str]:  # fmt: skip
    """pytest on `paths` of `folder`, where its conftest.py lies.

    The project's own pytest settings ask for plugins that a GPU machine need not have, so none of
    them are read: no configuration file, no conftest outside the folder, no xdist.
    """
    quiet = ["-q", "-ra", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist"]
    alone = ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(folder)]
    marker = ["-o", "markers=gpu: needs an accelerator"]
    hang = ["-o", f"faulthandler_timeout={hang_seconds}", "-o", "faulthandler_exit_on_timeout=true"]
    chosen = [str(path) for path in paths or (folder,)]
    return [sys.executable, "-m", "pytest", *quiet, *alone, *marker, *hang, *chosen]


def run(words: Sequence[str]) -> int:
    """Run the pytest command `words` until every test has begun in some process; the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        notes = Path(temporary) / "notes.jsonl"
        ended: list[str] = []
        while True:
            code = subprocess.run(
                words, env=os.environ | {NOTES: str(notes)}, check=False
            ).returncode
            events = _events(notes)
            left = [test for test in events["begun"] if test not in events["done"]]
            if len(left) == len(ended):
                break
            ended = left
            print(f"{left[-1]}: ended its process with code {code}; going on behind it", flush=True)
    failed = [test for test in events["failed"] if test not in ended]
    if ended:  # else pytest has said the same
        print("\n".join([*(f"FAILED {test}" for test in failed),
                         *(f"FAILED {test}: it ended its process" for test in ended)]))  # fmt: skip
    none_left = 5  # pytest's code where all tests had begun before
    return 1 if (ended or failed) and code in (0, none_left) else code


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
    return run(command(paths))


if __name__ == "__main__":
    sys.exit(main())
