"""The verdict: right on cases whose answer is known, and failing when it should."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from goku.demo import score

Media = npt.NDArray[np.uint8]


def _item(seed: int, shape: tuple[int, int, int]) -> Media:
    """Smooth, distinct media: a 3 x 3 colour pattern per frame, blown up."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (1, 3, 3, 3)).astype(np.uint8)
    return np.rint(score.resize(coarse, shape) * 255).astype(np.uint8)


def _noisy(media: Media, sigma: float, seed: int = 0) -> Media:
    rng = np.random.default_rng(seed)
    return np.clip(media + rng.normal(0, sigma, media.shape), 0, 255).astype(np.uint8)


SHAPES = [(1, 48, 64), (1, 64, 48), (5, 32, 64), (9, 48, 48), (1, 48, 64), (5, 48, 64)]
TRAINING = [_item(seed, shape) for seed, shape in enumerate(SHAPES)]
RECONSTRUCTIONS = [_noisy(item, 4.0, 1) for item in TRAINING]


def _judge(samples: list[Media], owners: list[int], last: float = 0.3) -> dict[str, object]:
    return score.verdict(samples, owners, TRAINING, RECONSTRUCTIONS, first_loss=1.0, last_loss=last)


def _failed(result: dict[str, object]) -> list[str]:
    return [criterion["key"] for criterion in result["criteria"] if not criterion["passed"]]


def test_psnr_against_a_value_worked_out_by_hand() -> None:
    a = np.zeros((1, 2, 2, 3), np.uint8)
    b = np.full_like(a, 51)  # 51/255 = 0.2, error 0.04
    assert score.psnr(a, b) == pytest.approx(10 * math.log10(1 / 0.04), abs=1e-12)
    assert score.psnr(a.astype(np.float32), b / 255.0) == pytest.approx(score.psnr(a, b), abs=1e-12)
    assert score.psnr(b, b) == math.inf


def test_psnr_of_a_clip_pools_the_error() -> None:
    a = np.zeros((2, 2, 2, 3), np.uint8)
    b = a.copy()
    b[1] = 255  # mean squared error 1/2, while the mean of the frames' PSNR would be inf
    assert score.psnr(a, b) == pytest.approx(10 * math.log10(2), abs=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 2, 3), np.uint8),
        np.zeros((1, 2, 2, 4), np.uint8),
        np.zeros((1, 2, 2, 3), np.int64),
        np.full((1, 2, 2, 3), 1.5),
        np.full((1, 2, 2, 3), np.nan),
        np.zeros((0, 2, 2, 3), np.uint8),
    ],
)
def test_media_of_another_kind_are_refused(bad: npt.NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="media"):
        score.psnr(bad, bad)


def test_psnr_of_two_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        score.psnr(np.zeros((1, 2, 2, 3)), np.zeros((1, 2, 4, 3)))


@given(
    arrays.arrays(np.uint8, (3, 5, 7, 3)),
    st.tuples(st.integers(1, 6), st.integers(1, 11), st.integers(1, 14)),
)
@settings(max_examples=40, deadline=None)
def test_resize_stays_within_the_values_and_keeps_a_constant(
    media: Media, size: tuple[int, int, int]
) -> None:
    out = score.resize(media, size)
    assert out.shape == (*size, 3)
    assert out.min() >= media.min() / 255 - 1e-12
    assert out.max() <= media.max() / 255 + 1e-12
    flat = score.resize(np.full_like(media, 100), size)
    np.testing.assert_allclose(flat, 100 / 255, rtol=0, atol=1e-12)


def test_resize_shrinks_by_area_and_grows_linearly() -> None:
    ramp = np.zeros((1, 1, 6, 3), np.uint8)
    ramp[0, 0, :, :] = np.array([0, 30, 60, 90, 120, 150], np.uint8)[:, None]
    np.testing.assert_allclose(
        score.resize(ramp, (1, 1, 3))[0, 0, :, 0] * 255, [15, 75, 135], atol=1e-9
    )
    # 6 -> 4: each new pixel covers 1.5 old ones
    np.testing.assert_allclose(
        score.resize(ramp, (1, 1, 4))[0, 0, :, 0] * 255, [10, 50, 100, 140], atol=1e-9
    )
    two = ramp[:, :, :2]
    np.testing.assert_allclose(
        score.resize(two, (1, 1, 4))[0, 0, :, 0] * 255, [0, 7.5, 22.5, 30], atol=1e-9
    )
    # A photograph as a clip repeats itself.
    assert np.ptp(score.resize(ramp, (5, 1, 6)), axis=0).max() == 0.0


