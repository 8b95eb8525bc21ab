"""Contests with a made-up clock, and the trials of a row on a CPU with the reference as a kernel."""

import contextlib

import pytest
import torch

from bench import adaln_modulate, cases, trials
from bench.begun import ContextLost
from bench.packs import Pack
from goku_kernels.triton import configs


def clock_of(ms, calls):
    def clock(names, rounds):
        calls.append((tuple(sorted(names)), rounds))
        return {name: ms[name] for name in names}

    return clock


def test_the_slower_half_leaves_and_the_shipped_one_stays():
    calls = []
    ms = {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0, 4: 8.0, 5: 7.0, 6: 6.0, 7: 9.0}
    out = trials.contest(list(ms), clock_of(ms, calls), first=0)
    assert calls == [((0, 1, 2, 3, 4, 5, 6, 7), 5), ((0, 1, 2, 3), 10), ((0, 2, 3), 20)]
    assert out.order[0] == 3
    assert (out.ms[7], out.rounds[7], out.rounds[3]) == (9.0, 5, 20)


def test_noise_does_not_replace_what_is_shipped():
    ms = {0: 1.0, 1: 0.995, 2: 1.3}
    assert trials.contest(list(ms), clock_of(ms, []), first=0).order[0] == 0
    ms[1] = 0.98
    assert trials.contest(list(ms), clock_of(ms, []), first=0).order[0] == 1
    # One that cannot run does not take part.
    assert trials.contest([1, 2], clock_of(ms, []), first=0).order == [1, 2]
    assert trials.contest([], clock_of(ms, []), first=0).order == []


def test_when_time_is_up_what_is_known_decides():
    calls = []
    ms = {0: 2.0, 1: 1.0, 2: 3.0}
    out = trials.contest(list(ms), clock_of(ms, calls), first=0, enough=lambda: True)
    assert (len(calls), out.order[0]) == (1, 1)


def row(kernel, **config):
    return {"kernel": kernel, "size": 64, "dtypes": ["bfloat16"], "chip": 90, "config": config}


@pytest.fixture
def operator(monkeypatch):
    """adaln_modulate whose reference reads its configuration: 8 rows are wrong, 16 do not fit.

    It is as slow as its rows say, by a clock that looks at the configuration instead of the time.
    """
    from triton.runtime.errors import OutOfResources

    seen = []

    def function(backend):
        def run(inputs):
            found = {r["kernel"]: r["config"].get("rows") for r in configs.table("adaln_modulate")}
            seen.append(found)
            if found["forward"] == 16:
                raise OutOfResources(300_000, 232_448, "shared memory")
            outs = adaln_modulate.eager(inputs)
            return tuple(x * (2 if found["forward"] == 8 else 1) for x in outs)

        return run

    def interleaved(calls, device, *, seconds, warm_up, min_rounds, copies):
        times = {}
        for name, (prepare, run) in calls.items():
            run(prepare(0))
            times[name] = trials.timing.Timing(10.0 / seen[-1]["forward"], 0, 0, min_rounds)
        return times

    packs = [Pack(name, ((1, 2, 3),)) for name in trials.JUDGED_ON]
    monkeypatch.setattr(adaln_modulate, "function", function)
    monkeypatch.setattr(trials, "GPU_PACKS", packs)
    monkeypatch.setattr(trials.timing, "interleaved", interleaved)
    return seen


def test_the_fastest_right_configuration_wins_and_the_truth_is_computed_once(operator, monkeypatch):
    drawn, made = [], []
    real = adaln_modulate.problem

    def problem(*args, **options):
        made.append(args)
        found = real(*args, **options)
        object.__setattr__(found, "draw", count(found.draw, drawn))
        return found

    def count(draw, into):
        def counted(device, seed):
            into.append(seed)
            return draw(device, seed)

        return counted

    truths = []
    known = cases.Truths.__init__

    def init(self, problem, inputs):
        truths.append(problem.pack.name)
        known(self, problem, inputs)

    monkeypatch.setattr(adaln_modulate, "problem", problem)
    monkeypatch.setattr(cases.Truths, "__init__", init)
    rows = [row("forward", rows=1), row("forward_specialised", rows=1), row("backward", rows=2)]
    begun = []
    trial = trials.Trials("adaln_modulate", torch.device("cpu"))
    configs_ = [{"rows": n} for n in (1, 2, 4, 8, 16)]
    out = trial.row(rows, rows[0], 64, "bfloat16", configs_, begun=begun.append)
    assert out.order[0] == 2  # 4 rows: 8 are faster and wrong, 16 do not fit
    assert out.failed[3].startswith("wrong on 64K, one clip: output 0")
    assert "out of resource: shared memory" in out.failed[4]
    assert begun[:5] == configs_
    assert {"rows": 16} not in begun[5:]  # what failed does not run again
    # What would run in a forward's place is left out; other kernels keep their rows.
    assert all(found.keys() == {"forward", "backward"} for found in operator)
    assert {found["backward"] for found in operator} == {2}
    # Inputs are drawn once a pack, and both rows of this width share them and the truth.
    trial.row(rows, rows[2], 64, "bfloat16", [{"rows": 1}, {"rows": 4}])
    assert len(drawn) == len(made) == 2
    assert truths == list(trials.JUDGED_ON)


