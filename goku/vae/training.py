"""Training a GokuVAE on a few media in minutes: principal components first, then AdamW on crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from goku.precision import autocast, autocast_dtype
from goku.vae.causal_vae import GokuVAE
from goku.vae.interface import STRIDES, latent_shape
from goku.vae.linear_start import start_from_components

LogFields = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig:
    """How a GokuVAE is trained. The defaults suit about ten small media on two CPU cores.

    Many steps on few crops, rather than few on many, and the components' start, gave the most per
    operation; so did beta2 = 0.95 over 0.99, and 2e-3 over 1e-3 and 4e-3.

    steps: optimizer steps; the cosine schedule ends there, and nothing depends on the clock.
    learning_rate, warmup_steps: peak of the schedule and the linear rise to it.
    weight_decay, beta2, clip_norm: of AdamW, and the largest gradient norm.
    crop: side of the spatial crops in pixels, a multiple of 8; shorter sides are taken whole.
    frames: most frames of a temporal crop, 4k+1.
    positions: latent positions in a step: as many crops of one shape as fit, at least one.
    l1_weight: share of the absolute error in the reconstruction loss; the rest is squared.
    kl_weight: of the KL divergence per latent value, beside the loss per pixel value.
    latent_noise: standard deviation, in units of each channel's own, of noise added to latents
        before decoding. Makes the decoder forgive the errors that a diffusion model leaves: with
        0.2, latents off by half a standard deviation decode about 4 dB better, and exact ones
        about 2 dB worse, than with 0.
    linear_start: begin from principal components of the media. False continues a trained VAE.
    precision: of the convolutions; "auto" is bfloat16 where the hardware computes in it.
    log_every: steps between two log entries.
    """

    steps: int = 2000
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 1e-3
    beta2: float = 0.95
    clip_norm: float = 1.0
    crop: int = 64
    frames: int = 9
    positions: int = 192
    l1_weight: float = 0.0
    kl_weight: float = 1e-3
    latent_noise: float = 0.2
    linear_start: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "positions", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed are integers >= 1")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed are numbers > 0")
        for name in ("warmup_steps", "weight_decay", "kl_weight", "latent_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: allowed are numbers >= 0")
        if not 0.0 <= self.beta2 < 1.0:
            raise ValueError(f"beta2 = {self.beta2}: allowed is 0 <= beta2 < 1")
        if not 0.0 <= self.l1_weight <= 1.0:
            raise ValueError(f"l1_weight = {self.l1_weight}: allowed is 0 to 1")
        if self.crop < 8 or self.crop % 8:
            raise ValueError(f"crop = {self.crop}: allowed are positive multiples of 8")
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"frames = {self.frames}: allowed are 4k+1 (1, 5, 9, ...)")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision = {self.precision!r}: allowed are auto, float32, bfloat16")


def train_vae(
    vae: GokuVAE,
    clips: Sequence[Tensor],
    config: VAETrainConfig | None = None,
    *,
    seed: int,
    log: Callable[[LogFields], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Trains `vae` in place on its own device, then measures its latent mean and std per channel.

    clips: each (3, T, H, W), uint8, or floating point in [-1, 1], with T = 4k+1 and sides that are
        multiples of 8; images are T = 1. Moved to the device crop by crop.
    seed: of crops and noise, drawn from generators of its own. On one machine and number of threads
        the result is the same bit for bit.
    log: called every `config.log_every` steps and at the last with step (from 1), loss, mse, psnr
        (dB, of the step's crops, noise included), kl, grad_norm and lr.
    progress: called after every step with (steps done, steps in all).
    Raises ValueError for clips of another shape or dtype, FloatingPointError when the loss stops being finite.
    """
    config = config if config is not None else VAETrainConfig()
    if not clips:
        raise ValueError("clips is empty: a VAE needs at least one to train on")
    for index, clip in enumerate(clips):
        _check_clip(index, clip)
    device, dtype = vae.latent_std.device, vae.latent_std.dtype
    matmul_dtype = autocast_dtype(config.precision, device)
    crops = _Crops(clips, config, seed)
    noise_generator = torch.Generator(device).manual_seed(seed)
    if config.linear_start:
        start_from_components(vae, clips)
    was_training = vae.training
    vae.train()
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    for step in range(config.steps):
        rate = config.learning_rate * _schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        video = crops.draw().to(device, dtype)
        with autocast(device, matmul_dtype):
            posterior = vae.posterior(video)
            scale = posterior.mean.detach().var((0, 2, 3, 4), keepdim=True, correction=0)
            variance = posterior.logvar.exp() + config.latent_noise**2 * scale
            noise = torch.randn(
                variance.shape, generator=noise_generator, device=device, dtype=dtype
            )
            reconstruction = vae.reconstruct(posterior.mean + variance.sqrt() * noise)
        squared = F.mse_loss(reconstruction, video)
        absolute = F.l1_loss(reconstruction, video)
        kl = posterior.kl()
        loss = (1.0 - config.l1_weight) * squared + config.l1_weight * absolute
        loss = loss + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), config.clip_norm, foreach=True)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"VAE training diverged at step {step + 1}: loss {loss.item()}"
            )
        optimizer.step()
        done = step + 1
        if log is not None and (done % config.log_every == 0 or done == config.steps):
            log(
                {
                    "step": done,
                    "loss": loss.item(),
                    "mse": squared.item(),
                    "psnr": 10.0 * math.log10(4.0 / max(squared.item(), 1e-12)),
                    "kl": kl.item(),
                    "grad_norm": norm.item(),
                    "lr": rate,
                }
            )
        if progress is not None:
            progress(done, config.steps)
    optimizer.zero_grad()
    measure_latents(vae, clips)
    vae.train(was_training)


