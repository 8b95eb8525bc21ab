"""What ended a process, or took the device's context along, is told once and passed over."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import begun, block, cases, gpu_steps, harness, running, step, timing, velocity_loss
from bench.begun import Begun, Start
from bench.cases import Peer
from bench.packs import Pack

CPU = torch.device("cpu")
PACKS = (Pack("one", ((1, 2, 3),)), Pack("two", ((1, 2, 2), (2, 1, 1))))
CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
)
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def context(monkeypatch):
    """A device whose context is lost once `context.lost` is set."""
    state = SimpleNamespace(lost=False)
    real = timing.synchronise

    def synchronise(device):
        if state.lost:
            raise RuntimeError(ILLEGAL)
        real(device)

    monkeypatch.setattr(timing, "synchronise", synchronise)
    return state


@pytest.fixture
def peers(monkeypatch):
    """The loss on two packs of a few tokens; its peers, to be filled."""
    listed = []
    problems = [velocity_loss.problem("latents", 64, pack, torch.bfloat16) for pack in PACKS]
    monkeypatch.setattr(velocity_loss, "problems", lambda kind: iter(problems))
    monkeypatch.setattr(velocity_loss, "PEERS", listed)
    return listed


def peer(name, function=velocity_loss.eager, backend="triton"):
    return Peer(name, lambda problem, device: function, backend=backend)


def breaking(context, when=lambda calls: True):
    """A peer that takes the context along in the call that `when` says of its number."""
    calls = []

    def run(inputs):
        calls.append(0)
        if when(len(calls)):
            context.lost = True
        if context.lost:
            raise RuntimeError(ILLEGAL)
        return velocity_loss.eager(inputs)

    return run


def run(out, **more):
    said = []
    options = running.Options(device=CPU, out=out, seconds=0.0, **more)
    try:
        return running.run("velocity_loss", options, said.append), said
    except begun.ContextLost as lost:
        return lost, said


def found(out):
    """(pack, peer, direction, status) of all rows, in their order."""
    return [(r["pack"], r["peer"], r["direction"], r["status"]) for r in harness.read(out)]


def once_more(monkeypatch, began="0"):
    """As the process that another has replaced itself by; it was started without --resume."""
    start = json.dumps({"resume": False, "since": began})
    monkeypatch.setenv("GOKU_BENCH_RESTARTED", start)


def test_a_lost_context_costs_one_peer_of_one_problem(tmp_path, context, peers, monkeypatch):
    restarts = []
    monkeypatch.setattr(begun, "restart", lambda left, start: restarts.append((left, start)))
    peers += [peer("eager", backend="torch"), peer("bad", breaking(context)), peer("good")]
    lost, _ = run(tmp_path, limit=1e6)
    assert isinstance(lost, begun.ContextLost)
    assert ILLEGAL in str(lost)
    assert 1e6 - 100 < restarts[0][0] <= 1e6
    rows = harness.read(tmp_path)
    assert found(tmp_path) == [
        ("one", "bad", "forward", "failed"), ("one", "bad", "backward", "failed")
    ]  # fmt: skip
    assert all(ILLEGAL in r["note"] and r["extra"] == {"ended_process": True} for r in rows)
    assert not list(tmp_path.glob("*.begun"))
    # The next process goes on behind it, to the same in the second problem; the third ends.
    once_more(monkeypatch)
    context.lost = False
    assert isinstance(run(tmp_path, resume=True)[0], begun.ContextLost)
    context.lost = False
    good, said = run(tmp_path, resume=True)
    assert good is False  # ours failed, whoever ran it
    assert any(line.startswith("passed over: velocity_loss") for line in said)
    everything = [
        (pack.name, name, direction)
        for pack in PACKS for name in ("eager", "bad", "good") for direction in ("forward", "backward")
    ]  # fmt: skip
    rows = found(tmp_path)
    assert sorted(r[:3] for r in rows) == sorted(everything)  # none twice, none lost
    assert {r[3] for r in rows if r[1] == "bad"} == {"failed"}
    assert {r[3] for r in rows if r[1] != "bad"} == {"measured"}
    before = harness.read(tmp_path)
    run(tmp_path, resume=True)
    assert harness.read(tmp_path) == before


def test_what_is_lost_while_backwards_are_timed_keeps_the_forwards(
    tmp_path, context, peers, monkeypatch
):
    """Judging takes one call, forwards five, and then the context goes."""
    peers += [peer("bad", breaking(context, lambda calls: calls == 8)), peer("good")]
    run(tmp_path, only=["one"])
    assert found(tmp_path) == [
        ("one", "bad", "forward", "measured"), ("one", "good", "forward", "measured"),
        ("one", "bad", "backward", "failed"),
    ]  # fmt: skip
    once_more(monkeypatch)
    context.lost = False
    run(tmp_path, only=["one"], resume=True)
    assert found(tmp_path)[3:] == [("one", "good", "backward", "measured")]


def test_a_failure_that_the_device_survives_costs_nobody_else(tmp_path, context, peers):
    def fails_late(inputs):
        fails_late.calls += 1
        if fails_late.calls > 3:
            raise torch.OutOfMemoryError("no room")
        return velocity_loss.eager(inputs)

    fails_late.calls = 0
    peers += [peer("late", fails_late), peer("good")]
    assert run(tmp_path, only=["one"])[0] is False
    assert found(tmp_path) == [
        ("one", "late", "forward", "failed"), ("one", "good", "forward", "measured"),
        ("one", "late", "backward", "failed"), ("one", "good", "backward", "measured"),
    ]  # fmt: skip
    rows = harness.read(tmp_path)
    assert rows[0]["note"] == "OutOfMemoryError: no room"
    assert rows[0]["extra"] == {}


def test_what_a_killed_process_ran_is_passed_over(tmp_path, peers, monkeypatch):
    """Killed in its note's own words: a kernel that waits for ever is no exception to catch."""
    seen = []

    def hangs(inputs):
        (note,) = tmp_path.glob("*.begun")
        seen.append(note.read_bytes())
        raise KeyboardInterrupt

    peers += [peer("eager", backend="torch"), peer("hangs", hangs)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, only=["one"])
    (tmp_path / "velocity_loss.begun").write_bytes(seen[0])
    peers[1] = peer("hangs")  # the sources are the same: it is not asked again
    good, said = run(tmp_path, only=["one"], resume=True)
    assert good is False
    assert "hangs: failed: ended its process" in said[0]
    rows = found(tmp_path)
    assert rows[:2] == [("one", "hangs", d, "failed") for d in ("forward", "backward")]
    assert {r[1:] for r in rows[2:]} == {("eager", d, "measured") for d in ("forward", "backward")}
    # Without --resume it is.
    run(tmp_path, only=["one"])
    assert found(tmp_path)[-1] == ("one", "hangs", "backward", "measured")


