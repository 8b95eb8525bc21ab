"""The latent cache: one safetensors file per item, found by content.

    <cache>/files/    sha256 of every media file, kept by (path, size, mtime_ns)
    <cache>/plans/    geometry of a (file content, decoding request): a warm start decodes nothing
    <cache>/latents/  mean and logvar, fp32 (C, T, H, W), un-normalised

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
import os
import tempfile
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
from goku.data.manifest import Record
from goku.data.media import DECODE_VERSION, decoder_version
from goku.data.transform import Geometry

_FORMAT = "goku-latent-1"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileIdentity:
    """Size in bytes and sha256 of a media file's content."""

    size: int
    sha256: str


class LatentCache:
    """Reads and writes the three folders under `directory`. Cheap to make; holds no open files."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    # Identity of media files

    def known_identity(self, path: str) -> FileIdentity | None:
        """The file's identity if it was hashed before and has kept its size and mtime."""
        stat = os.stat(path)
        entry = _read_json(self._identity_path(path))
        if entry is None or entry.get("size") != stat.st_size:
            return None
        if entry.get("mtime_ns") != stat.st_mtime_ns or not isinstance(entry.get("sha256"), str):
            return None
        return FileIdentity(stat.st_size, str(entry["sha256"]))

    def identify(self, path: str) -> FileIdentity:
        """The file's identity, reading the file unless it is known.

        DecodeError when the file cannot be read, OSError when the cache cannot be written.
        """
        known = self.known_identity(path)
        if known is not None:
            return known
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise DecodeError(path, f"cannot be read: {error.strerror}") from error
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest.hexdigest()}
        _write(self._identity_path(path), json.dumps({**entry, "path": path}).encode())
        return FileIdentity(stat.st_size, digest.hexdigest())

    def _identity_path(self, path: str) -> Path:
        return self._at("files", _key({"path": os.path.abspath(path)}), "json")

    # Geometry that a decoding gave

    def read_plan(self, request: str) -> Geometry | None:
        """The geometry stored under a `request_key`; None when absent or damaged."""
        entry = _read_json(self._at("plans", request, "json"))
        fields = set(Geometry.__dataclass_fields__)
        if entry is None or set(entry) != fields:
            return None
        if not all(isinstance(value, int) for value in entry.values()):
            return None
        return Geometry(**{name: int(str(value)) for name, value in entry.items()})

    def write_plan(self, request: str, geometry: Geometry) -> None:
        """Store the geometry that decoding `request` gave."""
        _write(self._at("plans", request, "json"), json.dumps(asdict(geometry)).encode())

    # Latents

    def path(self, key: str) -> Path:
        """Where the latent of `key` lies, or would lie."""
        return self._at("latents", key, "safetensors")

    def read(self, key: str) -> tuple[Tensor, Tensor]:
        """(mean, logvar), each (C, T, H, W) fp32. ValueError naming the file when it is damaged,
        FileNotFoundError when it is not there."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("goku", "{}"))
                mean, logvar = file.get_tensor("mean").clone(), file.get_tensor("logvar").clone()
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"cached latent {path} is damaged: {error}") from error
        if not isinstance(facts, dict) or facts.get("crc32") != _crc32(mean, logvar):
            raise ValueError(f"cached latent {path} is damaged: its CRC-32 does not match")
        return mean, logvar

    def valid(self, key: str, shape: tuple[int, ...]) -> bool:
        """True when the latent is there, undamaged and of `shape` (C, T, H, W); reads it whole."""
        if not self.path(key).is_file():
            return False
        try:
            mean, logvar = self.read(key)
        except ValueError:
            return False
        return mean.shape == logvar.shape == torch.Size(shape)

    def write(self, key: str, mean: Tensor, logvar: Tensor, origin: Mapping[str, str]) -> None:
        """Store one latent; `origin` goes into the file's metadata for people to read."""
        tensors = {"mean": mean.contiguous(), "logvar": logvar.contiguous()}
        # Under one key, since safetensors writes several in no fixed order: equal content, equal file.
        facts = {**origin, "format": _FORMAT, "crc32": _crc32(mean, logvar)}
        _write(self.path(key), save(tensors, {"goku": json.dumps(facts, sort_keys=True)}))

    def _at(self, kind: str, key: str, suffix: str) -> Path:
        return self.directory / kind / key[:2] / f"{key}.{suffix}"


def request_key(identity: FileIdentity, record: Record, config: DataConfig) -> str:
    """Key of everything that a geometry is a function of."""
    return _key(
        {
            "decode": DECODE_VERSION,
            "decoder": decoder_version(record),
            "file": asdict(identity),
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
            "format": _FORMAT,
            "decode": DECODE_VERSION,
            "decoder": decoder_version(record),
            "vae": vae_fingerprint,
            "geometry": asdict(geometry),
            "start_frame": record.start_frame,
            "fps": config.fps,
            "file": asdict(identity),
        }
    )


def _key(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt too must not leave the partial file
        os.unlink(temporary)
        raise
