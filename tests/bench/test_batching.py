"""How many short calls lie between two events, and what one of them takes, by a made-up clock."""

import pytest
import torch

from bench import batching, cases, harness, timing
from bench.timing import Timing

GPU = torch.device("cuda")  # nothing is asked of it here
OVERHEAD_MS = 0.003  # of two events


@pytest.mark.parametrize(
    ("ms", "calls"),
    [(0.011, 28), (0.3, 1), (0.299, 2), (0.1, 3), (1.0, 1), (500.0, 1), (1e-9, 64), (0.0, 64)],
)
def test_short_calls_are_many_and_long_ones_alone(ms, calls):
    assert batching.calls_together(ms) == calls
    assert calls in (1, 64) or calls * ms >= batching.TOGETHER_MS


def clock(kernels, log):
    """As `timing.interleaved` on a GPU: what ran, and the two events around it."""

    def interleaved(calls, device, *, seconds, copies, min_rounds=3):
        found = {}
        for name, (prepare, run) in calls.items():
            total = 0
            for r in range(min_rounds):
                kept = run(prepare(r % copies))
                total = len(kept) if isinstance(kept, list) else 1
            ms = OVERHEAD_MS + total * kernels[name]
            log.append((name, total, seconds))
            found[name] = Timing(ms, ms * 0.9, ms * 1.1, min_rounds)
        return found

    return interleaved


def test_every_peer_is_called_as_often_and_the_time_is_one_calls(monkeypatch):
    log = []
    kernels = {"ours": 0.011, "eager": 0.05}
    monkeypatch.setattr(timing, "interleaved", clock(kernels, log))
    calls = {name: (lambda i: i, lambda state: state) for name in kernels}
    found = batching.timed(calls, GPU, seconds=0.5, copies=7)
    # Alone the fastest seems to take 14 us: 22 of them are 0.3 ms.
    assert log == [("ours", 1, 0.0), ("eager", 1, 0.0), ("ours", 22, 0.5), ("eager", 22, 0.5)]
    for name, each in found.items():
        assert each.calls == 22
        assert each.timing.median_ms == pytest.approx(kernels[name] + OVERHEAD_MS / 22)
        assert each.timing.p20_ms == pytest.approx(0.9 * each.timing.median_ms)
        assert each.timing.p80_ms == pytest.approx(1.1 * each.timing.median_ms)
        assert each.timing.repeats == 3


def test_slow_calls_are_not_measured_twice(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "interleaved", clock({"ours": 60.0, "eager": 110.0}, log))
    calls = {name: (lambda i: i, lambda state: state) for name in ("ours", "eager")}
    found = batching.timed(calls, GPU, seconds=0.5, copies=7)
    assert [(name, total) for name, total, _ in log] == [("ours", 1), ("eager", 1)]
    assert {name: (each.calls, each.timing.repeats) for name, each in found.items()} == {
        "ours": (1, 3), "eager": (1, 3)
    }  # fmt: skip
    assert found["ours"].timing.median_ms == pytest.approx(60 + OVERHEAD_MS)
    log.clear()  # three rounds of both are 0.51 s: for a whole second there are more
    batching.timed(calls, GPU, seconds=1.0, copies=7)
    assert len(log) == 4


def test_a_perfect_kernel_reads_nearly_the_ceiling(monkeypatch):
    """33 MB at 3 TB/s are 11 us: alone between two events it read 79% of the ceiling."""
    ceiling = timing.Ceiling("copy", 3e12, "byte/s")
    perfect = 1e3 * 33e6 / ceiling.value
    monkeypatch.setattr(timing, "interleaved", clock({"ours": perfect}, []))
    found = batching.timed({"ours": (lambda i: i, lambda i: i)}, GPU, seconds=0, copies=9)["ours"]

    def percent(timed):
        return harness.Row(
            name="x", case="", shape={}, dtype="", work=33e6, ceiling=ceiling, sources=(), timing=timed
        ).percent_of_ceiling  # fmt: skip

    alone = perfect + OVERHEAD_MS
    assert percent(Timing(alone, alone, alone, 1)) < 80
    assert 98 < percent(found.timing) < 100


def test_calls_go_round_all_copies_and_keep_what_they_return():
    prepared, running = [], []
    call = (lambda i: prepared.append(i) or i, lambda state: running.append(state) or [state])
    prepare, run = batching.several(call, 3, 7)
    kept = [run(prepare(i)) for i in range(7)]
    assert prepared == running == [i % 7 for i in range(21)]
    assert kept[2] == [[6], [0], [1]]
    assert len({id(x) for each in kept for x in each}) == 21  # nothing was freed for the next


def test_elsewhere_one_call_is_timed(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "interleaved", clock({"a": 0.001}, log))
    (found,) = batching.timed({"a": (lambda i: i, lambda i: i)}, torch.device("cpu"), seconds=1,
                              copies=1).values()  # fmt: skip
    assert (found.calls, log) == (1, [("a", 1, 1)])
    assert batching.timed({}, GPU, seconds=1, copies=1) == {}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rows_say_how_many_calls_there_were(direction, monkeypatch):
    """Backwards too: each call has a forward of its own, on a copy of its own."""
    from bench import velocity_loss
    from bench.packs import Pack

    ceilings = timing.Ceilings(
        timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
    )
    small = velocity_loss.tuning(64, torch.bfloat16, Pack("one", ((1, 2, 3),)))
    monkeypatch.setattr(batching, "calls_together", lambda ms: 5)
    real = batching.timed

    def timed(calls, device, **options):
        monkeypatch.setattr(timing, "interleaved", clock({"a": 0.01}, []))
        return real(calls, GPU, **options)

    monkeypatch.setattr(cases.batching, "timed", timed)
    listed = [cases.Peer("a", lambda p, d: velocity_loss.eager)]
    rows = list(cases.measure(small, listed, torch.device("cpu"), ceilings, seconds=0))
    (row,) = (r for r in rows if r.direction == direction)
    assert row.extra == {"calls": 5}
    assert row.timing.median_ms == pytest.approx((OVERHEAD_MS + 5 * 0.01) / 5)
