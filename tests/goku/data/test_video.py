from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from itertools import count, pairwise, takewhile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from goku.data import DataConfig, DecodeError, Record, decode
from goku.data.decode import decode_record, probe

Write = Callable[..., Path]
Read = Callable[[Path], np.ndarray]
Gradient = Callable[[int, int, int], np.ndarray]


def config(**fields: object) -> DataConfig:
    # The sources here are 64 x 96 at most, so that frames come in their own size.
    fields = {"video_pixels": 64 * 96, "max_frames": 33, **fields}
    return DataConfig(path="unused", **fields)  # type: ignore[arg-type]


def record(path: Path, **fields: object) -> Record:
    return Record(path=str(path), text="t", name=path.name, **fields)  # type: ignore[arg-type]


def pixels(found: torch.Tensor) -> np.ndarray:
    assert found.dtype == torch.uint8
    return found.permute(1, 2, 3, 0).numpy()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, write_video: Write, gradient: Gradient) -> Path:
    """30 frames with B-frames: the decoding order is not the display order."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", gradient(30, 64, 96))


def test_all_frames_in_display_order(clip: Path, raw_frames: Read, gradient: Gradient) -> None:
    found = pixels(decode(record(clip), config()))
    reference = raw_frames(clip)
    assert len(reference) == 30
    np.testing.assert_array_equal(found, reference[:29])
    # Not merely what the reference says: every frame is nearest to its own original.
    originals = gradient(30, 64, 96).astype(np.float64)
    for index, frame in enumerate(found):
        distance = np.square(originals - frame).mean(axis=(1, 2, 3))
        assert distance.argmin() == index


@pytest.mark.parametrize("suffix", ["mkv", "mov", "m4v", "webm", "avi", "ts", "mpg"])
def test_other_containers(
    tmp_path: Path, write_video: Write, raw_frames: Read, gradient: Gradient, suffix: str
) -> None:
    codec = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video"}.get(suffix, "libx264")
    path = write_video(tmp_path / f"a.{suffix}", gradient(10, 64, 64), codec=codec)
    found = pixels(decode(record(path), config()))
    np.testing.assert_array_equal(found, raw_frames(path)[:9])


@pytest.mark.parametrize(
    ("start", "number", "longest", "expected"),
    [
        (0, None, 33, range(29)),
        (0, None, 17, range(17)),
        (0, None, 1, range(1)),
        (0, 12, 33, range(9)),
        (7, None, 33, range(7, 28)),
        (7, 5, 33, range(7, 12)),
        (7, 5, 3 + 2, range(7, 12)),
        (25, 5, 33, range(25, 30)),
        (29, 1, 33, range(29, 30)),
    ],
)
def test_ranges(
    clip: Path, raw_frames: Read, start: int, number: int | None, longest: int, expected: range
) -> None:
    item = record(clip, start_frame=start, num_frames=number)
    found = decode_record(item, config(max_frames=longest))
    np.testing.assert_array_equal(found.pixels, raw_frames(clip)[expected.start : expected.stop])
    assert found.media.geometry.frames == len(expected)
    # The headers of an intact file tell the same.
    assert probe(item, config(max_frames=longest)).geometry == found.media.geometry


@pytest.mark.parametrize(("start", "number"), [(30, None), (29, 2), (100, 5)])
def test_a_range_beyond_the_end_is_too_short(clip: Path, start: int, number: int | None) -> None:
    item = record(clip, start_frame=start, num_frames=number)
    for look in (decode_record, probe):
        with pytest.raises(DecodeError, match=f"too short: frames .*{start}.* the file has 30"):
            look(item, config())


def test_resize_and_crop(
    tmp_path: Path, write_video: Write, raw_frames: Read, gradient: Gradient
) -> None:
    path = write_video(tmp_path / "a.mp4", gradient(5, 150, 200))
    found = pixels(decode(record(path), config()))
    for frame, raw in zip(found, raw_frames(path), strict=True):
        whole = Image.fromarray(raw).resize((96, 72), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(frame, np.asarray(whole)[4:68])


def expected_indices(times: list[Fraction], fps: float) -> list[int]:
    """The stated rule, directly: of the frames that begin by t0 + k / fps, or a little later, the last."""
    spaces = [b - a for a, b in pairwise(times)]
    early = [Fraction(7, 16) * min(space, 1 / Fraction(fps)) for space in [*spaces[:1], *spaces]]
    end = times[-1] + early[-1]
    targets = takewhile(lambda t: t <= end, (times[0] + k / Fraction(fps) for k in count()))
    return [
        max(i for i, time in enumerate(times) if time - early[i] <= target) for target in targets
    ]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])  # mkv keeps time in whole milliseconds
@pytest.mark.parametrize(
    ("fps", "indices"),
    [
        (24.0, list(range(29))),
        (12.0, list(range(0, 26, 2))),
        (8.0, list(range(0, 27, 3))),
        (10.0, [int(k * 2.4 + 7 / 16) for k in range(13)]),
        (23.976, list(range(29))),
        (25.0, [int(k * 0.96 + 0.42) for k in range(29)]),
        (48.0, [k // 2 for k in range(57)]),
    ],
)
def test_resampling_a_constant_rate(
    tmp_path: Path,
    write_video: Write,
    raw_frames: Read,
    gradient: Gradient,
    suffix: str,
    fps: float,
    indices: list[int],
) -> None:
    path = write_video(tmp_path / f"a.{suffix}", gradient(30, 32, 32))
    found = decode_record(record(path), config(fps=fps, max_frames=57))
    np.testing.assert_array_equal(found.pixels, raw_frames(path)[indices])
    assert probe(record(path), config(fps=fps, max_frames=57)).geometry == found.media.geometry


@pytest.mark.parametrize("fps", [5.0, 10.0, 12.5, 30.0])
@pytest.mark.parametrize("start", [0, 3])
def test_resampling_by_timestamp(
    tmp_path: Path,
    write_video: Write,
    raw_frames: Read,
    gradient: Gradient,
    fps: float,
    start: int,
) -> None:
    steps = [0, 40, 200, 20, 120, 60, 400, 40, 40, 80, 120, 48, 100]  # in 1/1200 s, uneven
    times = [Fraction(sum(steps[: i + 1]), 1200) for i in range(len(steps))]
    path = write_video(tmp_path / "a.mp4", gradient(len(times), 32, 32), times=times)
    with av.open(str(path)) as container:
        stored = [f.pts * f.time_base for f in container.decode(video=0)]
    assert [t - stored[0] for t in stored] == times
    wanted = [start + i for i in expected_indices(times[start:], fps)]
    wanted = wanted[: (len(wanted) - 1) // 4 * 4 + 1]
    found = pixels(decode(record(path, start_frame=start), config(fps=fps)))
    np.testing.assert_array_equal(found, raw_frames(path)[wanted])


# (clock, timestamps in it, fps, source frame of each output)
CLOCKS = {
    "23.976 at 24": (24000, [1001 * k for k in range(30)], 24.0, list(range(29))),
    "29.97 at 30": (30000, [1001 * k for k in range(30)], 30.0, list(range(29))),
    "24 at 23.976": (24000, [1000 * k for k in range(30)], 24000 / 1001, list(range(29))),
    # A third of a millisecond late or early, as cameras are.
    "jitter at 30": (
        90000, [3000 * k + (-30, 17, 30, -8, 0)[k % 5] * (k > 0) for k in range(30)], 30.0,
        list(range(29)),
    ),
    "jitter at 15": (
        90000, [3000 * k + (-30, 17, 30, -8, 0)[k % 5] * (k > 0) for k in range(30)], 15.0,
        list(range(0, 26, 2)),
    ),
    # Slides stay until the next one comes.
    "slides": (1000, [0, 2000, 2500], 4.0, [0] * 8 + [1] * 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOCKS)
def test_clocks_that_are_a_little_off_drop_and_double_no_frame(
    tmp_path: Path, write_video: Write, raw_frames: Read, gradient: Gradient, name: str
) -> None:
    clock, stamps, fps, indices = CLOCKS[name]
    times = [Fraction(stamp, clock) for stamp in stamps]
    path = write_video(tmp_path / "a.mp4", gradient(len(times), 32, 32), times=times, clock=clock)
    with av.open(str(path)) as container:
        stored = [f.pts * f.time_base for f in container.decode(video=0)]
    assert [t - stored[0] for t in stored] == times
    found = decode_record(record(path), config(fps=fps))
    np.testing.assert_array_equal(found.pixels, raw_frames(path)[indices])
    repeated = [words for words in found.media.remarks if words.endswith("frames are repeated")]
    assert len(repeated) == (name == "slides")


def remuxed(path: Path, out: Path, durations: list[int]) -> None:
    """The same packets, shown for so many ms each."""
    with av.open(str(path)) as source, av.open(str(out), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.dts is not None]
        for packet, duration in zip(packets, durations, strict=True):
            packet.stream, packet.duration = stream, duration
            container.mux(packet)


@pytest.mark.parametrize("space", [40, 500])  # a camera, slides
@pytest.mark.parametrize("last", [1, 100])
def test_the_last_frame_of_a_matroska_file_may_stay(
    tmp_path: Path, write_video: Write, gradient: Gradient, space: int, last: int
) -> None:
    times = [Fraction(space * k, 1000) for k in range(9)]
    path = write_video(
        tmp_path / "a.mkv", gradient(9, 32, 32), times=times, clock=1000, codec="mpeg4"
    )
    remuxed(path, tmp_path / "b.mkv", [space] * 8 + [space * last])
    with av.open(str(tmp_path / "b.mkv")) as container:
        declared = container.streams.video[0].metadata["DURATION"]
    seconds = space * (8 + last) / 1000
    assert declared.startswith(f"00:{int(seconds // 60):02}:{seconds % 60:06.3f}")
    assert decode_record(record(tmp_path / "b.mkv"), config()).media.geometry.frames == 9


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, -1)])
def test_display_rotation_is_applied(
    tmp_path: Path,
    write_video: Write,
    raw_frames: Read,
    gradient: Gradient,
    rotation: int,
    turns: int,
) -> None:
    path = write_video(tmp_path / "a.mp4", gradient(5, 32, 64), rotation=rotation)
    with av.open(str(path)) as container:
        stated = next(container.decode(video=0)).rotation
    assert stated % 360 == rotation % 360
    # Rotation is counter-clockwise, as numpy's rot90 and FFmpeg's av_display_rotation_get have it.
    expected = np.rot90(raw_frames(path), turns, axes=(1, 2))
    np.testing.assert_array_equal(pixels(decode(record(path), config())), expected)
    assert probe(record(path), config()).geometry.width == expected.shape[2]


def test_wide_pixels_are_made_square(
    tmp_path: Path, write_video: Write, gradient: Gradient
) -> None:
    path = write_video(tmp_path / "a.mp4", gradient(1, 64, 64), aspect=Fraction(2))
    geometry = decode_record(record(path), config()).media.geometry
    assert (geometry.source_height, geometry.source_width) == (32, 64)
    assert (geometry.height, geometry.width) == (32, 64)


# Damage


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def noisy(frames: int) -> np.ndarray:
    """Frames that take many bytes, so that damage meets coded pixels."""
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("end.mp4", "not a readable video: Invalid data"),  # the index at the end is gone
        ("front.mp4", r"truncated: its index needs \d+ bytes, the file has \d+"),
        ("a.mkv", "truncated|corrupt video"),
        ("a.webm", "truncated|corrupt video"),
    ],
)
def test_truncated(
    tmp_path: Path, write_video: Write, name: str, reason: str, share: float
) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_video(tmp_path / name, noisy(29), codec=codec, faststart=name == "front.mp4")
    decode(record(path), config())
    cut(path, share)
    with pytest.raises(DecodeError, match=f"{name}: .*({reason})") as error:
        decode(record(path), config())
    assert error.value.path == str(path)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_in_h264_are_found_not_concealed(
    tmp_path: Path, write_video: Write, seed: int
) -> None:
    path = write_video(tmp_path / "a.mp4", noisy(9))
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(seed).integers(len(content) // 4, len(content) // 2, 20):
        content[place] ^= 0x55
    path.write_bytes(content)
    # An error at the damage or a frame that is marked: of FFmpeg's threads either may come first.
    either = r"corrupt video: (.* \(after \d+ good frames\)|frame \d+ is damaged)$"
    with pytest.raises(DecodeError, match=either):
        decode(record(path), config())


def test_the_cover_of_a_song_is_no_video(tmp_path: Path) -> None:
    song, cover = tmp_path / "song.mp4", io.BytesIO()
    Image.new("RGB", (64, 64), (200, 40, 30)).save(cover, "JPEG")
    with av.open(str(song), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        picture = container.add_stream("mjpeg", rate=1)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuvj420p"
        picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.time_base, packet.pts, packet.dts = picture, Fraction(1, 90000), 0, 0
        packet.is_keyframe = True
        container.mux(packet)
    with av.open(str(song)) as container:
        assert len(container.streams.video) == 1  # or nothing is tested
    for look in (decode, probe):
        with pytest.raises(DecodeError, match=r"song\.mp4: has no video stream"):
            look(record(song), config())


def test_not_video_at_all(tmp_path: Path, write_video: Write, gradient: Gradient) -> None:
    (tmp_path / "words.mp4").write_text("this is a text file\n" * 50)
    (tmp_path / "empty.mp4").touch()
    # FFmpeg left to itself takes this for a playlist and opens what it names.
    write_video(tmp_path / "target.mp4", gradient(9, 64, 64))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile target.mp4\n")
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert len(list(container.decode(video=0))) == 9
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    expected = {
        "words.mp4": "not a readable video",
        "empty.mp4": r"empty \(0 bytes\)",
        "list.mp4": "not a readable video",
        "sound.mp4": "has no video stream",
        "absent.mp4": "media file missing",
    }
    for name, reason in expected.items():
        for look in (decode_record, probe):
            with pytest.raises(DecodeError, match=f"{name}: .*{reason}"):
                look(record(tmp_path / name), config())


def test_a_changing_frame_size_is_an_error(
    tmp_path: Path, write_video: Write, gradient: Gradient
) -> None:
    first = write_video(tmp_path / "a.ts", gradient(5, 64, 96)).read_bytes()
    second = write_video(tmp_path / "b.ts", gradient(5, 32, 32)).read_bytes()
    (tmp_path / "both.ts").write_bytes(first + second)
    with pytest.raises(DecodeError, match="the frame size changes from 64x96 to 32x32 at frame 5"):
        decode(record(tmp_path / "both.ts"), config())


def test_too_small(tmp_path: Path, write_video: Write, gradient: Gradient) -> None:
    path = write_video(tmp_path / "a.mp4", gradient(5, 8, 64))
    with pytest.raises(DecodeError, match=r"a\.mp4: size: 8x64"):
        decode(record(path), config())
