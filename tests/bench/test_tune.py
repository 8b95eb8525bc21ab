"""The tuner around its trials: what it writes, leaves alone, takes up again, and when it stops."""

import json
import subprocess
import sys

import pytest
import torch

from bench import ahead, gpu_steps, harness, screening, trials, tune, tune_log
from bench.ahead import overridden
from bench.trials import Outcome
from goku_kernels.triton import configs

DTYPES = ["bfloat16"]
ORIGIN = {"triton": "9", "sources_sha256": "a", "device": "GPU", "torch": "1"}


def row(kernel, chip, size=1024, **config):
    return {"kernel": kernel, "size": size, "dtypes": DTYPES, "chip": chip, "config": config}


def listing(*configs):
    return [{"config": c, "registers": 10, "faults": []} for c in configs]


def table(op, row, *configs):
    known = {k: row[k] for k in ("kernel", "size", "dtypes", "chip")}
    return {"op": op, **known, **screening.origin(op), "candidates": listing(*configs)}


def outcome(rows, row, size, dtype, configs, *, enough, begun):
    """The one with most rows wins; the last cannot run."""
    for config in configs:
        begun(config)
    able = list(range(len(configs)))[:-1]
    order = sorted(able, key=lambda i: -configs[i]["rows"])
    ms = {i: 1.0 / configs[i]["rows"] for i in able}
    return Outcome(order, ms, dict.fromkeys(able, 5), {len(configs) - 1: "does not fit"})


def run(rows, which, log, lists, options=None, trial=outcome, left=lambda: 100.0):
    saved, said = [], []
    done = tune.tune(
        "adaln_modulate", rows, which, options or tune.Options(), log, lists, trial, left,
        lambda: saved.append(json.dumps(rows)), said.append,
    )  # fmt: skip
    return done, saved, said


def test_winners_are_saved_one_by_one_and_every_candidate_is_kept(tmp_path):
    rows = [row("forward", 80, rows=1), row("forward", 90, rows=1), row("backward", 90, rows=2)]
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    lists = {
        1: listing({"rows": 1}, {"rows": 4}, {"rows": 9}),
        2: listing({"rows": 2}, {"rows": 3}),
    }
    done, saved, _ = run(rows, [1, 2], log, lists)
    assert done
    assert [r["config"]["rows"] for r in rows] == [1, 4, 2]
    assert [r["config"]["rows"] for r in json.loads(saved[0])] == [1, 4, 2]
    assert len(saved) == 2
    lines = [json.loads(x) for x in (tmp_path / "adaln_modulate.jsonl").read_text().splitlines()]
    assert [(x["kernel"], x["config"]["rows"], x["status"], x["ms"]) for x in lines] == [
        ("forward", 1, "timed", 1.0), ("forward", 9, "failed", None), ("forward", 4, "winner", 0.25),
        ("backward", 3, "failed", None), ("backward", 2, "winner", 0.5),
    ]  # fmt: skip
    assert (lines[1]["note"], lines[0]["shipped"], lines[1]["shipped"]) == (
        "does not fit", True, False
    )  # fmt: skip
    assert lines[0]["registers"] == 10
    assert not log.begun.file.exists()


def test_a_stopped_run_is_taken_up(tmp_path):
    rows = [row("forward", 90, rows=1), row("backward", 90, rows=1)]
    lists = {i: listing({"rows": 1}, {"rows": 4}, {"rows": 9}) for i in (0, 1)}
    times = iter([100.0, 1.0])
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    done, saved, said = run(rows, [0, 1], log, lists, left=lambda: next(times))
    assert (done, len(saved), "no time is left" in said[-1]) == (False, 1, True)
    again = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    resume = tune.Options(resume=True)
    done, saved, said = run(rows, [0, 1], again, lists, resume)
    assert (done, len(saved), "tuned before" in said[0]) == (True, 1, True)
    # Other sources, or another GPU, count as not tuned.
    for change in ({"sources_sha256": "b"}, {"device": "other"}):
        other = tune.Log("adaln_modulate", tmp_path, ORIGIN | change)
        assert not other.tuned(rows[0])


