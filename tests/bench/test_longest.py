"""The search for the longest sequence, on devices that are arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import longest
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

    tokens, most = longest.longest(trial, room, first)
    assert most == used(tokens)
    assert used(tokens) * (1 + wasted) <= room
    assert tokens % longest.GRAIN == 0
    assert len(tried) == len(set(tried)) <= longest.MOST_TRIALS
    if len(tried) < longest.MOST_TRIALS:
        more = tokens * (1 + longest.CLOSE) + longest.GRAIN
        assert used(int(more)) * (1 + wasted) > room
    # From within a factor of two, as estimates are, it does not take long.
    largest = (room / (1 + wasted) - lasting) / per_token
    if 0.5 * largest < first < 2 * largest and largest > 20 * longest.GRAIN:
        assert len(tried) <= 8


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
