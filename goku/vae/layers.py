"""The parts of the causal VAE: space-time patches and the causal residual block.

Shapes: B batch, T latent frames, H height, W width, C channels, channels last (BTHWC) throughout,
which is the layout that oneDNN's convolutions read without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4
"""Frames, rows and columns of one patch. No convolution ever runs at full resolution."""

PATCH_VALUES = 3 * PATCH**3


def patchify(video: Tensor) -> Tensor:
    """(B, 3, 4T, 4H, 4W) -> (B, T, H, W, 192), values ordered (colour, frame, row, column)."""
    batch, colours, frames, height, width = video.shape
    t, h, w = frames // PATCH, height // PATCH, width // PATCH
    cells = video.reshape(batch, colours, t, PATCH, h, PATCH, w, PATCH)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, t, h, w, PATCH_VALUES)


def unpatchify(patches: Tensor) -> Tensor:
    """(B, T, H, W, 192) -> (B, 3, 4T, 4H, 4W), the inverse of `patchify`."""
    batch, t, h, w, _ = patches.shape
    cells = patches.reshape(batch, t, h, w, 3, PATCH, PATCH, PATCH)
    video = cells.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return video.reshape(batch, 3, t * PATCH, h * PATCH, w * PATCH)


def fold(x: Tensor) -> Tensor:
    """(B, T, 2H, 2W, C) -> (B, T, H, W, 4C): each 2x2 neighbourhood becomes channels."""
    batch, t, h, w, c = x.shape
    cells = x.reshape(batch, t, h // 2, 2, w // 2, 2, c).transpose(3, 4)
    return cells.reshape(batch, t, h // 2, w // 2, 4 * c)


def unfold(x: Tensor) -> Tensor:
    """(B, T, H, W, 4C) -> (B, T, 2H, 2W, C), the inverse of `fold`."""
    batch, t, h, w, c = x.shape
    cells = x.reshape(batch, t, h, w, 2, 2, c // 4).transpose(3, 4)
    return cells.reshape(batch, t, 2 * h, 2 * w, c // 4)


class SpatialConv(nn.Conv2d):
    """3x3 convolution of every frame by itself, zero padded: BTHWC -> BTHWC."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, t, h, w, _ = x.shape
        y = super().forward(x.flatten(0, 1).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).reshape(batch, t, h, w, -1)


class CausalMix(nn.Module):
    """Causal convolution in time, 1x1 in space: every position sees itself and its past.

    Frames before the first are zeros, so an image is exactly the first frame of a video.
    `past` is what `forward` returned for the frames just before: (B, kernel-1, H, W, C) or None.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.linear = nn.Linear(inputs * kernel, outputs)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        before = self.kernel - 1
        if before == 0:
            return self.linear(x), None
        frames = x.shape[1]
        if past is None:
            past = x.new_zeros(x.shape[0], before, *x.shape[2:])
        window = torch.cat([past, x], dim=1)
        taps = [window[:, i : i + frames] for i in range(self.kernel)]
        return self.linear(torch.cat(taps, dim=-1)), window[:, frames:]


class CausalBlock(nn.Module):
    """x + mix(SiLU(conv(norm(x)))): 3x3 in space, then causal in time.

    The norm runs over the channels of one position only, never across time or space, which is what
    makes chunks equal the whole. It is LayerNorm without affine (the convolution behind it holds
    the gain), since PyTorch's CPU kernel for it is four times as fast as its RMSNorm.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = SpatialConv(width, width)
        self.mix = CausalMix(width, width, kernel)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        hidden = F.silu(self.conv(F.layer_norm(x, x.shape[-1:])))
        update, past = self.mix(hidden, past)
        return x + update, past


class CausalStack(nn.ModuleList):
    """Blocks in order, with one `past` per block."""

    def __init__(self, width: int, depth: int, kernel: int) -> None:
        super().__init__(CausalBlock(width, kernel) for _ in range(depth))

    def forward(
        self, x: Tensor, pasts: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        given = pasts if pasts is not None else [None] * len(self)
        after: list[Tensor | None] = []
        for block, past in zip(self, given, strict=True):
            x, past = block(x, past)
            after.append(past)
        return x, after
