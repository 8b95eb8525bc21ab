"""GokuVAE: a small causal image and video VAE of stride 4x8x8, made to be trained on a CPU.

Ours throughout; the geometry alone is the paper's (arXiv 2502.04896, section 3.1). The first frame
is repeated three times, so that 4k+1 frames become k+1 patches of 4 frames x 4x4 pixels; residual
blocks (3x3 in space, then causal in time) work at 1/4 and 1/8 of the resolution; the decoder is the
mirror image and drops the three repeats. Beside them runs one linear layer from pixels to latent and
one back: `goku.vae.training` starts these from principal components, so that the network has only
the rest to learn.

Nothing mixes values across time but the causal convolutions, whose past is handed from chunk to
chunk. Hence an image is exactly the first frame of a video, and chunks equal the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goku.vae.folder import write_folder
from goku.vae.interface import STRIDES, Copies, Posterior, check_latent, check_video
from goku.vae.layers import (
    PATCH,
    PATCH_VALUES,
    CausalStack,
    SpatialConv,
    fold,
    patchify,
    unfold,
    unpatchify,
)

CHUNK = 4
"""Latent frames at a time in `encode` and `decode`, unless told otherwise."""

_REPEATS = PATCH - 1  # of the first frame, to fill its patch
_LOGVAR_RANGE = (-14.0, 6.0)  # keeps exp() finite and the KL bounded early in training

Past = list[list[Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of a GokuVAE. Raises ValueError for a size below its least.

    channels: latent channels.
    stem_width, width: channels of the residual blocks at 1/4 and at 1/8 of the resolution.
    encoder_stem_depth, encoder_depth: blocks of the encoder at 1/4 and at 1/8.
    decoder_depth, decoder_stem_depth: blocks of the decoder at 1/8 and at 1/4.
    temporal_kernel: latent frames that a causal convolution spans; 1 makes frames independent.
    """

    channels: int = 16
    stem_width: int = 96
    width: int = 192
    encoder_stem_depth: int = 1
    encoder_depth: int = 2
    decoder_depth: int = 4
    decoder_stem_depth: int = 2
    temporal_kernel: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name.endswith("depth") else 1
            if value < least:
                raise ValueError(f"{name} = {value}: allowed are integers >= {least}")


