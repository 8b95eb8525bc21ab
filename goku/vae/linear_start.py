"""A VAE that begins where linear compression ends: its shortcuts set to principal components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from goku.vae.causal_vae import GokuVAE
from goku.vae.layers import PATCH_VALUES, fold, patchify

LEAST_VARIANCE = 1e-6
"""Of a principal component, in squared units of [-1, 1]: below it lies rounding, not signal."""


@torch.no_grad()
def start_from_components(vae: GokuVAE, clips: Sequence[Tensor]) -> None:
    """Sets the linear shortcuts to the leading principal components of the clips' 8x8x4 patches.

    clips: each (3, T, H, W) uint8 or floating point in [-1, 1]. The latent of the shortcut alone
    then has mean 0 and variance 1 in every channel. Computed in fp64 from the covariance.
    """
    size = 4 * PATCH_VALUES
    total = torch.zeros(size, dtype=torch.float64)
    products = torch.zeros(size, size, dtype=torch.float64)
    count = 0
    for clip in clips:
        video = (clip.double() / 127.5 - 1.0 if clip.dtype == torch.uint8 else clip.double())[None]
        video = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)
        values = fold(patchify(video)).flatten(0, 3)
        total += values.sum(0).cpu()
        products += (values.T @ values).cpu()
        count += values.shape[0]
    mean = total / count
    variances, axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    channels = vae.channels
    axes = axes[:, -channels:].flip(1)
    scale = variances[-channels:].flip(0).clamp_min(LEAST_VARIANCE).sqrt()
    analysis = (axes / scale).T
    vae.encoder.shortcut.weight.copy_(analysis)
    _bias(vae.encoder.shortcut).copy_(-(analysis @ mean))
    vae.decoder.shortcut.weight.copy_(axes * scale)
    _bias(vae.decoder.shortcut).copy_(mean)


def _bias(linear: torch.nn.Linear) -> Tensor:
    assert linear.bias is not None
    return linear.bias
