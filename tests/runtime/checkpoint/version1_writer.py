"""Writes checkpoints of version 1, which the library reads and no longer writes."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta

from goku_runtime.checkpoint import crc32c
from goku_runtime.checkpoint.manifest import FileSum, Manifest
from goku_runtime.checkpoint.tree import flatten, to_json


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Nothing, as in version 1: paths in a pickle differ between Pythons."""
        return StorageMeta()


def save(state: dict[Any, Any], path: Path) -> None:
    """A state as a checkpoint of version 1, by this process alone and without its care."""
    flat = flatten(state)
    path.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = _Writer(path, thread_count=1, overwrite=False)
        dcp.save(dict(flat.tensors), storage_writer=writer, no_dist=True)
    (path / "state.json").write_text(to_json(flat.tree))
    files = {
        file.name: FileSum(file.stat().st_size, crc32c(file.read_bytes()))
        for file in sorted(path.iterdir())
    }
    manifest = Manifest(files, time.time_ns(), version=1)
    (path / "manifest.json").write_bytes(manifest.to_bytes())
