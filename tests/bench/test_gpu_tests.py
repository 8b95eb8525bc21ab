"""A test that ends its process costs itself: the others run in the next one."""

import re
import shutil

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


@pytest.mark.slow
def test_faults_hangs_and_crashes_cost_one_test_each(tmp_path, capfd):
    shutil.copy(gpu_tests.FOLDER / "conftest.py", tmp_path)
    file = tmp_path / "test_faulty.py"
    file.write_text(FAULTY)
    assert gpu_tests.run(gpu_tests.command([file], tmp_path, hang_seconds=2)) == 1
    ran = [line.split() for line in file.with_name("test_faulty.py.ran").read_text().splitlines()]
    assert [int(i) for i, _ in ran] == list(range(12))  # each once
    processes = dict.fromkeys(process for _, process in ran)
    assert [[int(i) for i, p in ran if p == process] for process in processes] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10], [11]
    ]  # fmt: skip
    said = "".join(capfd.readouterr())
    for i in (3, 5, 7):
        assert f"wrong at {i}" in said
    assert len(re.findall(r"::test_it\[[37]\]: the GPU answers nothing after it", said)) == 2
    ended = re.findall(r"FAILED \S*::test_it\[(\d+)\]: it ended its process", said)
    assert ended == ["3", "7", "9", "10"]
    assert re.search(r"FAILED \S*::test_it\[5\]\n", said)
    assert "in test_it" in said  # where the one that hung was


def test_all_well_is_code_0_and_a_plain_failure_1(tmp_path):
    shutil.copy(gpu_tests.FOLDER / "conftest.py", tmp_path)
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_good():\n    pass\n")
    bad.write_text("def test_bad():\n    assert False\n\ndef test_good():\n    pass\n")
    assert gpu_tests.run(gpu_tests.command([good], tmp_path)) == 0
    assert gpu_tests.run(gpu_tests.command([good, bad], tmp_path)) == 1


def test_a_file_that_is_not_there_is_bad_input(tmp_path, capsys):
    assert gpu_tests.main([str(tmp_path / "none.py")]) == 2
    assert "there is none" in capsys.readouterr().err
