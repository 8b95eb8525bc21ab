"""goku.flops against torch's own counter, and its MFU arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from goku import flops
from goku.model import PRESETS, GokuTransformer, ModelConfig
from goku_kernels import FLOP_FORMULAS, Packing

TINY = ModelConfig(dim=48, depth=2, heads=2, text_dim=24, latent_channels=4, time_channels=32)
GRIDS = [(1, 4, 3), (2, 3, 5), (1, 1, 1)]
TEXT = [3, 7, 1]


@pytest.mark.parametrize("condition", ["none", "frames"])
def test_forward_and_training_equal_torchs_counter_exactly(condition):
    shape = replace(TINY, condition=condition)
    model = GokuTransformer(shape)
    packing, text_packing = Packing.from_grids(GRIDS), Packing.from_lengths(TEXT)
    x = torch.randn(packing.total, TINY.patch_dim)
    text = torch.randn(text_packing.total, TINY.text_dim)
    given = torch.randn(packing.total, shape.condition_dim) if condition == "frames" else None
    # The math backend, since the counter has no formula for the CPU's fused kernel.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter,
    ):
        y = model(x, torch.rand(packing.batch), text, packing, text_packing, condition=given)
        forward = counter.get_total_flops()
        y.sum().backward()
    lengths = [12, 30, 1]
    assert forward == flops.model_flops(shape, lengths, TEXT)
    # Data has no gradient in training: not the latents, noised or given, not the text, not the
    # timestep features.
    assert counter.get_total_flops() == flops.training_flops(shape, lengths, TEXT)


def test_a_block_in_training_has_gradients_of_tokens_and_conditioning_but_not_of_the_text():
    model = GokuTransformer(TINY)
    packing, text_packing = Packing.from_grids(GRIDS), Packing.from_lengths(TEXT)
    x = torch.randn(packing.total, TINY.dim, requires_grad=True)
    c = torch.randn(packing.batch, TINY.dim, requires_grad=True)
    text = torch.randn(text_packing.total, TINY.text_dim)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter,
    ):
        model.blocks[0](x, c, text, packing, text_packing).sum().backward()
    assert counter.get_total_flops() == flops.block_training_flops(TINY, [12, 30, 1], TEXT)


def test_blocks_are_counted_from_segments_not_from_their_sum():
    shape = PRESETS["goku-2b"]
    together = flops.block_flops(shape, [1024], [64])
    apart = flops.block_flops(shape, [512, 512], [32, 32])
    attention = 4 * shape.dim * (1024 * (1024 + 64) - 2 * 512 * (512 + 32))
    modulation = 2 * shape.dim * 6 * shape.dim
    assert together - apart == attention - modulation


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="text_lengths has 1 entries: lengths has 2"):
        flops.block_flops(TINY, [1, 2], [3])


def test_mfu():
    assert flops.mfu(1e12, 2.0, 1e12) == 0.5
    with pytest.raises(ValueError, match="seconds is 0"):
        flops.mfu(1e12, 0, 1e12)
    with pytest.raises(ValueError, match="peak"):
        flops.mfu(1e12, 1, float("nan"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_named_peak(name, peak):
    assert flops.named_peak(name) == peak


def test_cpu_peak_is_measured_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    peak = flops.peak_flops("cpu", probe_seconds=0.05)
    assert torch.equal(state, torch.get_rng_state())
    assert peak is not None
    assert 1e8 < peak < 1e14  # a core does at least 0.1 GFLOP/s, no CPU over 100 TFLOP/s
    assert flops.peak_flops("meta") is None
