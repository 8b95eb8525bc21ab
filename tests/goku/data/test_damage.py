"""200 items with 22 kinds of damage and oddity, over all forms: each named once with its word, the rest trained on."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from goku.batch import BatchBuilder
from goku.config import parse
from goku.data import DataConfig, DataError, PrepareReport, doctor, prepare
from goku.data.html_report import page
from goku.flow import FlowConfig
from goku.model import GokuTransformer, KernelConfig, ModelConfig
from goku.packing import PackingConfig, step_positions
from goku.recipe import load_recipe
from goku.recipe_doctor import doctor_recipe

FORMS = ("sidecars", "table", "lists", "webdataset")
LARGEST = 1_000_000
TOTAL = 200


def picture(seed: int, height: int = 32, width: int = 32, channels: int = 3) -> np.ndarray:
    """A picture like no other: (height, width, channels) uint8."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    rows, columns = -(-height // 4), -(-width // 4)
    return np.kron(blocks, np.ones((rows, columns, 1), np.uint8))[:height, :width]


def clip(
    path: Path,
    seed: int,
    *,
    frames: int = 5,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    times: Callable[[int], Fraction] = lambda n: Fraction(n, 24),
) -> None:
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height = stream.width = 32
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"bf": "0", "preset": "ultrafast"}
        stream.codec_context.time_base = Fraction(1, 1200)
        if rotation:
            stream.set_display_rotation(rotation)
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(1000 * seed + n), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1200), int(times(n) * 1200)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def sound(path: Path) -> None:
    """An MP4 with no picture in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def bomb(path: Path, side: int) -> None:
    """A PNG of side x side pixels in some hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10**5))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def titled(path: Path, seed: int) -> None:
    """A clip whose title is no UTF-8, as old programs wrote it."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "QQQQQQ"
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.thread_count = 1
        for n in range(5):
            frame = av.VideoFrame.from_ndarray(picture(1000 * seed + n), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b"QQQQQQ") == 1
    path.write_bytes(content.replace(b"QQQQQQ", "Größen".encode("latin-1")))


def half_of_two(path: Path, seed: int) -> None:
    """A TIFF of two pictures, the second of which has no entries."""
    first, second = (Image.fromarray(picture(1000 * seed + n)) for n in range(2))
    first.save(path, save_all=True, append_images=[second])
    content = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, at)
    (following,) = struct.unpack_from("<I", content, at + 2 + 12 * entries)
    struct.pack_into("<H", content, following, 0)
    path.write_bytes(content)


def save(array: np.ndarray, path: Path, mode: str | None = None, **how: Any) -> None:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **how)


# kind -> (suffix, is it used, its word in the report ("": it is as good as any), how it is made from (path, seed)).
Make = Callable[[Path, int], None]
KINDS: dict[str, tuple[str, bool, str, Make]] = {
    "empty": (".png", False, "empty (0 bytes)", lambda p, n: p.touch()),
    "clip_as_png": (".png", False, "holds MP4 video, is named .png", lambda p, n: _misname(p, n)),
    "png_as_clip": (
        ".mp4",
        False,
        "holds PNG image, is named .mp4",
        lambda p, n: save(picture(n), p, format="PNG"),
    ),
    "png_as_jpg": (
        ".jpg",
        True,
        "holds PNG image, is named .jpg",
        lambda p, n: save(picture(n), p, format="PNG"),
    ),
    "one_frame": (".mp4", True, "trained as an image", lambda p, n: clip(p, n, frames=1)),
    "variable_rate": (
        ".mp4",
        True,
        "variable frame rate (41.7 to 125.0 ms a frame), taken as they come",
        lambda p, n: clip(p, n, times=lambda i: Fraction(i + 2 * (i > 2), 24)),
    ),
    "rotation": (".mp4", True, "rotation flag", lambda p, n: clip(p, n, rotation=90)),
    "odd_size": (".png", True, "odd size: 33 x 47", lambda p, n: save(picture(n, 33, 47), p)),
    "ten_bit": (".mp4", True, "10-bit", lambda p, n: clip(p, n, pix_fmt="yuv420p10le")),
    "alpha": (".png", True, "alpha", lambda p, n: save(picture(n, channels=4), p)),
    "cmyk": (".jpg", True, "CMYK", lambda p, n: save(picture(n), p, "CMYK")),
    "grey": (".png", True, "grey", lambda p, n: save(picture(n), p, "L")),
    "huge": (".png", True, "is huge", lambda p, n: save(picture(n, 800, 800), p)),
    "too_large": (
        ".png",
        False,
        "over data.max_source_pixels = 1,000,000",
        lambda p, n: save(picture(n, 1004, 1000), p),
    ),
    "zip_bomb": (".png", False, "over data.max_source_pixels", lambda p, n: bomb(p, 30_000 + n)),
    "negative_pts": (
        ".ts",
        True,
        "negative timestamps",
        lambda p, n: clip(p, n, times=lambda i: Fraction(i - 3, 24)),
    ),
    "hidden_by_start": (
        ".mp4",
        True,
        "negative timestamps",
        lambda p, n: clip(p, n, frames=8, times=lambda i: Fraction(i - 3, 24)),
    ),
    "no_video": (".mp4", False, "has no video stream", lambda p, n: sound(p)),
    "latin_title": (".avi", True, "", titled),
    "half_of_two": (".tif", False, "cannot be decoded: TypeError: Missing dim", half_of_two),
}


def _misname(path: Path, seed: int) -> None:
    clip(path.with_suffix(".mp4"), seed)
    path.with_suffix(".mp4").rename(path)


def _write(folder: Path, form: str, items: dict[str, bytes]) -> None:
    """The listing of the files of `folder`, with the captions (raw bytes) of `items` by file name."""
    if form == "sidecars":
        for name, caption in items.items():
            (folder / name).with_suffix(".txt").write_bytes(caption)
    elif form == "table":
        lines = [
            b'{"path": ' + json.dumps(name).encode() + b', "text": "' + caption + b'"}\n'
            for name, caption in items.items()
        ]
        (folder / "metadata.jsonl").write_bytes(b"".join(lines))
    else:
        (folder / "videos.txt").write_text("".join(f"{name}\n" for name in items))
        (folder / "prompts.txt").write_bytes(b"".join(c + b"\n" for c in items.values()))


def _pack(folder: Path, archive: Path, items: dict[str, bytes], cut: str | None) -> None:
    """All items in one archive, their captions beside them; `cut` comes last, and half of it is missing."""
    order = [name for name in items if name != cut] + ([cut] if cut else [])
    with tarfile.open(archive, "w") as tar:
        for name in order:
            for member, content in (
                (str(Path(name).with_suffix(".txt")), items[name]),
                (name, (folder / name).read_bytes()),
            ):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    if cut is not None:
        with tarfile.open(archive) as tar:
            member_at = tar.getmember(cut)
        with archive.open("r+b") as file:
            file.truncate(member_at.offset_data + member_at.size // 2)


@pytest.fixture(scope="module")
def damaged(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DataConfig, dict[str, str], set[str]]:
    """(config, the word of every item that is to be named, the names of those that are quarantined)."""
    root = tmp_path_factory.mktemp("damaged")
    words: dict[str, str] = {}
    bad: set[str] = set()
    seeds = iter(range(1, 10**6))
    (root / "elsewhere").mkdir()
    for form in FORMS:
        folder = root / form if form != "webdataset" else root / "loose"
        folder.mkdir()
        items = _fill(folder, form, seeds, words, bad)
        if form == "webdataset":
            (root / form).mkdir()
            for number in range(2):
                own = dict(list(items.items())[number::2])
                plain = [name for name in own if name.startswith("sound")]
                name = f"shard-{number}.tar"
                _pack(folder, root / form / name, own, plain[-1])
                words[f"webdataset:{name}/{plain[-1]}"] = "truncated tar"
                bad.add(f"webdataset:{name}/{plain[-1]}")
                for key in [key for key in words if key.startswith("webdataset:@")]:
                    if key.removeprefix("webdataset:@") in own:
                        moved = f"webdataset:{name}/{key.removeprefix('webdataset:@')}"
                        words[moved] = words.pop(key)
                        if key in bad:
                            bad.remove(key)
                            bad.add(moved)
        else:
            _write(folder, form, items)
    sources = {form: {"path": str(root / form)} for form in FORMS}
    config = parse(
        DataConfig,
        {
            "sources": sources,
            "image_pixels": 32 * 32,
            "video_pixels": 32 * 32,
            "max_frames": 9,
            "max_source_pixels": LARGEST,
            "skip_bad": True,
            "workers": 2,
        },
    )
    return config, words, bad


def _fill(
    folder: Path, form: str, seeds: Iterator[int], words: dict[str, str], bad: set[str]
) -> dict[str, bytes]:
    """One item of every kind, and sound ones up to a quarter of the whole: file name -> caption."""
    items: dict[str, bytes] = {}

    def name_of(file: str) -> str:
        return f"{form}:@{file}" if form == "webdataset" else f"{form}:{file}"

    def expect(file: str, word: str, *, used: bool) -> None:
        words[name_of(file)] = word
        if not used:
            bad.add(name_of(file))

    for kind, (suffix, used, word, make) in KINDS.items():
        file = f"{kind}{suffix}"
        make(folder / file, next(seeds))
        items[file] = f"a {kind}".encode()
        if word:
            expect(file, word, used=used)
    for kind, caption, word in (
        ("no_caption", b" ", "missing caption"),
        ("not_utf8", b"gr\xf6\xdfer", "not UTF-8"),
    ):
        save(picture(next(seeds)), folder / f"{kind}.png")
        items[f"{kind}.png"] = caption
        expect(f"{kind}.png", word, used=False)
        if form == "table":
            # A line that cannot be read has no name but its number.
            line = f"table:metadata.jsonl:{len(items)}"
            words[line] = words.pop(f"table:{kind}.png")
            bad.remove(f"table:{kind}.png")
            bad.add(line)
    save(picture(next(seeds)), folder / "twin_a.png")
    items["twin_a.png"] = b"twins"
    (folder / "twin_b.png").write_bytes((folder / "twin_a.png").read_bytes())
    items["twin_b.png"] = b"twins"
    expect("twin_b.png", "duplicate of", used=False)
    (folder / "twin_c.png").write_bytes((folder / "twin_a.png").read_bytes())
    items["twin_c.png"] = b"the other twin"
    expect("twin_c.png", "same content as", used=True)
    other = folder.parent / "elsewhere"
    if form != "webdataset":
        save(picture(next(seeds)), other / f"{form}.png")
        (folder / "link_out.png").symlink_to(other / f"{form}.png")
        items["link_out.png"] = b"a link"
        expect("link_out.png", "outside the dataset's folder; follow_links", used=False)
        if form == "table":
            line = f"table:metadata.jsonl:{len(items)}"
            words[line] = words.pop("table:link_out.png")
            bad.remove("table:link_out.png")
            bad.add(line)
        (folder / "link_in.png").symlink_to("twin_in.png")
        save(picture(next(seeds)), folder / "twin_in.png")
        items["link_in.png"] = b"a link within"
        if form == "sidecars":
            items["twin_in.png"] = b"what it leads to"
            expect("twin_in.png", "same content as", used=True)
    if form in ("table", "lists"):
        for kind, path in (
            ("absolute", str(other / f"{form}_absolute.png")),
            ("relative", f"../elsewhere/{form}_relative.png"),
        ):
            save(picture(next(seeds)), folder / path)
            items[path] = f"an {kind} path".encode()
            expect(path, "lies outside the dataset's folder", used=True)
    while len(items) < TOTAL // len(FORMS):
        file = f"sound{len(items)}.png"
        save(picture(next(seeds)), folder / file)
        items[file] = b"nothing wrong"
    return items


def named(report: PrepareReport) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in report.problems:
        found.setdefault(problem.name, []).append(problem.reason)
    for remark in report.remarks:
        found.setdefault(remark.name, []).append(remark.text)
    return found


@pytest.mark.slow
def test_each_is_named_once_with_its_word_and_the_rest_is_trained_on(
    tmp_path: Path, damaged: Any, vae: Any, text: Any
) -> None:
    config, words, bad = damaged
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    report = dataset.report
    assert report.listed == TOTAL
    found = named(report)
    assert set(found) == set(words)
    for name, reasons in found.items():
        assert len(reasons) == 1, (name, reasons)
        assert words[name] in reasons[0], name
    assert {problem.name for problem in report.problems} == bad
    assert len(words) > 80
    assert report.used == len(dataset.items) == TOTAL - len(bad)
    assert {problem.kind for problem in report.problems} == {
        *("damaged", "caption", "duplicate", "outside", "too large")
    }
    # The second time nothing is decoded, and the report says the same.
    vae.encoded.clear()
    again = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert (again.items, again.report.remarks) == (dataset.items, report.remarks)
    assert again.report.problems == report.problems
    assert vae.encoded == []
    _train(dataset, vae)


@pytest.mark.slow
def test_the_doctor_names_the_same_for_a_dataset_and_for_a_recipe(
    tmp_path: Path, damaged: Any
) -> None:
    """Without a VAE, without a cache, and as text, JSON and a page."""
    config, words, bad = damaged
    packing = PackingConfig(tokens_per_step=64, tokens_per_pack=64)
    alone = doctor(config, packing)
    found = {problem.name: [problem.reason] for problem in alone.unusable}
    assert set(found) == bad
    kinds = {problem.name: problem.kind for problem in alone.unusable}
    assert set(kinds.values()) == {"damaged", "caption", "duplicate", "outside", "too large"}
    for remark in alone.remarks:
        found.setdefault(remark.name, []).append(remark.text)
    sources = {name: {"path": source.path} for name, source in (config.sources or {}).items()}
    limits = ("image_pixels", "video_pixels", "max_frames", "max_source_pixels", "skip_bad")
    report = doctor_recipe(
        load_recipe(
            {
                "out": str(tmp_path / "run"),
                "sources": sources,
                "vae": {"path": str(tmp_path / "vae"), "train": {}},
                "model": {"preset": "tiny"},
                "data": {name: getattr(config, name) for name in limits} | {"workers": 0},
                "packing": {"tokens_per_step": 64, "tokens_per_pack": 64},
                "stages": {"first": {}, "second": {"data": {"image_pixels": 16 * 32}}},
            }
        )
    )
    assert report.ok
    text, shown = report.to_text(), page(report)
    told: dict[str, list[str]] = {}
    for row in (*report.quarantined, *report.remarks):
        # What names the trained size is another sentence in the other stage.
        if "first" in row.stages:
            told.setdefault(f"{row.source}:{row.name}", []).append(row.text)
        assert row.stages == ("first", "second") or "cropped to" in row.text
        assert escape(row.text) in shown
        assert escape(row.name) in shown
    assert told == found
    assert {f"{row.source}:{row.name}": row.kind for row in report.quarantined} == kinds
    for name, reasons in found.items():
        assert len(reasons) == 1
        assert words[name] in reasons[0]
        if name in bad:
            assert f"{name.replace(':', ': ', 1)}: [" in text
    for stage in report.stages:
        assert stage.sums()["listed"] == TOTAL
        assert stage.used == TOTAL - len(bad)


def _train(dataset: Any, vae: Any) -> None:
    """Three steps on what is left: the loss is a number and falls on the same samples."""
    packing = PackingConfig(tokens_per_step=64, tokens_per_pack=64)
    builder = BatchBuilder(dataset, vae, FlowConfig(), packing, 0, torch.device("cpu"))
    shape = ModelConfig(dim=32, depth=1, heads=2, text_dim=8, latent_channels=4)
    model = GokuTransformer(shape, KernelConfig(backend="torch"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream = dataset.stream(0)
    positions = step_positions(0, lambda p: builder.tokens[stream.item(p)], 64)
    losses = []
    for _ in range(3):
        batch = builder.training(positions, [stream.item(p) for p in positions])
        loss = (model(*batch.inputs) - batch.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] < float("inf")


def test_without_skip_bad_every_problem_is_said(tmp_path: Path, vae: Any, text: Any) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for kind in ("empty", "png_as_clip", "too_large", "no_video"):
        suffix, _, _, make = KINDS[kind]
        make(folder / f"{kind}{suffix}", 5)
        (folder / f"{kind}.txt").write_text(kind)
    config = DataConfig(path=str(folder), max_source_pixels=LARGEST, workers=0)
    with pytest.raises(DataError, match="4 of 4 items cannot be used") as error:
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert {p.name.split(".")[0]: p.kind for p in error.value.problems} == {
        "empty": "damaged",
        "no_video": "damaged",
        "png_as_clip": "damaged",
        "too_large": "too large",
    }


def test_a_lower_limit_of_pixels_counts_at_a_warm_start(
    tmp_path: Path, vae: Any, text: Any
) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for side in (64, 100):
        save(picture(side, side, side), folder / f"{side}.png")
        (folder / f"{side}.txt").write_text("x")
    config = {"path": str(folder), "workers": 0, "skip_bad": True}
    assert len(prepare(DataConfig(**config), vae, text, cache_dir=tmp_path / "cache")) == 2
    lower = DataConfig(**config, max_source_pixels=64 * 64)
    found = prepare(lower, vae, text, cache_dir=tmp_path / "cache")
    assert [problem.name for problem in found.skipped] == ["100.png"]
    assert (
        "100 x 100 = 10,000 pixels, over data.max_source_pixels = 4,096" in found.skipped[0].reason
    )
