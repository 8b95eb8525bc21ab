"""From datasets on disk to latents and text embeddings ready for training: `prepare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from goku.data.cached import CachedDataset, MixedDataset
from goku.data.config import DataConfig
from goku.data.decode import as_tensor, decode_record
from goku.data.errors import DataError, DecodeError, Dropped, Problem, Remark
from goku.data.filler import Entry, Filler, Progress, record_name
from goku.data.items import Dataset, PrepareReport
from goku.data.latents import LatentCache
from goku.data.media import Decoded
from goku.data.record import Record
from goku.data.sources import Source, sources_of
from goku.data.transform import VAE_STRIDES
from goku.data.workers import ordered_map
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE

# Embeddings held in memory at once while captions are encoded.
_CAPTIONS_AT_ONCE = 256


def prepare(
    config: DataConfig,
    vae: VideoVAE | None,
    text: TextCache | TextEncoder | None,
    *,
    cache_dir: str | os.PathLike[str],
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    frames: Sequence[int] = (),
    latents: bool = True,
    texts: bool = True,
) -> Dataset:
    """Decode and encode what the cache lacks, and return the whole dataset.

    With `world` > 1 every rank fills its share (items rank, rank + world, ... of each source), calls `barrier`,
    and then takes the rest from the cache, which the ranks share. Every rank returns the same
    dataset or raises the same DataError: its bad items do not keep a rank from the barrier.

    Args:
        vae: None only with latents=False.
        text: a TextCache, or an encoder for which one is made under cache_dir/text. Captions and
            the empty prompt are encoded here. None only with texts=False.
        device: where `vae` encodes; default the device of its first parameter, else the CPU.
        frames: of 0 (first) and -1 (last): which single frames of every clip are wanted as the VAE encodes them alone
            (`CachedSample.frames`). They are stored beside the clip, but for the first of an exactly causal VAE, which
            is the clip's own first latent.
        latents, texts: False leaves that cache as it is. Without latents the result has no items, and its report counts
            captions; without texts it has no text to read.

    Raises DataError listing every unusable item (config.skip_bad: only when none is left; what was
    left out is in `.skipped`), or when the limits or the mix leave a source or a group empty; ValueError when the
    VAE's geometry is not (4, 8, 8) or its latents have other shapes than it says; OSError when the cache cannot be
    written. Nothing half-written stays behind; finished items stay cached.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must be in 0 .. world - 1 = {world - 1}")
    if world > 1 and barrier is None:
        raise ValueError(f"world {world}: give `barrier`, called when this rank's share is cached")
    if (latents and vae is None) or (texts and text is None):
        raise ValueError("vae, text: None only where latents=False, texts=False leave it out")
    if latents and vae is not None and tuple(vae.strides) != VAE_STRIDES:
        raise ValueError(
            f"VAE geometry mismatch: strides (t, h, w) {tuple(vae.strides)}; "
            f"the data is cut for {VAE_STRIDES}"
        )
    cache = None
    if texts and text is not None:
        cache = text if isinstance(text, TextCache) else TextCache(Path(cache_dir) / "text", text)
    parts = [
        _Part(source, LatentCache(cache_dir), vae if latents else None, cache, device, frames)
        for source in sources_of(config)
    ]
    shown = _Shown(progress, sum(len(part.share(rank, world)) for part in parts))
    try:
        for part in parts:
            part.fill(rank, world, shown)
    finally:
        # Also when this rank failed (disk full): the others must not wait for it for ever.
        if barrier is not None:
            barrier()
    datasets = [part.dataset(world) for part in parts]
    problems = [problem for dataset in datasets for problem in dataset.report.problems]
    empty = [
        part for part, dataset in zip(parts, datasets, strict=True) if latents and not dataset.items
    ]
    if problems and (not config.skip_bad or (empty and len(empty) == len(parts))):
        listed = sum(dataset.report.listed for dataset in datasets)
        where = config.path or "data.sources"
        raise DataError(f"{where}: {len(problems)} of {listed} items cannot be used", problems)
    for part in empty:
        raise part.nothing_left()
    if config.sources is None:
        return datasets[0]
    named = [(part.source.name, dataset) for part, dataset in zip(parts, datasets, strict=True)]
    mixed = MixedDataset(config, named)
    if latents:
        mixed.groups()  # refuses an empty one now, not at the first step
    return mixed


