"""AutoencoderKLCogVideoX of diffusers: GroupNorm within chunks, so not causal to the bit.

It encodes 8 frames at a time (the first chunk 8 + T % 8) and decodes 2 latent frames at a time (the
first chunk 2 + n % 2), with the convolutions' past between the chunks. Decoding takes a chunk for the
beginning of a video only when its number of latents is odd: an even number n comes back as 4n frames
where 4n-3 are meant. So an even number is decoded with its last latent once more and the 4 frames of
that one are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from goku.vae.diffusers_vaes import DiffusersVAE, require, scaling_factor


class CogVideoXVAE(DiffusersVAE):
    """normalise = z * scaling_factor (1.15258426; 0.7 in CogVideoX 1.5), as in diffusers' pipelines.

    `invert_scale_latents` does not enter: diffusers decodes with 1 / scaling_factor whatever it says,
    and by it only undoes how one released model scaled its conditioning image in training.
    """

    name = "AutoencoderKLCogVideoX"
    _cutting = ("num_sample_frames_batch_size", "num_latent_frames_batch_size")

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Strides 4x8x8 and a scale that can be used; else ValueError."""
        require(config, "temporal_compression_ratio", 4)
        require(config, "in_channels", 3)
        require(config, "out_channels", 3)
        if len(config["block_out_channels"]) != 4:
            raise ValueError(
                f"block_out_channels = {config['block_out_channels']!r}, allowed are 4 values: "
                f"8x8 pixels"
            )
        # No released weights have these, and diffusers' own pipelines pass over them.
        for field in ("shift_factor", "latents_mean", "latents_std"):
            require(config, field, None)
        # diffusers gives these convolutions the channels of pixels: they fit no latent.
        require(config, "use_quant_conv", False)
        require(config, "use_post_quant_conv", False)
        scaling_factor(config)

    def _pieces(self, latent: Tensor) -> Iterator[Tensor]:
        # AutoencoderKLCogVideoX._decode (diffusers 0.42), a chunk at a time.
        frames, size = latent.shape[2], self.inner.num_latent_frames_batch_size
        if frames % 2 == 0:
            latent = torch.cat([latent, latent[:, :, -1:]], dim=2)
        left, past, start = 4 * frames - 3, None, 0
        stop = min(size + latent.shape[2] % size, latent.shape[2])
        while start < latent.shape[2]:
            piece, past = self.inner.decoder(latent[:, :, start:stop], conv_cache=past)
            start, stop = stop, stop + size
            piece = piece[:, :, :left]
            left -= piece.shape[2]
            yield piece
