"""The pixels of many records at once: `decode_all`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

from torch import Tensor

from goku.data.config import DataConfig
from goku.data.decode import as_tensor, decode_record
from goku.data.errors import SKIP_BAD, DataError, DecodeError, Problem
from goku.data.filler import record_name
from goku.data.latents import Plan, plan_of
from goku.data.media import Decoded
from goku.data.record import Record, counted
from goku.workers import ordered_map


def decode_all(
    records: Sequence[Record],
    config: DataConfig,
    left_out: Callable[[Record, Plan], bool] | None = None,
) -> list[tuple[Record, Tensor]]:
    """Every record, in order, with its `decode`, uint8 (3, T, H, W), by config.workers processes.

    left_out: asked for every record that can be decoded; those of which it says True are not kept.

    DataError listing every record that cannot be decoded; with skip_bad they are left out, as long as there are others.
    """
    clips: list[tuple[Record, Tensor]] = []
    decoded = 0
    problems: list[Problem] = []
    work = partial(_decode_one, config)
    results = ordered_map(work, records, name=record_name, workers=config.workers)
    with closing(results):
        for record, result in zip(records, results, strict=True):
            if isinstance(result, Decoded):
                decoded += 1
                if left_out is None or not left_out(record, plan_of(result.media)):
                    clips.append((record, as_tensor(result)))
            else:
                problems.append(Problem(record.name, result.reason))
    if problems and not (config.skip_bad and decoded):
        where = config.path or "data.sources"
        what = f"{where}: {len(problems)} of {counted(len(records), 'item')} cannot be used"
        raise DataError(what + ("" if config.skip_bad else SKIP_BAD), problems)
    return clips


def _decode_one(config: DataConfig, record: Record) -> Decoded | DecodeError:
    try:
        return decode_record(record, config)
    except DecodeError as error:
        return error
