"""From datasets on disk to latents and text embeddings ready for training: `prepare`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from goku.data.cached import CachedDataset, MixedDataset
from goku.data.collector import collector_paused
from goku.data.config import DataConfig
from goku.data.errors import SKIP_BAD, DataError, Dropped, Problem, Remark
from goku.data.filler import Entry, Filler, Found, Progress
from goku.data.item_list import LEFT_OUT, ItemList, SourceItems, duplicate, hold
from goku.data.items import Dataset, PrepareReport
from goku.data.latents import LatentCache
from goku.data.listings import Listings
from goku.data.manifest import scan
from goku.data.record import Record, counted
from goku.data.shares import Share, Told, check_alike, check_here, one_cache
from goku.data.sources import Source, sources_of
from goku.data.transform import VAE_STRIDES
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE

# Embeddings held in memory at once while captions are encoded.
_CAPTIONS_AT_ONCE = 256

Outcome = Entry | Problem | Dropped
"""What became of a record: used, unusable, or left out by the limits."""


def prepare(
    config: DataConfig,
    vae: VideoVAE | None,
    text: TextCache | TextEncoder | None,
    *,
    cache_dir: str | os.PathLike[str],
    rank: int = 0,
    world: int = 1,
    gather: Callable[[Any], list[Any]] | None = None,
    listings: Listings | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    checking: Progress | None = None,
    listed: Callable[[int], None] | None = None,
    frames: Sequence[int] = (),
    latents: bool = True,
    texts: bool = True,
    items: ItemList | None = None,
    may_be_empty: bool = False,
) -> Dataset:
    """Decode and encode what the cache lacks, and return the whole dataset.

    With `world` > 1 rank 0 lists the items; every rank fills its share (items rank, rank + world, ... of each source),
    tells the others by `gather` what became of it, and takes what they tell for the rest: nothing is tried twice. Where
    the ranks' caches are not known to be one folder, the sizes of the others' latents are looked at. Every rank returns
    the same dataset, or every rank raises.

    Args:
        vae: None only with latents=False.
        text: a TextCache, or an encoder for which one is made under cache_dir/text. Captions and
            the empty prompt are encoded here. None only with texts=False.
        gather: the picklable value of every rank, by rank, on every rank; called once, however long the ranks work.
        listings: what rank 0 lists, on every rank; asked first of all. None, with `world` 1: this process lists.
        device: where `vae` encodes; default the device of its first parameter, else the CPU.
        progress, checking: called after every item of this rank's share, and of the other ranks' shares.
        listed: called before them with the number of items that all ranks have to look at together.
        frames: of 0 (first) and -1 (last): which single frames of every clip are wanted as the VAE encodes them alone
            (`CachedSample.frames`). They are stored beside the clip, but for the first of an exactly causal VAE, which
            is the clip's own first latent.
        latents, texts: False leaves that cache as it is. Without latents the result has no items, and its report counts
            captions; without texts it has no text to read.

        items: those of a run that goes on: the dataset is to have these and no others (`goku.data.item_list.hold`).
            Where they have become others it is returned as it is, and its fingerprint differs from theirs.
        may_be_empty: what the limits leave nothing of is no error.

    Raises DataError listing every unusable item (config.skip_bad: only when none is left; what was
    left out is in `.skipped`), when the limits or the mix leave a source or a group empty, or when more than
    config.max_lost of `items` cannot be had; ValueError when the VAE's geometry is not (4, 8, 8) or its latents have
    other shapes than it says, when the ranks have different data sections or not the files that rank 0 lists, or naming
    another rank's failure; OSError when the cache cannot be written. Nothing half-written stays behind; finished items
    stay cached.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must be in 0 .. world - 1 = {world - 1}")
    if world > 1 and (gather is None or listings is None):
        raise ValueError(
            f"world {world}: give `gather` and `listings`, by which the ranks tell each other"
        )
    if (latents and vae is None) or (texts and text is None):
        raise ValueError("vae, text: None only where latents=False, texts=False leave it out")
    if latents and vae is not None and tuple(vae.strides) != VAE_STRIDES:
        raise ValueError(
            f"VAE geometry mismatch: strides (t, h, w) {tuple(vae.strides)}; "
            f"the data is cut for {VAE_STRIDES}"
        )
    sources: list[Source] = []
    parts: list[_Part] = []
    failure: ValueError | OSError | ImportError | ArithmeticError | None = None
    try:
        # Before all that may fail on one rank alone: they take part in it together.
        with collector_paused():
            sources = sources_of(config, listings or scan)
        if rank > 0:
            check_here(sources, rank, world)
        cache = None
        if texts and text is not None:
            own = Path(cache_dir) / "text"
            cache = text if isinstance(text, TextCache) else TextCache(own, text)
        parts = [
            _Part(source, LatentCache(cache_dir), vae if latents else None, cache, device, frames)
            for source in sources
        ]
        if listed is not None:
            listed(sum(len(part.source.records) for part in parts))
        shown = _Shown(progress, sum(len(part.share(rank, world)) for part in parts))
        for part in parts:
            part.fill(rank, world, shown)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        failure = error
        if world > 1 and sources:  # the others may work for hours before it is raised
            message = f"rank {rank} has failed and waits for the other ranks: {error}"
            print(message, file=sys.stderr, flush=True)
    shares: list[Share] = []
    if world > 1 and gather is not None:
        told = [part.told() for part in parts]
        folder = LatentCache(cache_dir).folder_id() if latents else None
        mine = Share(None, [len(part.source.records) for part in parts], told, folder)
        with collector_paused():
            shares = gather(mine if failure is None else Share(str(failure)))
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame: a cycle
    check_alike(shares)
    with collector_paused():
        if shares and latents:
            whole = sum(len(part.source.records) for part in parts)
            shown = _Shown(checking, whole - shown.total)
            for number, part in enumerate(parts):
                theirs = [share.told[number] for share in shares]
                part.join(rank, theirs, shown, look=not one_cache(shares))
        built = [(part.source, part.dataset(items)) for part in parts]
        return joined(config, built, latents=latents, may_be_empty=may_be_empty)


