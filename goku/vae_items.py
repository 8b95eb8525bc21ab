"""What a VAE is trained on: the items of the runs that it is for, without what all of them leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from goku.batch import trained_grid
from goku.data import DataConfig, DataError, Dropped, Item, Record, decode_all, list_records
from goku.data.errors import DecodeError
from goku.data.items import item_of
from goku.data.latents import Plan
from goku.data.limits import dropped_by_limits, dropped_by_suffix
from goku.data.listings import Scans
from goku.data.media import plan_record
from goku.data.record import counted
from goku.data.sources import sources_of
from goku.run_config import RunConfig

__all__ = ["decode_vae_items"]


def decode_vae_items(config: RunConfig, runs: Sequence[RunConfig]) -> list[Tensor]:
    """The pixels of all that a VAE is trained on, each uint8 (3, T, H, W), decoded as config.data says.

    runs: those that the VAE is for; config.data covers theirs. An item that none of them takes is left out, one that
    any of them would refuse is refused now. A clip is judged by the runs that take its frames as config.data does
    (fps, max_seconds): how many the others find in it, only decoding it again would tell.

    Raises what `decode_all` raises; DataError when nothing is left; ValueError as `goku.batch.trained_grid`.
    """
    scans = Scans()
    records = list_records(config.data, scans)
    source_of = {
        source.prefix + record.name: source.name
        for source in sources_of(config.data, scans)
        for record in source.records
    }
    taken: list[tuple[Item, RunConfig]] = []
    dropped: list[Dropped] = []

    def left_out(record: Record, plan: Plan) -> bool:
        source = source_of[record.name]
        found = [_as_taken(record, plan, source, config.data, run.data) for run in runs]
        taken.extend(
            (each, run) for each, run in zip(found, runs, strict=True) if isinstance(each, Item)
        )
        reasons = [each for each in found if isinstance(each, str)]
        if len(reasons) < len(runs):
            return False
        dropped.append(Dropped(record.name, reasons[0]))
        return True

    clips = [clip for _, clip in decode_all(records, config.data, left_out)]
    if dropped and not clips:
        reasons = "; ".join(str(entry) for entry in dropped[:3])
        raise DataError(
            f"{config.data.path or 'data.sources'}: nothing is left to train the VAE on; the limits dropped "
            f"{len(dropped)} of {counted(len(records), 'item')}: {reasons}"
        )
    for item, run in taken:
        last = run.model.condition == "frames" and -1 in run.conditioning.frames
        trained_grid(item, run.packing, run.parallel.sp, last)
    return clips


def _as_taken(
    record: Record, plan: Plan, source: str, decoded: DataConfig, data: DataConfig
) -> Item | str | None:
    """What a run on `data` makes of a record that decoded to `plan` under `decoded`: its item, or why it leaves it out;
    None where that cannot be told."""
    if data.sources is not None and source not in data.sources:
        return f"{source} is none of the run's sources"
    reason = dropped_by_suffix(record, data, source)
    if reason is not None:
        return reason
    alike = (data.fps, data.max_seconds) == (decoded.fps, decoded.max_seconds)
    if not (record.is_image or alike):
        return None
    size = plan.geometry.source_height, plan.geometry.source_width
    try:
        geometry = plan_record(record, data, *size, plan.selected_frames)
    except DecodeError as error:
        return error.reason
    reason = dropped_by_limits(record, replace(plan, geometry=geometry), data, source)
    return item_of(record, geometry, source, "") if reason is None else reason
