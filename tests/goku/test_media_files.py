"""What a browser gets: lossless PNG, playable MP4, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from goku import media_files
from goku.demo import score


def _clip(frames: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """A grey ramp that moves, so that 4:2:0 chroma loses nothing that matters."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.repeat(((6 * t + 2 * y + x) % 200 + 20)[..., None], 3, axis=-1).astype(np.uint8)


def test_to_uint8_maps_the_ends_and_keeps_bytes() -> None:
    video = np.zeros((3, 1, 1, 4), np.float32)
    video[:, 0, 0] = [-1.0, 0.0, 1.0, 1.7]
    assert media_files.to_uint8(video)[0, 0, :, 0].tolist() == [0, 128, 255, 255]
    data = np.arange(24, dtype=np.uint8).reshape(3, 2, 2, 2)
    np.testing.assert_array_equal(media_files.to_uint8(data), np.moveaxis(data, 0, -1))


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 3, 2, 2)), np.zeros((3, 1, 2, 2), np.int32), np.full((3, 1, 2, 2), np.nan)]
)
def test_to_uint8_refuses_other_things(bad: npt.NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="video"):
        media_files.to_uint8(bad)


def test_png_is_lossless() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    kind, data = media_files.media_bytes(frame[None])
    assert kind == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), frame)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mp4_is_what_browsers_play_and_looks_like_the_clip(size: tuple[int, int]) -> None:
    clip = _clip(9, *size)
    kind, data = media_files.media_bytes(clip, fps=12)
    assert kind == "video/mp4"
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 9
    height, width = size
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    shown = np.stack(frames)[:, :height, :width]
    # H.264 at crf 16 keeps a smooth ramp above 35 dB; 30 leaves room for other encoder builds.
    assert score.psnr(shown, clip) > 30


def test_save_chooses_the_suffix(tmp_path: Path) -> None:
    assert media_files.save(tmp_path / "a.b", _clip(1, 8, 8)).name == "a.b.png"
    path = media_files.save(tmp_path / "clip", _clip(5, 16, 16))
    assert path.name == "clip.mp4"
    assert path.stat().st_size > 100


@pytest.mark.parametrize("shape", [(8, 8, 3), (0, 8, 8, 3), (1, 8, 8, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="media of shape"):
        media_files.media_bytes(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/data/a.png", "..", ".hidden", "", "a/b", "x" * 300]
)
def test_stems_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    stem = media_files.file_stem(name)
    assert 0 < len(stem) < 100
    assert (tmp_path / stem).resolve().parent == tmp_path.resolve()
    assert not stem.startswith(".")


def test_stems_keep_plain_names_and_tell_others_apart() -> None:
    assert media_files.file_stem("clip-0_a.mp4") == "clip-0_a.mp4"
    assert (
        media_files.file_stem("a/b") != media_files.file_stem("a_b") != media_files.file_stem("a b")
    )
