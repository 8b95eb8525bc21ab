"""Brings the latent cache up to date for a list of records, and makes single samples again."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from goku.data.config import DataConfig
from goku.data.decode import as_tensor, decode_record
from goku.data.errors import DecodeError, Dropped, Problem
from goku.data.items import CachedSample
from goku.data.latents import FileIdentity, LatentCache, Plan, latent_key, plan_of, request_key
from goku.data.limits import dropped_by_limits
from goku.data.media import Decoded
from goku.data.media_source import check_file, stored_in
from goku.data.record import Record
from goku.data.transform import Geometry
from goku.vae import VideoVAE
from goku.workers import ordered_map

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after every item of this rank's share."""

FROM_CACHE = "trained from its cached latent"
MENDED = "its cached latent was damaged: made anew"
"""How the remark on an item ends whose media cannot be used, and whose latent can."""

FRAMES = (0, -1)
"""The single frames that can be asked for: the first and the last."""


@dataclass(frozen=True)
class Entry:
    """A record, what it decodes to, the key of its latent, and the content it was made from. remarks: on how it was
    found, beside those of the record and the plan."""

    record: Record
    plan: Plan
    key: str
    identity: FileIdentity
    remarks: tuple[str, ...] = ()

    @property
    def geometry(self) -> Geometry:
        return self.plan.geometry


@dataclass(frozen=True)
class Found:
    """What the other ranks are told of a usable record: all of its entry that they do not know."""

    plan: Plan
    identity: FileIdentity
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Read:
    """What a worker made of a file, and the identity of the content it read."""

    decoded: Decoded
    identity: FileIdentity


