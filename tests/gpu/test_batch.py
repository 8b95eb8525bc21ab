"""Packs on a CUDA device: those of the CPU to a rounding, built without waiting for the device, clips' frames given."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from goku.batch import BatchBuilder
from goku.conditioning import ConditioningConfig
from goku.flow import FlowConfig
from goku.packing import PackingConfig
from goku.statistics import sample_groups
from goku.vae import GokuVAE, VAEConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
CHANNELS, TEXT_DIM = 4, 16
GRIDS = [(1, 16, 16), (5, 9, 7), (1, 5, 12), (3, 8, 8), (1, 1, 1)]
PACKING = PackingConfig(tokens_per_step=4096, tokens_per_pack=2048)


class _Samples:
    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.empty_text = torch.randn(1, TEXT_DIM, generator=draw)
        self.items, self.samples = [], []
        for i, (t, h, w) in enumerate(GRIDS):
            frames = 4 * (t - 1) + 1
            self.items.append(
                SimpleNamespace(
                    name=f"item{i}", caption=f"caption {i}", frames=frames, height=16 * h,
                    width=16 * w, grid=(t, h, w), tokens=t * h * w,
                    modality="image" if t == 1 else "video", weight=1.0 + i, choose_caption=lambda u: 0,
                )
            )  # fmt: skip
            mean, logvar = torch.randn(2, CHANNELS, t, 2 * h, 2 * w, generator=draw)
            first = mean[:, :1]  # of a causal VAE, with gaps between its channels
            last = torch.randn(CHANNELS, 1, 2 * h, 2 * w, generator=draw)
            text = torch.randn(i + 1, TEXT_DIM, generator=draw)
            self.samples.append(
                SimpleNamespace(mean=mean, logvar=logvar, text=text, frames={0: first, -1: last})
            )

    def reading(self):
        return contextlib.nullcontext()

    def cached(self, index, caption=0):
        return self.samples[index]


def _builder(device):
    vae = GokuVAE(
        VAEConfig(channels=CHANNELS, stem_width=8, width=8, encoder_depth=1, decoder_depth=1)
    )
    vae.latent_mean.copy_(torch.linspace(-1, 1, CHANNELS))
    vae.latent_std.copy_(torch.linspace(0.5, 2, CHANNELS))
    given = ConditioningConfig(first=1.0, last=1.0, both=1.0, drop=0.2)
    return BatchBuilder(
        _Samples(), vae.to(device), FlowConfig(text_drop=0.3), PACKING, 3, torch.device(device),
        conditioning=given,
    )  # fmt: skip


def _pack(builder, first):
    positions, indices = list(range(first, first + 10)), [k % 5 for k in range(10)]
    builder.read_ahead([(positions, indices)])
    return builder.training(positions, indices)


def test_a_pack_is_that_of_the_cpu():
    ours, theirs = _pack(_builder(DEVICE), 20), _pack(_builder("cpu"), 20)
    assert ours.x.device.type == torch.device(DEVICE).type
    for name in ("x", "target", "condition"):
        # The exponential of the posterior differs by its last bits, the draws by none.
        torch.testing.assert_close(
            getattr(ours, name).cpu(), getattr(theirs, name), rtol=1e-5, atol=1e-5
        )
    for name in ("t", "text", "weights"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
    assert torch.equal(ours.packing.cu_seqlens.cpu(), theirs.packing.cu_seqlens)
    assert torch.equal(ours.packing.grid_sizes.cpu(), theirs.packing.grid_sizes)
    assert torch.equal(ours.text_packing.cu_seqlens.cpu(), theirs.text_packing.cu_seqlens)


def _some_packs(builder, count):
    """Packs that are begun while the device is asleep for about two seconds, and whether it still was at their end."""
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)
    awake = torch.cuda.Event()
    awake.record()
    before = torch.cuda.get_sync_debug_mode()
    # A copy from pageable memory that torch does not wait for, the driver may: the event tells of that one.
    torch.cuda.set_sync_debug_mode("error")
    try:
        packs = [_pack(builder, 30 + 10 * k) for k in range(count)]
        groups = [sample_groups(pack) for pack in packs]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    asleep = not awake.query()
    assert all(group.shape == (2, 10) for group in groups)
    torch.cuda.synchronize()
    return packs, asleep


def test_building_a_pack_does_not_wait_for_the_device():
    """One: CUDA's queue of a stream holds about 1,000 launches, and a pack has more than half as many (574 operators
    that are no views, counted on the CPU). Behind a full queue everybody waits."""
    builder = _builder(DEVICE)
    _some_packs(builder, 1)  # kernels are compiled, memory on both sides is there
    _, asleep = _some_packs(builder, 1)
    assert asleep


def test_packs_that_are_built_at_once_are_those_built_alone():
    builder = _builder(DEVICE)
    packs, _ = _some_packs(builder, 20)
    # Queued ahead of the copies: page-locked memory that was used again too early would show.
    for k, pack in enumerate(packs):
        alone = _pack(builder, 30 + 10 * k)
        torch.cuda.synchronize()
        for name in ("x", "target", "t", "text", "condition", "weights"):
            assert torch.equal(getattr(pack, name), getattr(alone, name))
