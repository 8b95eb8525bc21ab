"""GokuVAE: causality, chunks equal the whole, bounded memory, images as first frames."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from goku.vae import GokuVAE, VAEConfig

SMALL = VAEConfig(channels=3, stem_width=8, width=12, decoder_depth=2, temporal_kernel=3)


def small(dtype: torch.dtype = torch.float64, config: VAEConfig = SMALL) -> GokuVAE:
    """A VAE with every weight at work (the initial one has zero heads and biases)."""
    vae = GokuVAE(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vae.parameters():
            scale = 1.0 / math.sqrt(parameter[0].numel())
            parameter.add_(0.5 * scale * torch.randn(parameter.shape, generator=generator))
    return vae.to(dtype)


def media(frames: int, height: int = 16, width: int = 24, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, frames, height, width)
    return 2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (17, 5)])
def test_shapes(frames: int, latents: int) -> None:
    vae = small()
    posterior = vae.encode(media(frames, batch=2))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, latents, 2, 3)
    video = vae.decode(posterior.mean)
    assert video.shape == (2, 3, frames, 16, 24)
    assert not video.requires_grad


@settings(max_examples=15, deadline=None)
@given(k=st.integers(0, 6), chunk=st.integers(1, 8), kernel=st.integers(1, 4))
def test_chunks_equal_the_whole_fp64(k: int, chunk: int, kernel: int) -> None:
    config = VAEConfig(channels=3, stem_width=8, width=12, temporal_kernel=kernel)
    vae, video = small(config=config), media(4 * k + 1, seed=k)
    whole, parts = vae.encode(video, chunk=None), vae.encode(video, chunk=chunk)
    # fp64: only the order of summation in the convolutions differs.
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts.logvar, whole.logvar, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        vae.decode(whole.mean, chunk=chunk), vae.decode(whole.mean, chunk=None), rtol=0, atol=1e-10
    )


def test_chunks_equal_the_whole_fp32_and_forward() -> None:
    vae, video = small(torch.float32, VAEConfig()), media(33, 24, 32).float()
    with torch.no_grad():
        reconstruction, posterior = vae(video)
    for chunk in (1, 3, 4):
        parts = vae.encode(video, chunk=chunk)
        torch.testing.assert_close(parts.mean, posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(parts.logvar, posterior.logvar, rtol=0, atol=1e-5)
        decoded = vae.decode(posterior.mean, chunk=chunk)
        torch.testing.assert_close(decoded, reconstruction, rtol=0, atol=1e-5)


def test_a_later_frame_never_changes_an_earlier_latent() -> None:
    vae, video = small(), media(17)
    before = vae.encode(video)
    for frame in range(17):
        changed = video.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        after = vae.encode(changed)
        own = (frame + 3) // 4  # the latent frame that holds it
        assert torch.equal(after.mean[:, :, :own], before.mean[:, :, :own])
        assert torch.equal(after.logvar[:, :, :own], before.logvar[:, :, :own])
        assert not torch.equal(after.mean[:, :, own], before.mean[:, :, own])


def test_a_later_latent_never_changes_an_earlier_frame() -> None:
    vae = small()
    latent = vae.encode(media(17)).mean
    before = vae.decode(latent)
    for i in range(5):
        changed = latent.clone()
        changed[:, :, i] += 1.0
        after = vae.decode(changed)
        first = max(0, 4 * i - 3)  # the first video frame that latent frame i holds
        assert torch.equal(after[:, :, :first], before[:, :, :first])
        assert not torch.equal(after[:, :, first], before[:, :, first])


def test_the_past_is_used() -> None:
    """Causal, not frame by frame: the last latent depends on the frames before its own."""
    vae, video = small(), media(9)
    changed = video.clone()
    changed[:, :, 0] = -changed[:, :, 0]
    moved = vae.encode(changed).mean - vae.encode(video).mean
    assert moved[:, :, 2].abs().max() > 1e-6


def test_an_image_is_the_first_frame_of_a_video() -> None:
    vae, video = small(), media(9)
    image, whole = vae.encode(video[:, :, :1]), vae.encode(video)
    torch.testing.assert_close(image.mean, whole.mean[:, :, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        vae.decode(image.mean), vae.decode(whole.mean)[:, :, :1], rtol=0, atol=1e-12
    )


def test_batch_members_do_not_meet() -> None:
    vae, video = small(), media(5, batch=3)
    together = vae.encode(video).mean
    for i in range(3):
        alone = vae.encode(video[i : i + 1]).mean
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


class Intermediates(TorchDispatchMode):
    """Elements alive at once in what operations made, at the peak; the final outputs excluded.

    Counts storages by the tensors that still refer to them, so that it measures what is kept and
    not only what is made.
    """

    def __init__(self, outputs: set[int]) -> None:
        super().__init__()
        self.outputs, self.alive, self.peak = outputs, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            size = storage.nbytes() // tensor.element_size()
            if storage.data_ptr() not in known and size not in self.outputs:
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.alive -= size


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak(run: Callable[[], object], output: int) -> int:
    with Intermediates({output}) as mode:
        run()
    return mode.peak


@pytest.mark.parametrize("chunk", [2, None])
def test_memory_is_bounded_by_the_chunk(chunk: int | None) -> None:
    """Peak of everything made on the way, but for the outputs, does not know T when chunked."""
    vae = small(torch.float32)

    def encoding(frames: int) -> int:
        video = media(frames).float()
        outputs = 3 * (frames + 3) // 4 * 2 * 3  # of mean, and of logvar
        return peak(lambda: vae.encode(video, chunk=chunk), outputs)

    def decoding(frames: int) -> int:
        latent = torch.zeros(1, 3, (frames + 3) // 4, 2, 3)
        return peak(lambda: vae.decode(latent, chunk=chunk), 3 * frames * 16 * 24)

    for measure in (encoding, decoding):
        short, long = measure(25), measure(97)  # 7 and 25 latent frames
        if chunk is None:
            assert long > 3 * short  # what the chunks are for
        else:
            assert 0 < long == short


def test_normalise_and_back() -> None:
    vae = small()
    with torch.no_grad():
        vae.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        vae.latent_std.copy_(torch.tensor([2.0, 0.5, 1.5]))
    latent = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    scaled = vae.normalise(latent)
    torch.testing.assert_close(scaled[:, 1], (latent[:, 1] + 2.0) / 0.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(vae.denormalise(scaled), latent, rtol=1e-14, atol=1e-14)


def test_seed_decides_the_weights() -> None:
    state = torch.get_rng_state()
    first, again, other = (GokuVAE(SMALL, seed=s) for s in (1, 1, 2))
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.encoder.embed.weight, other.encoder.embed.weight)
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from the global generator


def test_fingerprint_follows_weights_statistics_and_configuration() -> None:
    vae = GokuVAE(SMALL)
    prints = {vae.fingerprint()}
    assert prints == {GokuVAE(SMALL).fingerprint()}
    with torch.no_grad():
        vae.decoder.head.bias[0] += 1e-7
        prints.add(vae.fingerprint())
        vae.latent_std[1] = 1.25
        prints.add(vae.fingerprint())
    prints.add(GokuVAE(VAEConfig(channels=3, stem_width=8, width=12)).fingerprint())
    prints.add(GokuVAE(SMALL).bfloat16().fingerprint())
    assert len(prints) == 5


@pytest.mark.parametrize("field", ["channels", "width", "stem_width", "temporal_kernel"])
def test_bad_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} = 0"):
        VAEConfig(**{field: 0})
    with pytest.raises(ValueError, match="encoder_depth = -1"):
        VAEConfig(encoder_depth=-1)


def test_bad_input_is_named() -> None:
    vae = small()
    with pytest.raises(ValueError, match="frames = 4"):
        vae.encode(media(4))
    with pytest.raises(ValueError, match="height = 20"):
        vae(media(1, 20))
    with pytest.raises(ValueError, match=r"needs \(B, 3, T, H, W\), none empty"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="chunk = 0"):
        vae.encode(media(1), chunk=0)
    with pytest.raises(ValueError, match=r"latent has shape \(3, 1, 2, 2\)"):
        vae.normalise(torch.zeros(3, 1, 2, 2))


def test_gradients_reach_every_parameter() -> None:
    vae = small()
    noise = torch.randn(1, 3, 3, 2, 3, dtype=torch.float64)
    reconstruction, posterior = vae(media(9), noise)
    (reconstruction.square().mean() + posterior.kl()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
