"""train_vae: the linear start, learning, determinism, statistics and bad input."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from goku.vae import GokuVAE, VAEConfig, VAETrainConfig, train_vae
from goku.vae.layers import patchify
from goku.vae.linear_start import start_from_components
from goku.vae.training import _Crops, as_video

TINY = VAEConfig(
    channels=4, stem_width=8, width=16, encoder_depth=1, decoder_depth=1, decoder_stem_depth=1
)
QUICK: dict[str, Any] = {"crop": 16, "frames": 5, "positions": 16, "precision": "float32"}


def pictures() -> list[Tensor]:
    """Smooth coloured waves, uint8: two images of different shapes and a moving clip."""

    def wave(frames: int, height: int, width: int, phase: float) -> Tensor:
        t, y, x = (torch.arange(n).float() for n in (frames, height, width))
        angle = 0.35 * x + 0.2 * y[:, None] + 0.3 * t[:, None, None] + phase
        colours = torch.stack([angle.sin(), (angle * 0.7).cos(), (angle + y[:, None] / 9).sin()])
        return ((colours + 1.0) * 127.5).round().to(torch.uint8)

    return [wave(1, 24, 32, 0.0), wave(1, 32, 16, 1.0), wave(9, 16, 24, 2.0)]


def error(vae: GokuVAE, clips: list[Tensor]) -> float:
    return sum(
        float((vae.decode(vae.encode(as_video(c)).mean) - as_video(c)).square().mean())
        for c in clips
    )


def test_linear_start_is_the_best_linear_compression() -> None:
    """The untrained VAE's squared error is the sum of the eigenvalues left out (Eckart-Young)."""
    clips = pictures()
    vae = GokuVAE(TINY).double()
    start_from_components(vae, clips)
    rows = []
    for clip in clips:
        frames = torch.cat([clip[:, :1]] * 3 + [clip], dim=1).double() / 127.5 - 1.0
        for t in range(0, frames.shape[1], 4):
            for y in range(0, frames.shape[2], 8):
                for x in range(0, frames.shape[3], 8):
                    rows.append(frames[:, t : t + 4, y : y + 8, x : x + 8].flatten())
    matrix = torch.stack(rows)
    left = torch.linalg.svdvals(matrix - matrix.mean(0))[4:].square().sum()
    got = torch.zeros((), dtype=torch.float64)
    latents = []
    for clip in clips:
        video = as_video(clip).double()
        mean = vae.encode(video).mean
        latents.append(mean.movedim(1, -1).flatten(0, 3))
        patches = vae.decoder(mean.movedim(1, -1), None)[0]
        repeated = torch.cat([video[:, :, :1]] * 3 + [video], dim=2)
        got = got + (patches - patchify(repeated)).square().sum()
    torch.testing.assert_close(got, left, rtol=1e-4, atol=0)  # as_video rounds to fp32
    values = torch.cat(latents)
    torch.testing.assert_close(values.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        values.var(0, correction=0), torch.ones(4).double(), rtol=1e-4, atol=0
    )


def test_training_improves_on_the_linear_start() -> None:
    clips = pictures()
    vae = GokuVAE(TINY)
    start_from_components(vae, clips)
    before = error(vae, clips)
    config = VAETrainConfig(steps=100, latent_noise=0.0, kl_weight=1e-4, **QUICK)
    train_vae(vae, clips, config, seed=0)
    assert error(vae, clips) < 0.7 * before


