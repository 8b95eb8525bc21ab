"""Whatever bytes a media file holds, a decoder gives pixels or a DecodeError."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from goku.data import DataConfig, DecodeError, Record
from goku.data.decode import decode_record, probe
from goku.data.errors import decoding
from goku.data.images import read_rgb
from goku.data.record import IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES

CODECS = {".webm": "libvpx", ".mpg": "mpeg2video", ".mpeg": "mpeg2video", ".avi": "mpeg4"}
EACH = 120
CONFIG = DataConfig(path=".", image_pixels=1024, video_pixels=1024, max_source_pixels=1_000_000)


def _clip(path: Path, pixels: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title"
        stream = container.add_stream(CODECS.get(path.suffix, "libx264"), rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.thread_count = 1
        for n in range(6):
            frame = av.VideoFrame.from_ndarray(np.roll(pixels, n, 1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _picture(path: Path, pixels: np.ndarray) -> None:
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    if path.suffix in (".tif", ".tiff"):
        image.save(path, save_all=True, append_images=[image])
        # Cut the link to the second page: then the file is good, and one flip from having two.
        content = bytearray(path.read_bytes())
        at = int.from_bytes(content[4:8], "little")
        link = at + 2 + 12 * int.from_bytes(content[at : at + 2], "little")
        content[link : link + 4] = bytes(4)
        path.write_bytes(content)
    elif path.suffix == ".bmp":
        image.save(path)
    else:
        image.save(path, exif=exif)


def _spoiled(content: bytes, chance: random.Random) -> bytes:
    """One to eight bytes changed; every other time among the first 300, where headers are."""
    spoiled = bytearray(content)
    end = min(300, len(content)) if chance.random() < 0.5 else len(content)
    for _ in range(chance.randint(1, 8)):
        spoiled[chance.randrange(end)] = chance.randrange(256)
    return bytes(spoiled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffixes", [IMAGE_SUFFIXES, VIDEO_SUFFIXES])
def test_spoiled_files_are_decode_errors_and_nothing_else(
    tmp_path: Path, suffixes: tuple[str, ...]
) -> None:
    chance = random.Random(7)
    pixels = np.random.default_rng(7).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.kron(pixels, np.ones((8, 8, 1), np.uint8))
    begin, reasons = time.monotonic(), set[str]()
    for suffix in suffixes:
        path = tmp_path / f"file{suffix}"
        (_picture if suffix in IMAGE_SUFFIXES else _clip)(path, pixels)
        record = Record(str(path), "a caption", path.name)
        decode_record(record, CONFIG)
        whole, refused = path.read_bytes(), 0
        for _ in range(EACH):
            path.write_bytes(_spoiled(whole, chance))
            for look in (decode_record, probe):
                try:
                    look(record, CONFIG)
                except DecodeError as error:
                    refused += 1
                    reasons.add(f"{error.path == str(path)} {bool(error.reason)}")
        assert 0 < refused < 2 * EACH
    assert reasons == {"True True"}
    assert time.monotonic() - begin < 120  # no file takes for ever


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (KeyError(16), "cannot be decoded: KeyError: 16"),
        (TypeError("Missing dimensions\nand more"), "cannot be decoded: TypeError: Missing dim"),
        (OSError(5, "Input/output error"), "cannot be decoded: OSError: [Errno 5] Input/output"),
        (MemoryError(), "cannot be decoded: MemoryError"),
    ],
)
def test_what_a_decoder_raises_is_named(raised: Exception, reason: str) -> None:
    with pytest.raises(DecodeError) as error, decoding("folder/a.tif"):
        raise raised
    assert error.value.reason.startswith(reason)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is raised
    own = DecodeError("b.png", "too short", "too large")
    with pytest.raises(DecodeError) as error, decoding("folder/a.tif"):
        raise own
    assert error.value is own
    with pytest.raises(KeyboardInterrupt), decoding("a.tif"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("looking", [decode_record, probe])
def test_an_archive_that_cannot_be_read_is_a_decode_error(
    tmp_path: Path, looking: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from goku.data.media_source import Window
    from goku.data.record import Member

    for suffix in (".png", ".mp4"):
        path = tmp_path / f"file{suffix}"
        pixels = np.full((32, 32, 3), 7, np.uint8)
        (_picture if suffix == ".png" else _clip)(path, pixels)
        size = path.stat().st_size
        member = Member(str(path), path.name, 0, size)
        record = Record(f"{path}/{path.name}", "a caption", path.name, member=member)
        looking(record, CONFIG)

        def broken(*_: object) -> int:
            raise OSError(116, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(Window, "readinto", broken)
            with pytest.raises(DecodeError):
                looking(record, CONFIG)


def test_a_given_picture_too(tmp_path: Path) -> None:
    path = tmp_path / "two.tif"
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    image.save(path, save_all=True, append_images=[image])
    content = bytearray(path.read_bytes())
    at = int.from_bytes(content[4:8], "little")
    link = at + 2 + 12 * int.from_bytes(content[at : at + 2], "little")
    second = int.from_bytes(content[link : link + 4], "little")
    content[second : second + 2] = bytes(2)
    path.write_bytes(content)
    with pytest.raises(DecodeError, match="cannot be decoded: TypeError"):
        read_rgb(str(path))


def test_every_suffix_is_tried() -> None:
    assert set(IMAGE_SUFFIXES) | set(VIDEO_SUFFIXES) == set(MEDIA_SUFFIXES)
