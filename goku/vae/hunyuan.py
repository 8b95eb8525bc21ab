"""AutoencoderKLHunyuanVideo of diffusers: GroupNorm over time, so not causal to the bit.

Beyond 16 frames it works in tiles of 17 frames every 12, blended over 4 (latents: 5 every 3, over
1): what diffusers and its pipelines do by default, kept here and part of the fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from goku.vae.diffusers_vaes import DiffusersVAE, require, scaling_factor


class HunyuanVideoVAE(DiffusersVAE):
    """normalise = z * scaling_factor (0.476986), as in diffusers' pipelines for HunyuanVideo."""

    name = "AutoencoderKLHunyuanVideo"
    _cutting = (
        "use_framewise_encoding",
        "use_framewise_decoding",
        "tile_sample_min_num_frames",
        "tile_sample_stride_num_frames",
    )

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Strides 4x8x8 and a scale that can be used; else ValueError."""
        require(config, "spatial_compression_ratio", 8)
        require(config, "temporal_compression_ratio", 4)
        require(config, "in_channels", 3)
        require(config, "out_channels", 3)
        scaling_factor(config)

    def _pieces(self, latent: Tensor) -> Iterator[Tensor]:
        # AutoencoderKLHunyuanVideo._temporal_tiled_decode (diffusers 0.42), a tile at a time.
        inner, ratio = self.inner, self.inner.temporal_compression_ratio
        size = inner.tile_sample_min_num_frames // ratio
        stride = inner.tile_sample_stride_num_frames // ratio
        if latent.shape[2] <= size:
            yield inner.decode(latent).sample
            return
        blended = inner.tile_sample_min_num_frames - inner.tile_sample_stride_num_frames
        left = (latent.shape[2] - 1) * ratio + 1
        before: Tensor | None = None
        for start in range(0, latent.shape[2], stride):
            tile = inner.decoder(inner.post_quant_conv(latent[:, :, start : start + size + 1]))
            keep = inner.tile_sample_stride_num_frames
            if before is None:
                keep += 1
            else:
                tile = inner.blend_t(before, tile[:, :, 1:], blended)
            before = tile
            piece = tile[:, :, : min(keep, left)]
            left -= piece.shape[2]
            if piece.shape[2]:
                yield piece