def test_what_ended_a_process_is_left_out_the_next_time(tmp_path):
    rows = [row("forward", 90, rows=1)]
    lists = {0: listing({"rows": 1}, {"rows": 64}, {"rows": 4}, {"rows": 9})}
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    log.begin(rows[0], {"rows": 64})  # and then the process ends
    again = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    run(rows, [0], again, lists)
    assert rows[0]["config"] == {"rows": 4}
    assert '"status": "ended the process"' in again.lines[0]


def test_after_two_that_ended_a_process_a_row_is_left_as_it_is(tmp_path):
    rows = [row("forward", 90, rows=1)]
    lists = {0: listing({"rows": 1}, {"rows": 2}, {"rows": 8}, {"rows": 3})}
    for deadly in ({"rows": 2}, {"rows": 8}):
        tune.Log("adaln_modulate", tmp_path, ORIGIN).begin(rows[0], deadly)
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    done, saved, said = run(rows, [0], log, lists, trial=None)
    assert (done, saved) == (True, [])
    assert said[0].endswith("2 configurations ended a process, 2 are not tried")


HANGING = """
import os, runpy, sys, time
from bench import absent_gpu, ahead, begun, screening, trials, tune, tune_log
from bench.trials import Outcome
import torch

FOLDER = sys.argv[1]
tune_log.PATIENCE_SECONDS, begun.PULSE_SECONDS = 1.0, 0.05
ahead.everywhere = lambda *args: None

def trial(self, rows, row, size, dtype, configs, *, enough, begun):
    for config in configs:
        begun(config)
        if config["rows"] == 32:
            time.sleep(100)  # a kernel that waits for ever
    return Outcome([len(configs) - 1], {len(configs) - 1: 1.0})

trials.Trials.row = trial
def main(ops, options, say=print):
    from pathlib import Path
    options = tune.Options(limit=options.limit, resume=options.resume, folder=Path(FOLDER),
                           results=Path(FOLDER) / "tune", screened=Path(FOLDER) / "screened")
    return tune.run(ops, options, torch.device("cpu"), 90, say)
tune.main = main
execv = os.execv
def again(file, words):
    execv(sys.executable, [sys.executable, "-c", os.environ["CODE"], FOLDER, *words[3:]])
os.execv = again
sys.orig_argv = [sys.executable, "-m", "bench", *sys.argv[2:]]
sys.argv = ["bench", *sys.argv[2:]]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


def test_a_configuration_that_waits_for_ever_runs_the_tuner_again(tmp_path):
    """In a process that replaces itself, and then leaves that configuration out."""
    kept = [{"rows": n, "num_warps": 4} for n in (8, 32, 64)]
    rows = [{**row("forward", 90, 64, **kept[0]), "dtypes": DTYPES}]
    (tmp_path / "velocity_loss.json").write_text(tune.text(rows))
    screening.write([table("velocity_loss", rows[0], *kept)], tmp_path / "screened")
    words = [sys.executable, "-c", HANGING, str(tmp_path), "tune", "velocity_loss", "--limit", "60"]
    given = {"cwd": harness.ROOT, "env": gpu_steps.environment() | {"CODE": HANGING}}
    given["env"].pop("GOKU_BENCH_RESTARTED", None)
    done = subprocess.run(words, capture_output=True, text=True, timeout=90, **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the command runs itself again") == 1
    (found,) = json.loads((tmp_path / "velocity_loss.json").read_text())["rows"]
    assert found["config"] == kept[2]
    lines = [
        json.loads(x) for x in (tmp_path / "tune" / "velocity_loss.jsonl").read_text().splitlines()
    ]
    assert [(r["status"], r["config"]["rows"]) for r in lines] == [
        ("ended the process", 32), ("timed", 8), ("winner", 64)
    ]  # fmt: skip


def test_specialised_warps_come_last_and_each_behind_what_it_is_compared_with(tmp_path):
    options = tune.Options(dtypes=["bfloat16"], sizes=[64, 128], results=tmp_path)
    work = tune._work("varlen_attention", options, 90, {}, 0.0, "")
    order = [(work.rows[i]["kernel"], work.rows[i]["size"]) for i in work.which]
    width = ["forward", "gradient_kv", "gradient_q", "gradient"]
    plain = [x for x in order if x[0] not in ("delta", SPECIAL)]
    assert plain == [(kernel, size) for size in (64, 128) for kernel in width]
    assert order[-2:] == [(SPECIAL, 64), (SPECIAL, 128)]


SPECIAL = "forward_specialised"


def beside(rows, log, ms, *, order, failed=None, resume=False, left=lambda: 100.0):
    """`tune.compare` of attention's rows, with the outcome of its trial."""
    saved, said, tried = [], [], []

    def trial(rows, row, size, dtype, *, begun):
        begun(row["config"])
        tried.append((row["kernel"], size, dtype))
        return Outcome(order, ms, {}, failed or {})

    done = tune.compare(
        "varlen_attention", rows, range(len(rows)), tune.Options(resume=resume), log, trial, left,
        lambda: saved.append(json.dumps(rows)), said.append,
    )  # fmt: skip
    return done, saved, said, tried


