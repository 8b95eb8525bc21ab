"""The latent cache: one safetensors file per item, found by content.

    <cache>/files/    sha256 of every media file, kept by (path, size, mtime_ns)
    <cache>/plans/    what decoding gave for a (file content, request): a warm start decodes nothing
    <cache>/latents/  mean and logvar, fp32 (C, T, H, W), un-normalised
    <cache>/frames/   mean of a single frame encoded alone, fp32 (C, 1, H, W), un-normalised
    <cache>/folder-id which folder this is, by which processes know that they share it

A latent's key is the sha256 of the VAE's fingerprint, the geometry (resize, crop, frames), the
first frame and fps, the versions of the decoding libraries, and the media file's size and content
hash. So an update of Pillow, PyAV or FFmpeg makes latents anew. Hashing reads each new file once,
at the speed of the disk or about 1 GB/s a core; a file whose content changes while its size and
modification time do not is missed.

Files appear atomically (temporary file, fsync, rename), so any number of processes may fill one
cache; at worst two do the same work. Every file carries a CRC-32 of its tensors: a damaged one is
found on reading and, by `prepare`, made anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from goku.data.config import DataConfig
from goku.data.errors import DecodeError
from goku.data.media import DECODE_VERSION, RESAMPLE_VERSION, Media, decoder_version
from goku.data.record import Member, Record
from goku.data.transform import Geometry
from goku.whole_file import write_whole

_FORMAT = "goku-latent-1"
_PLAN_VERSION = 2
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileIdentity:
    """Size in bytes and sha256 of a media file's content."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What decoding a request gave: the fields of `goku.data.media.Media` that hold for good."""

    geometry: Geometry
    selected_frames: int
    source_frames: int
    source_fps: float
    remarks: tuple[str, ...] = ()


def plan_of(media: Media) -> Plan:
    """What of a decoded file is kept."""
    return Plan(
        media.geometry, media.selected_frames, media.source_frames, media.source_fps, media.remarks
    )