@pytest.mark.parametrize(
    ("rows_without", "rows_with", "unused", "order"),
    [
        (4, 2, False, [0, 1]),  # slower
        (2, 4, False, [1, 0]), (2, 4, True, [1, 0]),
        (4, 4, False, [1, 0]), (4, 4, True, [0, 1]),  # no gain: as it is
        (2, 16, False, [0]), (2, 8, False, [0]),  # it cannot run, or is wrong
    ],
)  # fmt: skip
def test_a_kernel_is_timed_beside_those_whose_place_it_takes(
    rows_without, rows_with, unused, order, operator, monkeypatch
):
    """The faster row of "forward" that is used runs, as attention's specialised one does."""
    real = configs.table

    def table(op):
        found = [r for r in real(op) if not r.get("unused")]
        return [r for r in found if r["size"] == 32] or found

    special = {**row("forward", rows=rows_with), "size": 32} | ({"unused": True} if unused else {})
    rows = [row("forward", rows=rows_without), special]
    overridden = trials.overridden

    @contextlib.contextmanager
    def chosen(op, rows):
        nonlocal real
        with overridden(op, rows):
            real = configs.table
            configs.table = table
            try:
                yield
            finally:
                configs.table = real

    monkeypatch.setattr(trials, "overridden", chosen)
    begun = []
    trial = trials.Trials("adaln_modulate", torch.device("cpu"))
    out = trial.rivals(rows, special, 64, "bfloat16", begun=begun.append)
    assert out.order == order
    assert set(out.failed) == {0, 1} - set(order)
    assert begun[:2] == [{}, special["config"]]


def test_one_that_takes_the_context_along_ends_the_contest(operator, monkeypatch):
    """Whoever began last did it; 16 rows only fail."""
    lost = []

    def synchronise(device):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    real = adaln_modulate.function

    def function(backend):
        inner = real(backend)

        def run(inputs):
            if {r["config"]["rows"] for r in configs.table("adaln_modulate")} == {32}:
                lost.append(0)
            synchronise(None)
            return inner(inputs)

        return run

    monkeypatch.setattr(adaln_modulate, "function", function)
    monkeypatch.setattr(trials.timing, "synchronise", synchronise)
    rows, begun = [row("forward", rows=1)], []
    trial = trials.Trials("adaln_modulate", torch.device("cpu"))
    with pytest.raises(ContextLost, match="illegal memory access"):
        trial.row(rows, rows[0], 64, "bfloat16", [{"rows": n} for n in (1, 16, 32, 4)],
                  begun=begun.append)  # fmt: skip
    assert begun == [{"rows": 1}, {"rows": 16}, {"rows": 32}]


def test_a_backward_is_timed_without_its_forward(operator, monkeypatch):
    rows = [row("forward", rows=1), row("backward", rows=2)]
    trial = trials.Trials("adaln_modulate", torch.device("cpu"))
    trial.row(rows, rows[1], 64, "bfloat16", [{"rows": 1}, {"rows": 4}, {"rows": 2}])
    # One forward a pack for all backwards, and one for the verdict on the winner.
    assert len(operator) == 4


def test_attention_is_judged_on_shorter_samples():
    assert {p.name for p in trials.packs("varlen_attention")} == set(trials.JUDGED_SHORT)
    assert {p.name for p in trials.packs("adaln_modulate")} == set(trials.JUDGED_ON)
