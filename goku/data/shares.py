"""What the ranks that prepare a dataset together tell each other: `Share`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from goku.data.errors import DataError, Dropped, Problem
from goku.data.filler import Found
from goku.data.manifest import find_dataset
from goku.data.record import counted
from goku.data.shards import is_shard_name
from goku.data.sources import Source

Told = Found | Problem | Dropped
"""What became of a record, in words that another rank can use."""


_ALIKE = "allowed: one dataset that all ranks see alike"


@dataclass(frozen=True)
class Share:
    """What one rank tells: why it failed (None: it did not), and of each source how many records it has and what became
    of the records rank, rank + world, ...; which folder its cache is (None: it cannot tell)."""

    failure: str | None
    records: Sequence[int] = ()
    told: Sequence[Sequence[Told]] = ()
    folder: str | None = None


def one_cache(shares: Sequence[Share]) -> bool:
    """Whether all ranks are known to fill and read one and the same folder."""
    folders = {share.folder for share in shares}
    return len(folders) == 1 and None not in folders


def check_here(sources: Sequence[Source], rank: int, world: int) -> None:
    """DataError where rank 0's listing is not of what this rank has: another path, nothing there, or a table, list or
    archive of another size; of archives those that hold items of this rank's share.

    A few calls of the file system a source and one an archive, where listing it all again would be some an item. A
    media file that is missing here alone is found when it is decoded.
    """
    for source in sources:
        here = find_dataset(source.path)
        if str(here) != source.place:
            raise DataError(
                f"{source.path} is {here} here, where rank 0 lists {source.place}; {_ALIKE}"
            )
        if here.is_dir() and _is_empty(here):
            what = f"is empty here, where rank 0 lists {counted(source.listed, 'item')}"
            raise DataError(f"{here}: {what}; {_ALIKE}")
        own = {record.member.archive for record in source.records[rank::world] if record.member}
        for file, size in source.files.items():
            if is_shard_name(file) and file not in own:
                continue
            try:
                found = f"has {os.stat(file).st_size} bytes"
            except OSError as error:
                found = f"cannot be reached ({error.strerror})"
            if found != f"has {size} bytes":
                raise DataError(f"{file} {found} here, where rank 0 lists {size} bytes; {_ALIKE}")


def _is_empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def check_alike(shares: Sequence[Share]) -> None:
    """ValueError naming a rank that failed, or those whose data sections make another listing of rank 0's."""
    for rank, share in enumerate(shares):
        if share.failure is not None:
            raise ValueError(f"rank {rank}: {share.failure}")
    others = [r for r, share in enumerate(shares) if share.records != shares[0].records]
    if others:
        counts = ", ".join(f"rank {r} {sum(shares[r].records)}" for r in others)
        raise ValueError(
            f"of one listing the ranks take different items: rank 0 takes {sum(shares[0].records)}, {counts}; allowed: "
            "one data section for all ranks"
        )