class Encoder:
    """A VAE with its device and dtype (default those of its first parameter): pixels -> latents."""

    def __init__(self, vae: VideoVAE, device: torch.device | str | None = None) -> None:
        self.vae = vae
        parameter = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
        self.dtype = torch.float32 if parameter is None else parameter.dtype
        found = torch.device("cpu") if parameter is None else parameter.device
        self.device = found if device is None else torch.device(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar), each (C, T', H / 8, W / 8) fp32 on the CPU, of (3, T, H, W) uint8. ValueError when the VAE
        gives another shape; ArithmeticError when they are not finite."""
        video = (pixels.to(self.device).float() / 127.5 - 1.0)[None].to(self.dtype)
        posterior = self.vae.encode(video)
        mean, logvar = (
            part[0].to("cpu", torch.float32) for part in (posterior.mean, posterior.logvar)
        )
        _, frames, height, width = pixels.shape
        shape = (self.vae.channels, (frames - 1) // 4 + 1, height // 8, width // 8)
        if tuple(mean.shape) != shape or tuple(logvar.shape) != shape:
            raise ValueError(
                f"VAE geometry mismatch: {tuple(video.shape)} pixels gave mean "
                f"{tuple(mean.shape)}, logvar {tuple(logvar.shape)}; (C, T, H, W) {shape} "
                f"was expected"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(logvar).all()):
            raise ArithmeticError("the VAE gave latents that are not finite")
        return mean, logvar


class Filler:
    """Fills the cache for the records of one source. frames: which single frames of clips to encode alone as well."""

    def __init__(
        self,
        config: DataConfig,
        vae: VideoVAE,
        cache: LatentCache,
        device: torch.device | str | None = None,
        frames: Sequence[int] = (),
        source: str = "",
    ) -> None:
        self.config, self.cache, self.source = config, cache, source
        self.encoder = Encoder(vae, device)
        self.channels = vae.channels
        self.frames = stored_frames(vae, frames)
        self.fingerprint = vae.fingerprint()
        self.made = 0

    def fill(
        self, records: Sequence[Record], progress: Progress | None
    ) -> Iterator[Entry | Problem | Dropped]:
        """One outcome per record, in order. Only what the cache lacks is sent to the workers."""
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(records))

        cached = []
        for record in records:
            cached.append(self._cached(record))
            if cached[-1] is not None:
                count()  # now: looking through a large cache takes minutes
        missing = [record for record, entry in zip(records, cached, strict=True) if entry is None]
        with closing(self._made(missing)) as made:
            for entry in cached:
                if entry is not None:
                    yield entry
                else:
                    outcome = next(made)
                    count()
                    yield outcome

    def _made(self, records: Sequence[Record]) -> Generator[Entry | Problem | Dropped, None, None]:
        """Every record decoded and encoded."""
        work = partial(identify_and_decode, self.config, str(self.cache.directory))
        results = ordered_map(work, records, name=record_name, workers=self.config.workers)
        with closing(results):
            for record, result in zip(records, results, strict=True):
                if isinstance(result, _Read):
                    yield self._encode(record, result)
                elif isinstance(result, DecodeError):
                    yield Problem(record.name, result.reason, result.kind)
                else:
                    yield Problem(record.name, result.reason)

    def take(
        self,
        records: Sequence[Record],
        found: Sequence[Found],
        progress: Progress | None,
        look: bool = True,
    ) -> list[Entry]:
        """The entries of records that other ranks have cached.

        look: at the sizes of their files, an open file a latent on every rank, which a shared file system has no time
        for on thousands. A latent that is not there (a cache that the ranks do not share) is made here as well;
        ValueError when that fails, since ranks with other items would wait for each other for ever.
        """
        entries: list[Entry] = []
        lacking: list[int] = []
        for record, told in zip(records, found, strict=True):
            geometry = told.plan.geometry
            key = latent_key(self.fingerprint, told.identity, record, self.config, geometry)
            entries.append(Entry(record, told.plan, key, told.identity, told.remarks))
            if look and self.lacking(entries[-1], size_only=True):
                lacking.append(len(entries) - 1)
            if progress is not None:
                progress(len(entries), len(records))
        for index, made in zip(lacking, self._made([records[i] for i in lacking]), strict=True):
            if not isinstance(made, Entry) or made.key != entries[index].key:
                reason = "its content differs" if isinstance(made, Entry) else made.reason
                raise ValueError(
                    f"{records[index].name}: another rank has cached its latent, but {self.cache.directory} lacks it "
                    f"here, and it cannot be made ({reason}); allowed: a cache that all ranks share"
                )
        return entries

    def repair(self, entry: Entry) -> None:
        """Decode and encode the entry's media again and write what its cache should hold. DecodeError when the media
        cannot be decoded, or are not what they were."""
        read = identify_and_decode(self.config, str(self.cache.directory), entry.record)
        if isinstance(read, DecodeError):
            raise read
        geometry = read.decoded.media.geometry
        key = latent_key(self.fingerprint, read.identity, entry.record, self.config, geometry)
        if key != entry.key:
            raise DecodeError(entry.record.path, "changed since training began")
        self._write(entry, as_tensor(read.decoded), again=True)

    def sample(self, entry: Entry, text: Tensor) -> CachedSample:
        """The entry's cached tensors. ValueError, FileNotFoundError as `LatentCache.read`."""
        mean, logvar = self.cache.read(entry.key)
        return CachedSample(mean, logvar, text, self._frames(entry, mean))

    def _frames(self, entry: Entry, mean: Tensor) -> Mapping[int, Tensor]:
        if entry.geometry.frames == 1:
            return {}
        return {
            # Exactly causal: the first frame alone is the clip's own first latent.
            frame: self.cache.read_frame(entry.key, frame) if stored else mean[:, :1]
            for frame, stored in self.frames.items()
        }

    def _cached(self, record: Record) -> Entry | Dropped | None:
        remarks: tuple[str, ...] = ()
        try:
            identity = self.cache.known_identity(stored_in(record), record.member)
        except OSError as error:
            # Training needs no media: what they were when they were encoded is enough.
            identity = self.cache.last_identity(stored_in(record), record.member)
            why = error.strerror or type(error).__name__
            remarks = (f"its media file cannot be reached ({why}): {FROM_CACHE}",)
        if identity is None:
            return None  # the worker gives the reason
        plan = self.cache.read_plan(request_key(identity, record, self.config))
        if plan is None:
            return None
        geometry = plan.geometry
        if geometry.source_height * geometry.source_width > self.config.max_source_pixels:
            return None
        reason = dropped_by_limits(record, plan, self.config, self.source)
        if reason is not None:
            return Dropped(record.name, reason)
        key = latent_key(self.fingerprint, identity, record, self.config, geometry)
        entry = Entry(record, plan, key, identity, remarks)
        return entry if not self.lacking(entry) else None

    def lacking(self, entry: Entry, *, size_only: bool = False) -> list[int | None]:
        """What the cache has not: None for the clip's latent, the number of a single frame. size_only: look at the
        files' sizes alone, as config.verify "size" does."""
        t, h, w = entry.geometry.latent_shape
        lacking: list[int | None] = []
        size_only = size_only or self.config.verify == "size"
        if not self.cache.valid(entry.key, (self.channels, t, h, w), size_only=size_only):
            lacking.append(None)
        shape = (self.channels, 1, h, w)
        for frame in self._wanted(entry):
            if not self.cache.valid_frame(entry.key, frame, shape, size_only=size_only):
                lacking.append(frame)
        return lacking

    def _wanted(self, entry: Entry) -> list[int]:
        alone = entry.geometry.frames == 1  # an image is never given its own frame
        return [] if alone else [frame for frame, stored in self.frames.items() if stored]

    def _encode(self, record: Record, read: _Read) -> Entry | Problem | Dropped:
        plan = plan_of(read.decoded.media)
        self.cache.write_plan(request_key(read.identity, record, self.config), plan)
        reason = dropped_by_limits(record, plan, self.config, self.source)
        if reason is not None:
            return Dropped(record.name, reason)
        key = latent_key(self.fingerprint, read.identity, record, self.config, plan.geometry)
        entry = Entry(record, plan, key, read.identity)
        try:
            damaged = self._write(entry, as_tensor(read.decoded), again=False)
        except ArithmeticError as error:
            return Problem(record.name, str(error))
        return replace(entry, remarks=(MENDED,)) if damaged else entry

    def _write(self, entry: Entry, pixels: Tensor, *, again: bool) -> bool:
        """What the cache lacks of the entry, or all of it; whether a file was there that cannot be used."""
        # Another record may show the very same pixels.
        lacking = [None, *self._wanted(entry)] if again else self.lacking(entry)
        damaged = any(self._path(entry, frame).exists() for frame in lacking)
        origin = {"name": entry.record.name, "vae": self.fingerprint}
        for frame in lacking:
            if frame is None:
                self.cache.write(entry.key, *self.encoder(pixels), origin)
                self.made += 1
            else:
                at = frame % pixels.shape[1]
                mean, _ = self.encoder(pixels[:, at : at + 1])
                self.cache.write_frame(entry.key, frame, mean, origin)
        return damaged

    def _path(self, entry: Entry, frame: int | None) -> Path:
        key = entry.key
        return self.cache.path(key) if frame is None else self.cache.frame_path(key, frame)


def stored_frames(vae: VideoVAE, frames: Sequence[int]) -> dict[int, bool]:
    """Of the frames asked for, which have files of their own: all but the first of an exactly causal VAE."""
    for frame in frames:
        if frame not in FRAMES:
            raise ValueError(f"frames: {frame} cannot be given; allowed are 0 (first), -1 (last)")
    causal = bool(getattr(vae, "causal", True))
    return {frame: not (frame == 0 and causal) for frame in frames}


def identify_and_decode(config: DataConfig, cache_dir: str, record: Record) -> _Read | DecodeError:
    """In a worker. An expected failure is a value, so that all of them can be collected.

    The identity comes first, and counts only if the file is the same after it was decoded: else
    another file's pixels would be kept under its key for good.
    """
    path = stored_in(record)
    try:
        check_file(record)
        before = _size_and_time(path)
        identity = LatentCache(cache_dir).identify(path, record.member)
        decoded = decode_record(record, config)
        after = _size_and_time(path)
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


def record_name(record: Record) -> str:
    """What a worker's failure calls the record."""
    return record.name