def test_the_same_seed_gives_the_same_vae_bit_for_bit() -> None:
    clips = pictures()
    prints = []
    for seed, shift in ((0, 0), (0, 7), (1, 0)):
        torch.manual_seed(shift)  # the global generator has no say
        vae = GokuVAE(TINY)
        train_vae(vae, clips, VAETrainConfig(steps=3, **QUICK), seed=seed)
        prints.append(vae.fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_normalised_latents_have_mean_zero_and_variance_one() -> None:
    clips = pictures()
    vae = GokuVAE(TINY)
    train_vae(vae, clips, VAETrainConfig(steps=5, **QUICK), seed=0)
    first, second, count = torch.zeros(4).double(), torch.zeros(4).double(), 0
    for clip in clips:
        posterior = vae.encode(as_video(clip))
        mean = vae.normalise(posterior.mean).double().movedim(1, -1).reshape(-1, 4)
        spread = (posterior.logvar.double().exp().movedim(1, -1).reshape(-1, 4)) / (
            vae.latent_std.double().square()
        )
        first, second = first + mean.sum(0), second + (mean.square() + spread).sum(0)
        count += len(mean)
    torch.testing.assert_close(first / count, torch.zeros(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(second / count, torch.ones(4).double(), rtol=1e-4, atol=0)


def test_log_and_progress() -> None:
    entries: list[dict[str, float]] = []
    ticks: list[tuple[int, int]] = []
    config = VAETrainConfig(steps=7, log_every=3, **QUICK)
    train_vae(
        GokuVAE(TINY),
        pictures(),
        config,
        seed=0,
        log=entries.append,
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert [entry["step"] for entry in entries] == [3, 6, 7]
    assert ticks == [(i, 7) for i in range(1, 8)]
    for entry in entries:
        assert entry.keys() == {"step", "loss", "mse", "psnr", "kl", "grad_norm", "lr"}
        assert all(math.isfinite(value) for value in entry.values())


def test_continuing_keeps_what_was_learnt() -> None:
    clips = pictures()
    vae = GokuVAE(TINY)
    train_vae(vae, clips, VAETrainConfig(steps=60, **QUICK), seed=0)
    learnt = error(vae, clips)
    config = VAETrainConfig(steps=2, learning_rate=1e-6, linear_start=False, **QUICK)
    train_vae(vae, clips, config, seed=1)
    assert error(vae, clips) < 1.1 * learnt


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_precision_leaves_fp32_weights(precision: Any) -> None:
    vae = GokuVAE(TINY)
    config = VAETrainConfig(steps=2, **{**QUICK, "precision": precision})
    train_vae(vae, pictures(), config, seed=0)
    assert {value.dtype for value in vae.state_dict().values()} == {torch.float32}
    assert vae.training


def test_every_item_is_drawn() -> None:
    clips = [
        torch.full((3, t, h, w), i, dtype=torch.uint8)
        for i, (t, h, w) in enumerate(
            [(1, 16, 24), (1, 32, 16), (1, 8, 8), (9, 16, 16), (5, 24, 16)]
        )
    ]
    crops = _Crops(clips, VAETrainConfig(**QUICK), seed=0)
    seen: set[int] = set()
    for _ in range(60):
        batch = crops.draw()
        assert batch.shape[2] in (1, 5)
        seen |= {round(float(v)) for v in ((batch[:, 0, 0, 0, 0] + 1.0) * 127.5)}
    assert seen == {0, 1, 2, 3, 4}


def test_crops_lie_on_the_grid_of_the_whole() -> None:
    ramp = torch.arange(48, dtype=torch.uint8).expand(3, 1, 40, 48).contiguous()
    crops = _Crops([ramp], VAETrainConfig(**QUICK), seed=0)
    lefts = {
        round(float((v + 1.0) * 127.5)) for _ in range(20) for v in crops.draw()[:, 0, 0, 0, 0]
    }
    assert lefts == {0, 8, 16, 24, 32}


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(1, 3, 1, 8, 8), r"clips\[1\] has shape \(1, 3, 1, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.int32), r"clips\[1\] has dtype torch\.int32"),
        (torch.zeros(3, 2, 8, 8), r"clips\[1\]: frames = 2"),
        (torch.zeros(3, 1, 8, 12), r"clips\[1\]: width = 12"),
    ],
)
def test_bad_clips_are_named(clip: Tensor, message: str) -> None:
    good = torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        train_vae(GokuVAE(TINY), [good, clip], VAETrainConfig(steps=1), seed=0)
    with pytest.raises(ValueError, match="clips is empty"):
        train_vae(GokuVAE(TINY), [], VAETrainConfig(steps=1), seed=0)


def test_values_that_are_not_finite_stop_the_training() -> None:
    clip = torch.zeros(3, 1, 8, 8)
    clip[0, 0, 0, 0] = float("nan")
    config = VAETrainConfig(steps=2, linear_start=False, **QUICK)
    with pytest.raises(FloatingPointError, match="diverged at step 1"):
        train_vae(GokuVAE(TINY), [clip], config, seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("crop", 12),
        ("frames", 8),
        ("l1_weight", 1.5),
        ("kl_weight", -1.0),
        ("beta2", 1.0),
        ("latent_noise", -0.1),
        ("precision", "float16"),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} = '?{value}"):
        VAETrainConfig(**{field: value})
