"""Which frames of a clip the model is given, and how they enter it: image-to-video, as tensors only.

Goku (arXiv 2502.04896) gives the first frame: its latent is broadcast over time and concatenated
with the noised latent on channels. The mask beside it, which lets any frames be given, and the rule
for several of them (each time shows the nearest) are ours.

Shapes: C latent channels; T latent frames of H x W latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from goku.flow import guided
from goku.random import Purpose, uniform_each

__all__ = [
    "ConditioningConfig",
    "choose_given",
    "condition_latent",
    "drop_rates",
    "drops_both",
    "guided_pair",
    "latent_index",
]

# Pixel frames that training may give, in the order of ConditioningConfig's weights.
_CHOICES = {"first": (0,), "last": (-1,), "both": (0, -1)}


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """Which frames a training clip is given, where model.condition is "frames".

    first, last, both: relative weights of giving the first frame, the last one, or the two; >= 0,
        not all 0. The first alone is the paper's.
    drop: probability in [0, 1] of giving none, for classifier-free guidance over the image; drawn
        independently of flow.text_drop.
    drop_both: probability in [0, 1] of giving none and dropping the text, drawn before the two: what
        guidance starts from is then seen often, not at the product of two small rates.

    The paper has no rates. InstructPix2Pix (arXiv 2211.09800, section 3.2) drops the image alone, the
    text alone and both in 5 % of its samples each. Three independent draws give that at drop =
    flow.text_drop = 1/18 and drop_both = 4/85 (`drop_rates`), as configs/goku-2b.yaml has it; the
    values here are ours. Images are never given their own frame. Raises ValueError for values out of these ranges.
    """

    first: float = 1.0
    last: float = 0.0
    both: float = 0.0
    drop: float = 0.1
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        for name in _CHOICES:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; allowed: finite numbers >= 0")
        if not any(self._weights):
            raise ValueError("first, last and both are all 0; allowed: at least one above 0")
        for name in ("drop", "drop_both"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; allowed: [0, 1]")

    @property
    def _weights(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in _CHOICES)

    @property
    def frames(self) -> tuple[int, ...]:
        """Pixel frames of which a latent of their own is needed: a subset of (0, -1), in that order."""
        used = {frame for name, given in _CHOICES.items() if getattr(self, name) for frame in given}
        return tuple(frame for frame in (0, -1) if frame in used)

    @property
    def usual(self) -> tuple[int, ...]:
        """What is given most often (of equal weights the earlier field's): for losses to compare."""
        weights = self._weights
        return tuple(_CHOICES.values())[weights.index(max(weights))]


def choose_given(
    config: ConditioningConfig, seed: int, positions: Sequence[int], frames: Sequence[int]
) -> list[tuple[int, ...]]:
    """The pixel frames that each training sample is given, as functions of (seed, position) alone.

    Args:
        config: weights and rate.
        seed: in [0, 2^64).
        positions: B positions in the data stream. Of purpose CONDITION element 0 chooses, element 1
            drops, and so does element 2 (`drops_both`).
        frames: B numbers of pixel frames; 1 is an image, which is given nothing.

    Returns:
        For each sample (0,), (-1,), (0, -1) or ().

    Raises:
        ValueError: the sequences differ in length, or a position is out of range.
    """
    both = drops_both(config, seed, positions, frames)
    pick = uniform_each(seed, positions, Purpose.CONDITION, element=0).tolist()
    drop = uniform_each(seed, positions, Purpose.CONDITION, element=1).tolist()
    return [
        () if count == 1 or all_dropped or dropped < config.drop else _pick(config, choice)
        for count, choice, dropped, all_dropped in zip(frames, pick, drop, both, strict=True)
    ]


def drops_both(
    config: ConditioningConfig, seed: int, positions: Sequence[int], frames: Sequence[int]
) -> list[bool]:
    """Which training samples are given nothing and lose their text too: clips, with `drop_both`.

    Arguments and errors as those of `choose_given`, which gives these nothing.
    """
    if len(frames) != len(positions):
        raise ValueError(
            f"frames has {len(frames)} entries; allowed is one per position, here {len(positions)}"
        )
    drawn = uniform_each(seed, positions, Purpose.CONDITION, element=2).tolist()
    return [
        count > 1 and value < config.drop_both for count, value in zip(frames, drawn, strict=True)
    ]


def drop_rates(config: ConditioningConfig, text_drop: float) -> tuple[float, float, float]:
    """Shares of clips that lose (their given frames alone, their text alone, both).

    text_drop: flow.text_drop. Three independent draws: `drop_both` takes both at once, and where it does
    not, `drop` and `text_drop` each take theirs.
    """
    left = 1 - config.drop_both
    return (
        left * config.drop * (1 - text_drop),
        left * (1 - config.drop) * text_drop,
        config.drop_both + left * config.drop * text_drop,
    )


def _pick(config: ConditioningConfig, u: float) -> tuple[int, ...]:
    """The choice whose part of [0, 1) holds u, parts being proportional to the weights."""
    names = [name for name in _CHOICES if getattr(config, name)]
    left = u * math.fsum(getattr(config, name) for name in names)
    for name in names[:-1]:
        left -= getattr(config, name)
        if left < 0:
            return _CHOICES[name]
    return _CHOICES[names[-1]]


def latent_index(frame: int, frames: int) -> int:
    """Latent frame that holds pixel frame `frame` of a clip of `frames`: 0 -> 0, f > 0 -> (f + 3) // 4.

    The geometry of `goku.vae.VideoVAE`. A negative `frame` counts from the end: -1 is the last.

    Raises:
        ValueError: `frames` is not 4k + 1, or the clip has no such frame.
    """
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames is {frames}; allowed: 4k + 1 (1, 5, 9, ...)")
    if not -frames <= frame < frames:
        raise ValueError(
            f"frame is {frame}; allowed with {frames} frames: {-frames} to {frames - 1}"
        )
    return (frame % frames + 3) // 4


def condition_latent(
    given: Mapping[int, Tensor],
    shape: tuple[int, int, int, int],
    device: torch.device | None = None,
) -> Tensor:
    """What a sample is given, beside its noised latent: frames spread over time, and where they are.

    Args:
        given: latent frame (0 .. T-1, see `latent_index`) -> the normalised latent (C, 1, H, W) of
            the frame that is given there, encoded as an image of its own. All of one dtype and
            device.
        shape: (C, T, H, W) of the sample's latent.
        device: of the result where nothing is given; the CPU by default.

    Returns:
        (C + 1, T, H, W) of the latents' dtype on their device (fp32 on `device` where nothing is
        given): at every time the latent of the nearest given frame, of two equally near ones the
        earlier; the last channel is 1 at the times that are given, else 0. Nothing given: zeros.

    Raises:
        ValueError: a latent frame outside of the clip, or a latent of another shape.
    """
    channels, times, height, width = shape
    for index, latent in given.items():
        if not 0 <= index < times:
            raise ValueError(f"given has latent frame {index}; allowed: 0 to {times - 1}")
        if tuple(latent.shape) != (channels, 1, height, width):
            raise ValueError(
                f"given[{index}] has shape {tuple(latent.shape)}; "
                f"allowed is {(channels, 1, height, width)}"
            )
    if not given:
        return torch.zeros(channels + 1, times, height, width, device=device)
    indices = sorted(given)
    nearest = [min(indices, key=lambda i: (abs(i - time), i)) for time in range(times)]
    spread = torch.cat([given[i] for i in nearest], dim=1)
    mask = spread.new_zeros(1, times, height, width)
    for index in indices:  # an index of several would be copied to the device, which waits for it
        mask[:, index] = 1
    return torch.cat((spread, mask))


def guided_pair(
    none: Tensor, image: Tensor | None, both: Tensor, text_scale: float, image_scale: float
) -> Tensor:
    """Classifier-free guidance over text and image: none + s_i (image - none) + s_t (both - image).

    InstructPix2Pix (arXiv 2211.09800, equation 3). With equal scales `image` drops out, and the
    result is that of `goku.flow.guided(both, none, scale)`.

    Args:
        none: velocity with the empty prompt and without given frames, any shape.
        image: with the empty prompt and the given frames, of none's shape; None where the scales
            are equal.
        both: with the prompt and the given frames, of none's shape.
        text_scale, image_scale: s_t and s_i; 1 and 1 give `both`.

    Returns:
        Of both's dtype and shape, computed in at least fp32.

    Raises:
        ValueError: the shapes differ, or `image` is None with unequal scales.
    """
    if text_scale == image_scale:
        return guided(both, none, text_scale)
    if image is None:
        raise ValueError(
            f"image is None; allowed with equal scales alone, text_scale is {text_scale} and "
            f"image_scale {image_scale}"
        )
    for name, tensor in (("none", none), ("image", image)):
        if tensor.shape != both.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; allowed is that of both, "
                f"{tuple(both.shape)}"
            )
    dtype = torch.promote_types(both.dtype, torch.float32)
    a, b, c = none.to(dtype), image.to(dtype), both.to(dtype)
    return (torch.lerp(a, b, image_scale) + text_scale * (c - b)).to(both.dtype)
