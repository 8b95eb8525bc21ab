"""Images that a sample is given for some of its frames: read, encoded, checked, held in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from goku.conditioning import latent_index
from goku.data import images
from goku.data.transform import Geometry, apply
from goku.flow import interpolate
from goku.model import ModelConfig, patchify
from goku.requests import Request
from goku.vae import VideoVAE

__all__ = ["Given", "check_given", "encode_given", "holding", "read_image"]

Given = Mapping[int, Tensor]
"""Latent frame -> normalised latent (C, 1, H, W) of the image that is given there."""


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
def encode_given(vae: VideoVAE, request: Request, device: torch.device) -> dict[int, Tensor]:
    """The given images of a request as latents, each encoded as an image of its own: see `Given`. fp32, on `device`.

    Raises DecodeError for a file that is no image, ValueError for two frames that share a latent frame.
    """
    frames: dict[int, int] = {}
    latents: dict[int, Tensor] = {}
    dtype = (
        next(iter(vae.parameters())).dtype if isinstance(vae, torch.nn.Module) else torch.float32
    )
    for frame, image in sorted(request.given.items()):
        index = latent_index(frame, request.frames)
        if index in latents:
            raise ValueError(
                f"frames {frames[index]} and {frame} of {request.frames} are one latent frame; "
                "allowed: one given image for each"
            )
        frames[index] = frame
        pixels = (
            read_image(image, request.height, request.width) if isinstance(image, Path) else image
        )
        if tuple(pixels.shape) != (3, request.height, request.width):
            raise ValueError(
                f"given[{frame}] has shape {tuple(pixels.shape)}; "
                f"allowed: (3, {request.height}, {request.width})"
            )
        video = (pixels.to(device).float() / 127.5 - 1)[None, :, None].to(dtype)
        latents[index] = vae.normalise(vae.encode(video).mean)[0].float()
    return latents


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