def used(rows):
    return {(r["kernel"], r["size"]): not r.get("unused") for r in rows}


def test_a_specialised_forward_that_is_slower_is_marked_unused(tmp_path):
    def attention(**change):
        plain = [row("forward", 90, 64, queries=128), row("gradient_kv", 90, 64, keys=64),
                 row("gradient_q", 90, 64, keys=32)]  # fmt: skip
        return [*plain, row(SPECIAL, 90, 64, queries=64), row("gradient", 90, 64, keys=128)]

    rows = attention()
    log = tune.Log("varlen_attention", tmp_path, ORIGIN)
    done, saved, said, tried = beside(rows, log, {0: 1.0, 1: 1.2}, order=[0, 1])
    assert (done, len(saved)) == (True, 2)
    assert tried == [(SPECIAL, 64, "bfloat16"), ("gradient", 64, "bfloat16")]
    assert used(rows) == {(r["kernel"], 64): r["kernel"] not in (SPECIAL, "gradient") for r in rows}
    assert said[0] == (
        "varlen_attention forward_specialised at 64 bfloat16: 1.2000 ms, without it 1.0000 ms: unused"
    )
    records = [json.loads(line) for line in log.file.read_text().splitlines()]
    assert [(r["status"], r["ms"], r["ms_without"]) for r in records] == [("unused", 1.2, 1.0)] * 2
    assert records[0]["beside"] == {"forward": {"queries": 128}}
    assert records[1]["beside"] == {"gradient_kv": {"keys": 64}, "gradient_q": {"keys": 32}}
    assert not log.begun.file.exists()
    # Known; until one of the two is tuned to something else.
    assert beside(rows, log, {}, order=[], resume=True)[3] == []
    rows[0] = row("forward", 90, 64, queries=64)
    _, saved, said, tried = beside(rows, log, {0: 1.0, 1: 0.9}, order=[1, 0], resume=True)
    assert tried == [(SPECIAL, 64, "bfloat16")]
    assert used(rows)[SPECIAL, 64]
    assert len(saved) == 1
    # What is as it was is not written again.
    assert beside(rows, log, {0: 1.0, 1: 0.9}, order=[1, 0])[1] == [
        json.dumps(rows)
    ]  # the gradient
    assert beside(rows, log, {0: 1.0, 1: 0.9}, order=[1, 0])[1] == []


