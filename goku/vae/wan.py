"""AutoencoderKLWan of diffusers (Wan 2.1): exactly causal, 16 latent channels in the released weights.

Its first latent frame sees the first frame alone and every later one 4 more frames, each with the
convolutions' past at hand: so encoding goes on in memory that does not grow, an image is the first
latent frame of a video, and decoding hands out one latent frame's pixels at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from goku.vae.diffusers_vaes import DiffusersVAE, require


class WanVAE(DiffusersVAE):
    """normalise = (z - latents_mean) / latents_std, as in diffusers' pipelines for Wan.

    Wan 2.2's VAE of 4x16x16 has the same class name and is refused by its fields.
    """

    name = "AutoencoderKLWan"
    causal = True

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Strides 4x8x8 and statistics that can be used; else ValueError."""
        if config["patch_size"] is not None or config["is_residual"]:
            raise ValueError(
                f"patch_size = {config['patch_size']!r}, is_residual = {config['is_residual']!r}: "
                f"the VAE of Wan 2.2, whose strides (t, h, w) are 4x16x16; allowed are None and "
                f"False, 4x8x8"
            )
        require(config, "scale_factor_spatial", 8)
        require(config, "scale_factor_temporal", 4)
        require(config, "in_channels", 3)
        require(config, "out_channels", 3)
        if len(config["dim_mult"]) != 4:
            raise ValueError(f"dim_mult = {config['dim_mult']!r}, allowed are 4 values: 8x8 pixels")
        if sum(map(bool, config["temperal_downsample"])) != 2:
            raise ValueError(
                f"temperal_downsample = {config['temperal_downsample']!r}, allowed are two True: "
                f"4 frames"
            )
        for field in ("latents_mean", "latents_std"):
            values = config[field]
            if len(values) != config["z_dim"] or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"{field} = {values!r}, allowed are z_dim = {config['z_dim']} finite numbers"
                )
        if min(config["latents_std"]) <= 0:
            raise ValueError(f"latents_std = {config['latents_std']!r}, allowed are positive ones")

    @classmethod
    def wrap(cls, inner: Any) -> WanVAE:
        """The wrapper of a model that diffusers built."""
        return cls(inner, inner.config.latents_mean, inner.config.latents_std)

    # What AutoencoderKLWan._encode and _decode do (diffusers 0.42), but for two things. The past is
    # in these frames, not in the model's attributes, so that streams can run side by side. And the
    # 1x1x1 convolutions take one latent frame at a time, as all the rest does: over the whole clip
    # their rounding depends on its length, and an image would be its first frame but for the last bit.

    def _moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        past: list[Any] = [None] * self.inner._cached_conv_counts["encoder"]
        moments = []
        for stop in range(1, video.shape[2] + 1, 4):
            piece = video[:, :, max(0, stop - 4) : stop]
            out = self.inner.encoder(piece, feat_cache=past, feat_idx=[0])
            moments.append(self.inner.quant_conv(out))
        mean, logvar = torch.cat(moments, dim=2).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def _pieces(self, latent: Tensor) -> Iterator[Tensor]:
        past: list[Any] = [None] * self.inner._cached_conv_counts["decoder"]
        for i in range(latent.shape[2]):
            x = self.inner.post_quant_conv(latent[:, :, i : i + 1])
            out = self.inner.decoder(x, feat_cache=past, feat_idx=[0], first_chunk=i == 0)
            yield torch.clamp(out, min=-1.0, max=1.0)
