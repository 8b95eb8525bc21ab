"""The search for the longest sequence, on devices that are arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bench import harness, longest, timing
from bench.policy_runs import POLICIES


@given(
    lasting=st.integers(0, 40 * 2**30),
    per_token=st.integers(50_000, 4_000_000),
    room=st.integers(45 * 2**30, 140 * 2**30),
    wasted=st.floats(0, 0.08),
    first=st.integers(1_024, 500_000),
)
def test_what_is_found_fits_and_two_per_cent_more_does_not(
    lasting: int, per_token: int, room: int, wasted: float, first: int
) -> None:
    """Memory as the allocator has it: some of it lies between what is allocated, so that more is taken than is used."""
    tried = []

    def used(tokens: int) -> int:
        return lasting + per_token * tokens

    def trial(tokens: int) -> int | None:
        tried.append(tokens)
        return used(tokens) if used(tokens) * (1 + wasted) <= room else None

    # Within reach: ten trials go down to 1/292 of where they begin.
    within_reach = max(2 * longest.GRAIN, first // 200)
    assume(used(within_reach) * (1 + wasted) <= room)
    tokens, most = longest.longest(trial, room, first)
    assert most == used(tokens)
    assert used(tokens) * (1 + wasted) <= room
    assert tokens % longest.GRAIN == 0
    assert len(tried) == len(set(tried)) <= longest.MOST_TRIALS
    if len(tried) < longest.MOST_TRIALS:
        more = tokens * (1 + longest.CLOSE) + longest.GRAIN
        assert used(int(more)) * (1 + wasted) > room


def test_from_a_good_estimate_it_does_not_take_long() -> None:
    """As Goku-2B's blocks computed again on 80 GB: the estimate is within 10%, and 3% of the memory lies between."""
    room, lasting, per_token = 76 * 2**30, 38 * 2**30, 220_000
    for off in (0.9, 1.0, 1.1):
        tried: list[int] = []

        def trial(tokens: int, tried: list[int] = tried) -> int | None:
            tried.append(tokens)
            used = lasting + per_token * tokens
            return used if used * 1.03 <= room else None

        longest.longest(trial, room, int(0.9 * off * (room - lasting) / per_token))
        assert len(tried) <= 6


def test_it_ends_when_it_is_late() -> None:
    tried: list[int] = []

    def trial(tokens: int) -> int | None:
        tried.append(tokens)
        return 1000 * tokens if tokens < 50_000 else None

    tokens, _ = longest.longest(trial, 10**9, 100_000, is_late=lambda: True)
    assert tried == [99_840, 87_040, 43_520]  # what does not fit at all is no result
    assert tokens == 43_520


CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 8e14, "FLOP/s"), timing.Ceiling("copy", 4e12, "byte/s")
)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """80 GB, on which 90,000 tokens fit; a trial takes `trial` seconds of its clock, `now`."""
    state = SimpleNamespace(now=0.0, trial=10.0, tried=[], asked=[])

    def trial(tokens: int) -> int | None:
        state.tried.append(tokens)
        state.now += state.trial
        return 10**5 * tokens if tokens < 9e4 else None

    def free(device: torch.device) -> tuple[int, int]:
        state.asked.append("memory")
        return 76 * 2**30, 80 * 2**30

    monkeypatch.setattr(longest.time, "monotonic", lambda: state.now)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(longest.step, "release", lambda device: state.asked.append("release"))
    monkeypatch.setattr(longest, "try_tokens", lambda *_: trial)
    return state


def rows(**given: float) -> list[harness.Row]:
    return list(longest.measure("goku-2b", "full", torch.device("cpu"), CEILINGS, **given))


