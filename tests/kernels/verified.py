"""Which sources the tests marked `shipped` and `mutants` have passed with, by the versions that matter.

    make shipped                            compiles and judges every configuration for every chip, writes that down
    make mutants                            so for the wrong kernels that the interpreter's tests have to find
    python tests/kernels/verified.py NAME   writes down that the tests marked NAME have passed, in verified.json

They take a third of the suite's time, and their outcome is a function of the kernels, of these tests and of Triton
(which brings its own ptxas; of mutants also of torch, NumPy and Python, in which its interpreter computes): where none
has changed, `make test` leaves them to `make long`, and where one has, it runs them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels" / "goku_kernels"
RECORD = HERE / "verified.json"
# The marker's tests, and those that they run.
TESTS = {"shipped": ("compiled",), "mutants": ("test_mutants.py", "interpreter", "../conftest.py")}


def fingerprint(name: str) -> str:
    """SHA-256 over the kernels' sources and data and the tests of a marker, with their names."""
    found = [(KERNELS, file) for kind in ("*.py", "*.json") for file in sorted(KERNELS.rglob(kind))]
    for place in (HERE / test for test in TESTS[name]):
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        found += [(HERE, file) for file in files]
    digest = hashlib.sha256()
    for folder, path in found:
        content = path.read_bytes()
        label = os.path.relpath(path, folder)
        digest.update(f"{label}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def is_verified(name: str) -> bool:
    """Whether they have passed with the sources that are there and the Triton that is installed."""
    return _known().get(name, {}).get(versions(name)) == fingerprint(name)


def versions(name: str) -> str:
    """Of what decides the outcome beside the sources, as in "triton 3.7.1"."""
    import triton

    found = f"triton {triton.__version__}"
    if name == "mutants":
        import numpy
        import torch

        python = ".".join(platform.python_version_tuple()[:2])
        release = torch.__version__.split("+")[0]
        found += f", torch {release}, numpy {numpy.__version__}, python {python}"
    return found


def _known() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def main(name: str) -> None:
    known = _known()
    known.setdefault(name, {})[versions(name)] = fingerprint(name)
    RECORD.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in TESTS:
        sys.exit(f"verified.py takes one of {', '.join(TESTS)}")
    main(sys.argv[1])
