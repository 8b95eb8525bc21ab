"""Latents to tokens and back: patchify (ours; Goku does not state its patch size)."""

from __future__ import annotations

from torch import Tensor


def patchify(latent: Tensor, patch: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
    """Cut a latent into tokens, row-major over the grid (t, h, w).

    Args:
        latent: (C, T, H, W), each of T, H, W a multiple of the patch's.
        patch: latent cells (t, h, w) in one token.

    Returns:
        (tokens, C*pt*ph*pw); within a token the channel is outermost, then t, h, w.

    Raises:
        ValueError: `latent` has other axes, or a size that is no multiple of the patch's.
    """
    t, h, w = patch_grid(latent, patch)
    pt, ph, pw = patch
    cells = latent.reshape(latent.shape[0], t, pt, h, ph, w, pw)
    return cells.permute(1, 3, 5, 0, 2, 4, 6).reshape(t * h * w, -1)


def patch_grid(latent: Tensor, patch: tuple[int, int, int] = (1, 2, 2)) -> tuple[int, int, int]:
    """Grid (t, h, w) of tokens that `patchify` makes of `latent` (C, T, H, W).

    Raises:
        ValueError: `latent` has other axes, or a size that is no multiple of the patch's.
    """
    if latent.dim() != 4:
        raise ValueError(f"latent has shape {tuple(latent.shape)}: wanted (C, T, H, W)")
    sizes = tuple(latent.shape[1:])
    if any(n % p or n == 0 for n, p in zip(sizes, patch, strict=True)):
        raise ValueError(f"latent is {sizes} (T, H, W): allowed are multiples of the patch {patch}")
    return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]


def unpatchify(
    tokens: Tensor,
    grid: tuple[int, int, int],
    channels: int,
    patch: tuple[int, int, int] = (1, 2, 2),
) -> Tensor:
    """The inverse of `patchify`.

    Args:
        tokens: (t*h*w, channels*pt*ph*pw).
        grid: tokens along (t, h, w).
        channels: channels of the latent.
        patch: latent cells (t, h, w) in one token.

    Returns:
        (channels, t*pt, h*ph, w*pw).

    Raises:
        ValueError: the shape of `tokens` is not that of the grid, channels and patch.
    """
    t, h, w = grid
    pt, ph, pw = patch
    wanted = (t * h * w, channels * pt * ph * pw)
    if tuple(tokens.shape) != wanted:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}: grid {grid}, {channels} channels and patch "
            f"{patch} need {wanted}"
        )
    cells = tokens.reshape(t, h, w, channels, pt, ph, pw).permute(3, 0, 4, 1, 5, 2, 6)
    return cells.reshape(channels, t * pt, h * ph, w * pw)
