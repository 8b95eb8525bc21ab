"""The search for the longest sequence, on devices that are arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bench import longest, timing
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


def test_what_was_found_is_there_before_the_clip_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = timing.Ceilings(
        timing.Ceiling("matmul", 8e14, "FLOP/s"), timing.Ceiling("copy", 4e12, "byte/s")
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (76 * 2**30, 80 * 2**30))
    monkeypatch.setattr(longest, "try_tokens", lambda *_: lambda n: 10**5 * n if n < 9e4 else None)

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("fragments")

    monkeypatch.setattr(longest.step, "Run", no_room)
    device = torch.device("cpu")
    (row,) = longest.measure("goku-2b", "full", device, ceilings, 1e9)
    assert row.status == "absent"
    assert 88_000 < row.extra["longest_tokens"] < 90_000
    assert "was not run" in row.note
    # Where it would take too long it is not even built.
    monkeypatch.setattr(longest.step, "Run", None)
    assert len(list(longest.measure("goku-2b", "full", device, ceilings, 1.0))) == 1


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
