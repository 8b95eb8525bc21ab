from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from goku.data import DataConfig, DecodeError, Record, decode
from goku.data.decode import decode_record, probe


def config(**fields: object) -> DataConfig:
    return DataConfig(path="unused", **{"image_pixels": 64 * 96, **fields})  # type: ignore[arg-type]


def record(path: Path, **fields: object) -> Record:
    return Record(path=str(path), text="t", name=path.name, **fields)  # type: ignore[arg-type]


def pixels(path: Path, **fields: object) -> np.ndarray:
    """(H, W, 3) of the one frame."""
    found = decode(record(path), config(**fields))
    assert found.dtype == torch.uint8
    assert found.shape[:2] == (3, 1)
    return found[:, 0].permute(1, 2, 0).numpy()


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def test_a_picture_of_the_right_size_comes_unchanged(tmp_path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), rgb)


def test_resize_and_crop(tmp_path: Path) -> None:
    large = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "a.png")
    # 64 x 96 covers most of 3:4; 96 / 200 of the height is 72, of which 4 rows go above and below.
    whole = Image.fromarray(large).resize((96, 72), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(whole)[4:68])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    with Image.open(path) as image:
        image.getexif().clear()
        raw = np.asarray(image.convert("RGB"))
    # The EXIF specification's table, spelled out as what is done to the stored rows and columns.
    upright = {
        1: raw,
        2: raw[:, ::-1],
        3: raw[::-1, ::-1],
        4: raw[::-1],
        5: raw.transpose(1, 0, 2),
        6: raw.transpose(1, 0, 2)[:, ::-1],
        7: raw.transpose(1, 0, 2)[::-1, ::-1],
        8: raw.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(pixels(path), upright)
    assert (
        probe(record(path), config()).geometry
        == decode_record(record(path), config()).media.geometry
    )


def test_modes_become_rgb(tmp_path: Path, rgb: np.ndarray) -> None:
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), np.stack([grey] * 3, -1))

    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    bits = np.stack([(grey > 127) * np.uint8(255)] * 3, -1)
    np.testing.assert_array_equal(pixels(tmp_path / "bits.png"), bits)

    colours = Image.fromarray(rgb).quantize(16)
    colours.save(tmp_path / "palette.png")
    table = np.asarray(colours.getpalette(), dtype=np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(pixels(tmp_path / "palette.png"), table[np.asarray(colours)])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str) -> None:
    levels = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    expected = np.round(levels.astype(np.float64) / 257).astype(np.uint8)
    found = pixels(tmp_path / f"deep.{suffix}")
    np.testing.assert_array_equal(found, np.stack([expected] * 3, -1))
    assert found.min() == 0
    assert found.max() == 255


def test_transparency_is_laid_on_white(tmp_path: Path, rgb: np.ndarray) -> None:
    alpha = np.random.default_rng(5).integers(0, 256, (64, 96, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([rgb, alpha], -1)).save(tmp_path / "a.png")
    share = alpha / 255.0
    # Pillow blends in 8-bit fixed point: at most one level from the exact value.
    np.testing.assert_allclose(
        pixels(tmp_path / "a.png"), share * rgb + (1 - share) * 255, rtol=0, atol=1.001
    )
    palette = Image.new("P", (96, 64), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=1)
    assert (pixels(tmp_path / "p.png") == 255).all()


def test_a_transparent_colour_is_laid_on_white(tmp_path: Path, rgb: np.ndarray) -> None:
    rgb[10:20, 30:50] = (1, 2, 3)
    Image.fromarray(rgb).save(tmp_path / "a.png", transparency=(1, 2, 3))
    clear = (rgb == (1, 2, 3)).all(-1, keepdims=True)
    assert clear.sum() >= 200
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.where(clear, 255, rgb))


def test_a_transparent_level_of_sixteen_bits_is_laid_on_white(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64 * 96).astype(np.uint16).reshape(64, 96)
    levels[10:20, 30:50] = 1000
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=1000)
    expected = np.where(levels == 1000, 255, (levels.astype(np.int64) + 128) // 257)
    found = pixels(tmp_path / "a.png")
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, -1))


def test_never_enlarged_unless_asked(tmp_path: Path) -> None:
    small = np.full((40, 40, 3), 7, dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "a.png", upscale=True).shape == (64, 64, 3)
    Image.fromarray(small[:10]).save(tmp_path / "thin.png")
    with pytest.raises(DecodeError, match=r"thin\.png: size: 10x40 .* smaller than 16x16"):
        pixels(tmp_path / "thin.png")


def corrupt_png(path: Path, rgb: np.ndarray) -> None:
    """A bit flipped in the compressed pixels: the chunk's checksum no longer holds."""
    Image.fromarray(rgb).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_truncated(tmp_path: Path, rgb: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgb).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DecodeError, match=rf"a\.{suffix}: (corrupt|not a readable) image") as error:
        decode(record(path), config())
    assert error.value.path == str(path)


def test_unusable_pictures(tmp_path: Path, rgb: np.ndarray) -> None:
    corrupt_png(tmp_path / "flip.png", rgb)
    (tmp_path / "empty.png").touch()
    (tmp_path / "words.jpg").write_text("not a picture at all")
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "folder.png").mkdir()
    expected = {
        "flip.png": "corrupt image",
        "empty.png": r"the file is empty \(0 bytes\)",
        "words.jpg": "not a readable image: cannot identify image file",
        "moving.webp": "holds several pictures",
        "float.tif": "mode F",
        "absent.png": "media file missing: No such file",
        "folder.png": "media file missing: not a regular file",
        "what.gif": ".gif is not a media file",
    }
    for name, reason in expected.items():
        with pytest.raises(DecodeError, match=rf"{name}: .*{reason}"):
            decode(record(tmp_path / name), config())
        if name != "flip.png":  # whose header is whole
            with pytest.raises(DecodeError, match=rf"{name}: .*{reason}"):
                probe(record(tmp_path / name), config())


def test_a_range_makes_no_sense_for_a_picture(tmp_path: Path, rgb: np.ndarray) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert decode(record(tmp_path / "a.png", num_frames=1), config()).shape[1] == 1
    with pytest.raises(DecodeError, match="start_frame 2, num_frames None"):
        decode(record(tmp_path / "a.png", start_frame=2), config())


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    # A BMP header that claims 40,000 x 40,000 pixels.
    header = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "bomb.bmp").write_bytes(header + bytes(1000))
    with pytest.raises(DecodeError, match=r"1,600,000,000 pixels, over data\.max_source"):
        decode(record(tmp_path / "bomb.bmp"), config())
