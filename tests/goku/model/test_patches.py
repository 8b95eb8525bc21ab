"""patchify: the order of tokens and of the numbers in them, and its inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goku.model import patch_grid, patchify, unpatchify


def test_order_of_tokens_and_channels():
    c, t, h, w = 3, 2, 4, 6
    latent = torch.arange(c * t * h * w).reshape(c, t, h, w)
    tokens = patchify(latent)
    assert tokens.shape == (t * 2 * 3, c * 4)
    row = 0
    for ti in range(t):
        for hi in range(0, h, 2):
            for wi in range(0, w, 2):
                want = [
                    latent[ci, ti, hi + a, wi + b].item()
                    for ci in range(c)
                    for a in range(2)
                    for b in range(2)
                ]
                assert tokens[row].tolist() == want
                row += 1


sizes = st.tuples(*[st.integers(1, 4)] * 3)


@given(st.integers(1, 3), sizes, st.tuples(*[st.integers(1, 2)] * 3))
def test_unpatchify_is_the_inverse(channels, grid, patch):
    latent = torch.rand(channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    assert patch_grid(latent, patch) == grid
    assert torch.equal(unpatchify(patchify(latent, patch), grid, channels, patch), latent)


def test_refusals():
    with pytest.raises(ValueError, match=r"latent is \(1, 3, 4\).*multiples of the patch"):
        patchify(torch.zeros(2, 1, 3, 4))
    with pytest.raises(ValueError, match="latent is"):
        patchify(torch.zeros(2, 0, 4, 4))
    with pytest.raises(ValueError, match=r"wanted \(C, T, H, W\)"):
        patchify(torch.zeros(1, 2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"tokens has shape \(5, 8\).*need \(4, 8\)"):
        unpatchify(torch.zeros(5, 8), (1, 2, 2), 2)
