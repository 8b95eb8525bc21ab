"""Which sources the tests marked `shipped` have passed with, by version of Triton.

    make shipped                                     compiles and judges every configuration for every chip, then
    python tests/kernels/compiled/verified.py        writes that down in verified.json

They take a third of the suite's time, and their outcome is a function of the kernels, of these tests and of Triton
(which brings its own ptxas): where none has changed, `make test` leaves them to `make long`, and where one has, it
runs them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "kernels" / "goku_kernels"
RECORD = HERE / "verified.json"


def fingerprint() -> str:
    """SHA-256 over the kernels' sources and data and these tests, with their names."""
    digest = hashlib.sha256()
    for folder, patterns in ((KERNELS, ("*.py", "*.json")), (HERE, ("*.py",))):
        for path in sorted(file for pattern in patterns for file in folder.rglob(pattern)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def is_verified() -> bool:
    """Whether they have passed with the sources that are there and the Triton that is installed."""
    import triton

    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return known.get(triton.__version__) == fingerprint()


def main() -> None:
    import triton

    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[triton.__version__] = fingerprint()
    RECORD.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
