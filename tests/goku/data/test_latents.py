from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from goku.data import DataConfig, Geometry, Record, plan
from goku.data.latents import FileIdentity, LatentCache, Plan, latent_key, request_key
from goku.data.media import DECODE_VERSION, RESAMPLE_VERSION

IDENTITY = FileIdentity(size=10, sha256="ab")
RECORD = Record(path="/x/a.mp4", text="t", name="a", num_frames=9)
CONFIG = DataConfig(path="/x", video_pixels=64 * 64)
GEOMETRY = plan(90, 160, 9, pixels=64 * 64, max_frames=17)


def latent(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 4, 3, 6, 10, generator=generator)
    return both[0], both[1]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_round_trip_is_exact(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path)
    mean, logvar = latent()
    assert not cache.valid("k" * 64, (4, 3, 6, 10))
    with pytest.raises(FileNotFoundError):
        cache.read("k" * 64)
    cache.write("k" * 64, mean, logvar, {"name": "größe"})
    found = cache.read("k" * 64)
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], logvar)
    assert cache.valid("k" * 64, (4, 3, 6, 10))
    assert not cache.valid("k" * 64, (4, 3, 10, 6))


DAMAGE: dict[str, Callable[[bytearray], bytes]] = {
    "empty": lambda content: b"",
    "truncated": lambda content: bytes(content[:-5]),
    "header only": lambda content: bytes(content[:40]),
    "longer": lambda content: bytes(content) + b"\0" * 8,
    "header": lambda content: b"\xff" * 8 + bytes(content[8:]),
    "first tensor byte": lambda content: flip(content, -2 * 4 * 3 * 6 * 10 * 4),
    "last byte": lambda content: flip(content, -1),
}