def test_who_was_stopped_with_the_clock_is_not_blamed(tmp_path):
    record = {"name": "thing"}

    def left(*, ran, until):
        note = Begun(tmp_path / "thing.begun", until)
        note.begin([record])
        note._stop.set()
        note._pulse.join()
        began = json.loads(note.file.read_text())["began"]
        os.utime(note.file, (began + ran, began + ran))
        return Begun(note.file).left()

    now = time.time()
    assert left(ran=5.0, until=now + 100) == ([record], False)  # it crashed, long before the limit
    assert left(ran=30.0, until=now + 10) == ([record], True)  # slow, and out of time
    assert left(ran=100.0, until=now + 10) == ([record], False)  # nobody waits that long
    assert left(ran=30.0, until=float("inf")) == ([record], False)
    assert Begun(tmp_path / "thing.begun").left() == ([], False)
    (tmp_path / "thing.begun").write_text('{"began"')
    assert Begun(tmp_path / "thing.begun").left() == ([], False)


def test_a_note_is_replaced_in_place_and_goes(tmp_path):
    note = Begun(tmp_path / "thing.begun")
    note.begin([{"name": "x" * 1000}])
    note.begin([{"name": "y"}])
    assert Begun(note.file).left()[0] == [{"name": "y"}]
    note.clear()
    note.begin([{"name": "z"}])
    note.clear()
    assert not note.file.exists()
    assert note._pulse is None


