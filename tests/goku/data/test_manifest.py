from __future__ import annotations

import json
from pathlib import Path

import pytest

from goku.data import DataError, Record, read_records, scan
from goku.data.manifest import ALIASES


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def reasons(path: Path) -> dict[str, str]:
    return {problem.name: problem.reason for problem in scan(path).problems}


def test_folder_with_sidecars(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.mp4", "sub/c.JPG", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a clip\n")  # a byte order mark is no text
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "sub/c.txt").write_text("größer")
    (tmp_path / "notes.pdf").touch()
    (tmp_path / "left.txt").write_text("over")
    found = scan(tmp_path)
    assert [(r.name, r.text) for r in found.records] == [
        ("a.mp4", "a clip"),
        ("b.png", "two\nlines"),
        ("sub/c.JPG", "größer"),
    ]
    assert [r.is_image for r in found.records] == [False, True, True]
    assert found.problems == ()
    assert "notes.pdf" in found.notes[0]
    assert "left.txt" in found.notes[1]
    assert read_records(tmp_path) == list(found.records)


def test_names_in_capitals(tmp_path: Path) -> None:
    for name, text in (("UP.PNG", "up"), ("Both.JPG", "small"), ("low.png", "capitals")):
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".TXT" if text != "small" else ".txt").write_text(text)
    (tmp_path / "Both.TXT").write_text("not this one")
    found = scan(tmp_path)
    assert [(r.name, r.text) for r in found.records] == [
        ("Both.JPG", "small"), ("UP.PNG", "up"), ("low.png", "capitals"),
    ]  # fmt: skip
    assert found.problems == ()
    assert "Both.TXT" in found.notes[0]


def test_missing_captions_are_all_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "d.txt").write_text("fine")
    with pytest.raises(DataError, match="3 of 4 items") as error:
        read_records(tmp_path)
    problems = {p.name: p.reason for p in error.value.problems}
    assert problems["a.png"] == "missing caption: no a.txt beside it"
    assert problems["b.png"] == "missing caption: b.txt is empty"
    assert "not UTF-8" in problems["c.png"]
    assert all(name in str(error.value) for name in problems)
    assert [r.name for r in scan(tmp_path).records] == ["d.png"]


def test_no_dataset_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no media found"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "absent")
    (tmp_path / "data.parquet").touch()
    with pytest.raises(DataError, match=r"a folder, or a \.jsonl, \.json, \.csv or \.tar"):
        read_records(tmp_path / "data.parquet")
    with pytest.raises(DataError, match="lists no items"):
        read_records(jsonl(tmp_path, "", " "))
    (tmp_path / "data.jsonl").write_bytes(b"\x80\x81")
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path / "data.jsonl")


@pytest.mark.parametrize("path_column", ALIASES["path"])
@pytest.mark.parametrize("text_column", ALIASES["text"])
def test_aliases(tmp_path: Path, path_column: str, text_column: str) -> None:
    found = read_records(jsonl(tmp_path, {path_column: "x/a.mp4", text_column: " hi "}))
    assert found == [Record(path=str(tmp_path / "x/a.mp4"), text="hi", name="x/a.mp4")]
    csv = tmp_path / "data.csv"
    csv.write_text(f'{path_column},{text_column}\nx/a.mp4,"hi, ""you""\nthere"\n')
    assert [r.text for r in read_records(csv)] == ['hi, "you"\nthere']


def test_every_field(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "path": "/abs/a.mp4",
        "text": "t",
        "start_frame": 30,
        "num_frames": 9,
        "weight": 0.5,
        "height": 5,
        "aesthetic": 3.2,
    }
    expected = Record(
        path="/abs/a.mp4", text="t", name="7", start_frame=30, num_frames=9, weight=0.5
    )
    assert read_records(jsonl(tmp_path, row)) == [expected]
    csv = tmp_path / "data.csv"
    csv.write_text("id,path,text,start_frame,num_frames,weight\n7,/abs/a.mp4,t,30,9,0.5\n")
    assert read_records(csv) == [expected]
    csv.write_text("id,path,text,start_frame,num_frames,weight\n,/abs/a.mp4,t,,,\n")
    assert read_records(csv) == [Record(path="/abs/a.mp4", text="t", name="/abs/a.mp4")]


