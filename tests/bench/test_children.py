"""A command that hangs, and everything that it started, is dead when its time is up."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bench import children, gpu_steps

# Starts a child in a session of its own, which starts one whose parent ends at once; all three sleep.
FAMILY = """
import os, subprocess, sys, time
nap = "import time; time.sleep(60)"
write = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))"
orphan = f"import os, sys\\nif os.fork(): os._exit(0)\\nos.setsid()\\n{write}\\n{nap}"
child = (
    f"import subprocess, sys\\nsubprocess.run([sys.executable, '-c', {orphan!r}, sys.argv[2]])\\n"
    f"{write}\\n{nap}"
)
subprocess.Popen([sys.executable, "-c", child, *sys.argv[1:]], start_new_session=True)
while not all(os.path.exists(file) and os.path.getsize(file) for file in sys.argv[1:]):
    time.sleep(0.01)
print("all run", flush=True)
"""


def family(tmp_path, then):
    files = [tmp_path / name for name in ("child", "orphan")]
    return files, [sys.executable, "-c", FAMILY + then, *map(str, files)]


def alive(file):
    """Whether the process whose number is in `file` runs, other than as a zombie."""
    try:
        with open(f"/proc/{int(file.read_text())}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(command, seconds, tmp_path, **environment):
    with (tmp_path / "output").open("wb") as output:
        return children.run(
            command, seconds, cwd=tmp_path, env=os.environ | environment, output=output
        )


@pytest.mark.parametrize(("then", "expected"), [("time.sleep(60)", None), ("sys.exit(7)", 7)])
def test_nothing_is_left_of_a_command_that_hangs_or_ends(then, expected, tmp_path):
    files, command = family(tmp_path, then)
    began = time.monotonic()
    assert run(command, 2.0 if expected is None else 30.0, tmp_path) == expected
    assert time.monotonic() - began < 15
    assert (tmp_path / "output").read_text() == "all run\n"
    assert [alive(file) for file in files] == [False, False]


def test_the_families_of_others_are_left_alone(tmp_path):
    nap = [sys.executable, "-c", "import time; time.sleep(60)"]
    other = subprocess.Popen(nap, env=os.environ | {children.MARK: "another"})
    try:
        assert run([sys.executable, "-c", "pass"], 30, tmp_path) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_command_within_a_command_is_found_by_the_outer_mark(tmp_path):
    """gpu_check's own tests run gpu_check: what the inner one starts is the outer one's too."""
    script = (
        "import sys; from pathlib import Path; from bench import children; import os\n"
        'children.run([sys.executable, \'-c\', \'import os, time; open("inner", "w").write('
        "str(os.getpid())); time.sleep(60)'], 60, cwd=Path.cwd(), env=os.environ, "
        "output=sys.stdout.buffer)"
    )
    env = {"PYTHONPATH": str(gpu_steps.ROOT)}
    assert run([sys.executable, "-c", script], 1.5, tmp_path, **env) is None
    assert (tmp_path / "inner").read_text()
    assert not alive(tmp_path / "inner")


def test_an_interrupted_command_is_killed_too(tmp_path):
    files, command = family(tmp_path, "time.sleep(60)")
    script = (
        "import os, signal, sys; from pathlib import Path; from bench import children, gpu_check\n"
        "signal.signal(signal.SIGTERM, gpu_check._stopped)\n"
        f"children.run({command!r}, 60, cwd=Path.cwd(), env=os.environ, output=sys.stdout.buffer)"
    )
    outer = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(gpu_steps.ROOT)},
    )  # fmt: skip
    assert outer.stdout.readline() == "all run\n"
    outer.send_signal(signal.SIGTERM)
    assert outer.wait(timeout=20) == 128 + signal.SIGTERM
    assert [alive(file) for file in files] == [False, False]
    outer.stdout.close()
