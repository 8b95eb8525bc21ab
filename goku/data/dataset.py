"""From a dataset on disk to latents and text embeddings ready for training: `prepare`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from goku.data.config import DataConfig
from goku.data.decode import as_tensor, check_file, decode, decode_record
from goku.data.errors import DataError, DecodeError, Problem
from goku.data.latents import FileIdentity, LatentCache, latent_key, request_key
from goku.data.manifest import Record, scan
from goku.data.media import Decoded
from goku.data.transform import VAE_STRIDES, Geometry
from goku.data.workers import ordered_map
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after every item of this rank's share."""


# Embeddings held in memory at once while captions are encoded.
_CAPTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class Item:
    """One sample as training sees it.

    Attributes:
        name, caption, weight: as the dataset lists them.
        frames, height, width: of the pixels that were encoded; frames = 4k+1.
        grid: (t, h, w) tokens after the VAE (4, 8, 8) and patchify 1x2x2; tokens = t * h * w.
        modality: "image" for one frame, whatever kind of file it came from, else "video".
    """

    name: str
    caption: str
    frames: int
    height: int
    width: int
    grid: tuple[int, int, int]
    tokens: int
    modality: Literal["image", "video"]
    weight: float


@dataclass(frozen=True)
class CachedSample:
    """mean, logvar: (C, T, H, W) fp32, un-normalised; text: (length, dim) fp32, un-padded."""

    mean: Tensor
    logvar: Tensor
    text: Tensor


@dataclass(frozen=True)
class _Entry:
    record: Record
    geometry: Geometry
    key: str


@dataclass(frozen=True)
class _Read:
    """What a worker made of a file, and the identity of the content it read."""

    decoded: Decoded
    identity: FileIdentity


