"""`doctor`: what a dataset holds, what of it cannot be used and why, and what training makes of it.

Items go through the very functions that `prepare` uses (decode, `plan`, limits, duplicates), so sizes,
frames and tokens are those that training will see. `quick=True` reads headers and first frames only.
"""

from __future__ import annotations

from collections.abc import Callable

from goku.data.cached import CachedDataset
from goku.data.config import DataConfig
from goku.data.dataset import dataset_of
from goku.data.errors import Problem
from goku.data.latents import Plan
from goku.data.layout import lay_out
from goku.data.record import Record
from goku.data.report import DoctorReport, ItemReport
from goku.data.stream import ShuffledStream
from goku.data.survey import Survey
from goku.packing import Grid, PackingConfig, cut_grid


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
        quick: headers only, in seconds; misses damage inside files and equal files, and takes frame
            counts from the headers. Otherwise everything that training would decode is decoded.
        seed, ranks: of the run whose steps and packs are laid out.
        latent_channels: of the VAE, for the predicted size of the cache.
        cost: of a sample of so many tokens, by which the run's packs are balanced (for training
            `goku.packing.sample_cost` with the model's widths); None means length**2, attention
            alone.
        progress: called as progress(done, total).

    Unusable items are in the report, not raised; DataError is raised when there is no dataset to
    speak of (see `scan`). Nothing is written.
    """
    survey = Survey([config], quick=quick, progress=progress)
    sources = survey.sources(config)
    items: list[ItemReport] = []
    problems: list[Problem] = []
    datasets = [dataset_of(source, survey.outcomes(source)) for source in sources]
    for source, dataset in zip(sources, datasets, strict=True):
        problems += dataset.report.problems
        for name, record, plan in planned(dataset):
            try:
                grid = cut_grid(plan.geometry.grid, packing.tokens_per_pack, name, packing.overlong)
            except ValueError as error:
                # cut_grid's sentence begins with the name, which a Problem keeps apart.
                reason = str(error).removeprefix(f"{name}: ")
                problems.append(Problem(name, reason, source=source.name))
                continue
            items.append(item_report(name, record, plan, config, grid))
    tokens = [item.tokens for item in items]
    layout = None
    if tokens:
        stream = ShuffledStream(len(tokens), seed)
        layout = lay_out(tokens, stream, packing, ranks, cost or attention)
    return DoctorReport(
        path=config.path or ", ".join(f"{s.name} ({s.path})" for s in sources),
        quick=quick,
        listed=sum(dataset.report.listed for dataset in datasets),
        items=tuple(items),
        unusable=tuple(problems),
        notes=tuple(source.prefix + note for source in sources for note in source.notes),
        packing=None if layout is None else layout.packing,
        # mean and logvar, fp32; a file's header adds less than 1 kB.
        cache_bytes=sum(2 * 4 * latent_channels * 4 * _encoded_tokens(item) for item in items),
        dropped=tuple(dropped for dataset in datasets for dropped in dataset.report.dropped),
        remarks=tuple(remark for dataset in datasets for remark in dataset.report.remarks),
    )


def planned(dataset: CachedDataset) -> list[tuple[str, Record, Plan]]:
    """(the item's name, its record, what it decodes to) of every item."""
    return [
        (item.name, entry.record, entry.plan)
        for item, entry in zip(dataset.items, dataset.entries, strict=True)
    ]


def item_report(
    name: str, record: Record, plan: Plan, config: DataConfig, grid: Grid
) -> ItemReport:
    """The item as it is trained. grid: (t, h, w) of its tokens, perhaps cut."""
    geometry = plan.geometry
    frames = 4 * (grid[0] - 1) + 1
    rate = config.fps or plan.source_fps
    available = plan.source_frames - record.start_frame
    if record.num_frames is not None:
        available = min(record.num_frames, available) if record.at_most else record.num_frames
    # What the range holds at the training rate; the header's word, so only for the note.
    held = available
    if config.fps is not None and plan.source_fps:
        held = int((available - 1) / plan.source_fps * config.fps + 1e-6) + 1
    return ItemReport(
        name=name,
        modality="image" if geometry.frames == 1 else "video",
        source=(max(available, 1), geometry.source_height, geometry.source_width),
        source_seconds=available / plan.source_fps if plan.source_fps else 0.0,
        encoded_frames=geometry.frames,
        unused_frames=max(0, held - geometry.frames),
        frames=frames,
        height=geometry.height,
        width=geometry.width,
        seconds=frames / rate if rate and not record.is_image else 0.0,
        tokens=grid[0] * grid[1] * grid[2],
        repeats_frames=bool(config.fps and plan.source_fps and config.fps > plan.source_fps),
    )


def attention(length: int) -> float:
    """The cost of a sample by attention alone."""
    return float(length) ** 2


def _encoded_tokens(item: ItemReport) -> int:
    return ((item.encoded_frames - 1) // 4 + 1) * (item.height // 16) * (item.width // 16)


__all__ = ["DoctorReport", "attention", "doctor", "item_report", "planned"]