def test_one_that_is_not_right_or_ended_a_process_is_unused_too(tmp_path):
    rows = [row("forward", 90, 64, queries=128), row(SPECIAL, 90, 64, queries=64)]
    log = tune.Log("varlen_attention", tmp_path, ORIGIN)
    _, _, said, _ = beside(rows, log, {0: 1.0, 1: 0.5}, order=[0], failed={1: "wrong on a pack"})
    assert said[0].endswith("0.5000 ms, without it 1.0000 ms (wrong on a pack): unused")
    assert not used(rows)[SPECIAL, 64]
    rows[1] = row(SPECIAL, 90, 64, queries=32)
    log.begin(rows[1], {"queries": 32})  # and then the process ends
    log = tune.Log("varlen_attention", tmp_path, ORIGIN)
    _, _, said, tried = beside(rows, log, {}, order=[])
    assert tried == []
    assert "it ended a process" in said[0]
    assert not used(rows)[SPECIAL, 64]
    # Where nothing is right nothing changes, and time may be up.
    rows[1] = row(SPECIAL, 90, 64, queries=16)
    assert beside(rows, log, {}, order=[], failed={0: "wrong", 1: "wrong"})[1] == []
    done, _, said, tried = beside(rows, log, {}, order=[1], left=lambda: 1.0)
    assert (done, tried) == (False, [])
    assert "no time is left" in said[0]


def test_a_comparison_that_the_row_does_not_show_is_done_again(tmp_path):
    """As after --dry-run, or where the configurations were put back."""
    rows = [
        row("forward", 90, 64, queries=128),
        {**row(SPECIAL, 90, 64, queries=64), "unused": True},
    ]
    before = json.dumps(rows)
    log = tune.Log("varlen_attention", tmp_path, ORIGIN)
    assert len(beside(rows, log, {0: 1.0, 1: 0.9}, order=[1, 0], resume=True)[1]) == 1
    assert beside(rows, log, {}, order=[], resume=True)[3] == []
    rows = json.loads(before)
    _, saved, _, tried = beside(rows, log, {0: 1.0, 1: 0.9}, order=[1, 0], resume=True)
    assert (len(tried), len(saved), used(rows)[SPECIAL, 64]) == (1, 1, True)
    # The newest counts: it was slower in the meantime.
    beside(rows, log, {0: 1.0, 1: 1.2}, order=[0, 1])
    assert beside(rows, log, {}, order=[], resume=True)[3] == []


def test_where_what_runs_without_it_ended_a_process_the_row_stays(tmp_path):
    rows = [row("forward", 90, 64, queries=128), row(SPECIAL, 90, 64, queries=64)]
    for _ in range(2):
        tune.Log("varlen_attention", tmp_path, ORIGIN).begin(rows[1], {})
    log = tune.Log("varlen_attention", tmp_path, ORIGIN)
    done, saved, said, tried = beside(rows, log, {}, order=[])
    assert (done, saved, tried) == (True, [], [])
    assert "ended a process: it stays as it is" in said[0]
    # They are no configurations of the row's own.
    lists = {1: listing({"queries": 64, "rows": 1}, {"queries": 32, "rows": 2})}
    again = tune.tune(
        "varlen_attention", rows, [1], tune.Options(), log, lists, outcome, lambda: 100.0,
        lambda: None, said.append,
    )  # fmt: skip
    assert again
    assert rows[1]["config"]["rows"] == 1


def test_who_was_only_out_of_time_is_not_deadly(tmp_path):
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN, until=0.0)
    tuned = row("forward", 90, rows=1)
    log.begin(tuned, {"rows": 64})
    again = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    assert again.deadly(tuned) == []


def test_a_lost_context_runs_the_tuner_again(tmp_path, monkeypatch):
    """Which then leaves out what ran."""
    restarts = []
    monkeypatch.setattr(tune.begun, "restart", lambda left, start: restarts.append(start.resume))
    monkeypatch.setattr(ahead, "everywhere", lambda *args: None)

    def trial(self, rows, row, size, dtype, configs, *, enough, begun):
        begun(configs[1])
        raise tune.begun.ContextLost("an illegal memory access")

    monkeypatch.setattr(trials.Trials, "row", trial)
    rows = [{**row("forward", 90, 64, rows=8, num_warps=4), "dtypes": DTYPES}]
    (tmp_path / "velocity_loss.json").write_text(tune.text(rows))
    kept = table("velocity_loss", rows[0], rows[0]["config"], {"rows": 32, "num_warps": 4})
    screening.write([kept], tmp_path / "screened")
    options = tune.Options(
        folder=tmp_path, results=tmp_path / "tune", screened=tmp_path / "screened"
    )
    with pytest.raises(tune.begun.ContextLost):
        tune.run(["velocity_loss"], options, torch.device("cpu"), 90, lambda words: None)
    assert restarts == [False]
    (record,) = tune.begun.Begun(tmp_path / "tune" / "velocity_loss.begun").left()[0]
    assert record["config"] == {"rows": 32, "num_warps": 4}