def test_a_restart_is_the_same_command_that_resumes(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "execv", lambda *what: asked.append(what))
    monkeypatch.setattr(begun, "_close_on_exec", lambda descriptor: None)
    monkeypatch.setenv("GOKU_BENCH_RESTARTED", "")  # so that it is as before in the end
    monkeypatch.delenv("GOKU_BENCH_RESTARTED")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "bench", "run", "--only", "a", "b"])
    start = Start.of(False)
    begun.restart(5.0, start)
    assert asked == []  # this is pytest
    main = SimpleNamespace(__spec__=SimpleNamespace(name="bench.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    begun.restart(12.34 + begun.START_SECONDS, start)
    begun.restart(float("inf"), start)
    words = [sys.executable, "-m", "bench", "run", "--only", "a", "b", "--resume"]
    assert asked == [
        (sys.executable, [*words, "--limit", "12.3"]), (sys.executable, words)
    ]  # fmt: skip
    known = Start.of(True)  # as the new process sees it
    assert known.resume is False
    assert known.since == begun._PROCESS_BEGAN
    parsed = command.parser().parse_args([*words[3:], "--limit", "12.3"])
    assert (parsed.resume, parsed.limit, parsed.only) == (True, 12.3, ["a", "b"])


def test_the_command_comes_back_from_a_lost_context_and_from_a_kill(tmp_path):
    """In processes of their own, the second of which replaces itself."""
    code = f"""
import os, runpy, signal, sys, torch
from bench import timing, velocity_loss
from bench.cases import Peer
from bench.packs import Pack

lost = False
def bad(inputs):
    global lost
    lost = True
    raise RuntimeError({ILLEGAL!r})
def kills(inputs):
    os.kill(os.getpid(), signal.SIGKILL)
def synchronise(device):
    if lost:
        raise RuntimeError({ILLEGAL!r})
timing.synchronise = synchronise
small = velocity_loss.problem("latents", 64, Pack("one", ((1, 2, 3),)), torch.bfloat16)
velocity_loss.problems = lambda kind: [small]
velocity_loss.PEERS = [
    Peer("kills", lambda p, d: kills), Peer("bad", lambda p, d: bad),
    Peer("eager", lambda p, d: velocity_loss.eager),
]
execv = os.execv
def again(file, words):
    execv(sys.executable, [sys.executable, "-c", os.environ["CODE"], *words[3:]])
os.execv = again
sys.orig_argv = [sys.executable, "-m", "bench", *sys.argv[1:]]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""
    words = [sys.executable, "-c", code, "run", "velocity_loss", "--device", "cpu", "--seconds", "0",
             "--out", str(tmp_path)]  # fmt: skip
    given = {"cwd": harness.ROOT, "env": gpu_steps.environment() | {"CODE": code}}
    given["env"].pop("GOKU_BENCH_RESTARTED", None)
    first = subprocess.run(words, capture_output=True, text=True, **given)
    assert first.returncode == -signal.SIGKILL
    assert found(tmp_path) == []
    second = subprocess.run([*words, "--resume"], capture_output=True, text=True, **given)
    assert second.returncode == 0, second.stderr  # none of them is ours
    assert second.stdout.count("the command runs itself again") == 1
    assert [r[1:] for r in found(tmp_path)] == [
        (name, direction, status)
        for name, status in (("kills", "failed"), ("bad", "failed"), ("eager", "measured"))
        for direction in ("forward", "backward")
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["velocity_loss.jsonl"]


# ---- the block and the step ----

SETTING = block.Setting("tiny-test", Pack("two", ((2, 3, 4), (1, 2, 2))), block.PLAIN)


@pytest.mark.parametrize("call", [1, 4])
def test_a_block_that_takes_the_context_along_ends_its_setting(call, context, monkeypatch):
    """In its first call, which is judged, or once it is timed."""
    calls = []
    make = block.make_peer

    def maker(name, setting, device):
        module = make("eager", setting, device)
        if name == "goku fused":
            forward = module.forward

            def broken(*args):
                calls.append(0)
                context.lost = len(calls) == call
                if context.lost:
                    raise RuntimeError(ILLEGAL)
                return forward(*args)

            module.forward = broken
        return module

    monkeypatch.setattr(block, "make_peer", maker)
    marked = []
    rows = list(
        block.measure(SETTING, ["eager", "goku fused"], CPU, CEILINGS, seconds=0,
                      mark=lambda rows: lambda: marked.append([r.peer for r in rows]))
    )  # fmt: skip
    (row,) = rows
    assert (row.peer, row.status) == ("goku fused", "failed")
    assert row.extra == {begun.ENDED: True}
    assert ILLEGAL in row.note
    assert marked[:3] == [["eager", "goku fused"], ["eager", "goku fused"], ["goku fused"]]
    assert marked[-1] == ["goku fused"]


def test_a_step_that_takes_the_context_along_releases_nothing(context, monkeypatch):
    def gradients(self, batch):
        context.lost = True
        raise RuntimeError(ILLEGAL)

    monkeypatch.setattr(step.Run, "gradients", gradients)
    monkeypatch.setattr(step, "release", None)  # which asks the device
    setting = step.Setting("tiny-test", SETTING.pack, "full", "torch")
    row = step.measure(setting, CPU, CEILINGS, seconds=0)
    assert (row.status, row.extra) == ("failed", {begun.ENDED: True})


def test_only_what_is_asked_for_is_measured_and_noted_first(peers):
    peers += [peer("a"), peer("b")]
    (problem, *_) = velocity_loss.problems("cpu")
    marked = []

    def mark(rows):
        assert {(r.status, r.extra[begun.ENDED]) for r in rows} == {("failed", True)}
        return lambda: marked.append({(r.peer, r.direction) for r in rows})

    wanted = [("a", "backward"), ("b", "forward"), ("b", "backward")]
    rows = list(
        cases.measure(problem, peers, CPU, CEILINGS, seconds=0, wanted=wanted, mark=mark)
    )  # fmt: skip
    assert sorted((r.peer, r.direction) for r in rows) == sorted(wanted)
    b = {("b", "forward"), ("b", "backward")}
    assert marked == [{("a", "backward")}, b, b, {("a", "backward")}, {("b", "backward")}] + (
        [{("a", "backward")}, {("b", "backward")}] * (len(marked) // 2 - 2)
    )
