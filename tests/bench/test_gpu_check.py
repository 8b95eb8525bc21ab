"""bench/gpu_check where no GPU is, and the commands it would run where one is."""

import os
import subprocess
import sys

import pytest

from bench import gpu_check, harness

SCRIPT = harness.ROOT / "bench" / "gpu_check.py"


def run(*command, **environment):
    # An empty CUDA_VISIBLE_DEVICES hides a GPU that may be there.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


@pytest.mark.parametrize("what", [[], ["correctness"], ["speed"]])
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


def test_the_three_packages_are_found_uninstalled(tmp_path):
    names = ["goku_kernels", "goku_runtime", "goku"]
    code = f"import {', '.join(names)}; print([m.__file__ for m in ({', '.join(names)})])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=gpu_check.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(gpu_check.ROOT)) == 3


def test_a_step_that_fails_or_hangs_is_a_failure(capfd):
    assert gpu_check.run_step("good", [sys.executable, "-c", "print('ran')"], 60)
    assert "ran" in capfd.readouterr().out
    assert not gpu_check.run_step("bad", [sys.executable, "-c", "raise SystemExit(5)"], 60)
    assert "bad: exit code 5" in capfd.readouterr().out
    assert not gpu_check.run_step(
        "slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2
    )
    assert "slow: stopped after 0 s" in capfd.readouterr().out


def test_every_listed_benchmark_exists_and_the_steps_fit():
    assert all((harness.ROOT / "bench" / f"{name}.py").is_file() for name in gpu_check.BENCHMARKS)
    assert gpu_check.SECONDS < 8 * 60
    parts = [gpu_check.BUILD_SECONDS, gpu_check.TEST_SECONDS, *gpu_check.BENCHMARKS.values()]
    assert sum(parts) <= gpu_check.SECONDS
