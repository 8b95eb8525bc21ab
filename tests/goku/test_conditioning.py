"""Which frames are given, where they go in a latent, and guidance over text and image."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.conditioning import (
    ConditioningConfig,
    choose_given,
    condition_latent,
    drop_rates,
    drops_both,
    guided_pair,
    latent_index,
)
from goku.config import ConfigError, parse
from goku.flow import FlowConfig, drop_text, guided
from goku.random import Purpose, uniform

C, H, W = 3, 2, 4


def _latents(*indices: int) -> dict[int, torch.Tensor]:
    """A latent of one frame for each index, all values of all of them different."""
    size = C * H * W
    return {i: (100.0 * (i + 1) + torch.arange(size)).view(C, 1, H, W) for i in indices}


# ---- condition_latent


def test_the_first_frame_alone_is_broadcast_over_time_as_in_the_paper() -> None:
    first = _latents(0)[0]
    out = condition_latent({0: first}, (C, 4, H, W))
    assert out.shape == (C + 1, 4, H, W)
    assert torch.equal(out[:C], first.expand(C, 4, H, W))
    assert torch.equal(out[C, 0], torch.ones(H, W))
    assert torch.equal(out[C, 1:], torch.zeros(3, H, W))


def test_the_last_frame_alone() -> None:
    last = _latents(3)[3]
    out = condition_latent({3: last}, (C, 4, H, W))
    assert torch.equal(out[:C], last.expand(C, 4, H, W))
    assert out[C, :, 0, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("times", "shown"), [(4, [0, 0, 3, 3]), (5, [0, 0, 0, 4, 4]), (2, [0, 1])])
def test_first_and_last_meet_in_the_middle_where_the_earlier_wins(
    times: int, shown: list[int]
) -> None:
    latents = _latents(0, times - 1)
    out = condition_latent(latents, (C, times, H, W))
    for time, index in enumerate(shown):
        assert torch.equal(out[:C, time], latents[index][:, 0])
    assert out[C, :, 0, 0].tolist() == [1] + [0] * (times - 2) + [1]


def test_nothing_given_is_zeros() -> None:
    out = condition_latent({}, (C, 3, H, W))
    assert torch.equal(out, torch.zeros(C + 1, 3, H, W))


def test_a_frame_in_one_latent_frame() -> None:
    out = condition_latent(_latents(0), (C, 1, H, W))
    assert torch.equal(out[:C], _latents(0)[0])
    assert torch.equal(out[C:], torch.ones(1, 1, H, W))


@given(
    times=st.integers(1, 9), data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_any_set_of_frames_against_a_search(times: int, data: Any, dtype: torch.dtype) -> None:
    indices = data.draw(st.lists(st.integers(0, times - 1), unique=True, min_size=1))
    latents = {i: x.to(dtype) for i, x in _latents(*indices).items()}  # in any order
    out = condition_latent(latents, (C, times, H, W))
    assert out.dtype == dtype
    for time in range(times):
        # Outwards from `time`, the earlier of a pair first.
        order = itertools.chain.from_iterable((time - d, time + d) for d in range(times))
        nearest = next(i for i in order if i in latents)
        assert torch.equal(out[:C, time], latents[nearest][:, 0])
        assert torch.equal(out[C, time], torch.full((H, W), float(time in latents), dtype=dtype))


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (_latents(4), r"given has latent frame 4; allowed: 0 to 3"),
        ({-1: _latents(0)[0]}, r"given has latent frame -1; allowed: 0 to 3"),
        (
            {1: torch.zeros(C, 2, H, W)},
            r"given\[1\] has shape \(3, 2, 2, 4\); allowed is \(3, 1, 2",
        ),
        (
            {1: torch.zeros(C, 1, W, H)},
            r"given\[1\] has shape \(3, 1, 4, 2\); allowed is \(3, 1, 2",
        ),
        ({1: torch.zeros(C + 1, 1, H, W)}, r"given\[1\] has shape \(4, 1, 2, 4\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    latents: dict[int, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        condition_latent(latents, (C, 4, H, W))


# ---- latent_index


@pytest.mark.parametrize(
    ("frame", "index"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (-1, 2), (-4, 2), (-5, 1), (-9, 0)]
)
def test_latent_index(frame: int, index: int) -> None:
    assert latent_index(frame, 9) == index


@given(st.integers(0, 30))
def test_latent_frames_hold_one_and_then_four(k: int) -> None:
    frames = 4 * k + 1
    held = [latent_index(frame, frames) for frame in range(frames)]
    assert held == [0] + [i for i in range(1, k + 1) for _ in range(4)]
    assert [latent_index(frame - frames, frames) for frame in range(frames)] == held


@pytest.mark.parametrize(
    ("frame", "frames", "message"),
    [
        (9, 9, "frame is 9; allowed with 9 frames: -9 to 8"),
        (-10, 9, "frame is -10"),
        (0, 8, "frames is 8; allowed: 4k"),
        (0, -3, "frames is -3"),
    ],
)
def test_frames_that_are_not_there(frame: int, frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_index(frame, frames)


# ---- choose_given


@pytest.mark.parametrize(
    "weights",
    [
        {"drop": 0.1},
        {"first": 0.8, "both": 0.2, "drop": 0.1},
        {"first": 3, "last": 1, "both": 2, "drop": 0.35},
        {"first": 0, "last": 1, "drop": 0.0},
        {"drop": 1.0},
        {"first": 0.8, "both": 0.2, "drop": 0.1, "drop_both": 0.0},
        {"drop": 0.2, "drop_both": 0.3},
    ],
)
def test_rates_over_twenty_thousand_positions(weights: dict[str, float]) -> None:
    config = ConditioningConfig(**weights)
    count = 20_000
    chosen = choose_given(config, 7, range(count), [5] * count)
    total = config.first + config.last + config.both
    given = (1 - config.drop_both) * (1 - config.drop)
    expected = {
        (): 1 - given,
        (0,): given * config.first / total,
        (-1,): given * config.last / total,
        (0, -1): given * config.both / total,
    }
    assert set(chosen) <= set(expected)
    for which, rate in expected.items():
        # Five standard deviations of a binomial; exactly none and all at the ends.
        spread = 5 * math.sqrt(count * rate * (1 - rate))
        assert abs(chosen.count(which) - count * rate) <= spread + 1e-6


def test_the_choice_is_independent_of_the_drop_and_of_other_positions() -> None:
    weights = {"first": 1.0, "last": 1.0, "both": 1.0, "drop_both": 0.0}
    positions = list(range(300))
    frames = [5, 9, 1] * 100
    free = choose_given(ConditioningConfig(**weights, drop=0.0), 3, positions, frames)
    half = choose_given(ConditioningConfig(**weights, drop=0.5), 3, positions, frames)
    for ours, theirs, count in zip(half, free, frames, strict=True):
        assert (theirs == ()) == (count == 1)  # an image is never given itself
        assert ours in ((), theirs)
    assert {(0,), (-1,), (0, -1), ()} == set(half)
    config = ConditioningConfig(**weights, drop=0.5)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = choose_given(config, 3, [positions[i] for i in order], [frames[i] for i in order])
    assert mixed == [half[i] for i in order]
    assert choose_given(config, 4, positions, frames) != half
    assert choose_given(config, 3, [], []) == []


def test_elements_zero_to_two_of_their_purpose() -> None:
    """By hand, so that no later change moves what a run of today was given."""
    config = ConditioningConfig(first=1.0, last=2.0, both=1.0, drop=0.25, drop_both=0.25)
    # What runs were given before there was drop_both.
    before = ConditioningConfig(first=1.0, last=2.0, both=1.0, drop=0.25, drop_both=0.0)
    seen = set()
    for position in range(50):
        pick, drop, both = uniform(11, position, 3, Purpose.CONDITION).tolist()
        wanted: tuple[int, ...] = (0,) if pick < 0.25 else (-1,) if pick < 0.75 else (0, -1)
        wanted = () if drop < 0.25 else wanted
        assert choose_given(before, 11, [position], [5]) == [wanted]
        assert drops_both(before, 11, [position], [5]) == [False]
        assert choose_given(config, 11, [position], [5]) == [() if both < 0.25 else wanted]
        assert drops_both(config, 11, [position], [5]) == [both < 0.25]
        assert drops_both(config, 11, [position], [1]) == [False]  # an image keeps its text
        seen.add((wanted == (), both < 0.25))
    assert len(seen) == 4


def test_both_are_dropped_often_enough_to_be_learned() -> None:
    """The velocity that guidance starts from, at the rate of its source, not at 0.1 * 0.1."""
    count = 20_000
    dropped = drops_both(ConditioningConfig(), 7, range(count), [5] * count)
    assert abs(sum(dropped) - 0.05 * count) <= 5 * math.sqrt(count * 0.05 * 0.95)


@pytest.mark.parametrize(
    ("weights", "text_drop"),
    [({}, 0.1), ({"drop": 1 / 18, "drop_both": 4 / 85}, 1 / 18), ({"drop": 0.4}, 0.2)],
)
def test_rates_of_what_is_dropped(weights: dict[str, float], text_drop: float) -> None:
    """As training drops, over twenty thousand clips."""
    config, count = ConditioningConfig(**weights), 20_000
    positions, frames = range(count), [5] * count
    given = choose_given(config, 7, positions, frames)
    both = drops_both(config, 7, positions, frames)
    text = drop_text(FlowConfig(text_drop=text_drop), 7, positions).tolist()
    lost = [(not g, t or b) for g, t, b in zip(given, text, both, strict=True)]
    kinds = [(True, False), (False, True), (True, True)]
    for kind, rate in zip(kinds, drop_rates(config, text_drop), strict=True):
        assert abs(lost.count(kind) - count * rate) <= 5 * math.sqrt(count * rate * (1 - rate))
    if text_drop == 1 / 18:
        assert drop_rates(config, text_drop) == pytest.approx((0.05, 0.05, 0.05), abs=1e-12)


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="frames has 1 entries; allowed is one per position, here"):
        choose_given(ConditioningConfig(), 0, [1, 2], [5])
    with pytest.raises(ValueError, match="frames has 3 entries"):
        drops_both(ConditioningConfig(), 0, [1, 2], [5, 5, 5])


# ---- the config


@pytest.mark.parametrize(
    ("weights", "frames", "usual"),
    [
        ({}, (0,), (0,)),
        ({"first": 0, "last": 1}, (-1,), (-1,)),
        ({"first": 0, "both": 1}, (0, -1), (0, -1)),
        ({"first": 0.8, "both": 0.2}, (0, -1), (0,)),
        ({"first": 1, "last": 1}, (0, -1), (0,)),
        ({"first": 0.2, "last": 0.3, "both": 0.5}, (0, -1), (0, -1)),
    ],
)
def test_frames_and_the_usual_choice(
    weights: dict[str, float], frames: tuple[int, ...], usual: tuple[int, ...]
) -> None:
    config = ConditioningConfig(**weights)
    assert (config.frames, config.usual) == (frames, usual)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": -0.1}, "first is -0.1; allowed: finite numbers >= 0"),
        ({"last": float("nan")}, "last is nan"),
        ({"both": float("inf")}, "both is inf"),
        ({"first": 0}, "first, last and both are all 0; allowed: at least one above 0"),
        ({"drop": 1.01}, r"drop is 1.01; allowed: \[0, 1\]"),
        ({"drop": float("nan")}, "drop is nan"),
        ({"drop_both": -0.1}, r"drop_both is -0.1; allowed: \[0, 1\]"),
    ],
)
def test_bad_values_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditioningConfig(**change)
    with pytest.raises(ConfigError, match="conditioning"):
        parse(ConditioningConfig, change, where="conditioning")


# ---- guidance


def _three(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(7, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in "abc"
    )


@settings(max_examples=30)
@given(st.floats(-3, 10), st.floats(-3, 10))
def test_guidance_is_the_published_sum(text_scale: float, image_scale: float) -> None:
    none, image, both = _three()
    out = guided_pair(none, image, both, text_scale, image_scale)
    wanted = none + image_scale * (image - none) + text_scale * (both - image)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_equal_scales_need_no_image_and_ones_are_exact() -> None:
    none, image, both = _three(torch.float32)
    for scale in (0.0, 1.0, 2.5):
        wanted = guided(both, none, scale)
        assert torch.equal(guided_pair(none, None, both, scale, scale), wanted)
        assert torch.equal(guided_pair(none, image, both, scale, scale), wanted)
    assert torch.equal(guided_pair(none, None, both, 1, 1), both)


def test_low_precision_is_combined_in_fp32_and_rounded_once() -> None:
    none, image, both = _three(torch.bfloat16)
    out = guided_pair(none, image, both, 7.5, 1.5)
    assert out.dtype == torch.bfloat16
    exact = guided_pair(none.double(), image.double(), both.double(), 7.5, 1.5)
    # Half a unit in the last of bf16's 8 bits, and fp32's rounding of values below 50 beside it.
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_guidance_refuses_what_does_not_fit() -> None:
    none, image, both = _three()
    with pytest.raises(ValueError, match="image is None; allowed with equal scales alone"):
        guided_pair(none, None, both, 5, 2)
    with pytest.raises(ValueError, match=r"image has shape \(1, 3\); allowed is that of both"):
        guided_pair(none, image[:1], both, 5, 2)
    with pytest.raises(ValueError, match=r"none has shape \(1, 3\); allowed is that of both"):
        guided_pair(none[:1], image, both, 5, 2)
    with pytest.raises(ValueError, match="shape"):
        guided_pair(none[:1], None, both, 2, 2)
