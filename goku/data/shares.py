"""What the ranks that prepare a dataset together tell each other: `Share`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from goku.data.errors import Dropped, Problem
from goku.data.filler import Found
from goku.data.sources import Source

Told = Found | Problem | Dropped
"""What became of a record, in words that another rank can use."""


@dataclass(frozen=True)
class Share:
    """What one rank tells: why it failed (None: it did not), how many items it lists and their hash, of each source
    what became of the records rank, rank + world, ..., and which folder its cache is (None: it cannot tell)."""

    failure: str | None
    listed: int = 0
    listing: str = ""
    told: Sequence[Sequence[Told]] = ()
    folder: str | None = None

    @classmethod
    def of(
        cls, sources: Sequence[Source], told: Sequence[Sequence[Told]], folder: str | None
    ) -> Share:
        """That of a rank that has filled its share."""
        digest = hashlib.sha256()
        for source in sources:
            for r in source.records:
                row = [source.name, r.name, r.prompts, r.start_frame, r.num_frames, r.weight]
                digest.update(json.dumps(row).encode())
            names = [each.name for each in source.problems], [each.name for each in source.dropped]
            digest.update(json.dumps([source.name, *names]).encode())
        listed = sum(source.listed for source in sources)
        return cls(None, listed, digest.hexdigest(), told, folder)


def one_cache(shares: Sequence[Share]) -> bool:
    """Whether all ranks are known to fill and read one and the same folder."""
    folders = {share.folder for share in shares}
    return len(folders) == 1 and None not in folders


def check_alike(shares: Sequence[Share]) -> None:
    """ValueError naming a rank that failed, or those whose datasets are listed otherwise than rank 0's."""
    for rank, share in enumerate(shares):
        if share.failure is not None:
            raise ValueError(f"rank {rank}: {share.failure}")
    others = [r for r, share in enumerate(shares) if share.listing != shares[0].listing]
    if others:
        counts = ", ".join(f"rank {r} {shares[r].listed}" for r in others)
        raise ValueError(
            f"the ranks list different items: rank 0 lists {shares[0].listed}, {counts} (names, captions, ranges and "
            "weights are compared); allowed: one dataset that all ranks see alike"
        )
