"""The adapter interface: geometry, posterior, and that GokuVAE is a VideoVAE."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from goku.vae import STRIDES, GokuVAE, Posterior, VAEConfig, VideoVAE, latent_shape
from goku.vae.diffusers_vaes import DiffusersVAE
from goku.vae.interface import Copies, check_latent, check_video


def test_goku_vae_is_a_video_vae() -> None:
    vae = GokuVAE(VAEConfig(channels=3, stem_width=8, width=8))
    assert isinstance(vae, VideoVAE)
    assert vae.strides == STRIDES == (4, 8, 8)
    assert vae.channels == 3
    assert vae.causal


@given(st.integers(0, 80), st.integers(1, 200), st.integers(1, 200))
def test_latent_shape(k: int, h: int, w: int) -> None:
    assert latent_shape(4 * k + 1, 8 * h, 8 * w) == (k + 1, h, w)


@pytest.mark.parametrize(
    ("geometry", "name"),
    [
        ((0, 8, 8), "frames = 0"),
        ((4, 8, 8), "frames = 4"),
        ((6, 8, 8), "frames = 6"),
        ((-3, 8, 8), "frames = -3"),
        ((1, 12, 8), "height = 12"),
        ((1, 0, 8), "height = 0"),
        ((1, 8, 20), "width = 20"),
    ],
)
def test_bad_geometry_is_named(geometry: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        latent_shape(*geometry)
    if min(geometry) >= 0:
        with pytest.raises(ValueError, match=name):
            check_video(torch.zeros(1, 3, *geometry))


def test_bad_tensors_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1, 8, 8\).*\(B, 3, T, H, W\)"):
        check_video(torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="uint8"):
        check_video(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 5, 1, 2, 2\).*\(B, 4, T, H, W\)"):
        check_latent(torch.zeros(1, 5, 1, 2, 2), 4)
    with pytest.raises(ValueError, match="int64"):
        check_latent(torch.zeros(1, 4, 1, 2, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="empty"):
        check_latent(torch.zeros(1, 4, 0, 2, 2), 4)


def test_posterior_sample_has_its_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([2.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1, 1)
    deviation = torch.tensor([0.5, 3.0], dtype=torch.float64).view(1, 2, 1, 1, 1)
    shape = (1, 2, 1, 200, 200)
    posterior = Posterior(mean.expand(shape), (2 * deviation.log()).expand(shape))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    latent = posterior.sample(noise)
    torch.testing.assert_close(latent, mean + deviation * noise, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 1"):
        posterior.sample(noise[:, :1])


def test_kl_is_the_divergence_to_the_standard_normal() -> None:
    mean, variance = 0.7, 0.3
    shape = (2, 3, 1, 2, 2)
    posterior = Posterior(torch.full(shape, mean), torch.full(shape, math.log(variance)))
    ours = torch.distributions.Normal(mean, math.sqrt(variance))
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-6, atol=0)
    assert Posterior(torch.zeros(shape), torch.zeros(shape)).kl() == 0


class _Moves(TorchDispatchMode):
    """Counts tensors that go to the device without values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.count += 1
        return out


@pytest.mark.parametrize(
    "vae",
    [
        GokuVAE(VAEConfig(channels=2, stem_width=8, width=8)),
        DiffusersVAE(nn.Identity(), [0.0, 0.0], [1.0, 1.0]),
    ],
    ids=["GokuVAE", "DiffusersVAE"],
)
def test_latents_on_another_device_than_the_vae_wait_for_it_once(vae: Any) -> None:
    """From a GPU each copy would wait for the training step under way, while packs are prepared on the host."""
    there = torch.zeros(1, 2, 1, 2, 2, device="meta")
    with torch.no_grad(), _Moves() as moves:
        for _ in range(3):
            assert vae.denormalise(vae.normalise(there)).device.type == "meta"
        assert moves.count == 2  # the mean, the standard deviation
        vae.latent_std.fill_(2.0)
        vae.normalise(there)
        assert moves.count == 3
        vae.normalise(torch.zeros(1, 2, 1, 2, 2))
        assert moves.count == 3


def test_a_copy_is_of_the_buffer_as_it_is() -> None:
    copies, meta = Copies(), torch.device("meta")
    first = torch.ones(3)
    kept = copies.of("mean", first, meta)
    assert copies.of("mean", first, meta) is kept
    assert copies.of("mean", first, torch.device("cpu")) is first
    assert copies.of("std", torch.ones(2), meta).shape == (2,)
    first.add_(1)
    changed = copies.of("mean", first, meta)
    assert changed is not kept
    assert copies.of("mean", first.clone(), meta) is not changed  # as Module.to replaces it
