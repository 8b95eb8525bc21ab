"""Public VAEs on small random weights: shapes, scaling, chunks, streams.

The references are diffusers' own models and the formulas of its pipelines, written out here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku.vae import VideoVAE, decode_pieces, latent_shape, load_vae

Build = Callable[..., Any]
Make = Callable[..., torch.Tensor]
NAMES = ["AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_video_vae(folders: dict[str, Path], name: str) -> None:
    vae = load_vae(folders[name])
    assert isinstance(vae, VideoVAE)
    assert vae.strides == (4, 8, 8)
    assert vae.channels == 16
    assert vae.causal == (name == "AutoencoderKLWan")
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 21, 25, 29, 33, 37])
def test_shapes_there_and_back(
    folders: dict[str, Path], name: str, frames: int, clip: Make
) -> None:
    vae = load_vae(folders[name])
    video = clip(frames)
    posterior = vae.encode(video)
    expected = (1, 16, *latent_shape(frames, 16, 24))
    assert posterior.mean.shape == posterior.logvar.shape == expected
    assert posterior.mean.dtype == torch.float32
    assert vae.decode(posterior.mean).shape == video.shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [1, 5, 17, 21])
def test_encode_is_that_of_diffusers(
    folders: dict[str, Path], name: str, frames: int, build: Build, clip: Make
) -> None:
    video = clip(frames)
    vae, theirs = load_vae(folders[name]), build(name)
    if name == "AutoencoderKLWan":
        vae, theirs = vae.double(), theirs.double()
    with torch.no_grad():
        expected = theirs.encode(video.to(vae.dtype)).latent_dist
    found = vae.encode(video)
    if name == "AutoencoderKLWan":  # the last 1x1x1 convolution goes frame by frame: rounding
        torch.testing.assert_close(found.mean, expected.mean.float(), rtol=0, atol=1e-7)
        torch.testing.assert_close(found.logvar, expected.logvar.float(), rtol=0, atol=1e-7)
    else:
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found.logvar, expected.logvar)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", range(1, 10))
def test_decode_is_that_of_diffusers(
    folders: dict[str, Path], name: str, frames: int, build: Build, latent: Make
) -> None:
    z = latent(frames)
    vae, theirs = load_vae(folders[name]), build(name)
    if name == "AutoencoderKLWan":
        vae, theirs = vae.double(), theirs.double()
    with torch.no_grad():
        if name == "AutoencoderKLCogVideoX" and frames % 2 == 0:
            longer = torch.cat([z, z[:, :, -1:]], dim=2)
            expected = theirs.decode(longer).sample[:, :, :-4]
        else:
            expected = theirs.decode(z.to(vae.dtype)).sample
    found = vae.decode(z)
    assert found.shape[2] == 4 * frames - 3
    if name == "AutoencoderKLWan":  # the first 1x1x1 convolution goes frame by frame: rounding,
        # in fp32 also here, since diffusers enlarges in fp32 whatever the weights are
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_logvar_is_kept_where_its_exponential_is_finite(
    folders: dict[str, Path], name: str, clip: Make
) -> None:
    vae = load_vae(folders[name])
    for parameter in vae.inner.parameters():
        parameter.data.mul_(100)
    assert vae.encode(clip(5)).logvar.aminmax() == (-30.0, 20.0)


def test_cogvideox_alone_gives_an_even_number_of_latents_four_frames_each(
    build: Build, latent: Make
) -> None:
    """The reason for the last latent once more; when diffusers mends it, this is to go."""
    with torch.no_grad():
        assert build("AutoencoderKLCogVideoX").decode(latent(2)).sample.shape[2] == 8


@pytest.mark.parametrize("frames", [4, 6])
def test_cogvideox_begins_an_even_clip_as_an_odd_one(
    folders: dict[str, Path], frames: int, latent: Make
) -> None:
    """The last latent is in the last chunk alone: what comes before is that of any longer clip."""
    vae = load_vae(folders["AutoencoderKLCogVideoX"])
    z = latent(7)
    before = 4 * (frames - 1) - 3
    even, odd = vae.decode(z[:, :, :frames]), vae.decode(z[:, :, : frames + 1])
    assert torch.equal(even[:, :, :before], odd[:, :, :before])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_pieces_are_the_whole_to_the_bit(
    folders: dict[str, Path], name: str, frames: int, latent: Make
) -> None:
    vae = load_vae(folders[name])
    z = latent(frames)
    pieces = list(decode_pieces(vae, z[0]))
    whole = vae.decode(vae.denormalise(z))[0]
    expected = ((whole.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(torch.cat(pieces, dim=1), expected)
    assert all(piece.dtype == torch.uint8 and piece.shape[1] <= 17 for piece in pieces)
    if frames == 8:
        assert len(pieces) > 1


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_side_by_side(folders: dict[str, Path], name: str, latent: Make) -> None:
    vae = load_vae(folders[name])
    first, second = latent(7, seed=3), latent(7, seed=4)
    both = list(zip(vae.decode_stream(first), vae.decode_stream(second), strict=True))
    assert torch.equal(torch.cat([a for a, _ in both], dim=2), vae.decode(first))
    assert torch.equal(torch.cat([b for _, b in both], dim=2), vae.decode(second))


def test_wan_is_causal_to_the_bit(folders: dict[str, Path], clip: Make, latent: Make) -> None:
    vae = load_vae(folders["AutoencoderKLWan"])
    video = clip(13)
    whole = vae.encode(video)
    for latents in (1, 2, 3):
        part = vae.encode(video[:, :, : 4 * latents - 3])
        assert torch.equal(part.mean, whole.mean[:, :, :latents])
        assert torch.equal(part.logvar, whole.logvar[:, :, :latents])
    z = latent(4)
    assert torch.equal(vae.decode(z[:, :, :2]), vae.decode(z)[:, :, :5])


@pytest.mark.parametrize("name", ["AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX"])
def test_the_others_are_not_causal(folders: dict[str, Path], name: str, clip: Make) -> None:
    """Else they should say so, and a given image could be taken from the clip's own latent."""
    vae = load_vae(folders[name])
    video = clip(9)
    image, first = vae.encode(video[:, :, :1]).mean, vae.encode(video).mean[:, :, :1]
    assert (image - first).abs().max() > 0.01


