"""Timing: what counts, who comes when, and ceilings that are rates."""

import math
import time

import torch

from bench import timing

CPU = torch.device("cpu")


def test_percentiles():
    assert timing.summary([5, 1, 4, 2, 3, 6]) == timing.Timing(3.5, 2, 5, 6)
    assert timing.summary([3, 1]) == timing.Timing(2, 1, 3, 2)
    assert timing.summary([9, 1, 2]).median_ms == 2
    assert timing.summary([7]) == timing.Timing(7, 7, 7, 1)


def test_timing_counts_only_calls_after_the_warm_up():
    calls = []
    timed = timing.time_calls(lambda: calls.append(0), CPU, seconds=0, warm_up=2)
    assert len(calls) == 2 + timed.repeats
    assert timed.repeats == 3
    assert 0 <= timed.p20_ms <= timed.median_ms <= timed.p80_ms


def test_peers_take_turns_and_inputs_rotate():
    seen = []

    def call(name):
        return (lambda i: (name, i)), seen.append

    found = timing.interleaved(
        {"a": call("a"), "b": call("b")}, CPU, seconds=0, warm_up=1, min_rounds=4, copies=3
    )
    assert [name for name, _ in seen] == ["a", "b"] * 5
    assert [i for _, i in seen[::2]] == [0, 1, 2, 0, 1]
    assert {name: t.repeats for name, t in found.items()} == {"a": 4, "b": 4}


def test_slow_rounds_are_warmed_up_once(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_ROUND_SECONDS", 0.0)
    calls = []
    timed = timing.time_calls(lambda: calls.append(0), CPU, seconds=0, warm_up=5)
    assert len(calls) == 1 + timed.repeats


def test_nothing_to_time_takes_no_time():
    began = time.monotonic()
    assert timing.interleaved({}, CPU, seconds=30) == {}
    assert time.monotonic() - began < 5


def test_what_prepares_a_call_is_not_timed():
    def prepare(i):
        return sum(range(300_000))

    found = timing.interleaved({"": (prepare, lambda state: None)}, CPU, seconds=0)
    whole = timing.time_calls(lambda: prepare(0), CPU, seconds=0)
    assert found[""].median_ms < 0.2 * whole.median_ms


def test_copies_pass_twice_the_cache():
    cache = 60 * 2**20
    for size in (1, 10**6, 2**26, 2**27, 2**33):
        copies = timing.copies_past(size, cache)
        assert copies == timing.MAX_COPIES or copies * size > 2 * cache
        assert copies == 1 or (copies - 1) * size <= 2 * cache
    assert timing.copies_past(0, cache) == timing.MAX_COPIES
    assert timing.copies_past_cache(1, CPU) == 1


def test_ceilings_are_rates():
    product = timing.matmul_ceiling(CPU, torch.float32, size=64, seconds=0)
    copy = timing.copy_ceiling(CPU, size=2**16, seconds=0)
    assert (product.what, product.unit) == ("float32 matmul 64x64x64", "FLOP/s")
    assert (copy.what, copy.unit) == ("copy of 65536 bytes", "byte/s")
    assert math.isfinite(product.value)
    assert min(product.value, copy.value) > 0
    both = timing.Ceilings(product, copy)
    assert (both.of("FLOP"), both.of("byte")) == (product, copy)
