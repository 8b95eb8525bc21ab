"""A session of bench/gpu_check: its order, its time, what it goes on with and what it leaves, with real children."""

import os
import sys
import tarfile
import time

import pytest

from bench import gpu_session, gpu_steps
from bench.gpu_session import Session, Stage
from bench.gpu_steps import CONFIGS, Sources, Status, Step

RESULTS = "bench/results"
CODE = Sources(("bench",), ("one",))
HEADER = "import os, pathlib, sys, time\nlog = open('ran', 'a'); log.write(sys.argv[1] + ' ')\nlog.close()\n"
# As a benchmark: a row for every tenth of a second until its time is up, five in all.
RESUMES = f"""
file = pathlib.Path("{RESULTS}/rows.jsonl")
began = time.monotonic()
while len(file.read_text().split() if file.exists() else []) < 5:
    if time.monotonic() - began > float(sys.argv[2]): sys.exit(1)
    time.sleep(0.3)
    with file.open("a") as rows: rows.write("{{}}\\n")
"""
TUNES = f"pathlib.Path('{CONFIGS}/one.json').write_text('tuned'); sys.exit(int(sys.argv[3]))"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    for name in (
        "bench/a.py",
        f"{CONFIGS}/one.json",
        f"{CONFIGS}/two.json",
        f"{RESULTS}/old.jsonl",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("" if name.endswith("old.jsonl") else "1")
    monkeypatch.setattr(gpu_steps, "ROOT", root)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GOKU_COMMIT", raising=False)
    return root


def step(name, code="", seconds=20.0, *, sources=CODE, least=0.0, arguments=()):
    def command(limit):
        given = [name, str(gpu_steps.inner(limit)), *map(str, arguments)]
        return [sys.executable, "-c", HEADER + code, *given]

    return Step(name, command, seconds, sources, least)


def session(tree, *stages, limit=60.0, fresh=False, device="H200"):
    began = time.monotonic()
    status = Status(tree / RESULTS, device)
    return Session(
        status, stages, lambda: limit - (time.monotonic() - began), tree.parent / "state.tgz", fresh
    )


def ran(tree):
    """Names of the steps that ran since the last look."""
    file = tree / "ran"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def archived(tree):
    with tarfile.open(tree.parent / "state.tgz") as archive:
        return {m.name: archive.extractfile(m).read().decode() for m in archive}


def test_what_is_through_is_not_done_again_and_a_failure_ends_nothing(tree, capfd):
    stages = [
        Stage("first", [step("good"), step("bad", "sys.exit(5)")]),
        Stage("second", [step("bad", "sys.exit(5)"), step("last")]),
    ]
    assert not session(tree, *stages).run()
    assert ran(tree) == ["good", "bad", "last"]  # what failed is not tried twice in a call
    said = capfd.readouterr().out
    for words in ("+ first: good: well", "- first: bad: exit code 5", "+ second: last: well"):
        assert words in said
    assert not session(tree, *stages).run()
    assert ran(tree) == ["bad"]
    assert "+ first: good: well before with these sources" in capfd.readouterr().out
    assert not session(tree, *stages, fresh=True).run()
    assert ran(tree) == ["good", "bad", "last"]
    assert not session(tree, *stages, device="H100").run()
    assert ran(tree) == ["good", "bad", "last"]
    mended = [Stage("first", [step("good"), step("bad")])]
    assert session(tree, *mended).run()


def test_the_state_is_written_after_every_step_also_of_one_that_is_killed(tree, monkeypatch):
    seen = []
    save = gpu_session.gpu_state.save

    def noted(file, root):
        size = save(file, root)
        seen.append(sorted(archived(tree)))
        return size

    monkeypatch.setattr(gpu_session.gpu_state, "save", noted)
    row = f"pathlib.Path('{RESULTS}/%s.jsonl').write_text('{{}}\\n')"
    hangs = f"{row % 'hung'}; time.sleep(60)"
    steps = [
        step("a", row % "a"),
        step("hangs", hangs, 1.0),
        step("b", f"{row % 'b'}; sys.exit(1)"),
    ]
    began = time.monotonic()
    assert not session(tree, Stage("all", steps, goes_on=True)).run()
    assert time.monotonic() - began < 20
    assert ran(tree) == ["a", "hangs", "b"]  # neither would end otherwise the second time
    names = [[n.rpartition("/")[2] for n in s if n.startswith(RESULTS)] for s in seen]
    noted = ["gpu_check.json", "gpu_check.log"]
    assert names[0] == ["old.jsonl"]
    assert names[1] == sorted(["a.jsonl", "old.jsonl", *noted])
    assert names[2] == sorted(["a.jsonl", "hung.jsonl", "old.jsonl", *noted])
    assert names[3] == sorted(["a.jsonl", "b.jsonl", "hung.jsonl", "old.jsonl", *noted])
    assert '"stopped after 1 s"' in archived(tree)[f"{RESULTS}/gpu_check.json"]
    assert f"{CONFIGS}/one.json" in archived(tree)


def test_the_state_is_written_when_an_exception_ends_the_call(tree, monkeypatch):
    def stopped(*arguments):
        (tree / RESULTS / "half.jsonl").write_text("{}\n")
        raise SystemExit(143)

    monkeypatch.setattr(gpu_session, "run_step", stopped)
    with pytest.raises(SystemExit):
        session(tree, Stage("all", [step("a")])).run()
    assert f"{RESULTS}/half.jsonl" in archived(tree)


def test_a_place_for_the_state_that_is_none_is_told_before_the_first_step(tree):
    (tree.parent / "state.tgz").mkdir()
    with pytest.raises(ValueError, match="--state"):
        session(tree, Stage("all", [step("a")])).run()
    assert ran(tree) == []


def test_a_benchmark_goes_on_when_all_others_have_had_their_time(tree):
    rows = step("rows", RESUMES, 1.2)
    stages = [Stage("rows", [rows, step("others")], goes_on=True), Stage("last", [step("last")])]
    assert session(tree, *stages).run()
    names = ran(tree)
    assert names[:3] == ["rows", "others", "last"]
    assert set(names[3:]) == {"rows"}
    assert (tree / RESULTS / "rows.jsonl").read_text() == "{}\n" * 5


def test_a_benchmark_goes_on_at_the_next_call(tree, capfd):
    stage = Stage("rows", [step("rows", RESUMES, 100.0, least=0.7)], goes_on=True)
    assert not session(tree, stage, limit=gpu_session.RESERVE + 1.2).run()
    assert "- rows: rows: is to go on, after 1 s" in capfd.readouterr().out
    assert 0 < len((tree / RESULTS / "rows.jsonl").read_text().split()) < 5
    assert session(tree, stage).run()
    assert ran(tree) == ["rows", "rows"]
    assert (tree / RESULTS / "rows.jsonl").read_text() == "{}\n" * 5


def test_time_is_of_the_call_and_what_does_not_fit_waits(tree, capfd):
    limit = gpu_session.RESERVE + 1.0
    hangs = step("hangs", "time.sleep(60)", 100.0)
    large = step("large", least=30.0, seconds=50.0)
    stages = [Stage("rows", [large, hangs], goes_on=True)]
    began = time.monotonic()
    assert not session(tree, *stages, limit=limit).run()
    assert time.monotonic() - began < limit + 1
    assert ran(tree) == ["hangs"]
    assert "- rows: large: no time was left" in capfd.readouterr().out
    # Of other stages the ones behind wait too: rows before the tuning would be stale after it.
    stages = [Stage("tuning", [large]), Stage("rows", [step("small")])]
    assert not session(tree, *stages, limit=limit).run()
    assert ran(tree) == []
    assert "- rows: small: not begun" in capfd.readouterr().out


def test_what_tuning_changed_is_checked_again_and_nothing_else(tree, monkeypatch, capfd):
    monkeypatch.setenv("GOKU_COMMIT", "abc")
    tested = [step("one"), step("two", sources=Sources(("bench",), ("two",)))]
    tune = step("tune", TUNES, sources=Sources(("bench",)), arguments=[0])
    see = "pathlib.Path('commit').write_text(os.environ['GOKU_COMMIT'])"
    stages = [
        Stage("correctness", tested, code_alone=True), Stage("tuning", [tune], tunes=True),
        Stage("again", tested), Stage("rows", [step("rows", see)], goes_on=True),
    ]  # fmt: skip
    assert session(tree, *stages).run()
    assert ran(tree) == ["one", "two", "tune", "one", "rows"]
    # Their configurations are not those of the commit.
    assert (tree / "commit").read_text() == "abc+dirty"
    assert session(tree, *stages).run()
    assert ran(tree) == []
    (tree / CONFIGS / "one.json").write_text("tuned by hand")
    capfd.readouterr()
    assert session(tree, *stages).run()
    assert ran(tree) == ["one", "rows"]
    # Not in its first turn: other checks would come before the rows so.
    assert "+ correctness: one: well before" in capfd.readouterr().out


@pytest.mark.parametrize(("code", "tries"), [(1, 3), (2, 1), (0, 1)])
def test_a_tuner_whose_process_died_goes_on_before_what_comes_behind(code, tries, tree):
    tune = step("tune", TUNES, sources=Sources(("bench",)), arguments=[code])
    stages = [Stage("tuning", [tune], tunes=True), Stage("rows", [step("rows")])]
    assert session(tree, *stages).run() == (code == 0)
    assert ran(tree) == ["tune"] * tries + ["rows"]


def test_a_tuner_has_its_seconds_in_all_calls_together(tree, capfd):
    hangs = Step("tune", step("tune", "time.sleep(60)").command, 2.0, Sources(("bench",)), 0.6)
    stages = [Stage("tuning", [hangs], tunes=True), Stage("rows", [step("rows")])]
    assert not session(tree, *stages, limit=gpu_session.RESERVE + 1.0).run()
    assert ran(tree) == ["tune"]
    assert session(tree, *stages).run()
    assert ran(tree) == ["tune", "rows"]
    assert "+ tuning: tune: has had its 2 s" in capfd.readouterr().out
    assert Status(tree / RESULTS, "H200").entry("tune")["spent"] == pytest.approx(2.0, abs=0.1)
    assert session(tree, *stages).run()
    assert ran(tree) == []


def test_the_cache_is_warmed_with_what_is_to_come_and_once(tree, monkeypatch):
    commands = []

    def run_step(name, command, seconds, out):
        commands.append((name, command[1:]))
        return gpu_steps.Ended(0, 1.0)

    monkeypatch.setattr(gpu_session, "run_step", run_step)
    asks = [Step(op, lambda s: [], 9.0, CODE, launches=(op,)) for op in gpu_steps.OPERATORS[:3]]
    Status(tree / RESULTS, "H200").note(asks[0], gpu_steps.Ended(0, 1.0))
    warm = ["-m", "bench", "warm", *gpu_steps.OPERATORS[1:3]]
    assert session(tree, Stage("all", asks), limit=100).run()
    assert commands[0] == ("warm", warm)
    commands.clear()
    assert session(tree, Stage("all", asks), limit=100, fresh=True).run()
    assert commands[0] == ("warm", [*warm[:3], gpu_steps.OPERATORS[0]])
    commands.clear()
    # Configurations of one changed: its kernels are not those in the cache.
    (tree / CONFIGS / f"{gpu_steps.OPERATORS[1]}.json").write_text("tuned")
    assert session(tree, Stage("all", asks), limit=100, fresh=True).run()
    assert commands[0] == ("warm", [*warm[:3], gpu_steps.OPERATORS[1]])
    os.unlink(gpu_session.warm_file())
    commands.clear()
    session(tree, Stage("all", asks), limit=20, fresh=True).run()
    assert "warm" not in [name for name, _ in commands]


def test_what_tuning_changed_is_warmed_before_the_next_stage(tree, monkeypatch):
    ran_ = []
    tuned = tree / CONFIGS / f"{gpu_steps.OPERATORS[1]}.json"

    def run_step(name, command, seconds, out):
        ran_.append((name, command[4:]))
        if name == "tune":
            tuned.write_text("tuned")
        return gpu_steps.Ended(0, 1.0)

    monkeypatch.setattr(gpu_session, "run_step", run_step)
    both = gpu_steps.OPERATORS[:2]
    asks = [Step(op, lambda s: [], 9.0, CODE, launches=(op,)) for op in both]
    again = [Step(f"{op} again", lambda s: [], 9.0, CODE, launches=(op,)) for op in both]
    tune = Step("tune", lambda s: [], 9.0, CODE)
    stages = [Stage("all", asks), Stage("tuning", [tune]), Stage("after", again)]
    assert session(tree, *stages, limit=100).run()
    names = [name for name, _ in ran_]
    assert names == ["warm", *both, "tune", "warm", *(step.name for step in again)]
    # Of both at first, and then of that alone whose configurations are others now.
    assert [words for name, words in ran_ if name == "warm"] == [[*both], [both[1]]]


def test_the_plan(tmp_path):
    """Every check, every benchmark; tuned before it is measured; three calls of 560 s hold it."""
    from bench import running, screening

    stages = gpu_session.plan(tmp_path)
    names = {stage.name: [s.name for s in stage.steps] for stage in stages}
    assert list(names) == [
        "correctness",
        "tuning",
        "tests of what was tuned",
        "rows",
        "other checks",
    ]
    checks = set(names["tests of what was tuned"]) | set(names["other checks"])
    assert checks == set(names["correctness"])
    assert {"longest", *(f"bench/{name}" for name in running.BENCHMARKS)} == set(names["rows"])
    assert names["rows"][0] == "bench/varlen_attention"
    assert sum(s.seconds for stage in stages for s in stage.steps if "bench" in s.name) < 1000
    for s in stages[1].steps:
        command = s.command(100.0)
        assert command[1:4] == ["-m", "bench", "tune"]
        assert command[-3:] == ["--limit", "75", "--resume"]
        ops = command[4 : min(i for i, word in enumerate(command) if word.startswith("--"))]
        sizes = command[command.index("--sizes") + 1 :][:2]
        assert sizes == (["64", "128"] if ops == ["varlen_attention"] else ["2048", "4096"])
        for op in ops:
            assert f"tests/gpu/test_{op}.py" in names["tests of what was tuned"]
            assert (screening.CONFIGS / f"{op}.json").is_file()
    for stage in stages:
        for s in stage.steps:
            assert s.sources is not None
            assert s.command(200.0)[0] == sys.executable
