"""Given images: when they are encoded, in which dtype, and the words for those that training did not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from goku.conditioning import ConditioningConfig
from goku.given import encode_given, first_image, untrained_given
from goku.requests import Request
from goku.vae import GokuVAE, VAEConfig

CPU = torch.device("cpu")
PICTURE = torch.zeros(3, 32, 32, dtype=torch.uint8)
TINY = VAEConfig(stem_width=8, width=8, encoder_depth=1, decoder_depth=1)


def _clip(*given: int, frames: int = 9) -> Request:
    return Request("a", 32, 32, frames, given=dict.fromkeys(given, PICTURE))


def test_latents_of_a_bf16_vae_are_normalised_as_in_training() -> None:
    """The cache holds raw means, which training normalises in fp32."""
    vae = GokuVAE(TINY, seed=3)
    with torch.no_grad():
        vae.latent_mean.normal_(generator=torch.Generator().manual_seed(0))
        vae.latent_std.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    vae = vae.bfloat16()
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    (latent,) = encode_given(vae, Request("a", 32, 32, 5, given={0: picture}), CPU).values()
    video = (picture.float() / 127.5 - 1)[None, :, None].bfloat16()
    with torch.no_grad():
        cached = vae.encode(video).mean.float()
    assert torch.equal(latent, vae.normalise(cached)[0])
    # In bf16 it would be another.
    assert (latent - vae.normalise(cached.bfloat16())[0].float()).abs().max() > 1e-4


def test_an_image_is_given_nothing() -> None:
    vae = GokuVAE(TINY)
    for frame in (0, -1):
        with pytest.raises(
            ValueError, match=r"frames is 1 with .* allowed with given images: 5, 9"
        ):
            encode_given(vae, _clip(frame, frames=1), CPU)
    assert encode_given(vae, _clip(frames=1), CPU) == {}


def test_a_file_is_encoded_once_for_each_size(tmp_path: Path) -> None:
    encoded: list[tuple[int, ...]] = []

    class Counted(GokuVAE):
        def encode(self, video: Tensor) -> Any:
            encoded.append(tuple(video.shape))
            return super().encode(video)

    Image.new("RGB", (32, 32), (9, 90, 200)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    files = {0: tmp_path / "a.png", -1: tmp_path / "b.png"}
    vae, known = Counted(TINY), {}  # type: ignore[var-annotated]
    first, again, longer, larger = (
        encode_given(vae, Request("a", 32, width, frames, seed=seed, given=files), CPU, known)
        for width, frames, seed in ((32, 5, 0), (32, 5, 1), (32, 9, 0), (48, 5, 0))
    )
    assert encoded == [(1, 3, 1, 32, 32)] * 2 + [(1, 3, 1, 32, 48)] * 2
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], longer[2])
    assert not torch.equal(first[0], first[1])
    assert larger[0].shape[-1] == 6


def test_the_first_image_however_it_is_counted() -> None:
    assert first_image(_clip(0)) is PICTURE
    assert first_image(_clip(-9)) is PICTURE
    assert first_image(_clip(-1, 4)) is None
    assert first_image(_clip(-1, frames=1)) is PICTURE


@pytest.mark.parametrize(
    ("given", "weights", "words"),
    [
        ((), {}, None),
        ((0,), {}, None),
        ((-9,), {}, None),
        ((-1,), {}, "8 of 9: training gave none so (conditioning: first 1, last 0, both 0)"),
        ((8,), {"last": 0.5}, None),
        ((0, -1), {"last": 0.5}, "0, 8 of 9: training gave none so (conditioning: first 1, last 0.5, both 0)"),
        ((0, -1), {"first": 0.8, "both": 0.2}, None),
        ((0,), {"first": 0.0, "both": 1.0}, "0 of 9: training gave none so (conditioning: first 0, last 0, both 1)"),
        ((4,), {}, "4 of 9: training gave first and last frames alone"),
        ((0, 4, -1), {"both": 1.0}, "0, 4, 8 of 9: training gave first and last frames alone"),
        (
            (0, 6), {},
            "0, 6 of 9: training gave first and last frames alone; 6 stands for all of 5 to 8, one latent frame",
        ),
    ],
)  # fmt: skip
def test_frames_that_training_did_not_give_are_said(
    given: tuple[int, ...], weights: dict[str, float], words: str | None
) -> None:
    found = untrained_given(_clip(*given), ConditioningConfig(**weights))
    assert found == (None if words is None else f"given frames {words}")


def test_of_an_unknown_training_only_what_no_training_has() -> None:
    assert untrained_given(_clip(0, -1), None) is None
    line = untrained_given(_clip(1), None)
    assert line == (
        "given frames 1 of 9: training gave first and last frames alone; 1 stands for all of 1 to 4, one latent frame"
    )
