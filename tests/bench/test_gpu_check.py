"""bench/gpu_check where no GPU is, and the commands it would run where one is."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from bench import gpu_check, gpu_state, gpu_steps, gpu_tests, harness, running

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sped"], "invalid choice: 'sped'"),
        (["step", "--limit", "-1"], "--limit: -1: allowed are finite numbers >= 0"),
        (["session", "--limit", "nan"], "--limit: nan: allowed are finite numbers >= 0"),
        (["step", "--state", "a"], "--state is 'a': only a session has it"),
        (["all", "--from", "a"], "--from is 'a': only a session has it"),
        (["session", "--out", "a"], "--out is 'a': a session works on bench/results"),
        (["session", "--from", "/no/such.tgz"], "--from /no/such.tgz is no archive of --state"),
    ],
)
def test_wrong_arguments_exit_2(arguments, said):
    done = run(sys.executable, SCRIPT, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_session_of_no_time_only_unpacks_and_needs_no_gpu(tmp_path, monkeypatch, capsys):
    results = tmp_path / "made" / "bench" / "results"
    results.mkdir(parents=True)
    (results / "step.jsonl").write_text("{}\n")
    file = tmp_path / "state.tgz"
    gpu_state.save(file, tmp_path / "made")
    monkeypatch.setattr(gpu_check, "absent", lambda: 3)
    monkeypatch.setattr(gpu_check.gpu_state, "unpack", partial(gpu_state.unpack, root=tmp_path))
    given = ["session", "--from", str(file), "--limit"]
    assert gpu_check.main([*given, "0"]) == 0
    assert (tmp_path / "bench" / "results" / "step.jsonl").read_text() == "{}\n"
    assert "1 files of" in capsys.readouterr().out
    assert gpu_check.main([*given, "9"]) == 3


@pytest.mark.long
def test_pytest_runs_on_the_gpu_tests_without_the_projects_plugins_and_settings():
    command = [
        *gpu_tests.Tests().command(),
        "--collect-only",
        "-p",
        "no:timeout",
        "-p",
        "no:hypothesispytest",
    ]
    env = gpu_steps.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=gpu_steps.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for stem in ("test_block", "test_operators"):
        assert f"tests/gpu/{stem}.py" in done.stdout


@pytest.mark.long
def test_the_three_packages_are_found_uninstalled(tmp_path):
    names = ["goku_kernels", "goku_runtime", "goku"]
    code = f"import {', '.join(names)}; print([m.__file__ for m in ({', '.join(names)})])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=gpu_steps.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(gpu_steps.ROOT)) == 3


# ---- what is run, taken up again and kept ----


def test_every_benchmark_is_in_one_part_and_each_part_fits():
    listed = [name for part in gpu_check.BENCHMARKS.values() for name in part]
    assert sorted(listed) == sorted(running.BENCHMARKS)
    assert {"correctness", *gpu_check.BENCHMARKS} == set(gpu_check.PARTS)
    assert gpu_check.PART_SECONDS < 8 * 60
    for part in gpu_check.BENCHMARKS.values():
        assert sum(part.values()) <= gpu_check.PART_SECONDS
        assert min(part.values()) > gpu_steps.MARGIN
        # A file of rows each, the status and the log.
        assert len(part) + 2 <= 8
    step = sum(s.seconds for s in gpu_check.steps("step", Path("out"), fresh=False))
    assert step <= gpu_check.PART_SECONDS


def test_the_steps_of_correctness(tmp_path):
    steps = {step.name: step for step in gpu_check.steps("correctness", tmp_path, fresh=False)}
    files = [path.name for path in (gpu_steps.ROOT / "tests" / "gpu").glob("test_*.py")]
    assert {f"tests/gpu/{name}" for name in files} | {"training"} == set(steps) - {"build"}
    train = steps["training"].command(50.0)
    assert train[1:] == ["-m", "bench.training", "--out", str(tmp_path)]
    assert set(gpu_steps.OPERATORS) == set(running.OPERATORS)


def number(command, option):
    return float(command[command.index(option) + 1])


@pytest.mark.parametrize("limit", [460.0, 60.0, 900.0])
@pytest.mark.parametrize("part", list(gpu_check.BENCHMARKS))
def test_benchmarks_resume_unless_fresh_and_fit_into_the_limit(part, limit, tmp_path):
    for fresh in (False, True):
        steps = gpu_check.steps(part, tmp_path, fresh, limit)
        assert 0.9 * limit < sum(step.seconds for step in steps) <= 1.001 * limit
        for step in steps:
            command = step.command(step.seconds)
            assert command[command.index("--out") + 1] == str(tmp_path)
            if step.name == "longest":
                assert number(command, "--seconds") == pytest.approx(step.seconds / 2, abs=0.5)
                continue
            assert ("--resume" in command) == (not fresh)
            assert number(command, "--seconds") == 0.5
            margin = step.seconds - number(command, "--limit")
            assert min(step.seconds / 4, gpu_steps.MARGIN - 1) <= margin < step.seconds


@pytest.fixture
def made_up_steps(monkeypatch):
    ran = []

    def steps(part, out, fresh, limit):
        for name, sources in (("good", True), ("bad", True), ("bench/x", False)):
            known = gpu_steps.Sources(("setup.py",)) if sources else None
            yield gpu_steps.Step(name, lambda seconds, name=name: [name], 100.0, known)

    def run_step(name, command, seconds, out):
        ran.append((name, seconds))
        return gpu_steps.Ended(5 if name == "bad" else 0, 1.0)

    monkeypatch.setattr(gpu_check, "steps", steps)
    monkeypatch.setattr(gpu_check, "run_step", run_step)
    return ran


def test_what_went_well_is_not_done_again(made_up_steps, tmp_path, capsys, monkeypatch):
    sources = {"hash": "a"}
    monkeypatch.setattr(gpu_steps.Sources, "code", lambda self: sources["hash"])

    def run(hash="a", device="H200", fresh=False):
        made_up_steps.clear()
        sources["hash"] = hash
        status = gpu_steps.Status(tmp_path, device, lambda: ("abc", False))
        assert gpu_check.run_part("x", status, fresh=fresh) == ["bad"]
        return [name for name, _ in made_up_steps]

    assert run() == ["good", "bad", "bench/x"]
    assert run() == ["bad", "bench/x"]
    assert "good: well before" in capsys.readouterr().out
    assert run(fresh=True) == ["good", "bad", "bench/x"]
    assert run("b") == ["good", "bad", "bench/x"]
    assert run("b", device="H100") == ["good", "bad", "bench/x"]
    assert run("b", device="H200") == ["bad", "bench/x"]  # the other GPU's are kept beside
    assert [path.name for path in tmp_path.iterdir()] == [gpu_steps.STATUS]
    noted = gpu_steps.read_status(tmp_path)
    assert {device: set(steps) for device, steps in noted.items()} == {
        "H200": {"good", "bad"}, "H100": {"good", "bad"}
    }  # fmt: skip
    assert (noted["H200"]["bad"]["ended"], noted["H200"]["bad"]["commit"]) == ("exit code 5", "abc")


def test_a_part_ends_when_its_time_is_up(made_up_steps, tmp_path, capsys):
    status = gpu_steps.Status(tmp_path, "H200")
    assert gpu_check.run_part("x", status, fresh=False, limit=0.5) == ["good", "bad", "bench/x"]
    assert made_up_steps == []
    assert "no time is left" in capsys.readouterr().out
    gpu_check.run_part("x", status, fresh=False, limit=30)
    assert all(29 < seconds <= 30 for _, seconds in made_up_steps)