class LatentCache:
    """Reads and writes the four folders under `directory`. Cheap to make; holds no open files."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def folder_id(self) -> str | None:
        """The same on all machines that share the folder, another for each folder of its own, a copy too; None where
        that cannot be known. Made where it is missing."""
        path = self.directory / "folder-id"
        try:
            if not path.exists():
                self.directory.mkdir(parents=True, exist_ok=True)
                own = path.with_name(f".partial-{uuid.uuid4().hex}")
                try:
                    own.write_text(uuid.uuid4().hex)
                    os.link(own, path)  # whole or not at all, and the first one stays
                except FileExistsError:
                    pass
                finally:
                    own.unlink(missing_ok=True)
            with open(path, encoding="ascii") as file:
                # A copy has the content, and hardly ever the inode.
                return f"{file.read()}-{os.fstat(file.fileno()).st_ino}"
        except (OSError, ValueError):  # no hard links here, or nothing may be written; not ASCII
            return None

    # Identity of media files

    def known_identity(self, path: str, member: Member | None = None) -> FileIdentity | None:
        """The identity of the file (or of the member of the archive `path`) if it was hashed before
        and the file has kept its size and mtime."""
        stat = os.stat(path)
        entry = _read_json(self._identity_path(path, member))
        if entry is None or entry.get("size") != stat.st_size:
            return None
        if entry.get("mtime_ns") != stat.st_mtime_ns or not isinstance(entry.get("sha256"), str):
            return None
        return FileIdentity(member.size if member else stat.st_size, str(entry["sha256"]))

    def last_identity(self, path: str, member: Member | None = None) -> FileIdentity | None:
        """The identity that the file (or the member of the archive `path`) had when it was last hashed, whatever has
        become of it; None when it never was."""
        entry = _read_json(self._identity_path(path, member))
        if entry is None or not isinstance(entry.get("sha256"), str):
            return None
        size = member.size if member else entry.get("size")
        return FileIdentity(size, str(entry["sha256"])) if isinstance(size, int) else None

    def identify(self, path: str, member: Member | None = None) -> FileIdentity:
        """The identity of the file, or of the member of the archive `path`; read unless known.

        DecodeError when the file cannot be read, OSError when the cache cannot be written.
        """
        known = self.known_identity(path, member)
        if known is not None:
            return known
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                left = member.size if member else stat.st_size
                file.seek(member.offset if member else 0)
                while block := file.read(min(_BLOCK, left) if member else _BLOCK):
                    digest.update(block)
                    left -= len(block)
        except OSError as error:
            raise DecodeError(path, f"cannot be read: {error.strerror}") from error
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}
        content = {**entry, "path": path, **({"member": member.name} if member else {})}
        write_whole(self._identity_path(path, member), json.dumps(content).encode(), durable=True)
        return FileIdentity(member.size if member else stat.st_size, digest.hexdigest())

    def _identity_path(self, path: str, member: Member | None = None) -> Path:
        place: dict[str, object] = {"path": os.path.abspath(path)}
        if member is not None:
            place |= {"offset": member.offset, "size": member.size}
        return self._at("files", _key(place), "json")

    # What a decoding gave

    def read_plan(self, request: str) -> Plan | None:
        """What is stored under a `request_key`; None when absent, damaged or of an older form."""
        entry = _read_json(self._at("plans", request, "json"))
        if entry is None or entry.get("version") != _PLAN_VERSION:
            return None
        geometry, remarks = entry.get("geometry"), entry.get("remarks")
        counts = [entry.get("selected_frames"), entry.get("source_frames")]
        fps = entry.get("source_fps")
        if not (isinstance(geometry, dict) and isinstance(remarks, list)):
            return None
        if set(geometry) != set(Geometry.__dataclass_fields__):
            return None
        if not all(isinstance(value, int) for value in [*geometry.values(), *counts]):
            return None
        if not isinstance(fps, (int, float)) or not all(isinstance(r, str) for r in remarks):
            return None
        selected, source = (int(str(count)) for count in counts)
        return Plan(Geometry(**geometry), selected, source, float(fps), tuple(remarks))

    def write_plan(self, request: str, plan: Plan) -> None:
        """Store what decoding `request` gave."""
        content = {"version": _PLAN_VERSION, **asdict(plan)}
        write_whole(self._at("plans", request, "json"), json.dumps(content).encode(), durable=True)

    # Latents

    def path(self, key: str) -> Path:
        """Where the latent of `key` lies, or would lie."""
        return self._at("latents", key, "safetensors")

    def read(self, key: str) -> tuple[Tensor, Tensor]:
        """(mean, logvar), each (C, T, H, W) fp32. ValueError naming the file when it is damaged,
        FileNotFoundError when it is not there."""
        mean, logvar = _load(self.path(key), ("mean", "logvar"))
        return mean, logvar

    def valid(self, key: str, shape: tuple[int, ...], *, size_only: bool = False) -> bool:
        """True when the latent is there, undamaged and of `shape` (C, T, H, W); reads it whole.

        size_only: read the header alone, and trust a file of the shapes and size that it states.
        """
        if size_only:
            return _has_size(self.path(key), {"mean": shape, "logvar": shape})
        if not self.path(key).is_file():
            return False
        try:
            mean, logvar = self.read(key)
        except ValueError:
            return False
        return mean.shape == logvar.shape == torch.Size(shape)

    def write(self, key: str, mean: Tensor, logvar: Tensor, origin: Mapping[str, str]) -> None:
        """Store one latent; `origin` goes into the file's metadata for people to read."""
        _store(self.path(key), {"mean": mean, "logvar": logvar}, origin)

    # Single frames, encoded alone

    def frame_path(self, key: str, frame: int) -> Path:
        """Where frame `frame` (0 the first, -1 the last) of the latent of `key` lies, or would lie."""
        return self._at("frames", _key({"latent": key, "frame": frame}), "safetensors")

    def read_frame(self, key: str, frame: int) -> Tensor:
        """The mean of the frame encoded alone, (C, 1, H, W) fp32. Errors as `read`."""
        return _load(self.frame_path(key, frame), ("mean",))[0]

    def valid_frame(
        self, key: str, frame: int, shape: tuple[int, ...], *, size_only: bool = False
    ) -> bool:
        """As `valid`, of a frame's mean of `shape` (C, 1, H, W)."""
        if size_only:
            return _has_size(self.frame_path(key, frame), {"mean": shape})
        if not self.frame_path(key, frame).is_file():
            return False
        try:
            return self.read_frame(key, frame).shape == torch.Size(shape)
        except ValueError:
            return False

    def write_frame(self, key: str, frame: int, mean: Tensor, origin: Mapping[str, str]) -> None:
        """Store the mean of one frame encoded alone."""
        _store(self.frame_path(key, frame), {"mean": mean}, origin)

    def _at(self, kind: str, key: str, suffix: str) -> Path:
        return self.directory / kind / key[:2] / f"{key}.{suffix}"


