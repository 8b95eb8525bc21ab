"""The forms of a dataset's listing: tables, two lists, tar archives; captions, motion scores, links."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku.data import DataConfig, DataError, DecodeError, Record, decode, prepare, scan
from goku.data.latents import LatentCache
from goku.data.media_source import Window, open_media
from goku.data.record import captions_of, with_motion


def problems(path: Path, **how: Any) -> dict[str, str]:
    return {problem.name: problem.reason for problem in scan(path, **how).problems}


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(level: int = 9, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((size, size, 3), level, np.uint8)
    pixels[::3, ::5] = 255 - level
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}])
def test_json_tables(tmp_path: Path, wrap: Callable[[list[Any]], Any]) -> None:
    rows = [{"file_name": "a.png", "caption": "x"}, 7, {"video": "b.mp4", "text": "", "weight": 2}]
    (tmp_path / "metadata.json").write_text(json.dumps(wrap(rows)))
    found = scan(tmp_path)
    assert [(r.name, r.text) for r in found.records] == [("a.png", "x")]
    reasons = problems(tmp_path)
    assert "a JSON object is needed, not int" in reasons["metadata.json[1]"]
    assert "missing caption" in reasons["metadata.json[2]"]
    for bad, message in (("{", "not JSON"), ('{"items": []}', "a list of items is needed")):
        (tmp_path / "metadata.json").write_text(bad)
        with pytest.raises(DataError, match=message):
            scan(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_a_row_that_is_not_utf8_costs_itself_alone(tmp_path: Path, suffix: str) -> None:
    rows = [(f"{n}.png", f"größe {n}") for n in range(4)]
    encodings = ["utf-8", "latin-1", "utf-8", "utf-8"]
    if suffix == "csv":
        lines = [b"path,text"]
        lines += [f"{p},{t}".encode(e) for (p, t), e in zip(rows, encodings, strict=True)]
        content = b"\n".join(lines)
    else:
        objects = [
            json.dumps({"path": p, "text": t}, ensure_ascii=False).encode(e)
            for (p, t), e in zip(rows, encodings, strict=True)
        ]
        content = b"\n".join(objects) if suffix == "jsonl" else b"[" + b",".join(objects) + b"]"
    table = tmp_path / f"data.{suffix}"
    table.write_bytes(content)
    found = scan(table)
    assert [(r.name, r.text) for r in found.records] == [rows[0], rows[2], rows[3]]
    where = {"jsonl": "data.jsonl:2", "csv": "data.csv:3", "json": "data.json[1]"}[suffix]
    assert [(p.name, p.kind) for p in found.problems] == [(where, "caption")]
    assert "not UTF-8" in found.problems[0].reason


def test_an_open_quote_costs_its_line_alone(tmp_path: Path) -> None:
    csv = tmp_path / "data.csv"
    csv.write_text('path,text\na.png,"open\nb.png,"two\nlines"\nc.png,"x"y\nd.png,last\n')
    found = scan(csv)
    assert [(r.name, r.text) for r in found.records] == [("b.png", "two\nlines"), ("d.png", "last")]
    assert {p.name for p in found.problems} == {"data.csv:2", "data.csv:5"}
    assert all("not CSV" in p.reason for p in found.problems)


def test_several_captions(tmp_path: Path) -> None:
    several = ["one", {"text": "two", "weight": 3}, {"text": " three "}]
    table = tmp_path / "data.jsonl"
    table.write_text(json.dumps({"path": "a.png", "text": several}) + "\n")
    (record,) = scan(table).records
    assert record.captions == (("two", 3.0), ("one", 1.0), ("three", 1.0))
    assert (record.text, record.prompts) == ("two", ("two", "one", "three"))
    csv = tmp_path / "data.csv"
    cell = json.dumps(several).replace('"', '""')
    csv.write_text(f'path,captions\na.png,"{cell}"\n')
    assert scan(csv).records == (record,)
    # One caption is as it always was, in whatever way it is written.
    table.write_text(json.dumps({"path": "a.png", "text": ["only"]}) + "\n")
    assert scan(table).records[0].captions == ()
    for value, message in [
        ([], "missing caption"),
        (["x", " "], "missing caption"),
        (["x", "x "], "'x' is given twice"),
        ([{"text": "x", "wieght": 2}], "unknown key 'wieght'; allowed are text, weight"),
        ([{"text": "x", "weight": -1}], "caption weight: -1 must be a finite number above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            captions_of(value)
        table.write_text(json.dumps({"path": "a.png", "text": value}) + "\n")
        assert scan(table).problems[0].kind == "caption"


def test_a_stated_length_is_an_upper_bound(
    tmp_path: Path, write_video: Callable[..., Path], gradient: Any
) -> None:
    write_video(tmp_path / "a.mp4", gradient(9, 32, 32))
    config = DataConfig(path="unused", video_pixels=32 * 32)
    table = tmp_path / "data.jsonl"
    rows = [{"path": "a.mp4", "text": "x", "num_frames": n} for n in (30, 5)]
    rows.append({"path": "a.mp4", "text": "x", "num_frames": 30, "start_frame": 0})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    long, short, ranged = scan(table).records
    assert decode(long, config).shape[1] == 9
    assert decode(short, config).shape[1] == 5
    with pytest.raises(DecodeError, match="too short: frames 0 to 29 were asked for"):
        decode(ranged, config)


def test_motion_scores(tmp_path: Path) -> None:
    table = tmp_path / "data.jsonl"
    rows = [
        {"path": "a.mp4", "text": ["x", "y"], "motion_score": 4.25},
        {"path": "b.mp4", "text": "z"},
        {"path": "c.mp4", "text": "z", "motion": "fast"},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scan(table)
    assert "motion_score: 'fast' must be a finite number" in found.problems[0].reason
    template = "{caption} motion score: {motion:.1f}"
    scored, plain = (with_motion(record, template) for record in found.records)
    assert scored.prompts == ("x motion score: 4.2", "y motion score: 4.2")
    assert (plain.text, plain.remarks) == (
        "z",
        ("has no motion score: its caption is used as it is",),
    )
    assert with_motion(found.records[0], None) == found.records[0]


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("media", ["videos.txt", "video.txt", "images.txt", "image.txt"])
@pytest.mark.parametrize("captions", ["prompt.txt", "prompts.txt", "caption.txt", "captions.txt"])
def test_two_lists(tmp_path: Path, media: str, captions: str) -> None:
    (tmp_path / media).write_text("a.mp4\r\nsub/b.png\r\n")
    (tmp_path / captions).write_bytes("\ufeffone, größer\ntwo\n\n".encode())
    assert scan(tmp_path).records == (
        Record(path=str(tmp_path / "a.mp4"), text="one, größer", name="a.mp4"),
        Record(path=str(tmp_path / "sub/b.png"), text="two", name="sub/b.png"),
    )


def test_lines_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "videos.txt").write_bytes(b"a.mp4\n\nb.mp4\n\nc.mp4\nd.doc\ne.mp4\n\xff.mp4\n")
    (tmp_path / "prompt.txt").write_bytes(b"A\n\n\nlost\nC\nD\n\xe9\nF\n")
    found = scan(tmp_path)
    assert [(r.name, r.text) for r in found.records] == [("a.mp4", "A"), ("c.mp4", "C")]
    reasons = problems(tmp_path)
    assert list(reasons) == ["b.mp4", "videos.txt:4", "d.doc", "e.mp4", "videos.txt:8"]
    assert reasons["b.mp4"] == "missing caption: line 3 of prompt.txt is blank"
    assert "missing media path" in reasons["videos.txt:4"]
    assert ".doc is not a media file" in reasons["d.doc"]
    assert "line 7 of prompt.txt, is not UTF-8" in reasons["e.mp4"]


def test_lists_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n")
    (tmp_path / "prompt.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"videos\.txt has 2 lines and prompt\.txt 1"):
        scan(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"both prompt\.txt and prompts\.txt; keep one"):
        scan(tmp_path)
    (tmp_path / "prompts.txt").unlink()
    (tmp_path / "metadata.csv").write_text("path,text\na.mp4,x\n")
    with pytest.raises(DataError, match=r"both metadata\.csv and videos\.txt; keep one"):
        scan(tmp_path)
    assert [r.name for r in scan(tmp_path, "table").records] == ["a.mp4"]


def test_a_caption_named_like_a_list_is_a_caption(tmp_path: Path) -> None:
    for name in ("video.mp4", "prompt.png"):
        (tmp_path / name).touch()
    (tmp_path / "video.txt").write_text("a clip")
    (tmp_path / "prompt.txt").write_text("a picture")
    assert [(r.name, r.text) for r in scan(tmp_path).records] == [
        ("prompt.png", "a picture"),
        ("video.mp4", "a clip"),
    ]


# --- archives -------------------------------------------------------------------------------------


def test_archives(tmp_path: Path) -> None:
    files = {
        "d/0001.png": png(1),
        "d/0001.txt": "größer\n".encode(),
        "d/0002.mp4": b"clip",
        "d/0002.json": json.dumps(
            {"caption": ["a", "b"], "num_frames": 9, "weight": 2, "motion_score": 3, "width": 5}
        ).encode(),
        "d/0003.jpg": b"x",
        "d/0003.caption": b"c",
        "d/0003.json": b'{"caption": "not this", "key": "0003"}',
        "d/0001.cls": b"7",
        "d/._0001.png": b"left by a Mac",
    }
    path = tar(tmp_path / "shard-000.tar", files)
    first, second, third = scan(path).records
    assert (first.name, first.text, first.is_image) == ("shard-000.tar/d/0001.png", "größer", True)
    assert second.prompts == ("a", "b")
    assert (second.num_frames, second.at_most, second.weight, second.motion) == (9, True, 2, 3)
    assert (third.text, third.path) == ("c", f"{path}/d/0003.jpg")
    with open_media(first) as file:
        assert file.read() == files["d/0001.png"]
    assert "d/0001.cls" in scan(path).notes[0]
    # In a folder, by a range, and as a form of its own beside loose media.
    tar(tmp_path / "shard-001.tar", {"x.png": png(), "x.txt": b"x"})
    both = [r.name for r in scan(tmp_path).records]
    assert both == [r.name for r in scan(tmp_path / "shard-{000..001}.tar").records]
    assert len(both) == 4
    reasons = problems(tmp_path / "shard-{000..002}.tar")
    assert reasons == {"shard-002.tar": "the archive is missing"}
    (tmp_path / "y.png").touch()
    assert [p.name for p in scan(tmp_path).problems] == ["y.png"]
    assert [r.name for r in scan(tmp_path, "webdataset").records] == both


def test_samples_that_cannot_be_used(tmp_path: Path) -> None:
    files = {
        "a.txt": b"no media",
        "b.png": png(),
        "c.png": png(),
        "c.mp4": b"x",
        "c.txt": b"two",
        "d.png": png(),
        "d.txt": b"\xff\xfe",
        "e.png": png(),
        "e.json": b"{",
        "f.png": png(),
        "f.json": b"[1]",
        "g.png": png(),
        "g.json": b'{"text": "g", "weight": 0}',
        "h.png": png(),
        "h.txt": b"fine",
    }
    path = tar(tmp_path / "s.tar", files)
    assert [r.text for r in scan(path).records] == ["fine"]
    reasons = problems(path)
    assert reasons["s.tar/a"] == "has no media file"
    assert reasons["s.tar/b.png"].startswith("missing caption: the archive has no .txt")
    assert reasons["s.tar/c"] == "has several media files: c.png, c.mp4"
    assert "d.txt is not UTF-8" in reasons["s.tar/d.png"]
    assert "e.json: not JSON" in reasons["s.tar/e.png"]
    assert "a JSON object is needed, not list" in reasons["s.tar/f.png"]
    assert "weight: 0 must be" in reasons["s.tar/g.png"]


def test_truncated_archives(tmp_path: Path) -> None:
    whole = tar(
        tmp_path / "s.tar", {"a.txt": b"a", "a.png": png(1), "b.txt": b"b", "b.png": png(2)}
    )
    content = whole.read_bytes()
    last = scan(whole).records[1].member
    assert last is not None
    cuts = {
        last.offset + 5: ({"s.tar/b.png"}, f"ends {last.size - 5} bytes before the file does"),
        last.offset - 100: ({"s.tar/b", "s.tar"}, "the mark of its end is missing"),
        last.offset + 512 * -(-last.size // 512): ({"s.tar"}, "the mark of its end is missing"),
    }
    for size, (names, reason) in cuts.items():
        whole.write_bytes(content[:size])
        found = scan(whole)
        assert "a" in [r.text for r in found.records]
        assert {p.name for p in found.problems} == names
        assert all(
            p.reason.startswith("truncated tar") for p in found.problems if p.name != "s.tar/b"
        )
        assert any(reason in p.reason for p in found.problems)
    whole.write_bytes(b"these are no archive's bytes" * 100)
    assert problems(whole)["s.tar"].startswith("truncated tar, or none")
    whole.rename(tmp_path / "s.tar.gz")
    with pytest.raises(DataError, match="compressed archives allow no random access"):
        scan(tmp_path / "s.tar.gz")


def test_members_decode_as_files_do(
    tmp_path: Path, write_dataset: Callable[[Path], Path], vae: Any, text: Any
) -> None:
    folder = write_dataset(tmp_path / "media")
    names = sorted(file.name for file in folder.iterdir())
    archive = tar(tmp_path / "all.tar", {n: (folder / n).read_bytes() for n in names})
    config = {"image_pixels": 64 * 96, "video_pixels": 48 * 64, "workers": 0}
    loose = prepare(DataConfig(path=str(folder), **config), vae, text, cache_dir=tmp_path / "c1")
    packed = prepare(
        DataConfig(path=str(archive), **{**config, "workers": 2}),
        vae,
        text,
        cache_dir=tmp_path / "c2",
    )
    assert [i.grid for i in packed.items] == [i.grid for i in loose.items]
    for index in range(len(loose)):
        assert torch.equal(packed.read(index).mean, loose.read(index).mean)
        assert torch.equal(packed.pixels(index), loose.pixels(index))
    # By content: the same latents lie under the same names; and the second time nothing is read.
    keys = [sorted(p.name for p in (tmp_path / c / "latents").rglob("*.s*")) for c in ("c1", "c2")]
    assert keys[0] == keys[1]
    vae.encoded.clear()
    prepare(DataConfig(path=str(archive), **config), vae, text, cache_dir=tmp_path / "c2")
    assert vae.encoded == []
    cache = LatentCache(tmp_path / "c2")
    member = scan(archive).records[0].member
    assert member is not None
    archive.write_bytes(archive.read_bytes() + bytes(512))
    assert cache.known_identity(str(archive), member) is None


def test_the_window_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    expected = io.BytesIO(bytes(range(20, 50)))
    with Window((tmp_path / "f").open("rb"), 20, 30) as window:
        for where, whence in [(0, 0), (5, 0), (-4, 2), (3, 1), (40, 0), (-1, 2), (0, 2)]:
            assert window.seek(where, whence) == expected.seek(where, whence)
            assert window.read(7) == expected.read(7)
            assert window.tell() == expected.tell()
        window.seek(2)
        assert window.read() == bytes(range(22, 50))
        with pytest.raises(ValueError, match="before the beginning"):
            window.seek(-31, 2)


# --- links ----------------------------------------------------------------------------------------


def test_links(tmp_path: Path) -> None:
    folder, other = tmp_path / "set", tmp_path / "other"
    folder.mkdir()
    (other / "deep").mkdir(parents=True)
    (other / "x.png").write_bytes(png())
    (other / "deep/y.png").write_bytes(png())
    (other / "deep/y.txt").write_text("y")
    (folder / "in.png").write_bytes(png(3))
    (folder / "out.png").symlink_to(other / "x.png")
    (folder / "same.png").symlink_to("in.png")
    (folder / "dir").symlink_to(other / "deep")
    (folder / "loop").symlink_to(folder)
    for stem in ("in", "out", "same"):
        (folder / f"{stem}.txt").write_text(stem)
    found = scan(folder)
    assert [r.name for r in found.records] == ["in.png", "same.png"]
    assert [(p.name, p.kind) for p in found.problems] == [("out.png", "outside")]
    reason = f"link to {other / 'x.png'} outside the dataset's folder; follow_links: true allows it"
    assert found.problems[0].reason == reason
    assert "2 linked folders: dir, loop; follow_links: true reads them" in found.notes[0]
    every = scan(folder, follow_links=True)
    assert [r.name for r in every.records] == ["dir/y.png", "in.png", "out.png", "same.png"]
    # The dataset's folder itself may be a link.
    (tmp_path / "alias").symlink_to(folder)
    assert [r.name for r in scan(tmp_path / "alias").records] == ["in.png", "same.png"]
    # In a table: a link out is refused, a path that says where it leads is used, with a remark.
    table = folder / "metadata.jsonl"
    rows = [{"path": p, "text": "t"} for p in ("out.png", "../other/x.png", str(other / "x.png"))]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scan(folder)
    assert [p.name for p in found.problems] == ["metadata.jsonl:1"]
    assert [r.remarks for r in found.records] == [("lies outside the dataset's folder",)] * 2


def test_links_that_lead_nowhere_or_back(
    tmp_path: Path, write_dataset: Callable[[Path], Path], vae: Any, text: Any
) -> None:
    folder = write_dataset(tmp_path / "set")
    (folder / "e.png").symlink_to("gone.png")
    (folder / "e.txt").write_text("e")
    with pytest.raises(DataError, match=r"1 of 5 .*\n  e\.png: media file missing"):
        prepare(DataConfig(path=str(folder), workers=0), vae, text, cache_dir=tmp_path / "cache")
    # The folder's other name in a table is not outside.
    (tmp_path / "alias").symlink_to(folder)
    rows = [
        {"path": str(base / "a.png"), "text": base.name} for base in (folder, tmp_path / "alias")
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("set", "alias"):
        found = scan(tmp_path / name)
        assert [r.remarks for r in found.records] == [(), ()]
        assert found.problems == ()


def test_a_form_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    for form in ("table", "lists", "webdataset"):
        with pytest.raises(DataError, match=f"is no dataset of the form {form}"):
            scan(tmp_path, form)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form is 'tabel'; allowed: auto, sidecars, table"):
        scan(tmp_path, "tabel")  # type: ignore[arg-type]