class _Shown:
    """One count of progress over all sources."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, done: int, total: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class _Part:
    """The work on one source."""

    def __init__(
        self,
        source: Source,
        cache: LatentCache,
        vae: VideoVAE | None,
        texts: TextCache | None,
        device: torch.device | str | None,
        frames: Sequence[int],
    ) -> None:
        self.source, self.cache, self.texts = source, cache, texts
        self.filler = None
        if vae is not None:
            self.filler = Filler(source.config, vae, cache, device, frames, source.name)
        self.outcomes: list[Entry | Problem | Dropped] = []
        self.counts = (0, 0, 0)

    def share(self, rank: int, world: int) -> Sequence[Record]:
        return self.source.records[rank::world]

    def fill(self, rank: int, world: int, progress: Progress) -> None:
        """Latents and captions of this rank's share."""
        share = self.share(rank, world)
        made = present = nbytes = 0
        if self.filler is not None:
            self.outcomes = list(self.filler.fill(share, progress))
            keys = {entry.key for entry in self.outcomes if isinstance(entry, Entry)}
            made, present = self.filler.made, len(keys) - self.filler.made
            nbytes = sum(self.cache.path(key).stat().st_size for key in keys)
        if self.texts is not None:
            captions = [*dict.fromkeys(text for record in share for text in record.prompts), ""]
            if self.filler is None:
                present = sum(self.texts.path(caption).exists() for caption in captions)
                made = len(captions) - present
            for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
                self.texts.get(captions[start : start + _CAPTIONS_AT_ONCE])
            if self.filler is None:
                nbytes = sum(self.texts.path(caption).stat().st_size for caption in captions)
                for _ in share:
                    progress(0, 0)
        self.counts = made, present, nbytes

    def dataset(self, world: int) -> CachedDataset:
        """Every rank's part together."""
        source = self.source
        if self.filler is not None and world > 1:
            self.outcomes = list(self.filler.fill(source.records, None))
        entries, duplicates, remarks = _by_content(self.outcomes, source.prefix)
        bad = [*source.problems, *(o for o in self.outcomes if isinstance(o, Problem)), *duplicates]
        dropped = [*source.dropped, *(o for o in self.outcomes if isinstance(o, Dropped))]
        made, present, nbytes = self.counts
        prefix, name = source.prefix, source.name
        report = PrepareReport(
            listed=source.listed,
            used=len(entries) if self.filler is not None else len(source.records),
            problems=tuple(replace(p, name=prefix + p.name, source=name) for p in bad),
            remarks=tuple(remarks),
            dropped=tuple(replace(d, name=prefix + d.name) for d in dropped),
            made=made,
            present=present,
            nbytes=nbytes,
        )
        return CachedDataset(
            source.config, self.filler, self.texts, entries, report, source.name, prefix
        )

    def nothing_left(self) -> DataError:
        where = self.source.path
        dropped = [*self.source.dropped, *(o for o in self.outcomes if isinstance(o, Dropped))]
        reasons = "; ".join(str(entry) for entry in dropped[:3])
        return DataError(
            f"{where}: nothing is left to train on; the limits dropped {len(dropped)} of "
            f"{self.source.listed} items: {reasons}"
            if dropped
            else f"{where}: none of {self.source.listed} items can be used"
        )


def _by_content(
    outcomes: Sequence[Entry | Problem | Dropped], prefix: str
) -> tuple[list[Entry], list[Problem], list[Remark]]:
    """The entries without those whose content, range and captions an earlier one has; those; every remark."""
    entries: list[Entry] = []
    duplicates: list[Problem] = []
    remarks: list[Remark] = []
    seen: dict[tuple[object, ...], list[Entry]] = {}
    for entry in outcomes:
        if not isinstance(entry, Entry):
            continue
        record = entry.record
        same = seen.setdefault((entry.identity, record.start_frame, record.num_frames), [])
        twin = next((o.record.name for o in same if o.record.prompts == record.prompts), None)
        if twin is not None:
            reason = f"duplicate of {twin} (same content and caption)"
            duplicates.append(Problem(record.name, reason, "duplicate"))
            continue
        others = [o.record.name for o in same if o.record.path != record.path]
        notes = [*record.remarks, *entry.plan.remarks]
        if others:
            notes.append(f"same content as {others[0]}, with another caption")
        remarks += [Remark(prefix + record.name, note) for note in notes]
        same.append(entry)
        entries.append(entry)
    return entries, duplicates, remarks


def decode_all(records: Sequence[Record], config: DataConfig) -> list[Tensor]:
    """`decode` of every record, by config.workers processes: uint8 (3, T, H, W) each, in order.

    DataError listing every record that cannot be decoded; with skip_bad they are left out.
    """
    clips: list[Tensor] = []
    problems: list[Problem] = []
    work = partial(_decode_one, config)
    results = ordered_map(work, records, name=record_name, workers=config.workers)
    for record, result in zip(records, results, strict=True):
        if isinstance(result, Decoded):
            clips.append(as_tensor(result))
        else:
            problems.append(Problem(record.name, result.reason))
    if problems and not (config.skip_bad and clips):
        raise DataError(f"{len(problems)} of {len(records)} items cannot be used", problems)
    return clips


def _decode_one(config: DataConfig, record: Record) -> Decoded | DecodeError:
    try:
        return decode_record(record, config)
    except DecodeError as error:
        return error