def flip(content: bytearray, place: int) -> bytes:
    content[place] ^= 1
    return bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(tmp_path: Path, kind: str) -> None:
    cache = LatentCache(tmp_path)
    cache.write("k" * 64, *latent(), {})
    path = cache.path("k" * 64)
    path.write_bytes(DAMAGE[kind](bytearray(path.read_bytes())))
    assert not cache.valid("k" * 64, (4, 3, 6, 10))
    with pytest.raises(ValueError, match=rf"cached latent {path} is damaged"):
        cache.read("k" * 64)
    cache.write("k" * 64, *latent(), {})
    assert cache.valid("k" * 64, (4, 3, 6, 10))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    cache = LatentCache(tmp_path)
    cache.write("k" * 64, *latent(0), {})
    before = {path: path.read_bytes() for path in files(tmp_path)}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    for key in ("k" * 64, "n" * 64):
        with pytest.raises(OSError, match="No space left"):
            cache.write(key, *latent(1), {})
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_identity_is_the_content_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LatentCache(tmp_path / "cache")
    media = tmp_path / "a.mp4"
    media.write_bytes(b"one")
    assert cache.known_identity(str(media)) is None
    first = cache.identify(str(media))
    # sha256 of "one", from sha256sum.
    digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert first == FileIdentity(3, digest)
    assert cache.known_identity(str(media)) == first
    # Believed while size and time stand still (stated), looked at again when either changes.
    stat = media.stat()
    media.write_bytes(b"two")
    os.utime(media, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.identify(str(media)) == first
    os.utime(media, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.known_identity(str(media)) is None
    second = cache.identify(str(media))
    assert second.sha256 != first.sha256
    other = tmp_path / "b.mp4"
    other.write_bytes(b"two")
    assert cache.identify(str(other)) == second
    for entry in files(tmp_path / "cache/files"):
        entry.write_bytes(b"{broken")
    assert cache.known_identity(str(media)) is None
    assert cache.identify(str(media)) == second


def test_plans_round_trip_and_survive_damage(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path)
    assert cache.read_plan("r" * 64) is None
    plan = Plan(GEOMETRY, 9, 30, 23.976, ("10-bit", "größe"))
    cache.write_plan("r" * 64, plan)
    assert cache.read_plan("r" * 64) == plan
    whole = json.loads(files(tmp_path)[0].read_bytes())
    wrong = [{**whole, "version": 1}, {**whole, "source_fps": "24"}, {**whole, "remarks": [1]}]
    wrong += [{**whole, "geometry": {}}, {**whole, "selected_frames": None}]
    # Of before there were remarks: the geometry alone.
    wrong += [whole["geometry"]]
    damaged = [json.dumps(content).encode() for content in wrong]
    for content in (b"", b"[]", b'{"frames": 1}', b"\xff\xfe", *damaged):
        files(tmp_path)[0].write_bytes(content)
        assert cache.read_plan("r" * 64) is None


def test_latent_key_covers_everything_it_must() -> None:
    def key(
        vae: str = "v",
        identity: FileIdentity = IDENTITY,
        record: Record = RECORD,
        config: DataConfig = CONFIG,
        geometry: Geometry = GEOMETRY,
    ) -> str:
        return latent_key(vae, identity, record, config, geometry)

    different = [
        key(),
        key(vae="w"),
        key(identity=replace(IDENTITY, size=11)),
        key(identity=replace(IDENTITY, sha256="ac")),
        key(record=replace(RECORD, start_frame=1)),
        key(config=replace(CONFIG, fps=12.0)),
        # Resampled, the last frame of a range is held as long as the one before it.
        key(config=replace(CONFIG, fps=12.0), record=replace(RECORD, num_frames=5)),
        *(
            key(geometry=replace(GEOMETRY, **{name: getattr(GEOMETRY, name) + 1}))
            for name in Geometry.__dataclass_fields__
        ),
    ]
    assert len(set(different)) == len(different)
    picture = replace(RECORD, path="/x/a.png", num_frames=None)
    assert key(record=picture, config=replace(CONFIG, fps=12.0)) == key(record=picture)
    # What does not change the pixels does not change the key: not even where the file lies.
    assert key(record=replace(RECORD, text="u", name="n", weight=2.0, path="/y/b.mp4")) == key()
    assert key(config=replace(CONFIG, path="/y", workers=7, skip_bad=True, cache="/z")) == key()


def test_keys_are_those_of_caches_that_are_there() -> None:
    """Written down: of another key nothing that is cached would be found."""
    versions = {"pillow": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("goku.data.latents.decoder_version", lambda record: versions)
        found = latent_key("v", IDENTITY, RECORD, CONFIG, GEOMETRY)
        asked = request_key(IDENTITY, RECORD, CONFIG)
    shared = {
        "decode": DECODE_VERSION,
        "decoder": versions,
        "file": asdict(IDENTITY),
        "fps": CONFIG.fps,
        "start_frame": RECORD.start_frame,
    }
    if CONFIG.fps is not None:
        shared["resample"] = RESAMPLE_VERSION
    own = {"format": "goku-latent-1", "vae": "v", "geometry": asdict(GEOMETRY)}
    assert found == sha256(json.dumps(shared | own, sort_keys=True).encode()).hexdigest()
    own = {
        "num_frames": RECORD.num_frames,
        "pixels": CONFIG.video_pixels,
        "max_frames": CONFIG.max_frames,
        "upscale": CONFIG.upscale,
    }
    assert asked == sha256(json.dumps(shared | own, sort_keys=True).encode()).hexdigest()


def test_request_key_covers_what_a_geometry_depends_on() -> None:
    def key(record: Record = RECORD, **changes: object) -> str:
        return request_key(IDENTITY, record, replace(CONFIG, **changes))  # type: ignore[arg-type]

    different = [
        key(),
        key(video_pixels=64 * 80),
        key(max_frames=5),
        key(fps=12.0),
        key(upscale=True),
        key(replace(RECORD, start_frame=1)),
        key(replace(RECORD, num_frames=None)),
        request_key(replace(IDENTITY, size=11), RECORD, CONFIG),
    ]
    assert len(set(different)) == len(different)
    assert key(image_pixels=10**6) == key()
    assert key(replace(RECORD, path="/x/a.png"), image_pixels=10**6) != key()


def test_another_way_to_resample_is_another_key_of_resampled_clips_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resampled = replace(CONFIG, fps=12.0)
    picture = replace(RECORD, path="/x/a.png", num_frames=None)
    cases = [(RECORD, resampled), (RECORD, CONFIG), (picture, resampled)]

    def keys() -> list[tuple[str, str]]:
        return [
            (request_key(IDENTITY, r, c), latent_key("v", IDENTITY, r, c, GEOMETRY))
            for r, c in cases
        ]

    before = keys()
    monkeypatch.setattr("goku.data.latents.RESAMPLE_VERSION", 99)
    after = keys()
    assert not set(before[0]) & set(after[0])
    assert before[1:] == after[1:]


def test_keys_change_with_the_libraries_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = replace(RECORD, path="/x/a.png", num_frames=None)

    def keys(record: Record) -> tuple[str, str]:
        return (
            request_key(IDENTITY, record, CONFIG),
            latent_key("v", IDENTITY, record, CONFIG, GEOMETRY),
        )

    video, image = [keys(RECORD)], [keys(picture)]
    for name, value in (
        ("av.__version__", "0.0.1"),
        ("av.library_versions", {**av.library_versions, "libavcodec": (1, 2, 3)}),
    ):
        monkeypatch.setattr(name, value)
        video.append(keys(RECORD))
        assert keys(picture) == image[0]
    monkeypatch.setattr("PIL.__version__", "0.0.1")
    video.append(keys(RECORD))  # its frames are resized by Pillow
    image.append(keys(picture))
    for found in (video, image):
        for kind in zip(*found, strict=True):
            assert len(set(kind)) == len(found)


def test_a_folder_has_one_id_and_its_copy_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LatentCache(tmp_path / "cache")
    found = first.folder_id()
    assert found is not None
    assert LatentCache(tmp_path / "cache").folder_id() == found
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["folder-id"]
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    assert LatentCache(tmp_path / "copy").folder_id() not in (None, found)
    assert LatentCache(tmp_path / "other").folder_id() not in (None, found)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    assert LatentCache(tmp_path / "no links").folder_id() is None
    assert list((tmp_path / "no links").iterdir()) == []
    assert first.folder_id() == found  # what is there needs none
    (tmp_path / "cache/folder-id").write_bytes(b"\xff")
    assert first.folder_id() is None


def test_of_many_that_make_a_folder_at_once_all_have_its_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: LatentCache(tmp_path / "cache").folder_id(), range(64)))
    assert len(set(found)) == 1
    assert found[0] is not None