# ---- scaling ----


def wan_formula(z: torch.Tensor, config: Any) -> torch.Tensor:
    """pipeline_wan_i2v.py, prepare_latents: subtract the mean, times one over the deviation."""
    mean = torch.tensor(config.latents_mean, dtype=torch.float64).view(1, 16, 1, 1, 1)
    inverse = 1.0 / torch.tensor(config.latents_std, dtype=torch.float64).view(1, 16, 1, 1, 1)
    return (z.double() - mean) * inverse


def factor_formula(z: torch.Tensor, config: Any) -> torch.Tensor:
    """pipeline_cogvideox_video2video.py, pipeline_hunyuan_video.py: times the scaling factor."""
    return config.scaling_factor * z.double()


FORMULAS = {
    "AutoencoderKLWan": wan_formula,
    "AutoencoderKLHunyuanVideo": factor_formula,
    "AutoencoderKLCogVideoX": factor_formula,
}


@pytest.mark.parametrize("name", NAMES)
def test_scaling_is_that_of_the_pipelines(
    folders: dict[str, Path], name: str, build: Build, latent: Make
) -> None:
    vae = load_vae(folders[name])
    z = 3 * latent(3)
    scaled = vae.normalise(z)
    assert scaled.dtype == torch.float32
    expected = FORMULAS[name](z, build(name).config)
    torch.testing.assert_close(scaled.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vae.denormalise(scaled), z, rtol=1e-6, atol=1e-6)
    assert (scaled - z).abs().max() > 0.1
    assert vae.normalise(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["AutoencoderKLHunyuanVideo", "AutoencoderKLCogVideoX"])
def test_the_scaling_factor_of_the_folder_counts(
    tmp_path: Path, name: str, build: Build, latent: Make
) -> None:
    build(name, scaling_factor=0.7).save_pretrained(tmp_path)
    torch.testing.assert_close(load_vae(tmp_path).normalise(latent(1)), 0.7 * latent(1))


def test_inverted_scaling_does_not_enter(
    tmp_path: Path, folders: dict[str, Path], build: Build, latent: Make
) -> None:
    """diffusers' pipelines multiply a clip's latents whatever that flag says."""
    build("AutoencoderKLCogVideoX", invert_scale_latents=True).save_pretrained(tmp_path)
    plain = load_vae(folders["AutoencoderKLCogVideoX"])
    assert torch.equal(load_vae(tmp_path).normalise(latent(1)), plain.normalise(latent(1)))
