"""The demo's verdict in numbers: does a sample look like the item its caption names?

Everything here is a pure function of pixels. Media are `(T, H, W, 3)` arrays, uint8 or float in
[0, 1]; a photograph has T = 1. All arithmetic is fp64.

Three yardsticks stand beside a sample's PSNR to its own item: the *mean image* (what a model that
ignores the caption could do best in squared error), the *reconstruction* (what the VAE loses before
the transformer sees anything), and the *nearest item* among all training media.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "COMMON_GRID",
    "mean_image",
    "mean_image_psnr",
    "nearest",
    "psnr",
    "resize",
    "summary",
    "verdict",
]

Media = npt.NDArray[Any]

# (frames, height, width) at which items of different shapes are compared. Small enough that a
# half-pixel shift from a crop does not decide, large enough to tell the demo's ten items apart.
COMMON_GRID = (4, 32, 32)

MIN_CAPTIONS = 4
MIN_NEAREST = 0.80
MIN_ABOVE_MEAN_IMAGE_DB = 3.0
MAX_BELOW_VAE_DB = 6.0
MAX_LOSS_RATIO = 0.5


def psnr(a: Media, b: Media) -> float:
    """Peak signal-to-noise ratio in dB of two media of one shape, peak 1; inf when they are equal.

    The squared error is averaged over frames, rows, columns and channels together (so a clip is
    not the mean of its frames' PSNR).

    Raises:
        ValueError: the shapes differ, or a value is not uint8 or a finite float in [0, 1].
    """
    x, y = _unit(a), _unit(b)
    if x.shape != y.shape:
        raise ValueError(f"psnr: shapes {x.shape} and {y.shape} differ; resize one first")
    error = float(np.mean((x - y) ** 2))
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def resize(media: Media, size: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """`media` at `size` = (frames, height, width), fp64 in [0, 1], aspect ratio not kept.

    Per axis: the area average when shrinking, linear interpolation between pixel centres when
    growing. A photograph resized to several frames repeats itself.
    """
    x = _unit(media)
    for axis, length in enumerate(size):
        if length < 1:
            raise ValueError(f"resize: size {size}: every length must be at least 1")
        if length != x.shape[axis]:
            weights = _weights(x.shape[axis], length)
            x = np.moveaxis(np.tensordot(weights, x, axes=(1, axis)), 0, axis)
    return np.clip(x, 0.0, 1.0)  # weights sum to 1 only to rounding


def nearest(sample: Media, candidates: Sequence[Media]) -> int:
    """Index of the candidate with the highest PSNR to `sample`; the first of equals.

    Sample and candidates are all brought to `COMMON_GRID` first, whatever their shapes, so that a
    candidate gains nothing from having the sample's resolution or length.
    """
    if not candidates:
        raise ValueError("nearest: candidates is empty; there must be at least one")
    small = resize(sample, COMMON_GRID)
    return int(np.argmax([psnr(small, resize(item, COMMON_GRID)) for item in candidates]))


def mean_image(training: Sequence[Media], size: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """The mean over the training media, each resized to `size` = (frames, height, width)."""
    if not training:
        raise ValueError("mean_image: training is empty; there must be at least one item")
    total = np.zeros((*size, 3))
    for item in training:
        total += resize(item, size)
    return total / len(training)


def mean_image_psnr(item: Media, training: Sequence[Media]) -> float:
    """PSNR of the mean image, made at the item's own size, to the item, in dB."""
    frames, height, width = item.shape[:3]
    return psnr(mean_image(training, (frames, height, width)), item)


def verdict(
    samples: Sequence[Media],
    owners: Sequence[int],
    training: Sequence[Media],
    reconstructions: Sequence[Media],
    *,
    first_loss: float,
    last_loss: float,
) -> dict[str, Any]:
    """Judge generated media against the training media.

    Args:
        samples: generated media; `samples[i]` has the shape of `training[owners[i]]`.
        owners: for each sample the index of the item whose caption it was given.
        training: all training media, as the VAE saw them (after resize and crop).
        reconstructions: the VAE's decoding of each training item, same order and shapes.
        first_loss, last_loss: loss on the fixed (sample, noise, t) before and after training.

    Returns:
        A JSON-able dict: `passed`; `criteria`, a list of {key, label, value, limit, text, passed};
        the medians `psnr`, `mean_image_psnr`, `vae_psnr` (dB, each over the samples, with each
        sample's own item); `nearest_fraction`; `captions`; `samples`; `loss_first`, `loss_last`;
        and `per_sample`, a list of {owner, nearest, psnr, mean_image_psnr, vae_psnr}.

    Raises:
        ValueError: lists of unequal length, an owner out of range, or a shape that differs.
    """
    if len(samples) != len(owners) or not samples:
        raise ValueError(f"verdict: {len(samples)} samples and {len(owners)} owners; need as many")
    if len(training) != len(reconstructions):
        raise ValueError(
            f"verdict: {len(training)} training items and {len(reconstructions)} reconstructions"
        )
    for owner in owners:
        if not 0 <= owner < len(training):
            raise ValueError(f"verdict: owner {owner} is not in 0..{len(training) - 1}")

    baseline = {owner: mean_image_psnr(training[owner], training) for owner in set(owners)}
    ceiling = {owner: psnr(reconstructions[owner], training[owner]) for owner in set(owners)}
    per_sample = [
        {
            "owner": owner,
            "nearest": nearest(sample, training),
            "psnr": psnr(sample, training[owner]),
            "mean_image_psnr": baseline[owner],
            "vae_psnr": ceiling[owner],
        }
        for sample, owner in zip(samples, owners, strict=True)
    ]
    hits = sum(row["nearest"] == row["owner"] for row in per_sample)
    numbers = {
        key: float(median(row[key] for row in per_sample))
        for key in ("psnr", "mean_image_psnr", "vae_psnr")
    }
    numbers |= {
        "nearest_fraction": hits / len(samples),
        "loss_first": float(first_loss),
        "loss_last": float(last_loss),
    }
    criteria = _criteria(numbers, captions=len(set(owners)), hits=hits, count=len(samples))
    return {
        "passed": all(criterion["passed"] for criterion in criteria),
        "criteria": criteria,
        "captions": len(set(owners)),
        "samples": len(samples),
        **numbers,
        "per_sample": per_sample,
    }


def summary(result: dict[str, Any]) -> str:
    """The verdict in one line; with `unseen_first` and `unseen_last` in `result`, those too."""
    unseen = ""
    if "unseen_first" in result:
        unseen = f"; on unseen media {result['unseen_first']:.3f} -> {result['unseen_last']:.3f} (not judged)"
    missed = [criterion["key"] for criterion in result["criteria"] if not criterion["passed"]]
    return (
        f"{'PASS' if result['passed'] else 'FAIL (' + ', '.join(missed) + ')'}: "
        f"nearest item is the captioned one in {result['nearest_fraction']:.0%} of "
        f"{result['samples']} samples over {result['captions']} captions; "
        f"PSNR {result['psnr']:.1f} dB (mean image {result['mean_image_psnr']:.1f}, "
        f"VAE {result['vae_psnr']:.1f}); "
        f"loss on fixed noise {result['loss_first']:.3f} -> {result['loss_last']:.3f}" + unseen
    )


def _criteria(
    numbers: dict[str, float], *, captions: int, hits: int, count: int
) -> list[dict[str, Any]]:
    """Each line of the acceptance with its number; a NaN on either side fails it."""
    value, mean_db, vae_db = numbers["psnr"], numbers["mean_image_psnr"], numbers["vae_psnr"]
    first, last = numbers["loss_first"], numbers["loss_last"]
    rows = [
        (
            "captions",
            "Distinct captions",
            float(captions),
            float(MIN_CAPTIONS),
            captions >= MIN_CAPTIONS,
            f"{captions} captions sampled, at least {MIN_CAPTIONS} needed",
        ),
        (
            "nearest",
            "Nearest item is the captioned one",
            numbers["nearest_fraction"],
            MIN_NEAREST,
            numbers["nearest_fraction"] >= MIN_NEAREST,
            f"{hits} of {count} samples, at least {MIN_NEAREST:.0%} needed",
        ),
        (
            "above_mean_image",
            "Median PSNR against the mean image",
            value,
            mean_db + MIN_ABOVE_MEAN_IMAGE_DB,
            value >= mean_db + MIN_ABOVE_MEAN_IMAGE_DB,
            f"{value:.1f} dB; mean image {mean_db:.1f}, "
            f"at least +{MIN_ABOVE_MEAN_IMAGE_DB:g} needed",
        ),
        (
            "near_vae",
            "Median PSNR against the VAE's own reconstruction",
            value,
            vae_db - MAX_BELOW_VAE_DB,
            value >= vae_db - MAX_BELOW_VAE_DB,
            f"{value:.1f} dB; reconstruction {vae_db:.1f}, at most −{MAX_BELOW_VAE_DB:g} allowed",
        ),
        (
            "loss",
            "Loss on fixed noise at least halved",
            last,
            first * MAX_LOSS_RATIO,
            last <= first * MAX_LOSS_RATIO,
            f"{first:.3f} before, {last:.3f} after",
        ),
    ]
    keys = ("key", "label", "value", "limit", "passed", "text")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _unit(media: Media) -> npt.NDArray[np.float64]:
    """`media` as fp64 in [0, 1], checked."""
    x = np.asarray(media)
    if x.ndim != 4 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(f"media of shape {x.shape}: must be (frames, height, width, 3)")
    if x.dtype == np.uint8:
        return x.astype(np.float64) / 255.0
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"media of dtype {x.dtype}: must be uint8 or floating in [0, 1]")
    x = x.astype(np.float64)
    if not (np.isfinite(x).all() and x.min() >= 0.0 and x.max() <= 1.0):
        raise ValueError(
            f"media with values in {x.min():.4g}..{x.max():.4g}: floats must be finite, in [0, 1]"
        )
    return x


def _weights(old: int, new: int) -> npt.NDArray[np.float64]:
    """The (new, old) matrix that resamples one axis; its rows sum to 1."""
    if new < old:  # the overlap of each new pixel's interval with each old one's
        edges = np.arange(new + 1) * (old / new)
        low, high = edges[:-1, None], edges[1:, None]
        left = np.arange(old)[None, :]
        overlap = np.minimum(high, left + 1.0) - np.maximum(low, left)
        return np.clip(overlap, 0.0, None) * (new / old)
    centres = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0, old - 1.0)
    below = np.floor(centres).astype(np.int64)
    above = np.minimum(below + 1, old - 1)
    weights = np.zeros((new, old))
    rows = np.arange(new)
    np.add.at(weights, (rows, below), 1.0 - (centres - below))
    np.add.at(weights, (rows, above), centres - below)
    return weights