def test_a_sample_equal_to_an_item_is_nearest_to_it_whatever_its_shape() -> None:
    for index, item in enumerate(TRAINING):
        assert score.nearest(item, TRAINING) == index
        assert score.nearest(_noisy(item, 30.0), TRAINING) == index
        other = np.rint(score.resize(item, (1, 40, 40)) * 255).astype(np.uint8)
        assert score.nearest(other, TRAINING) == index
    assert score.nearest(TRAINING[0], [TRAINING[0], TRAINING[0]]) == 0
    with pytest.raises(ValueError, match="candidates"):
        score.nearest(TRAINING[0], [])


def test_the_mean_image_is_the_mean() -> None:
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((3, 8, 2, 3), 255, np.uint8)
    np.testing.assert_allclose(score.mean_image([black, white], (2, 4, 6)), 0.5, atol=1e-12)
    # error 0.25 everywhere
    assert score.mean_image_psnr(black, [black, white]) == pytest.approx(
        10 * math.log10(4), abs=1e-9
    )


def test_good_samples_pass_with_the_right_numbers() -> None:
    owners = [0, 1, 2, 3, 4, 5, 0, 1]
    samples = [_noisy(TRAINING[owner], 6.0, 9) for owner in owners]
    result = _judge(samples, owners)
    assert result["passed"] is True
    assert _failed(result) == []
    assert (result["samples"], result["captions"], result["nearest_fraction"]) == (8, 6, 1.0)
    expected = np.median([score.psnr(s, TRAINING[o]) for s, o in zip(samples, owners, strict=True)])
    assert result["psnr"] == pytest.approx(expected, abs=1e-12)
    baseline = np.median([score.mean_image_psnr(TRAINING[o], TRAINING) for o in owners])
    assert result["mean_image_psnr"] == pytest.approx(baseline, abs=1e-12)
    json.dumps(result, allow_nan=False)
    assert score.summary(result).startswith("PASS")
    assert "\n" not in score.summary(result)


def test_noise_fails() -> None:
    rng = np.random.default_rng(5)
    samples = [rng.integers(0, 256, item.shape).astype(np.uint8) for item in TRAINING]
    failed = _failed(_judge(samples, list(range(6))))
    assert {"nearest", "above_mean_image", "near_vae"} <= set(failed)


def test_the_mean_image_itself_fails() -> None:
    samples = [score.mean_image(TRAINING, item.shape[:3]) for item in TRAINING]
    result = _judge(samples, list(range(6)))
    assert "above_mean_image" in _failed(result)
    assert result["psnr"] == pytest.approx(result["mean_image_psnr"], abs=1e-9)


def test_good_pictures_of_another_caption_fail() -> None:
    # 0 and 4 have one shape: each is painted for the other's caption.
    result = _judge([TRAINING[4], TRAINING[0]] * 2 + [TRAINING[1]], [0, 4, 0, 4, 1])
    assert "nearest" in _failed(result)
    assert result["nearest_fraction"] == pytest.approx(0.2)
    assert score.summary(result).startswith("FAIL (")


def test_nearest_passes_at_exactly_four_in_five() -> None:
    samples = [TRAINING[k] for k in (0, 1, 2, 3)] + [TRAINING[0]]
    assert "nearest" not in _failed(_judge(samples, [0, 1, 2, 3, 4]))
    samples[3] = np.full_like(samples[3], 255) - samples[3]
    assert "nearest" in _failed(_judge(samples, [0, 1, 2, 3, 4]))


def test_blurred_samples_fail_against_a_better_vae() -> None:
    samples = [_noisy(item, 25.0) for item in TRAINING]  # about 20 dB, the VAE about 36
    assert _failed(_judge(samples, list(range(6)))) == ["near_vae"]


@pytest.mark.parametrize(("last", "holds"), [(0.5, True), (0.501, False), (math.nan, False)])
def test_the_loss_has_to_halve(last: float, holds: bool) -> None:
    result = _judge(RECONSTRUCTIONS, list(range(6)), last=last)
    assert ("loss" not in _failed(result)) is holds
    assert result["passed"] is holds


def test_too_few_captions_fail() -> None:
    assert _failed(_judge([RECONSTRUCTIONS[k] for k in (0, 1, 2)], [0, 1, 2])) == ["captions"]


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="owner 9"):
        _judge([TRAINING[0]], [9])
    with pytest.raises(ValueError, match="1 samples and 2 owners"):
        _judge([TRAINING[0]], [0, 1])
    with pytest.raises(ValueError, match="reconstructions"):
        score.verdict([TRAINING[0]], [0], TRAINING, [], first_loss=1, last_loss=0)
    with pytest.raises(ValueError, match="shapes"):
        _judge([TRAINING[0]], [2])