class Encoder(nn.Module):
    """Patches (B, T, H/4, W/4, 192) -> (mean, logvar) (B, T, H/8, W/8, 2 * channels)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config
        self.embed = nn.Linear(PATCH_VALUES, c.stem_width)
        self.stem = CausalStack(c.stem_width, c.encoder_stem_depth, c.temporal_kernel)
        self.down = nn.Linear(4 * c.stem_width, c.width)
        self.body = CausalStack(c.width, c.encoder_depth, c.temporal_kernel)
        self.head = nn.Linear(c.width, 2 * c.channels)
        self.shortcut = nn.Linear(4 * PATCH_VALUES, c.channels)

    def forward(self, patches: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        stem_past, body_past = past if past is not None else (None, None)
        x, stem_past = self.stem(self.embed(patches), stem_past)
        x, body_past = self.body(self.down(fold(x)), body_past)
        straight = self.shortcut(fold(patches))
        return self.head(x) + F.pad(straight, (0, straight.shape[-1])), [stem_past, body_past]


class Decoder(nn.Module):
    """Latent (B, T, H/8, W/8, channels) -> patches (B, T, H/4, W/4, 192)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = config
        self.embed = SpatialConv(c.channels, c.width)
        self.body = CausalStack(c.width, c.decoder_depth, c.temporal_kernel)
        self.up = nn.Linear(c.width, 4 * c.stem_width)
        self.stem = CausalStack(c.stem_width, c.decoder_stem_depth, c.temporal_kernel)
        self.head = nn.Linear(c.stem_width, PATCH_VALUES)
        self.shortcut = nn.Linear(c.channels, 4 * PATCH_VALUES)

    def forward(self, latent: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        body_past, stem_past = past if past is not None else (None, None)
        x, body_past = self.body(self.embed(latent), body_past)
        x, stem_past = self.stem(unfold(self.up(x)), stem_past)
        return self.head(x) + unfold(self.shortcut(latent)), [body_past, stem_past]


class GokuVAE(nn.Module):
    """A causal image and video VAE; satisfies `goku.vae.VideoVAE`, whose shapes and errors hold.

    seed: of the initial weights, drawn from a generator of its own.
    `encode` and `decode` are for use (no gradient, `chunk` latent frames at a time, so that memory
    beyond input and output does not grow with the length); `forward` is for training. Both work in
    the dtype of the weights.
    """

    causal = True

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config if config is not None else VAEConfig()
        with torch.random.fork_rng(devices=[]):  # layers draw weights of their own, replaced below
            self.encoder = Encoder(self.config)
            self.decoder = Decoder(self.config)
        self._copies = Copies()
        self.register_buffer("latent_mean", torch.zeros(self.config.channels))
        self.register_buffer("latent_std", torch.ones(self.config.channels))
        self._initialise(seed)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent position as (time, height, width)."""
        return STRIDES

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.config.channels

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """He's normal before a SiLU; small where a block adds, so that it begins near the identity;
        zero heads, so that the shortcuts alone are the beginning."""
        generator = torch.Generator().manual_seed(seed)
        gains = {"conv": math.sqrt(2.0), "mix.linear": 0.1, "head": 0.0}
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
            assert module.bias is not None
            module.bias.zero_()
        self.encoder.head.bias[self.config.channels :] = -4.0  # a narrow posterior to begin with

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Posterior]:
        """Reconstruction (B, 3, T, H, W) and posterior, whole and differentiable.

        noise: standard normal (B, C, T, H, W) that picks the latent; None takes the mean.
        """
        posterior = self.posterior(video)
        latent = posterior.mean if noise is None else posterior.sample(noise)
        return self.reconstruct(latent), posterior

    def posterior(self, video: Tensor) -> Posterior:
        """What `encode` answers, whole and differentiable."""
        check_video(video)
        return self._encode_piece(self._cast(video), None)[0]

    def reconstruct(self, latent: Tensor) -> Tensor:
        """What `decode` answers, whole and differentiable."""
        check_latent(latent, self.channels)
        return self._decode_piece(self._cast(latent), None)[0]

    @torch.no_grad()
    def encode(self, video: Tensor, *, chunk: int | None = CHUNK) -> Posterior:
        """The posterior of a video, raw; without gradient. chunk: latent frames at a time."""
        frames, height, width = check_video(video)
        shape = (video.shape[0], self.channels, frames, height, width)
        mean, logvar = (video.new_empty(shape, dtype=self.latent_std.dtype) for _ in range(2))
        past: Past | None = None
        for start, stop in _chunks(frames, chunk):
            first = max(0, STRIDES[0] * start - _REPEATS)
            piece = video[:, :, first : STRIDES[0] * stop - _REPEATS]
            posterior, past = self._encode_piece(self._cast(piece), past)
            mean[:, :, start:stop], logvar[:, :, start:stop] = posterior.mean, posterior.logvar
        return Posterior(mean, logvar)

    @torch.no_grad()
    def decode(self, latent: Tensor, *, chunk: int | None = CHUNK) -> Tensor:
        """The video of a raw latent, not clamped; without gradient. chunk: latent frames at a time."""
        check_latent(latent, self.channels)
        batch, _, frames, height, width = latent.shape
        time, down, across = STRIDES
        shape = (batch, 3, time * frames - _REPEATS, down * height, across * width)
        video = latent.new_empty(shape, dtype=self.latent_std.dtype)
        first = 0
        for piece in self.decode_stream(latent, chunk=chunk):
            video[:, :, first : first + piece.shape[2]] = piece
            first += piece.shape[2]
        return video

    def decode_stream(self, latent: Tensor, *, chunk: int | None = CHUNK) -> Iterator[Tensor]:
        """`decode` in pieces (B, 3, t, H, W) of `chunk` latent frames; their past goes along."""
        check_latent(latent, self.channels)
        past: Past | None = None
        for start, stop in _chunks(latent.shape[2], chunk):
            with torch.no_grad():  # not around the yield: the caller's code runs there
                piece, past = self._decode_piece(self._cast(latent[:, :, start:stop]), past)
            yield piece

    def normalise(self, latent: Tensor) -> Tensor:
        """(latent - mean) / std per channel; train_vae measures both."""
        mean, std = self._statistics(latent)
        return (latent - mean) / std

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    def fingerprint(self) -> str:
        """SHA-256 of configuration, weights and latent statistics, as hex."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors; `goku.vae.load_vae` reads them. OSError."""
        config = {
            "_class": type(self).__name__,
            "strides": list(STRIDES),
            **asdict(self.config),
            "fingerprint": self.fingerprint(),
        }
        write_folder(directory, config, self.state_dict())

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.latent_std.dtype)

    def _statistics(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        check_latent(latent, self.channels)
        shape = (1, -1, 1, 1, 1)
        mean = self._copies.of("mean", self.latent_mean, latent.device)
        std = self._copies.of("std", self.latent_std, latent.device)
        return mean.view(shape), std.view(shape)

    def _encode_piece(self, video: Tensor, past: Past | None) -> tuple[Posterior, Past]:
        if past is None:
            repeats = video[:, :, :1].expand(-1, -1, _REPEATS, -1, -1)
            video = torch.cat([repeats, video], dim=2)
        moments, past = self.encoder(patchify(video), past)
        mean, logvar = self._channels_first(moments).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*_LOGVAR_RANGE)), past

    def _decode_piece(self, latent: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        drop = _REPEATS if past is None else 0
        patches, past = self.decoder(latent.permute(0, 2, 3, 4, 1), past)
        return unpatchify(patches.to(self.latent_std.dtype))[:, :, drop:], past

    def _channels_first(self, x: Tensor) -> Tensor:
        """BTHWC -> BCTHW, and out of autocast's dtype into that of the weights."""
        return x.permute(0, 4, 1, 2, 3).to(self.latent_std.dtype)


def _chunks(frames: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}: allowed are integers >= 1, or None for the whole")
    size = frames if chunk is None else chunk
    for start in range(0, frames, size):
        yield start, min(start + size, frames)
