"""Checkpoints of version 1: DCP's own files under our manifest. Read, no longer written."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from goku_runtime.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    file_problem,
    file_problems,
    raise_problems,
)
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.version1.metadata import METADATA_NAME, read_metadata
from goku_runtime.checkpoint.version1.reader import StagingReader

__all__ = ["Version1", "described"]


def described(
    directory: Path, manifest: Manifest
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every tensor, by name. Raises CheckpointError: `.metadata` is damaged."""
    wanted = manifest.files.get(METADATA_NAME)
    if wanted is None:
        raise CheckpointError(f"{directory} is damaged: {METADATA_NAME}: missing")
    raise_problems(directory, file_problem(directory / METADATA_NAME, wanted))
    saved = read_metadata(directory, manifest.files).state_dict_metadata
    return {
        name: (entry.properties.dtype, tuple(entry.size))
        for name, entry in saved.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }


class Version1:
    """One checkpoint of version 1, opened by all ranks together; see `goku_runtime.checkpoint.load`.

    Every file is read and summed first, by the ranks in turn, and tensors are read aside: nothing of
    the caller's changes before every rank has checked everything, which takes host memory for it.

    Raises:
        CheckpointError: files missing, truncated, altered or extra: all named.
        OSError: a file cannot be read.
    """

    def __init__(self, ranks: Ranks, directory: Path, manifest: Manifest) -> None:
        self._ranks, self._directory = ranks, directory
        share = (ranks.rank, ranks.count)
        found = ranks.together(lambda: file_problems(directory, manifest, share=share))
        raise_problems(directory, [problem for each in ranks.gather(found) for problem in each])
        self._metadata: Metadata = ranks.together(lambda: read_metadata(directory, manifest.files))

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A saved tensor's dtype ("torch.float32") and shape. Raises CheckpointError: there is none."""
        saved = self._metadata.state_dict_metadata.get(name)
        if not isinstance(saved, dcp.TensorStorageMetadata):
            raise CheckpointError(f"{METADATA_NAME} is damaged: it lacks {name!r}")
        return str(saved.properties.dtype), tuple(saved.size)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Reads tensors into the caller's, by saved name, on all ranks or on none."""
        reader = StagingReader(self._directory, self._metadata)
        with _quiet_dcp(self._ranks):
            dcp.load(
                dict(tensors),
                storage_reader=reader,
                process_group=self._ranks.group,
                no_dist=not self._ranks.distributed,
            )
        reader.commit()


@contextmanager
def _quiet_dcp(ranks: Ranks) -> Generator[None]:
    """Turns DCP's exception into what stood behind it, and leaves out its warning of no ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            ranks.raise_dcp(error)
            raise
