"""Decoding in pieces: the pixels of the whole decode to the bit, in memory that does not grow."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goku.vae import GokuVAE, VAEConfig, decode_pieces


@pytest.fixture(scope="module")
def vae() -> GokuVAE:
    vae = GokuVAE(VAEConfig(channels=3, stem_width=8, width=12), seed=4)
    with torch.no_grad():
        for name in ("encoder.head.weight", "decoder.head.weight"):  # zero at first
            vae.get_parameter(name).normal_(generator=torch.Generator().manual_seed(5))
        vae.latent_mean.copy_(torch.tensor([0.3, -1.0, 2.0]))
        vae.latent_std.copy_(torch.tensor([0.5, 1.5, 3.0]))
    return vae.eval()


def latent(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_no_black_ones(vae: GokuVAE, value: float) -> None:
    z = latent(6)
    z[0, 5, 0, 0] = value
    pieces = decode_pieces(vae, z)
    next(pieces)  # of the frames before
    with pytest.raises(FloatingPointError, match="the decoded sample is not finite"):
        next(pieces)


@given(frames=st.integers(1, 14), seed=st.integers(0, 99))
def test_pieces_are_the_whole_to_the_bit(vae: GokuVAE, frames: int, seed: int) -> None:
    z = latent(frames, seed)
    pieces = list(decode_pieces(vae, z))
    # The pixels by the formula, of the normalised latent: raw = z * std + mean.
    raw = z * vae.latent_std.view(3, 1, 1, 1) + vae.latent_mean.view(3, 1, 1, 1)
    video = vae.decode(raw[None])[0]
    expected = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(torch.cat(pieces, dim=1), expected)
    assert expected.shape == (3, 4 * frames - 3, 16, 24)
    # 4 latent frames at a time, the first of all of them worth a single frame.
    assert [piece.shape[1] for piece in pieces] == [
        4 * min(4, frames - start) - (3 if start == 0 else 0) for start in range(0, frames, 4)
    ]


def test_values_beyond_the_range_are_clamped(vae: GokuVAE) -> None:
    (piece,) = decode_pieces(vae, 1000 * latent(1))
    assert {0, 255} <= set(piece.unique().tolist())
    assert piece.dtype == torch.uint8
    assert piece.device.type == "cpu"


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, None])
def test_a_stream_is_decode_with_the_same_chunk(vae: GokuVAE, chunk: int | None) -> None:
    z = latent(7)[None]
    pieces = list(vae.decode_stream(z, chunk=chunk))
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(z, chunk=chunk))
    assert len(pieces) == (1 if chunk is None else -(-7 // chunk))


def test_nothing_is_decoded_before_it_is_asked_for(
    vae: GokuVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = vae._decode_piece

    def counted(piece: torch.Tensor, past: object) -> object:
        decoded.append(piece.shape[2])
        return real(piece, past)  # type: ignore[arg-type]

    monkeypatch.setattr(vae, "_decode_piece", counted)
    pieces: Iterator[torch.Tensor] = decode_pieces(vae, latent(400))
    assert decoded == []
    next(pieces)
    assert decoded == [4]
    next(pieces)
    assert decoded == [4, 4]


def test_the_callers_gradients_are_left_alone(vae: GokuVAE) -> None:
    """A generator that suspends within no_grad would turn it off for whoever runs the loop."""
    for piece in vae.decode_stream(latent(6)[None]):
        assert torch.is_grad_enabled()
        assert not piece.requires_grad
    assert torch.is_grad_enabled()


def test_a_bad_latent_is_named(vae: GokuVAE) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 2, 3\): needs \(C, T, H, W\)"):
        list(decode_pieces(vae, latent(2)[None]))
    with pytest.raises(ValueError, match=r"needs \(B, 3, T, H, W\)"):
        list(decode_pieces(vae, latent(2)[:2]))
    with pytest.raises(ValueError, match="chunk = 0"):
        list(vae.decode_stream(latent(2)[None], chunk=0))
