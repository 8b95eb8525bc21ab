"""What a browser gets: lossless PNG, playable MP4, whole or not at all."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import example, given
from hypothesis import strategies as st
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
        # Untagged, players take HD for BT.709 and show other colours.
        context = stream.codec_context
        assert (context.colorspace, context.color_range) == (Colorspace.ITU601, ColorRange.MPEG)
        assert (context.color_primaries, context.color_trc) == (1, 1)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 9
    height, width = size
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    shown = np.stack(frames)[:, :height, :width]
    # H.264 at crf 16 keeps a smooth ramp above 35 dB; 30 leaves room for other encoder builds.
    assert score.psnr(shown, clip) > 30


def test_the_bytes_do_not_depend_on_the_number_of_processors() -> None:
    """x264 cuts a picture into as many slices as it has threads, by default one a processor."""
    script = (
        "import hashlib, os, sys, numpy as np\n"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])\n"
        "from goku import media_files\n"
        "y, x = np.mgrid[:288, :512]\n"
        "clip = np.stack([(6 * t + 2 * y + x) % 200 for t in range(5)]).astype(np.uint8)\n"
        "data = media_files.mp4_bytes(np.repeat(clip[..., None], 3, axis=-1))\n"
        "print(len(os.sched_getaffinity(0)), hashlib.sha256(data).hexdigest())\n"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", script, count], capture_output=True, text=True, check=True
        ).stdout.split()
        for count in ("1", "64")
    ]
    if told[0][0] == told[1][0]:
        pytest.skip("this process sees one processor")
    assert told[0][1] == told[1][1]


def test_the_bytes_are_the_same_in_every_process() -> None:
    """x264's AVX-512 code gives one process in three to ten other bytes of one of these clips."""
    script = (
        "import hashlib, numpy as np\n"
        "from goku import media_files\n"
        "told = []\n"
        "for width, height, frames in ((80, 64, 9), (192, 64, 9), (112, 64, 17), (48, 48, 13)) * 3:\n"
        "    draw = np.random.default_rng(width)\n"
        "    tiles = draw.integers(0, 256, (1, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)\n"
        "    clip = np.concatenate([np.roll(tiles, (t, 2 * t), (1, 2)) for t in range(frames)])\n"
        "    clip = np.clip(clip + draw.integers(-6, 7, clip.shape), 0, 255).astype(np.uint8)\n"
        "    told.append(hashlib.sha256(media_files.mp4_bytes(clip)).hexdigest())\n"
        "print(*told)\n"
    )
    command = [sys.executable, "-c", script]
    told = {
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(6)
    }
    (one,) = told
    assert len(set(one.split())) == 4


def test_save_chooses_the_suffix(tmp_path: Path) -> None:
    assert media_files.save(tmp_path / "a.b", _clip(1, 8, 8)).name == "a.b.png"
    path = media_files.save(tmp_path / "clip", _clip(5, 16, 16))
    assert path.name == "clip.mp4"
    assert path.stat().st_size > 100


def test_a_rate_that_no_file_can_say_is_refused() -> None:
    for fps in (0, 2**31, 10**20):
        with pytest.raises(ValueError, match=f"fps is {fps}"):
            media_files.mp4_bytes(_clip(2, 16, 16), fps=fps)


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


METADATA = {
    "prompt": 'a cat \u732b\u2009\u00e9\0 "quoted"\n',
    "seed": 2**40,
    "guidance": 1.5,
    "none": None,
}


@pytest.mark.parametrize("frames", [1, 5])
def test_metadata_comes_back_and_leaves_the_pixels_alone(frames: int, tmp_path: Path) -> None:
    clip = _clip(frames, 16, 32)
    plain = media_files.save(tmp_path / "plain", clip)
    told = media_files.save(tmp_path / "told", clip, metadata=METADATA)
    assert media_files.read_metadata(told) == METADATA
    again = media_files.save(tmp_path / "again", clip, metadata=dict(reversed(METADATA.items())))
    assert again.read_bytes() == told.read_bytes() != plain.read_bytes()
    assert str(tmp_path).encode() not in told.read_bytes()
    if frames == 1:
        pixels = [np.asarray(Image.open(path)) for path in (plain, told)]
    else:
        pixels = []
        for path in (plain, told):
            with av.open(str(path)) as container:
                stacked = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
                pixels.append(np.stack(stacked))
        with av.open(str(told)) as container:
            assert container.metadata["title"].startswith("a cat \u732b\u2009\u00e9")
    np.testing.assert_array_equal(*pixels)


@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()),
        max_size=4,
    )
)
@example({"prompt": "\ud800 half a surrogate"})
@example({"prompt": "long " * 20_000})
def test_whatever_json_can_say_comes_back(tmp_path_factory: Any, metadata: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("told")
    for name, video in (("a", _clip(1, 16, 16)), ("b", _clip(2, 16, 16))):
        path = media_files.save(folder / name, video, metadata=metadata)
        assert media_files.read_metadata(path) == metadata


def test_files_without_metadata_are_told(tmp_path: Path) -> None:
    for frames in (1, 2):
        path = media_files.save(tmp_path / "plain", _clip(frames, 16, 16))
        with pytest.raises(ValueError, match="does not say how it was made"):
            media_files.read_metadata(path)
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(ValueError, match=r"plain\.(png|mp4) "):
            media_files.read_metadata(path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read as PNG or MP4"):
        media_files.read_metadata(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        media_files.read_metadata(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="JSON"):
        media_files.save(tmp_path / "x", _clip(1, 8, 8), metadata={"scale": float("nan")})
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("frames", [1, 3])
def test_a_file_that_is_to_be_kept_is_kept(
    frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = "png" if frames == 1 else "mp4"
    names = [f"v1.5.{suffix}", f"v1.5_2.{suffix}", f"v1.5_3.{suffix}"]
    clips = [np.full((frames, 16, 16, 3), 80 * n, np.uint8) for n in range(3)]
    paths = [media_files.save(tmp_path / "v1.5", clip, overwrite=False) for clip in clips]
    assert [path.name for path in paths] == names
    for path, clip in zip(paths, clips, strict=True):
        assert path.read_bytes() == media_files.media_bytes(clip)[1]
    # What fails leaves neither the name that it had taken nor the part that was written.
    with monkeypatch.context() as patch:

        def broken(self: Path, target: Path) -> Path:
            raise OSError(5, "Input/output error", str(self))

        patch.setattr(Path, "replace", broken)
        with pytest.raises(OSError, match="Input/output error"):
            media_files.save(tmp_path / "v1.5", clips[0], overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert media_files.save(tmp_path / "v1.5", clips[2]) == paths[0]
    assert paths[0].read_bytes() == paths[2].read_bytes()