def joined(
    config: DataConfig,
    built: Sequence[tuple[Source, CachedDataset]],
    *,
    latents: bool = True,
    may_be_empty: bool = False,
) -> Dataset:
    """The dataset of all sources. DataError where `prepare` gives one: unusable items that may not be left out, too
    many that a run going on misses, or a source or a group of the mix without any item. latents: False where datasets
    have none and hence no items."""
    datasets = [dataset for _, dataset in built]
    problems = [problem for dataset in datasets for problem in dataset.report.problems]
    lost = [problem for dataset in datasets for problem in dataset.lost.values()]
    empty = [each for each in built if latents and not each[1].report.used]
    where = config.path or "data.sources"
    all_bad = len(empty) == len(built) and not any(each.report.dropped for each in datasets)
    if problems and (not config.skip_bad or (empty and all_bad)):
        listed = sum(dataset.report.listed for dataset in datasets)
        what = f"{where}: {len(problems)} of {counted(listed, 'item')} cannot be used"
        if lost and not config.skip_bad:
            what += (
                f"; the run began with {len(lost)} of them: put back what is missing, or data.skip_bad: true goes on "
                "with weight 0 in its place"
            )
        elif not config.skip_bad:
            what += SKIP_BAD
        raise DataError(what, problems)
    if len(lost) > config.max_lost:
        limit = f"over data.max_lost = {config.max_lost}"
        raise DataError(f"{where}: {counted(len(lost), 'item')} of the run lost, {limit}", lost)
    for source, dataset in empty:
        if not may_be_empty:
            raise nothing_left(source, dataset.report)
    if config.sources is None:
        return datasets[0]
    mixed = MixedDataset(config, [(source.name, dataset) for source, dataset in built])
    if latents and not may_be_empty:
        mixed.groups()  # refuses an empty one now, not at the first step
    return mixed