class CachedDataset:
    """Items whose latents are all cached. `skipped` lists what skip_bad left out."""

    def __init__(
        self,
        config: DataConfig,
        cache: LatentCache,
        text: TextCache,
        entries: Sequence[_Entry],
        skipped: Sequence[Problem],
    ) -> None:
        self.config = config
        self.items: list[Item] = [_item(entry) for entry in entries]
        self.skipped: tuple[Problem, ...] = tuple(skipped)
        self._cache = cache
        self._text = text
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> CachedSample:
        """The cached sample `index`. ValueError naming the file when it was damaged since
        `prepare` (which makes it anew), FileNotFoundError when it was removed."""
        mean, logvar = self._cache.read(self._entries[index].key)
        return CachedSample(mean, logvar, self._text.get([self.items[index].caption])[0])

    @property
    def empty_text(self) -> Tensor:
        """(length, dim) embedding of the empty prompt, for classifier-free guidance."""
        return self._text.get([""])[0]

    def fingerprint(self) -> str:
        """Hash of all that training sees: names, captions, weights, and latents by their content
        (VAE, geometry and media file). The same wherever the dataset lies."""
        rows = [
            [
                e.record.name,
                e.record.text,
                e.record.weight,
                e.key,
            ]  # in order: the stream counts on it
            for e in self._entries
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def pixels(self, index: int) -> Tensor:
        """(3, T, H, W) uint8: what the latent was encoded from, decoded anew."""
        return decode(self._entries[index].record, self.config)


def prepare(
    config: DataConfig,
    vae: VideoVAE,
    text: TextCache | TextEncoder,
    *,
    cache_dir: str | os.PathLike[str],
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> CachedDataset:
    """Decode and encode what the cache lacks, and return the whole dataset.

    With `world` > 1 every rank fills its share (items rank, rank + world, ...), calls `barrier`,
    and then takes the rest from the cache, which the ranks share. Every rank returns the same
    dataset or raises the same DataError: its bad items do not keep a rank from the barrier.

    Args:
        text: a TextCache, or an encoder for which one is made under cache_dir/text. Captions and
            the empty prompt are encoded here.
        device: where `vae` encodes; default the device of its first parameter, else the CPU.

    Raises DataError listing every unusable item (config.skip_bad: only when none is left; what was
    left out is in `.skipped`); ValueError when the VAE's geometry is not (4, 8, 8) or its latents
    have other shapes than it says; OSError when the cache cannot be written. Nothing half-written
    stays behind; finished items stay cached.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must be in 0 .. world - 1 = {world - 1}")
    if world > 1 and barrier is None:
        raise ValueError(f"world {world}: give `barrier`, called when this rank's share is cached")
    if tuple(vae.strides) != VAE_STRIDES:
        raise ValueError(
            f"VAE geometry mismatch: strides (t, h, w) {tuple(vae.strides)}; "
            f"the data is cut for {VAE_STRIDES}"
        )
    found = scan(config.path)
    texts = text if isinstance(text, TextCache) else TextCache(Path(cache_dir) / "text", text)
    filler = _Filler(config, vae, LatentCache(cache_dir), device)
    share = found.records[rank::world]
    try:
        outcomes = list(filler.fill(share, progress))
        captions = [*dict.fromkeys(record.text for record in share), ""]
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            texts.get(captions[start : start + _CAPTIONS_AT_ONCE])
    finally:
        # Also when this rank failed (disk full): the others must not wait for it for ever.
        if barrier is not None:
            barrier()
    if world > 1:
        outcomes = list(filler.fill(found.records, None))
    entries = [outcome for outcome in outcomes if isinstance(outcome, _Entry)]
    problems = [*found.problems, *(o for o in outcomes if isinstance(o, Problem))]
    if problems and not (config.skip_bad and entries):
        raise DataError(
            f"{config.path}: {len(problems)} of {found.listed} items cannot be used", problems
        )
    return CachedDataset(config, filler.cache, texts, entries, problems)


def decode_all(records: Sequence[Record], config: DataConfig) -> list[Tensor]:
    """`decode` of every record, by config.workers processes: uint8 (3, T, H, W) each, in order.

    DataError listing every record that cannot be decoded; with skip_bad they are left out.
    """
    clips: list[Tensor] = []
    problems: list[Problem] = []
    work = partial(_decode_one, config)
    results = ordered_map(work, records, name=_record_name, workers=config.workers)
    for record, result in zip(records, results, strict=True):
        if isinstance(result, Decoded):
            clips.append(as_tensor(result))
        else:
            problems.append(Problem(record.name, result.reason))
    if problems and not (config.skip_bad and clips):
        raise DataError(f"{len(problems)} of {len(records)} items cannot be used", problems)
    return clips


class _Filler:
    """Brings the cache up to date for a list of records."""

    def __init__(
        self,
        config: DataConfig,
        vae: VideoVAE,
        cache: LatentCache,
        device: torch.device | str | None,
    ) -> None:
        self.config, self.vae, self.cache = config, vae, cache
        parameter = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        found = torch.device("cpu") if parameter is None else parameter.device
        self.device = found if device is None else torch.device(device)
        self.fingerprint = vae.fingerprint()

    def fill(
        self, records: Sequence[Record], progress: Progress | None
    ) -> Iterator[_Entry | Problem]:
        """One outcome per record, in order. Only what the cache lacks is sent to the workers."""
        cached = [self._cached(record) for record in records]
        missing = [record for record, entry in zip(records, cached, strict=True) if entry is None]
        work = partial(_identify_and_decode, self.config, str(self.cache.directory))
        made = ordered_map(work, missing, name=_record_name, workers=self.config.workers)
        for done, (record, entry) in enumerate(zip(records, cached, strict=True), start=1):
            outcome: _Entry | Problem
            if entry is not None:
                outcome = entry
            else:
                result = next(made)
                if isinstance(result, _Read):
                    outcome = self._encode(record, result)
                else:
                    outcome = Problem(record.name, result.reason)
            if progress is not None:
                progress(done, len(records))
            yield outcome

    def _cached(self, record: Record) -> _Entry | None:
        try:
            identity = self.cache.known_identity(record.path)
        except OSError:
            return None  # the worker gives the reason
        if identity is None:
            return None
        geometry = self.cache.read_plan(request_key(identity, record, self.config))
        if geometry is None:
            return None
        key = latent_key(self.fingerprint, identity, record, self.config, geometry)
        valid = self.cache.valid(key, (self.vae.channels, *geometry.latent_shape))
        return _Entry(record, geometry, key) if valid else None

    @torch.no_grad()
    def _encode(self, record: Record, read: _Read) -> _Entry | Problem:
        identity, decoded = read.identity, read.decoded
        geometry = decoded.media.geometry
        key = latent_key(self.fingerprint, identity, record, self.config, geometry)
        shape = (self.vae.channels, *geometry.latent_shape)
        if not self.cache.valid(key, shape):  # another record may show the very same pixels
            pixels = as_tensor(decoded).to(self.device)
            video = (pixels.float() / 127.5 - 1.0)[None].to(self.dtype)
            posterior = self.vae.encode(video)
            mean, logvar = (
                part[0].to("cpu", torch.float32) for part in (posterior.mean, posterior.logvar)
            )
            if tuple(mean.shape) != shape or tuple(logvar.shape) != shape:
                raise ValueError(
                    f"VAE geometry mismatch: {tuple(video.shape)} pixels gave mean "
                    f"{tuple(mean.shape)}, logvar {tuple(logvar.shape)}; (C, T, H, W) {shape} "
                    f"was expected"
                )
            if not (torch.isfinite(mean).all() and torch.isfinite(logvar).all()):
                return Problem(record.name, "the VAE gave latents that are not finite")
            self.cache.write(key, mean, logvar, {"name": record.name, "vae": self.fingerprint})
        self.cache.write_plan(request_key(identity, record, self.config), geometry)
        return _Entry(record, geometry, key)


def _identify_and_decode(config: DataConfig, cache_dir: str, record: Record) -> _Read | DecodeError:
    """In a worker. An expected failure is a value, so that all of them can be collected.

    The identity comes first, and counts only if the file is the same after it was decoded: else
    another file's pixels would be kept under its key for good.
    """
    try:
        check_file(record)
        before = _size_and_time(record.path)
        identity = LatentCache(cache_dir).identify(record.path)
        decoded = decode_record(record, config)
        after = _size_and_time(record.path)
    except DecodeError as error:
        return error
    if after != before:
        return DecodeError(record.path, "changed while it was read")
    return _Read(decoded, identity)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DecodeError(path, f"changed while it was read: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _decode_one(config: DataConfig, record: Record) -> Decoded | DecodeError:
    try:
        return decode_record(record, config)
    except DecodeError as error:
        return error


def _record_name(record: Record) -> str:
    return record.name


def _item(entry: _Entry) -> Item:
    geometry = entry.geometry
    return Item(
        name=entry.record.name,
        caption=entry.record.text,
        frames=geometry.frames,
        height=geometry.height,
        width=geometry.width,
        grid=geometry.grid,
        tokens=geometry.tokens,
        modality="image" if geometry.frames == 1 else "video",
        weight=entry.record.weight,
    )