@torch.no_grad()
def measure_latents(vae: GokuVAE, clips: Sequence[Tensor]) -> None:
    """Sets `latent_mean` and `latent_std`: per channel, of latents sampled from the posteriors.

    Every latent position of every clip counts once; computed in fp64.
    """
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for clip in clips:
        posterior = vae.encode(as_video(clip).to(vae.latent_std))
        mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
        total = total + mean.sum((0, 2, 3, 4)).cpu()
        squares = squares + (mean.square() + variance).sum((0, 2, 3, 4)).cpu()
        count += mean[:, 0].numel()
    mean = total / count
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_((squares / count - mean.square()).clamp_min(1e-12).sqrt())


def as_video(clip: Tensor) -> Tensor:
    """(3, T, H, W) uint8, or floating point already in [-1, 1] -> (1, 3, T, H, W) floating point."""
    return (clip.float() / 127.5 - 1.0 if clip.dtype == torch.uint8 else clip)[None]


class _Crops:
    """Draws a step's batch: crops of one shape, from the items whose largest crop that is.

    A shape comes up as often as it has items, with as many crops as fit `positions`. Offsets are
    multiples of the spatial strides, so a crop is cut into the same blocks as the whole.
    """

    def __init__(self, clips: Sequence[Tensor], config: VAETrainConfig, seed: int) -> None:
        self.clips = clips
        self.generator = torch.Generator().manual_seed(seed)
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for index, clip in enumerate(clips):
            _, frames, height, width = clip.shape
            shape = min(frames, config.frames), min(height, config.crop), min(width, config.crop)
            shapes.setdefault(shape, []).append(index)
        self.groups = [
            (shape, members, max(1, config.positions // math.prod(latent_shape(*shape))))
            for shape, members in sorted(shapes.items())
        ]
        self.weights = torch.tensor([len(members) for _, members, _ in self.groups]).double()

    def draw(self) -> Tensor:
        """(B, 3, t, h, w) floating point in [-1, 1], on the clips' device."""
        group = int(torch.multinomial(self.weights, 1, generator=self.generator))
        shape, members, size = self.groups[group]
        return torch.stack([self._crop(members, shape) for _ in range(size)])

    def _crop(self, members: list[int], shape: tuple[int, int, int]) -> Tensor:
        clip = self.clips[members[self._below(len(members))]]
        (t, h, w), (_, frames, height, width) = shape, clip.shape
        start = self._below(frames - t + 1)
        top = STRIDES[1] * self._below((height - h) // STRIDES[1] + 1)
        left = STRIDES[2] * self._below((width - w) // STRIDES[2] + 1)
        return as_video(clip[:, start : start + t, top : top + h, left : left + w])[0]

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))


def _check_clip(index: int, clip: Tensor) -> None:
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise ValueError(f"clips[{index}] has shape {tuple(clip.shape)}: needs (3, T, H, W)")
    if clip.dtype != torch.uint8 and not clip.is_floating_point():
        raise ValueError(f"clips[{index}] has dtype {clip.dtype}: needs uint8 or floating point")
    try:
        latent_shape(*clip.shape[1:])
    except ValueError as error:
        raise ValueError(f"clips[{index}]: {error}") from error


def _schedule(step: int, config: VAETrainConfig) -> float:
    """Linear warm-up times a cosine from 1 to 0.02."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * (0.02 + 0.98 * cosine)