def test_a_folder_may_hold_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert [r.path for r in read_records(tmp_path)] == [str(tmp_path / "a.png")]
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(DataError, match=r"both metadata\.jsonl and metadata\.csv"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is needed, not list"),
        ({"path": "a.mp4"}, "missing caption: give it as one of text, caption, prompt, cap"),
        ({"path": "a.mp4", "text": " "}, "missing caption"),
        ({"path": "a.mp4", "text": 3}, "missing caption"),
        ({"text": "t"}, "one of path, media_path, video, file_name"),
        ({"path": "a.doc", "text": "t"}, ".doc is not a media file; allowed are .bmp"),
        ({"path": "a.mp4", "video": "b.mp4", "text": "t"}, "path and video both give the path"),
        ({"path": "a.mp4", "text": "t", "start_frame": -1}, "start_frame: -1 must be"),
        ({"path": "a.mp4", "text": "t", "start_frame": 1.5}, "start_frame: 1.5 must be"),
        ({"path": "a.mp4", "text": "t", "start_frame": True}, "start_frame: True must be"),
        ({"path": "a.mp4", "text": "t", "num_frames": 0}, "num_frames: 0 must be"),
        ({"path": "a.mp4", "text": "t", "num_frames": "x"}, "num_frames: 'x' must be"),
        ({"path": "a.mp4", "text": "t", "weight": 0}, "weight: 0 must be"),
        ({"path": "a.mp4", "text": "t", "weight": float("nan")}, "weight: nan must be"),
        ({"path": "a.mp4", "text": "t", "num_frame": 3}, "did you mean 'num_frames'"),
        ({"path": "a.mp4", "text": "t", "id": [1]}, r"id: [1] must be"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: object, reason: str) -> None:
    path = jsonl(tmp_path, {"path": "ok.mp4", "text": "t"}, row)
    assert list(reasons(path)) == ["data.jsonl:2"]
    assert reason in reasons(path)["data.jsonl:2"]
    assert [r.name for r in scan(path).records] == ["ok.mp4"]


def test_wrong_csv_columns_name_the_aliases(tmp_path: Path) -> None:
    csv = tmp_path / "data.csv"
    csv.write_text("clip,caption\na.mp4,x\n")
    with pytest.raises(DataError, match="no path column among clip, caption; name it one of path,"):
        read_records(csv)
    csv.write_text("video,words\na.mp4,x\n")
    with pytest.raises(DataError, match=r"no text column.*text, caption, prompt, cap"):
        read_records(csv)
    csv.write_text("")
    with pytest.raises(DataError, match=r"no path column among \(none\)"):
        read_records(csv)
    csv.write_text("video,text\na.mp4,one,two\nb.mp4\nc.mp4,ok\n")
    assert "more fields" in reasons(csv)["data.csv:2"]
    assert "missing caption" in reasons(csv)["data.csv:3"]
    csv.write_text('video,text\na.mp4,"open\n')
    with pytest.raises(DataError, match="not CSV"):
        read_records(csv)


def test_duplicates(tmp_path: Path) -> None:
    clip = {"path": "a.mp4", "text": "one"}
    found = scan(
        jsonl(
            tmp_path,
            clip,
            {**clip, "text": "two"},
            {**clip, "start_frame": 5},
            {**clip, "start_frame": 5, "num_frames": 9},
            clip,
            {"id": "x", "path": "b.mp4", "text": "b"},
            {"id": "x", "path": "c.mp4", "text": "c"},
        )
    )
    # The same file may serve several captions and ranges; names stay unique.
    names = ["a.mp4", "a.mp4 #2", "a.mp4[5:]", "a.mp4[5:14]", "x"]
    assert [r.name for r in found.records] == names
    assert [(p.name, p.reason.split(":")[0]) for p in found.problems] == [
        ("a.mp4", "duplicate"),
        ("x", "duplicate id"),
    ]
    assert "b.mp4" in found.problems[1].reason


def test_a_long_list_of_problems_is_shortened(tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / f"{index:02}.png").touch()
    with pytest.raises(DataError) as error:
        read_records(tmp_path)
    assert len(error.value.problems) == 60
    assert "... and 10 more" in str(error.value)


@pytest.mark.parametrize("strange", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_csv_rows_end_at_line_feeds_alone(tmp_path: Path, strange: str) -> None:
    csv = tmp_path / "data.csv"
    csv.write_text(f"path,text\r\na.mp4,one{strange}two\r\nb.mp4,three\r\n", encoding="utf-8")
    assert [r.text for r in read_records(csv)] == [f"one{strange}two", "three"]
    csv.write_text(f"path,text\na.mp4,one{strange}two\nb.mp4,x,y\n", encoding="utf-8")
    assert list(reasons(csv)) == ["data.csv:3"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_media_that_a_folders_manifest_does_not_list_are_noted(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    for file in ("a.png", "sub/b.mp4", "sub/c.JPG", "d.png", ".hidden.png", "notes.md", "d.txt"):
        (tmp_path / file).touch()
    # A row that cannot be used lists its media all the same.
    rows = [("sub/../a.png", "x"), ("d.png", "")]
    if name.endswith("jsonl"):
        lines = [json.dumps({"path": path, "text": text}) for path, text in rows]
    else:
        lines = ["path,text", *(f"{path},{text}" for path, text in rows)]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = scan(tmp_path)
    assert found.notes == (f"2 media not listed in {name}: sub/b.mp4, sub/c.JPG",)
    assert (len(found.records), len(found.problems)) == (1, 1)
    # Who names the manifest itself has chosen.
    assert scan(tmp_path / name).notes == ()
