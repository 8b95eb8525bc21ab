"""What the rest of Goku knows of a video VAE: one adapter protocol, its posterior and its geometry.

Shapes: B batch, C latent channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

STRIDES = (4, 8, 8)
"""Pixels per latent position as (time, height, width): arXiv 2502.04896, section 3.1."""


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian that an encoder answers with.

    mean, logvar: (B, C, T, H, W), raw, that is before `VideoVAE.normalise`.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + standard deviation * noise. noise: standard normal, shaped as the mean."""
        if noise.shape != self.mean.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, the posterior {tuple(self.mean.shape)}"
            )
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal in nats, averaged over every latent value: ()."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).mean()


@runtime_checkable
class VideoVAE(Protocol):
    """An image and video VAE as the trainer, the latent cache and the sampler use it.

    video: (B, 3, T, H, W) floating point in [-1, 1] with T = 4k+1 and H, W multiples of 8;
    an image is T = 1. latent: (B, channels, k+1, H/8, W/8). Latent frame 0 holds video frame 0,
    latent frame i > 0 holds video frames 4i-3 .. 4i. Any other geometry is a ValueError that
    names it.
    """

    @property
    def causal(self) -> bool:
        """True when no latent frame depends on a later video frame, so that an image's latent is
        the first latent frame of every video that begins with it. GroupNorm over time breaks it.
        """

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent position as (time, height, width)."""

    @property
    def channels(self) -> int:
        """Latent channels."""

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of a video, raw."""

    def decode(self, latent: Tensor) -> Tensor:
        """The video of a raw latent. It may leave [-1, 1]."""

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """`decode` in pieces (B, 3, t, H, W) along time: put together they are its very bits, and
        the memory that one piece needs does not grow with the length of the video."""

    def normalise(self, latent: Tensor) -> Tensor:
        """Raw latent to the scale at which the transformer works: unit variance per channel."""

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of `normalise`."""

    def fingerprint(self) -> str:
        """Hex digest of configuration and weights: part of the key of every cached latent."""


class Copies:
    """A module's small buffers on other devices than its own, each copied once.

    A copy from a GPU waits for all that it was given before: latents in host memory, while the VAE lies on the GPU,
    would wait for the training step under way.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.device], tuple[Tensor, int, Tensor]] = {}

    def of(self, name: str, buffer: Tensor, device: torch.device) -> Tensor:
        """The buffer of this name on the device, as it is now: a changed or replaced one is copied anew."""
        if buffer.device == device:
            return buffer
        source, version, copy = self._kept.get((name, device), (None, 0, buffer))
        if source is not buffer or version != buffer._version:
            copy = buffer.to(device)
            self._kept[name, device] = (buffer, buffer._version, copy)
        return copy


def latent_shape(
    frames: int, height: int, width: int, strides: tuple[int, int, int] = STRIDES
) -> tuple[int, int, int]:
    """Latent (T, H, W) of a video of that many frames and pixels.

    Raises ValueError unless frames = strides[0] * k + 1 and the sides are multiples of the strides.
    """
    time, down, across = strides
    if frames < 1 or frames % time != 1 % time:
        raise ValueError(f"frames = {frames}: a video needs {time}k+1 frames (1, {time + 1}, ...)")
    if height < down or height % down:
        raise ValueError(f"height = {height}: needs a positive multiple of {down}")
    if width < across or width % across:
        raise ValueError(f"width = {width}: needs a positive multiple of {across}")
    return (frames - 1) // time + 1, height // down, width // across


def check_video(video: Tensor, strides: tuple[int, int, int] = STRIDES) -> tuple[int, int, int]:
    """Checks (B, 3, T, H, W) floating point and returns the latent (T, H, W). Raises ValueError."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}: needs (B, 3, T, H, W)")
    if not video.is_floating_point():
        raise ValueError(f"video has dtype {video.dtype}: needs floating point in [-1, 1]")
    return latent_shape(video.shape[2], video.shape[3], video.shape[4], strides)


def check_latent(latent: Tensor, channels: int) -> None:
    """Checks (B, channels, T, H, W) floating point, nothing empty. Raises ValueError."""
    if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
        raise ValueError(
            f"latent has shape {tuple(latent.shape)}: needs (B, {channels}, T, H, W), none empty"
        )
    if not latent.is_floating_point():
        raise ValueError(f"latent has dtype {latent.dtype}: needs floating point")
