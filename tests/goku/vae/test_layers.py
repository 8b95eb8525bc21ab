"""Patches and the causal layers, against plain loops in fp64."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.vae.layers import (
    CausalBlock,
    CausalMix,
    SpatialConv,
    fold,
    patchify,
    unfold,
    unpatchify,
)


def test_patchify_order() -> None:
    video = torch.arange(2 * 3 * 8 * 8 * 12, dtype=torch.float64).view(2, 3, 8, 8, 12)
    patches = patchify(video)
    assert patches.shape == (2, 2, 2, 3, 192)
    for b, t, h, w in [(0, 0, 0, 0), (1, 1, 1, 2), (0, 1, 0, 1)]:
        block = video[b, :, 4 * t : 4 * t + 4, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
        assert torch.equal(patches[b, t, h, w], block.flatten())
    assert torch.equal(unpatchify(patches), video)


def test_fold_order() -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 5).view(2, 3, 4, 6, 5)
    folded = fold(x)
    assert folded.shape == (2, 3, 2, 3, 20)
    assert torch.equal(folded[1, 2, 1, 2], x[1, 2, 2:4, 4:6].flatten())
    assert torch.equal(unfold(folded), x)


def test_spatial_conv_is_a_zero_padded_3x3_of_each_frame() -> None:
    conv = SpatialConv(3, 5).double()
    x = torch.randn(2, 3, 4, 6, 3, dtype=torch.float64)
    y = conv(x)
    for b in range(2):
        for t in range(3):
            frame = F.conv2d(x[b, t].movedim(-1, 0)[None], conv.weight, conv.bias, padding=1)
            torch.testing.assert_close(y[b, t], frame[0].movedim(0, -1), rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 6))
def test_causal_mix_is_a_causal_convolution(kernel: int, frames: int, cut: int) -> None:
    mix = CausalMix(3, 2, kernel).double()
    x = torch.randn(2, frames, 2, 2, 3, dtype=torch.float64)
    whole, _ = mix(x, None)
    taps = mix.linear.weight.view(2, kernel, 3)  # the last tap sees the frame itself
    for t in range(frames):
        expected = mix.linear.bias.expand(2, 2, 2, 2).clone()
        for i in range(kernel):
            source = t - (kernel - 1) + i
            if source >= 0:
                expected = expected + x[:, source] @ taps[:, i].T
        torch.testing.assert_close(whole[:, t], expected, rtol=1e-12, atol=1e-12)
    cut = min(cut, frames)
    if 0 < cut < frames:
        first, past = mix(x[:, :cut], None)
        second, _ = mix(x[:, cut:], past)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)


def test_block_norm_sees_one_position_only() -> None:
    """Scaling one position leaves every output alone that neither convolution reaches from it."""
    block = CausalBlock(4, 2).double()
    x = torch.randn(1, 4, 7, 7, 4, dtype=torch.float64)
    before, _ = block(x, None)
    changed = x.clone()
    changed[:, 1, 3, 3] *= 100.0
    changed[:, 1, 3, 3, 0] += 5.0
    after, _ = block(changed, None)
    reached = torch.zeros(1, 4, 7, 7, dtype=torch.bool)
    reached[:, 1:3, 2:5, 2:5] = True  # 3x3 in space; its own frame and the next
    moved = (after != before).any(-1)
    assert not bool((moved & ~reached).any())
    assert bool(moved[reached].any())
