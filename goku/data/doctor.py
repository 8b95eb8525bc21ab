"""`doctor`: what a dataset holds, what of it cannot be used and why, and what training makes of it.

Items go through the very functions that `prepare` uses (decode, `plan`), so sizes, frames and
tokens are those that training will see. `quick=True` reads headers and first frames only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from goku.data.config import DataConfig
from goku.data.decode import decode_record, probe
from goku.data.errors import DecodeError, Problem
from goku.data.media import Media
from goku.data.record import Record
from goku.data.report import DoctorReport, ItemReport, PackingReport
from goku.data.sources import sources_of
from goku.data.stream import ShuffledStream
from goku.data.workers import ordered_map
from goku.packing import PackingConfig, cut_grid, efficiency, partition, step_positions

# Steps of the first epoch whose packs are laid out for the efficiency; more do not change the mean.
_STEPS_PACKED = 256


def doctor(
    config: DataConfig,
    packing: PackingConfig,
    *,
    quick: bool = False,
    seed: int = 0,
    ranks: int = 1,
    latent_channels: int = 16,
    cost: Callable[[int], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DoctorReport:
    """Examine the dataset at config.path for training with `config` and `packing`.

    Args:
        quick: headers only, in seconds; misses damage inside files, and takes frame counts from
            the headers. Otherwise everything that training would decode is decoded.
        seed, ranks: of the run whose steps and packs are laid out.
        latent_channels: of the VAE, for the predicted size of the cache.
        cost: of a sample of so many tokens, by which the run's packs are balanced (for training
            `goku.packing.sample_cost` with the model's widths); None means length**2, attention
            alone.
        progress: called as progress(done, total).

    Unusable items are in the report, not raised; DataError is raised when there is no dataset to
    speak of (see `scan`). Nothing is written.
    """
    sources = sources_of(config)
    records = [replace(r, name=s.prefix + r.name) for s in sources for r in s.records]
    notes = tuple(s.prefix + note for s in sources for note in s.notes)
    work = partial(_examine, config, quick)
    results = ordered_map(work, records, name=_name, workers=config.workers)
    items: list[ItemReport] = []
    problems = [
        replace(p, name=s.prefix + p.name, source=s.name) for s in sources for p in s.problems
    ]
    for done, (record, result) in enumerate(zip(records, results, strict=True), start=1):
        if isinstance(result, Media):
            try:
                items.append(_report(record, result, config, packing))
            except ValueError as error:
                # cut_grid's sentence begins with the name, which a Problem keeps apart.
                reason = str(error).removeprefix(f"{record.name}: ")
                problems.append(Problem(record.name, reason))
        elif isinstance(result, DecodeError):
            problems.append(Problem(record.name, result.reason, result.kind))
        else:
            problems.append(Problem(record.name, result.reason))
        if progress is not None:
            progress(done, len(records))
    return DoctorReport(
        path=config.path or ", ".join(f"{s.name} ({s.path})" for s in sources),
        quick=quick,
        listed=sum(s.listed - len(s.dropped) for s in sources),
        items=tuple(items),
        unusable=tuple(problems),
        notes=notes,
        packing=_lay_out([i.tokens for i in items], packing, seed, ranks, cost or _attention),
        # mean and logvar, fp32; a file's header adds less than 1 kB.
        cache_bytes=sum(2 * 4 * latent_channels * 4 * _encoded_tokens(item) for item in items),
    )


def _examine(config: DataConfig, quick: bool, record: Record) -> Media | DecodeError:
    try:
        return probe(record, config) if quick else decode_record(record, config).media
    except DecodeError as error:
        return error


def _report(record: Record, media: Media, config: DataConfig, packing: PackingConfig) -> ItemReport:
    geometry = media.geometry
    grid = cut_grid(geometry.grid, packing.tokens_per_pack, record.name, packing.overlong)
    frames = 4 * (grid[0] - 1) + 1
    rate = config.fps or media.source_fps
    available = media.source_frames - record.start_frame
    if record.num_frames is not None:
        available = record.num_frames
    # What the range holds at the training rate; the header's word, so only for the note.
    held = available
    if config.fps is not None and media.source_fps:
        held = int((available - 1) / media.source_fps * config.fps + 1e-6) + 1
    return ItemReport(
        name=record.name,
        modality="image" if geometry.frames == 1 else "video",
        source=(max(available, 1), geometry.source_height, geometry.source_width),
        source_seconds=available / media.source_fps if media.source_fps else 0.0,
        encoded_frames=geometry.frames,
        unused_frames=max(0, held - geometry.frames),
        frames=frames,
        height=geometry.height,
        width=geometry.width,
        seconds=frames / rate if rate and not record.is_image else 0.0,
        tokens=grid[0] * grid[1] * grid[2],
        repeats_frames=bool(config.fps and media.source_fps and config.fps > media.source_fps),
    )


def _encoded_tokens(item: ItemReport) -> int:
    return ((item.encoded_frames - 1) // 4 + 1) * (item.height // 16) * (item.width // 16)


def _attention(length: int) -> float:
    return float(length) ** 2


def _lay_out(
    tokens: Sequence[int],
    packing: PackingConfig,
    seed: int,
    ranks: int,
    cost: Callable[[int], float],
) -> PackingReport | None:
    """The steps that begin in the first epoch, and the packs of the first 256 of them."""
    if not tokens:
        return None
    stream = ShuffledStream(len(tokens), seed)

    def length_of(position: int) -> int:
        return tokens[stream.item(position)]

    steps = packs = taken = 0
    shares: list[float] = []
    position = 0
    while position < len(tokens):
        positions = step_positions(position, length_of, packing.tokens_per_step)
        if steps < _STEPS_PACKED:
            lengths = [length_of(p) for p in positions]
            costs = [cost(length) for length in lengths]
            plan = partition(lengths, costs, ranks, packing.tokens_per_pack)
            flat = [pack for rank in plan for pack in rank if pack]
            shares.append(efficiency(flat, lengths, packing.tokens_per_pack))
            packs += len(flat)
            taken += len(positions)
        steps += 1
        position += len(positions)
    laid_out = len(shares)
    return PackingReport(
        tokens_per_step=packing.tokens_per_step,
        tokens_per_pack=packing.tokens_per_pack,
        overlong=packing.overlong,
        ranks=ranks,
        steps_per_epoch=steps,
        samples_per_step=taken / laid_out,
        packs_per_step=packs / laid_out,
        efficiency=sum(shares) / laid_out,
    )


def _name(record: Record) -> str:
    return record.name


__all__ = ["DoctorReport", "doctor"]
