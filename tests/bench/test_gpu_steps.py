"""One step of bench/gpu_check: how it ends, what is kept of what it said, what it depends on."""

import json
import subprocess
import sys

import pytest

from bench import gpu_steps
from bench.gpu_steps import CONFIGS, Ended, Sources, Status, Step


def step_of(code):
    return [sys.executable, "-c", code]


def test_a_step_that_fails_or_hangs_is_a_failure(capfd, tmp_path):
    def step(name, code, seconds=60.0):
        return gpu_steps.run_step(name, step_of(code), seconds, tmp_path)

    good = step("good", "print('== 3 passed ==')\nprint('ran')\nprint('== 3 passed in 1 s ==')")
    assert (good.well, good.said) == (True, "3 passed in 1 s")
    assert "ran" in capfd.readouterr().out
    assert step("bad", "raise SystemExit(5)").code == 5
    assert "bad: exit code 5" in capfd.readouterr().out
    # Not flushed by the command itself: what a killed one said is there all the same.
    slow = "import time; print('began'); time.sleep(60)"
    assert step("slow", slow, 1.0) == Ended(None, 1.0)
    said = capfd.readouterr().out
    assert "slow: stopped after 1 s" in said
    assert "began" in said


def test_a_row_that_a_killed_step_did_not_finish_is_cut(tmp_path):
    write = "file = open(sys.argv[1], 'w'); file.write('{}\\n{\"na'); file.flush(); time.sleep(60)"
    code = [*step_of(f"import sys, time; {write}"), str(tmp_path / "x.jsonl")]
    gpu_steps.run_step("half", code, 1.0, tmp_path)
    assert (tmp_path / "x.jsonl").read_text() == "{}\n"


def test_the_log_keeps_beginning_and_end_of_what_every_step_said(capfd, tmp_path):
    code = "import sys; [print('line', i) for i in range(100_000)]; sys.exit('the error')"
    assert not gpu_steps.run_step("long", step_of(code), 60, tmp_path).well
    assert gpu_steps.run_step("short", step_of("print('fine')"), 60, tmp_path).well
    log = (tmp_path / gpu_steps.LOG).read_text(encoding="utf-8")
    shown = capfd.readouterr().out
    for text, most in ((log, gpu_steps.LOG_CHARACTERS), (shown, gpu_steps.SHOWN_CHARACTERS)):
        assert most < len(text) < most + 400
        for words in ("line 0\n", "the error\n== long: exit code 1", "fine\n== short: well"):
            assert words in text
        assert "line 50000\n" not in text


# ---- what a step depends on ----


def test_what_the_checks_import_of_bench_is_what_they_depend_on():
    """As python itself finds it, in a process of its own."""
    given = gpu_steps.imported("bench/training.py", "bench/checks.py", "bench/velocity_loss.py")
    assert {"bench/cases.py", "bench/packs.py", "bench/timing.py"} < set(given)
    assert not {"bench/report.py", "bench/gpu_session.py", "bench/tune.py"} & set(given)
    code = (
        "import sys, bench.training, bench.checks, bench.velocity_loss\n"
        "print(*[n for n in sys.modules if n.startswith('bench.')])"
    )
    done = subprocess.run(
        step_of(code), capture_output=True, text=True, cwd=gpu_steps.ROOT,
        env=gpu_steps.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {f"{name.replace('.', '/')}.py" for name in done.stdout.split()} <= set(given)


def test_every_check_depends_on_its_file_and_on_the_configurations_it_launches():
    sources = gpu_steps.check_sources()
    for name, found in sources.items():
        if name.startswith("tests/gpu/"):
            op = name.removeprefix("tests/gpu/test_").removesuffix(".py")
            op = gpu_steps.BESIDE.get(op, op)
            assert found.configs == ((op,) if op in gpu_steps.OPERATORS else gpu_steps.OPERATORS)
            assert name in found.places
    assert sources["training"].configs == gpu_steps.OPERATORS
    every = [place for found in sources.values() for place in found.places]
    assert all((gpu_steps.ROOT / place).exists() for place in every)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "ROOT", tmp_path)
    texts = {"kernels/goku_kernels/a.py": "a", "bench/b.py": "b", "bench/notes.md": "n",
             "bench/results/c.json": "c", f"{CONFIGS}/one.json": "1", f"{CONFIGS}/two.json": "2"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_hash_follows_code_and_own_configurations_and_leaves_results_out(tree):
    sources = Sources(("kernels/goku_kernels", "bench"), ("one",))

    def after(name, text):
        (tree / name).write_text(text)
        return sources.code(), sources.all()

    code, whole = sources.code(), sources.all()
    assert (len(code), len(whole)) == (64, 64)
    for name in ("bench/results/c.json", f"{CONFIGS}/two.json", "bench/notes.md"):
        assert after(name, "new") == (code, whole)
    tuned = after(f"{CONFIGS}/one.json", "new")
    assert tuned[0] == code
    assert tuned[1] != whole
    changed = after("bench/b.py", "new")
    assert code != changed[0]
    assert changed[1] not in (whole, tuned[1])


def test_a_step_is_known_with_its_code_alone_or_with_its_configurations(tree, tmp_path):
    step = Step("x", lambda seconds: [], 1.0, Sources(("bench",), ("one",)))
    status = Status(tmp_path / "out", "H200")
    assert not status.knows(step)
    status.note(step, Ended(0, 1.0))
    assert status.knows(step)
    (tree / f"{CONFIGS}/one.json").write_text("tuned")
    assert (status.knows(step), status.knows(step, code_alone=True)) == (False, True)
    (tree / "bench/b.py").write_text("new")
    assert not status.knows(step, code_alone=True)
    status.note(step, Ended(None, 1.0))
    assert not status.knows(step, code_alone=True)
    assert status.entry("x")["ended"] == "stopped after 1 s"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"H200": {"x": {"ended": "well"}}}', '{"x": {"a": 1}}']
)
def test_a_status_that_cannot_be_read_is_refused_by_name(text, tmp_path):
    (tmp_path / gpu_steps.STATUS).write_text(text)
    with pytest.raises(ValueError, match=r"gpu_check\.json"):
        gpu_steps.read_status(tmp_path)
    (tmp_path / gpu_steps.STATUS).write_text(json.dumps({}))
    assert gpu_steps.read_status(tmp_path) == {}