def test_nothing_is_saved_where_nothing_can_be_used(tmp_path):
    def broken(*args, **options):
        return Outcome(failed={0: "wrong"})

    rows = [row("forward", 90, rows=1)]
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    _, saved, said = run(rows, [0], log, {0: listing({"rows": 1})}, trial=broken)
    assert (saved, "none of 1 configurations" in said[0]) == ([], True)
    assert not log.tuned(rows[0])


def test_files_of_candidates_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_log, "MAX_LINES", 3)
    log = tune.Log("adaln_modulate", tmp_path, ORIGIN)
    log.add([{"n": n} for n in range(5)])
    assert [json.loads(x)["n"] for x in log.file.read_text().splitlines()] == [2, 3, 4]


def test_kept_tables_are_taken_while_they_fit(tmp_path, monkeypatch):
    rows = [row("forward", 90, rows=1)]
    kept = table("adaln_modulate", rows[0], {"rows": 2}, {"rows": 1}, {"rows": 4})
    screening.write([kept], tmp_path)
    options = tune.Options(screened=tmp_path, kept=1)
    found = tune.listed("adaln_modulate", rows, [0], options)[0]
    assert [c["config"]["rows"] for c in found] == [1, 2]  # the row's own first
    # A row that was tuned since still begins with its own.
    tuned = [row("forward", 90, rows=7)]
    assert tune.listed("adaln_modulate", tuned, [0], options)[0][0]["config"] == {"rows": 7}
    screening.write([{**kept, "sources_sha256": "older"}], tmp_path)
    screened = []
    monkeypatch.setattr(screening, "screen", lambda *args, **more: screened.append(args) or {0: []})
    assert tune.listed("adaln_modulate", rows, [0], options) == {0: []}
    assert len(screened) == 1


def test_what_cannot_be_tuned_is_refused(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="tune needs a CUDA device"):
            tune.main(["adaln_modulate"], tune.Options())


def test_a_whole_run_on_a_cpu_writes_the_winner(tmp_path, monkeypatch):
    """With the reference for kernels, and a clock that looks at the configuration."""
    from bench import velocity_loss
    from bench.packs import Pack

    compiled, seen = [], []

    def function(backend):
        def call(inputs):
            table = [r for r in configs.table("velocity_loss") if r["chip"] == 90]
            seen.append({r["kernel"]: r["config"].get("rows") for r in table})
            return velocity_loss.eager(inputs)

        return call

    def interleaved(calls, device, **rest):
        found = {}
        for name, (prepare, one) in calls.items():
            one(prepare(0))
            found[name] = trials.timing.Timing(1.0 / (seen[-1]["forward"] or 1), 0, 0, 1)
        return found

    monkeypatch.setattr(velocity_loss, "function", function)
    monkeypatch.setattr(trials, "GPU_PACKS", [Pack(n, ((1, 2, 3),)) for n in trials.JUDGED_ON])
    monkeypatch.setattr(trials.timing, "interleaved", interleaved)
    monkeypatch.setattr(ahead, "everywhere", lambda do, tasks, *rest: compiled.extend(tasks))
    rows = [{**row("forward", 90, 64, rows=8, num_warps=4), "dtypes": DTYPES},
            row("forward", 80, 64, rows=8, num_warps=4)]  # fmt: skip
    (tmp_path / "velocity_loss.json").write_text(tune.text(rows))
    kept = table("velocity_loss", rows[0], rows[0]["config"], {"rows": 32, "num_warps": 4})
    screening.write([kept], tmp_path / "screened")
    options = tune.Options(
        folder=tmp_path, results=tmp_path / "tune", screened=tmp_path / "screened", resume=True
    )
    device = torch.device("cpu")
    assert tune.run(["velocity_loss"], options, device, 90, lambda words: None)
    written = json.loads((tmp_path / "velocity_loss.json").read_text())["rows"]
    assert [r["config"]["rows"] for r in written] == [32, 8]
    assert [t.config["rows"] for t in compiled] == [8, 32]
    seen.clear()
    assert tune.run(["velocity_loss"], options, device, 90, lambda words: None)  # nothing is left
    assert seen == []
    with pytest.raises(ValueError, match="no row to tune: chip 100"):
        tune.run(["velocity_loss"], options, device, 100)
    with pytest.raises(ValueError, match=r"there is no adaln_modulate.json"):
        tune.run(["adaln_modulate"], options, device, 90)


