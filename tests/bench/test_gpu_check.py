"""bench/gpu_check where no GPU is, and the commands it would run where one is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check, harness, running

SCRIPT = harness.ROOT / "bench" / "gpu_check.py"


def run(*command, **environment):
    # An empty CUDA_VISIBLE_DEVICES hides a GPU that may be there.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


@pytest.mark.parametrize("what", [[], ["correctness"], ["block", "--fresh"]])
def test_without_a_gpu_it_says_so_exits_3_and_writes_nothing(what, tmp_path):
    out = tmp_path / "results"
    done = run(sys.executable, SCRIPT, *what, "--out", out)
    assert done.returncode == 3, done.stderr
    assert "no CUDA device" in done.stdout
    assert not out.exists()


def test_the_executable_does_the_same():
    done = run(SCRIPT.with_suffix(""), PYTHON=sys.executable)
    assert (done.returncode, "no CUDA device" in done.stdout) == (3, True), done.stderr


def test_without_torch_and_without_a_driver_too():
    # -S: no site-packages, so no torch
    done = run(sys.executable, "-S", SCRIPT, PYTHONPATH="", PATH="")
    expected = 1 if gpu_check.has_nvidia_driver() else 3
    assert done.returncode == expected, done.stderr
    assert "torch" in done.stdout


def test_wrong_arguments_exit_2():
    assert run(sys.executable, SCRIPT, "sped").returncode == 2


@pytest.mark.long
def test_pytest_runs_on_the_gpu_tests_without_the_projects_plugins_and_settings():
    command = [
        *gpu_check.test_command(),
        "--collect-only",
        "-p",
        "no:timeout",
        "-p",
        "no:hypothesispytest",
    ]
    env = gpu_check.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=gpu_check.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for stem in ("test_block", "test_operators"):
        assert f"tests/gpu/{stem}.py" in done.stdout


@pytest.mark.long
def test_the_three_packages_are_found_uninstalled(tmp_path):
    names = ["goku_kernels", "goku_runtime", "goku"]
    code = f"import {', '.join(names)}; print([m.__file__ for m in ({', '.join(names)})])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=gpu_check.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(gpu_check.ROOT)) == 3


def test_a_step_that_fails_or_hangs_is_a_failure(capfd, tmp_path):
    def step(name, code, seconds=60.0):
        return gpu_check.run_step(name, [sys.executable, "-c", code], seconds, tmp_path)

    assert step("good", "print('ran')")
    assert "ran" in capfd.readouterr().out
    assert not step("bad", "raise SystemExit(5)")
    assert "bad: exit code 5" in capfd.readouterr().out
    slow = "import time; print('began', flush=True); time.sleep(60)"
    assert not step("slow", slow, 2.0)
    said = capfd.readouterr().out
    assert "slow: stopped after 2 s" in said
    assert "began" in said


def test_the_log_keeps_beginning_and_end_of_what_every_step_said(capfd, tmp_path):
    code = "import sys; [print('line', i) for i in range(100_000)]; sys.exit('the error')"
    assert not gpu_check.run_step("long", [sys.executable, "-c", code], 60, tmp_path)
    assert gpu_check.run_step("short", [sys.executable, "-c", "print('fine')"], 60, tmp_path)
    log = (tmp_path / gpu_check.LOG).read_text(encoding="utf-8")
    shown = capfd.readouterr().out
    for text, most in ((log, gpu_check.LOG_CHARACTERS), (shown, gpu_check.SHOWN_CHARACTERS)):
        assert most < len(text) < most + 300
        for words in ("line 0\n", "the error\n== long: exit code 1", "fine\n== short: well"):
            assert words in text
        assert "line 50000\n" not in text


def test_a_test_that_waits_for_ever_ends_its_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "HANG_SECONDS", 2)
    file = tmp_path / "test_hang.py"
    file.write_text("import time\n\ndef test_hang():\n    time.sleep(100)\n")
    began = time.monotonic()
    assert not gpu_check.run_step("hang", gpu_check.test_command(file), 90, tmp_path)
    assert time.monotonic() - began < 60
    assert "in test_hang" in (tmp_path / gpu_check.LOG).read_text(encoding="utf-8")


# ---- what is run, taken up again and kept ----


def test_every_benchmark_is_in_one_part_and_each_part_fits():
    listed = [name for part in gpu_check.BENCHMARKS.values() for name in part]
    assert sorted(listed) == sorted(running.BENCHMARKS)
    assert {"correctness", *gpu_check.BENCHMARKS} == set(gpu_check.PARTS)
    assert gpu_check.PART_SECONDS < 8 * 60
    for part in gpu_check.BENCHMARKS.values():
        assert sum(part.values()) <= gpu_check.PART_SECONDS
        assert min(part.values()) > gpu_check.MARGIN
        # A file of rows each, the status and the log.
        assert len(part) + 2 <= 8
    step = sum(s.seconds for s in gpu_check.steps("step", Path("out"), fresh=False))
    assert step <= gpu_check.PART_SECONDS


def test_the_steps_of_correctness(tmp_path):
    steps = {step.name: step for step in gpu_check.steps("correctness", tmp_path, fresh=False)}
    files = [path.name for path in (gpu_check.ROOT / "tests" / "gpu").glob("test_*.py")]
    assert {f"tests/gpu/{name}" for name in files} | {"training"} == set(steps) - {"build"}
    assert all(step.known for name, step in steps.items() if name != "build")
    assert steps["training"].command[1:] == ["-m", "bench.training"]


def test_benchmarks_resume_unless_fresh(tmp_path):
    for fresh in (False, True):
        for step in gpu_check.steps("memory", tmp_path, fresh):
            assert ("--resume" in step.command) == (not fresh)
            assert step.command[step.command.index("--out") + 1] == str(tmp_path)
            limit = float(step.command[step.command.index("--limit") + 1])
            assert 0 < limit < step.seconds


@pytest.fixture
def made_up_steps(monkeypatch):
    ran = []

    def steps(part, out, fresh):
        for name, known in (("good", True), ("bad", True), ("bench/x", False)):
            yield gpu_check.Step(name, [name], 1.0, known)

    def run_step(name, command, seconds, out):
        ran.append(name)
        return name != "bad"

    monkeypatch.setattr(gpu_check, "steps", steps)
    monkeypatch.setattr(gpu_check, "run_step", run_step)
    return ran


def test_what_went_well_is_not_done_again(made_up_steps, tmp_path, capsys):
    def run(sources="a", device="H200", fresh=False):
        made_up_steps.clear()
        failed = gpu_check.run_part("x", tmp_path, device, fresh=fresh, sources=sources)
        assert failed == ["bad"]
        return list(made_up_steps)

    assert run() == ["good", "bad", "bench/x"]
    assert run() == ["bad", "bench/x"]
    assert "good: well before" in capsys.readouterr().out
    assert run(fresh=True) == ["good", "bad", "bench/x"]
    assert run(sources="b") == ["good", "bad", "bench/x"]
    assert run(sources="b", device="H100") == ["good", "bad", "bench/x"]
    assert [path.name for path in tmp_path.iterdir()] == [gpu_check.STATUS]
    assert set(gpu_check.read_status(tmp_path)) == {"good"}


def test_a_part_ends_when_its_time_is_up(made_up_steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PART_SECONDS", 0.5)
    failed = gpu_check.run_part("x", tmp_path, "H200", fresh=False, sources="a")
    assert failed == ["good", "bad", "bench/x"]
    assert made_up_steps == []
    assert "no time is left" in capsys.readouterr().out


def test_the_hash_of_the_sources_is_steady_and_leaves_results_out():
    first = gpu_check.source_hash()
    assert first == gpu_check.source_hash()
    assert len(first) == 64
