"""Long clips decoded a piece at a time: the pixels of the whole, without its memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from goku.vae.interface import VideoVAE


def decode_pieces(vae: VideoVAE, latent: Tensor) -> Iterator[Tensor]:
    """Pixels of a normalised latent (C, T, H, W) as uint8 pieces (3, t, H, W) on the host, in order.

    Put together they are, bit for bit, the pixels of `vae.decode` of the whole: every VAE here works
    through time in steps of its own (GokuVAE 4 latent frames, Wan 1, CogVideoX 2, HunyuanVideo tiles
    of 5 that are blended) and `decode_stream` hands each step out with the past that it needs. So
    there is no overlap to choose and no seam. Values beyond [-1, 1] are clamped.

    Raises ValueError for a latent of another shape, FloatingPointError for pixels that are not finite: as bytes they
    would be black.
    """
    if latent.ndim != 4:
        raise ValueError(f"latent has shape {tuple(latent.shape)}: needs (C, T, H, W)")
    for piece in vae.decode_stream(vae.denormalise(latent[None])):
        pixels = piece[0].float()
        if not bool(pixels.isfinite().all()):
            raise FloatingPointError(
                "the decoded sample is not finite: the weights are not, or the velocity grew beyond all bounds"
            )
        yield ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