def steps_take(seconds: float, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that take so long on the card's clock; the tokens of each, once it is built."""
    ran: list[int] = []

    class Run:
        def __init__(self, setting: longest.step.Setting, device: torch.device) -> None:
            ran.append(setting.pack.tokens)

        def prepare(self) -> None:
            pass

        def step(self, batch: object) -> None:
            card.now += seconds

    monkeypatch.setattr(longest.step, "Run", Run)
    monkeypatch.setattr(longest.step.Batch, "draw", lambda *_: None)
    return ran


def test_what_was_found_is_there_before_the_clip_is_tried(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("fragments")

    monkeypatch.setattr(longest.step, "Run", no_room)
    (row,) = rows(seconds=1e9, deadline=1e9)
    assert row.status == "absent"
    assert 88_000 < row.extra["longest_tokens"] < 90_000
    assert row.note.endswith("tokens fit; no clip was timed")
    # What the ceilings took is given back before anybody asks what is free.
    assert card.asked[:2] == ["release", "memory"]


def test_the_clip_is_not_built_where_time_is_short(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longest.step, "Run", None)
    (row,) = rows(seconds=200.0, deadline=25.0)
    assert "a step on one clip of them is expected to take" in row.note
    assert row.note.endswith("; no clip was timed")
    assert 88_000 < row.extra["longest_tokens"] < 90_000  # nothing was saved for it
    assert "cut short" not in row.note


def test_a_shorter_clip_is_timed_where_there_is_time_for_that(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for 500 tokens: 180 s are needed for all, and less is left."""
    ran = steps_take(30.0, card, monkeypatch)
    monkeypatch.setattr(longest, "clip_seconds", lambda setting, _: setting.pack.tokens / 500)
    first, row = rows(seconds=1e9, deadline=120.0)
    assert (first.status, row.status) == ("absent", "measured")
    left = 120.0 - (card.now - 30.0)
    assert ran == [row.extra["clip_tokens"]]
    most = longest.SHARE_OF_REST * left * 500
    assert most - longest.GRAIN < ran[0] <= most
    assert row.extra["longest_tokens"] == first.extra["longest_tokens"] > 88_000
    assert row.shape["tokens"] == ran[0]
    assert row.extra["tokens_per_s"] == pytest.approx(ran[0] / 30)
    assert row.note.endswith(f"; one step on one clip of {ran[0]:,}")


@given(st.integers(1, 800), st.floats(0, 1000), st.floats(1e-9, 1e-7))
def test_the_longest_clip_within_a_time(grains: int, seconds: float, square: float) -> None:
    def needed(tokens: int) -> float:
        return 5.0 + square * tokens**2

    tokens = grains * longest.GRAIN
    found = longest.within(needed, tokens, seconds)
    assert found == 0 or needed(found) <= seconds
    assert found % longest.GRAIN == 0
    assert found <= tokens
    if found < tokens:
        assert needed(max(found + longest.GRAIN, longest.CLIP)) > seconds or tokens < longest.CLIP


def test_the_search_leaves_the_clip_the_time_that_it_needs(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the limit decides, not half of it: 94 s of 180 are there if the search was quick."""
    ran = steps_take(94.0, card, monkeypatch)
    monkeypatch.setattr(longest, "clip_seconds", lambda *_: 94.0 + longest.SPARE_SECONDS)
    _, row = rows(seconds=90.0, deadline=180.0)
    whole = len(card.tried)
    assert (row.status, row.timing.median_ms) == ("measured", 94e3)
    assert ran == [row.extra["longest_tokens"]] == [row.extra["clip_tokens"]]
    assert card.now <= 180.0 - longest.SPARE_SECONDS
    # With slower trials there are fewer, and the row says so.
    card.now, card.trial, card.tried[:] = 0.0, 20.0, []
    _, row = rows(seconds=90.0, deadline=180.0)
    assert len(card.tried) < whole
    assert row.status == "measured"
    assert "the search was cut short" in row.note
    assert card.now <= 180.0
    # The search alone may take its own time.
    card.now, card.tried[:] = 0.0, []
    rows(seconds=30.0, deadline=1e9)
    assert len(card.tried) < whole


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="not even 512 tokens fit into 1,000 bytes"):
        longest.longest(lambda tokens: None, 1000, 4096)


def test_packs_have_the_tokens_that_are_asked_for() -> None:
    assert longest.one_clip(20 * 512).tokens == 20 * 512
    assert longest.many_clips(40 * 512).lengths == (8192, 8192, 4096)
    assert longest.many_clips(16 * 512).lengths == (8192,)


def test_the_estimate_is_the_longest_that_it_says_fits() -> None:
    room = 76 * 2**30
    full, none = (longest.estimated("goku-2b", policy, room) for policy in ("full", "none"))
    assert 100_000 < full < 200_000
    assert none < full / 5
    parameters = 2_015_012_672
    for tokens, fits in ((full, True), (full + longest.GRAIN, False)):
        setting = longest.step.Setting("goku-2b", longest.one_clip(tokens), "full")
        assert (setting.memory(parameters).peak <= room) == fits


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert longest.main(["--policies", *POLICIES]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
