"""Images that a sample is given for some of its frames: read, encoded, checked, held in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from goku.conditioning import ConditioningConfig, latent_index
from goku.data import images
from goku.data.config import DataConfig
from goku.data.errors import DecodeError
from goku.data.transform import Geometry, apply
from goku.flow import interpolate
from goku.model import ModelConfig, patchify
from goku.requests import Request
from goku.vae import VideoVAE

__all__ = [
    "Encoded",
    "Given",
    "check_given",
    "encode_given",
    "first_image",
    "holding",
    "read_image",
    "untrained_given",
]

Given = Mapping[int, Tensor]
"""Latent frame -> normalised latent (C, 1, H, W) of the image that is given there."""

Encoded = MutableMapping[tuple[Path, int, int], Tensor]
"""(File, height, width) -> its normalised latent (C, 1, H, W)."""


def read_image(path: Path, height: int, width: int) -> Tensor:
    """An image file as uint8 (3, height, width): upright, resized to cover that size, cropped at the centre.

    Raises DecodeError (a ValueError) for what is no readable image.
    """
    image = images.read_rgb(str(path))
    # As goku.data.transform.plan does, but to a size that is asked for: one side is exact.
    if height * image.width >= width * image.height:
        resized = (height, max(width, _rounded(image.width * height, image.height)))
    else:
        resized = (max(height, _rounded(image.height * width, image.width)), width)
    # It is enlarged before it is cropped, and memory is not to decide.
    most = DataConfig(path=str(path)).max_source_pixels
    if resized[0] * resized[1] > most:
        raise DecodeError(
            str(path),
            f"its {image.height}x{image.width} (height x width) would have to become {resized[0]}x{resized[1]} to "
            f"cover {height}x{width}; allowed: {most:,} pixels. Crop it first",
        )
    geometry = Geometry(
        source_height=image.height,
        source_width=image.width,
        resize_height=resized[0],
        resize_width=resized[1],
        top=(resized[0] - height) // 2,
        left=(resized[1] - width) // 2,
        height=height,
        width=width,
        frames=1,
    )
    return torch.from_numpy(np.moveaxis(apply(image, geometry), -1, 0).copy())


def _rounded(a: int, b: int) -> int:
    return (2 * a + b) // (2 * b)


@torch.no_grad()
def encode_given(
    vae: VideoVAE, request: Request, device: torch.device, known: Encoded | None = None
) -> dict[int, Tensor]:
    """The given images of a request as latents, each encoded as an image of its own: see `Given`. fp32, on `device`.

    known: files that were encoded before, which gains those of this request.

    Raises DecodeError for a file that is no image, ValueError for two frames that share a latent frame, and for frames
    given to an image, which no training has (`goku.conditioning.choose_given`).
    """
    if request.given and request.frames == 1:
        raise ValueError(
            f"frames is 1 with an image given for frame {min(request.given)}; allowed with given images: 5, 9, ... "
            "(training gives frames to clips alone)"
        )
    frames: dict[int, int] = {}
    latents: dict[int, Tensor] = {}
    known = {} if known is None else known
    for frame, image in sorted(request.given.items()):
        index = latent_index(frame, request.frames)
        if index in latents:
            raise ValueError(
                f"frames {frames[index]} and {frame} of {request.frames} are one latent frame; "
                "allowed: one given image for each"
            )
        frames[index] = frame
        if not isinstance(image, Path):
            latents[index] = _encode(vae, image, request, frame, device)
            continue
        key = image, request.height, request.width
        if key not in known:
            pixels = read_image(*key)
            known[key] = _encode(vae, pixels, request, frame, device)
        latents[index] = known[key]
    return latents


def _encode(
    vae: VideoVAE, pixels: Tensor, request: Request, frame: int, device: torch.device
) -> Tensor:
    if tuple(pixels.shape) != (3, request.height, request.width):
        raise ValueError(
            f"given[{frame}] has shape {tuple(pixels.shape)}; "
            f"allowed: (3, {request.height}, {request.width})"
        )
    dtype = (
        next(iter(vae.parameters())).dtype if isinstance(vae, torch.nn.Module) else torch.float32
    )
    video = (pixels.to(device).float() / 127.5 - 1)[None, :, None].to(dtype)
    # In fp32, as training normalises the means of its cache, whatever the VAE computes in.
    return vae.normalise(vae.encode(video).mean.float())[0].float()


def first_image(request: Request) -> Path | Tensor | None:
    """What is given for the first frame, whichever way it is counted; None where nothing is."""
    return next(
        (image for frame, image in request.given.items() if frame % request.frames == 0), None
    )


def untrained_given(request: Request, conditioning: ConditioningConfig | None) -> str | None:
    """A line that says in what the given frames of a request are not what training gave; None where they are.

    conditioning: the run's, None where it is not known.
    """
    frames = sorted({frame % request.frames for frame in request.given})
    if not frames:
        return None
    named = ", ".join(map(str, frames))
    parts = []
    ends = (0, request.frames - 1)
    kinds = {ends[:1]: "first", ends[1:]: "last", ends: "both"}
    kind = kinds.get(tuple(frames))
    if kind is None:
        parts.append("training gave first and last frames alone")
    elif conditioning is not None and getattr(conditioning, kind) == 0:
        weights = [f"{name} {getattr(conditioning, name):g}" for name in ("first", "last", "both")]
        parts.append(f"training gave none so (conditioning: {', '.join(weights)})")
    for frame in frames:
        if frame % 4:
            begin = 4 * ((frame - 1) // 4) + 1
            parts.append(f"{frame} stands for all of {begin} to {begin + 3}, one latent frame")
    return f"given frames {named} of {request.frames}: {'; '.join(parts)}" if parts else None


def check_given(model: ModelConfig, vae: VideoVAE, given: Sequence[Given], *, hold: bool) -> None:
    """ValueError where frames are given and the model was trained without, or `hold` is asked of a VAE that cannot."""
    if not any(given):
        return
    if model.condition == "none":
        raise ValueError(
            "the model was trained without given frames (model.condition none); "
            "allowed: one of a stage with condition: frames"
        )
    if hold and not vae.causal:
        raise ValueError(
            "hold needs a VAE whose first latent frame depends on the first frame alone, and "
            f"{type(vae).__name__}'s depends on later ones; allowed: no hold"
        )


def holding(
    given: Sequence[Given],
    grids: Sequence[tuple[int, int, int]],
    noise: Tensor,
    channels: int,
    rows: Callable[[Tensor], Tensor],
) -> Callable[[Tensor, float], Tensor]:
    """What `hold` does after a step: (state, t) -> the state with given first frames on their path from the noise.

    noise: (tokens, patch_dim) of the whole pack; rows: what this process holds of such a tensor.
    """
    target, held = torch.zeros_like(noise), torch.zeros_like(noise[:, :1], dtype=torch.bool)
    begin = 0
    for each, (t, h, w) in zip(given, grids, strict=True):
        if 0 in each:
            target[begin : begin + h * w] = patchify(each[0].to(target))
            held[begin : begin + h * w] = True
        begin += t * h * w
    target, start, mask = rows(target), rows(noise), rows(held)
    return lambda x, t: torch.where(mask, interpolate(target, start, t), x)