def request_key(identity: FileIdentity, record: Record, config: DataConfig) -> str:
    """Key of everything that a plan is a function of."""
    # Named only where they are asked for, so that the keys of before they were there still hold.
    limits: dict[str, object] = (
        {} if config.max_seconds is None else {"seconds": config.max_seconds}
    )
    if record.at_most:
        limits["at_most"] = True
    return _key(
        {
            **limits,
            **_resampled(record, config),
            "decode": DECODE_VERSION,
            "decoder": decoder_version(record),
            "file": vars(identity),
            "start_frame": record.start_frame,
            "num_frames": record.num_frames,
            "pixels": config.image_pixels if record.is_image else config.video_pixels,
            "max_frames": config.max_frames,
            "fps": config.fps,
            "upscale": config.upscale,
        }
    )


def latent_key(
    vae_fingerprint: str,
    identity: FileIdentity,
    record: Record,
    config: DataConfig,
    geometry: Geometry,
) -> str:
    """Key of one item's latent: VAE, geometry with crop and frames, first frame, fps, decoder,
    file."""
    return _key(
        {
            **_resampled(record, config),
            "format": _FORMAT,
            "decode": DECODE_VERSION,
            "decoder": decoder_version(record),
            "vae": vae_fingerprint,
            "geometry": vars(geometry),
            "start_frame": record.start_frame,
            "fps": None if record.is_image else config.fps,
            "file": vars(identity),
        }
    )


def _resampled(record: Record, config: DataConfig) -> dict[str, object]:
    """What is no part of the geometry, and decides on the frames that are taken. The last of a range is held as long as
    the one before it, which another range's end does not say."""
    if record.is_image or config.fps is None:
        return {}
    return {"resample": RESAMPLE_VERSION, "num_frames": record.num_frames}


def _key(content: Mapping[str, object]) -> str:
    # Given vars(), not asdict(): a process makes the keys of all items of all, and copying takes longer than the rest.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _load(path: Path, names: tuple[str, ...]) -> list[Tensor]:
    """The named tensors of a cache file. ValueError naming the file when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("goku", "{}"))
            # Copied by NumPy: torch would start threads for it in every thread that reads ahead.
            tensors = [torch.from_numpy(file.get_tensor(name).numpy().copy()) for name in names]
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"cached latent {path} is damaged: {error}") from error
    if not isinstance(facts, dict) or facts.get("crc32") != _crc32(*tensors):
        raise ValueError(f"cached latent {path} is damaged: its CRC-32 does not match")
    return tensors


def _has_size(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True when the file's header states fp32 tensors of these shapes alone, and the file ends where they do."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                return False
            header = json.loads(file.read(length))
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(header, dict):
        return False
    header.pop("__metadata__", None)
    stated = {
        name: (entry.get("dtype"), tuple(entry.get("shape", ())))
        for name, entry in header.items()
        if isinstance(entry, dict)
    }
    numbers = sum(math.prod(shape) for shape in shapes.values())
    wanted = {name: ("F32", tuple(shape)) for name, shape in shapes.items()}
    return stated == wanted and size == 8 + length + 4 * numbers


def _store(path: Path, tensors: Mapping[str, Tensor], origin: Mapping[str, str]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # Under one key, since safetensors writes several in no fixed order: equal content, equal file.
    facts = {**origin, "format": _FORMAT, "crc32": _crc32(*whole.values())}
    write_whole(path, save(whole, {"goku": json.dumps(facts, sort_keys=True)}), durable=True)


def _crc32(*tensors: Tensor) -> str:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        entry = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # ValueError: not JSON, not UTF-8
        return None
    return entry if isinstance(entry, dict) else None
