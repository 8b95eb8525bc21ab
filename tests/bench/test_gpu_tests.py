"""A test that ends its process costs itself: the others run in the next one."""

import re
import shutil
from pathlib import Path

import pytest

from bench import gpu_tests

# A GPU that answers nothing after tests 3 and 7; test 5 is merely wrong.
FAULTY = """
import os, time, pytest, torch
DEAD = []
def answer():
    if DEAD: raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, answer
@pytest.mark.parametrize("i", range(12))
def test_it(i):
    with open(__file__ + ".ran", "a") as file: file.write(f"{i} {os.getpid()}\\n")
    assert not DEAD
    DEAD.extend([1] * (i in (3, 7)))
    assert i not in (3, 5, 7), f"wrong at {i}"
    if i == 9: time.sleep(100)
    if i == 10: os._exit(0)
"""


@pytest.fixture
def folder(tmp_path):
    shutil.copy(gpu_tests.Tests().folder / "conftest.py", tmp_path)
    return tmp_path


def made(folder, **files):
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    paths = tuple(folder / f"test_{name}.py" for name in files)
    return gpu_tests.Tests(paths, folder, folder, hang_seconds=2)


@pytest.mark.slow
def test_faults_hangs_and_crashes_cost_one_test_each(folder, capfd):
    assert gpu_tests.check(made(folder, faulty=FAULTY), None) == 1
    ran = [line.split() for line in (folder / "test_faulty.py.ran").read_text().splitlines()]
    assert [int(i) for i, _ in ran] == list(range(12))  # each once
    processes = dict.fromkeys(process for _, process in ran)
    assert [[int(i) for i, p in ran if p == process] for process in processes] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10], [11]
    ]  # fmt: skip
    said = "".join(capfd.readouterr())
    for i in (3, 5, 7):
        assert f"wrong at {i}" in said
    assert re.findall(r"test_it\[(\d)\]: the GPU answers nothing after it", said) == ["3", "7"]
    assert re.findall(r"^FAILED \S*::test_it\[(\d+)\]$", said, re.MULTILINE) == ["3", "5", "7", "9", "10"]  # fmt: skip
    assert "in test_it" in said  # where the one that hung was
    assert "5 of 12 tests failed" in said


def test_the_block_may_take_longer(tmp_path):
    for name in ("test_block.py", "test_batch.py"):
        (tmp_path / name).touch()
    assert gpu_tests.hang_seconds([tmp_path / "test_batch.py"]) == 60
    assert gpu_tests.hang_seconds([tmp_path / "test_batch.py", tmp_path / "test_block.py"]) == 120
    assert gpu_tests.hang_seconds([tmp_path]) == 120
    short = tmp_path / "test_specialised_warps.py"
    assert gpu_tests.hang_seconds([short]) == 45
    assert gpu_tests.hang_seconds([short, tmp_path / "test_batch.py"]) == 60


BY_PTXAS = """
import os
def test_assembled():
    assert os.environ.get("TRITON_PTXAS_PATH") == "/another/ptxas"
def test_wrong():
    assert False
def test_good():
    pass
"""


def test_what_hung_is_not_waited_for_again(folder, capfd):
    hangs = "import time\ndef test_hangs():\n    time.sleep(100)\n"
    assert gpu_tests.check(made(folder, hangs=hangs), Path("/another/ptxas")) == 1
    said = capfd.readouterr().out
    assert "FAILED test_hangs.py::test_hangs" in said
    assert "1 of 1 tests failed" in said
    assert "/another/ptxas" not in said


def test_failures_are_tried_with_another_assembler(folder, capfd):
    tests = made(folder, good="def test_good():\n    pass\n", bad=BY_PTXAS)
    assert gpu_tests.check(tests, Path("/another/ptxas")) == 1
    said = capfd.readouterr().out
    assert "passes with /another/ptxas: test_bad.py::test_assembled\n" in said
    assert "fails as well with /another/ptxas: test_bad.py::test_wrong\n" in said
    assert said.rstrip().splitlines()[-1] == "2 of 4 tests failed"
    assert gpu_tests.check(made(folder, good="def test_good():\n    pass\n"), Path("/x")) == 0
    assert "assembler" not in capfd.readouterr().out


def test_the_assembler_is_that_of_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "ptxas"
    file.write_text("#!/bin/sh\n")
    assert gpu_tests.installed_ptxas() != file
    file.chmod(0o755)
    assert gpu_tests.installed_ptxas() == file


def test_a_file_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert gpu_tests.main([str(tmp_path / "none.py")]) == 2
    assert "there is none" in capsys.readouterr().err