def nothing_left(source: Source, report: PrepareReport) -> DataError:
    """What to raise of a source without any item to train on."""
    reasons = "; ".join(str(entry).removeprefix(source.prefix) for entry in report.dropped[:3])
    return DataError(
        f"{source.path}: nothing is left to train on; the limits dropped {len(report.dropped)} of "
        f"{counted(source.listed, 'item')}: {reasons}"
        if report.dropped
        else f"{source.path}: none of {counted(source.listed, 'item')} can be used"
    )


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
        self.outcomes: list[Outcome] = []
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

    def told(self) -> list[Told]:
        """What the other ranks are to know of this rank's share."""
        return [
            Found(o.plan, o.identity, o.remarks) if isinstance(o, Entry) else o
            for o in self.outcomes
        ]

    def join(
        self, rank: int, told: Sequence[Sequence[Told]], progress: Progress, look: bool
    ) -> None:
        """Every rank's outcomes in the records' order. told: by rank; look: whether what they cached is there."""
        assert self.filler is not None
        world = len(told)
        words = [(r, told[i % world][i // world]) for i, r in enumerate(self.source.records)]
        usable = [
            (record, word)
            for i, (record, word) in enumerate(words)
            if i % world != rank and isinstance(word, Found)
        ]
        records, found = [record for record, _ in usable], [word for _, word in usable]
        taken = iter(self.filler.take(records, found, progress, look=look))
        own = iter(self.outcomes)
        outcomes: list[Outcome] = []
        for i, (_, word) in enumerate(words):
            if i % world == rank:
                outcomes.append(next(own))
            else:
                outcomes.append(next(taken) if isinstance(word, Found) else word)
        self.outcomes = outcomes

    def dataset(self, items: ItemList | None) -> CachedDataset:
        """Every rank's part together. items: those of a run that goes on."""
        kept = None if items is None else items.source(self.source.name)
        return dataset_of(self.source, self.outcomes, self.filler, self.texts, self.counts, kept)


def dataset_of(
    source: Source,
    outcomes: Sequence[Outcome],
    filler: Filler | None = None,
    texts: TextCache | None = None,
    counts: tuple[int, int, int] = (0, 0, 0),
    kept: SourceItems | None = None,
) -> CachedDataset:
    """The dataset of one source. outcomes: one per record, in order; none where only captions were cached.
    counts: files made and present, and their bytes. filler, texts: what its items are read by, None: they are not.
    kept: the items that it is to have, as far as they are what they were."""
    held = None if kept is None or filler is None else hold(kept, source, outcomes, filler)
    missing = {} if held is None else held.lost
    outcomes = outcomes if held is None else held.outcomes
    entries, duplicates, remarks = by_content(outcomes, source.prefix, all_wanted=held is not None)
    listed = list(source.problems)
    dropped = [*source.dropped, *(o for o in outcomes if isinstance(o, Dropped))]
    if held is not None and kept is not None and not source.config.skip_bad:
        on_list = {row[0] for row in kept.rows}
        dropped += [Dropped(p.name, LEFT_OUT) for p in listed if p.name not in on_list]
        listed = [p for p in listed if p.name in on_list]
    bad = [*listed, *(o for o in outcomes if isinstance(o, Problem)), *duplicates]
    made, present, nbytes = counts
    prefix, name = source.prefix, source.name
    lost = {
        place: replace(missing[entry.record.name], name=prefix + entry.record.name, source=name)
        for place, entry in enumerate(entries)
        if entry.record.name in missing
    }
    usable = len(entries) - len(lost)
    report = PrepareReport(
        listed=source.listed if held is None else usable + len(bad) + len(dropped),
        used=usable if outcomes or not source.records else len(source.records),
        problems=tuple(replace(p, name=prefix + p.name, source=name) for p in bad),
        remarks=tuple(remarks),
        dropped=tuple(replace(d, name=prefix + d.name) for d in dropped),
        made=made,
        present=present,
        nbytes=nbytes,
    )
    return CachedDataset(source.config, filler, texts, entries, report, name, prefix, lost)


def by_content(
    outcomes: Sequence[Outcome], prefix: str, *, all_wanted: bool = False
) -> tuple[list[Entry], list[Problem], list[Remark]]:
    """The entries without those whose content, range and captions an earlier one has; those; every remark.

    all_wanted: the entries are those of a run that goes on. They were none of another's duplicates when it began, and
    of one that is listed no more the range is not known.
    """
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
        if twin is not None and not all_wanted:
            duplicates.append(duplicate(record.name, twin))
            continue
        others = [o.record.name for o in same if o.record.path != record.path]
        notes = [*record.remarks, *entry.plan.remarks, *entry.remarks]
        if others:
            notes.append(f"same content as {others[0]}, with another caption")
        remarks += [Remark(prefix + record.name, note) for note in notes]
        same.append(entry)
        entries.append(entry)
    return entries, duplicates, remarks