def test_operators_take_the_overridden_rows_and_then_their_own():
    rows = [row("forward", 90, 4096, num_warps=2)]
    args = ("forward", 1024, torch.bfloat16, 90)
    before = configs.config("adaln_modulate", *args)
    with overridden("adaln_modulate", rows):
        assert configs.config("adaln_modulate", *args) == {"num_warps": 2}
        assert configs.config("gated_residual_adaln", *args) != {"num_warps": 2}
    assert configs.config("adaln_modulate", *args) == before
    with pytest.raises(KeyError), overridden("adaln_modulate", rows):
        raise KeyError
    assert configs.config("adaln_modulate", *args) == before


def test_attention_on_sm_90_takes_the_overridden_rows_of_either_forward():
    from goku_kernels.triton import varlen_attention as kernels
    from goku_kernels.triton.launch import Recorder

    def launched(rows, size=128):
        x = torch.empty((512, 8, size), dtype=torch.bfloat16, device="meta")
        cu = torch.empty(4, dtype=torch.int32, device="meta")
        recorder = Recorder(90)
        with overridden("varlen_attention", rows):
            kernels.forward(x, x, x, cu, cu, 0.1, run=recorder)
        last = recorder.launches[-1]
        values = [last.arguments[k] for k in ("QUERIES", "KEYS", "STAGES")]
        return last.kernel.fn.__name__, *values, last.options["num_warps"]

    plain = {"queries": 64, "keys": 32, "num_stages": 4, "num_warps": 2, "programs": 1, "tma": 1}
    special = {**plain, "queries": 256, "num_warps": 8}
    rows = [row("forward", 90, 128, **plain), row("forward_specialised", 90, 128, **special)]
    assert launched(rows) == ("specialised_forward_kernel", 256, 32, 4, 8)
    assert launched(rows[:1]) == ("forward_kernel", 64, 32, 4, 2)
    # One that is unused leaves its size to the plain one, and not to a wider one of its own kind.
    unused = ahead.with_use(rows, rows[1], used=False)
    assert launched(unused) == launched(rows[:1])
    narrow = [{**r, "size": 64} for r in unused]
    assert launched([*rows, *narrow], 64)[0] == "forward_kernel"
    assert launched([*rows, *narrow])[0] == "specialised_forward_kernel"
    assert ahead.with_use(unused, unused[1], used=True) == rows
    # A trial of an unused one launches it.
    tried = ahead.with_config(unused, unused[1], {**special, "queries": 512})
    assert launched(tried) == ("specialised_forward_kernel", 512, 32, 4, 8)


def test_files_are_written_as_they_are_kept():
    for file in sorted(tune.FOLDER.glob("*.json")):
        rows = json.loads(file.read_text())["rows"]
        assert json.loads(tune.text(rows)) == {"rows": rows}
        assert tune.text(rows).count("\n") == len(rows) + 2


def test_tables_depend_on_the_files_that_their_kernels_are_in():
    def stems(op):
        return {name.split("/")[-1].removesuffix(".py") for name in screening.sources(op)}

    assert stems("gated_residual_adaln") == {
        "gated_residual_adaln", "modulation", "modulation_launch", "segments", "launch"
    }  # fmt: skip
    assert stems("varlen_attention") >= {"varlen_tiles", "varlen_attention_backward"}
    assert "rotation" in stems("qk_norm_rope")
