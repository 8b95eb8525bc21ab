"""The engine's C++ tests (csrc/io/tests) under the compiler's sanitizers: `make sanitize`."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# cmake and ninja are the ones that stand beside this interpreter.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PATH": PATH} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def same_places() -> list[str]:
    """Older thread sanitizers do not cope with much randomness in a process's addresses."""
    prefix = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*prefix, "true"], check=False).returncode
    return prefix if allowed == 0 else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.long)]
)
def test_the_engine_is_clean(sanitizer, tmp_path):
    build = ROOT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
    run("cmake", "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DGOKU_SANITIZE={sanitizer}")
    run("cmake", "--build", build)
    said = run(
        *(same_places() if sanitizer == "thread" else []),
        build / "io_tests",
        TMPDIR=str(tmp_path),
        # A second report would hide the first one's end.
        TSAN_OPTIONS="halt_on_error=1",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert said.endswith("passed\n")
    assert "threads, direct auto\n" in said
