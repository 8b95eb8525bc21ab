"""Checkpoints that are either whole or absent, fast to write and to read, and checked as they are read.

A checkpoint is a directory: tensors in files that `torch.distributed.checkpoint` reads as well, an index of
them in ``index.json``, a CRC-32C for every 64 KiB of them, plain values in ``state.json``, and in
``manifest.json`` the size and CRC-32C of every file. It is written beside its final place and renamed
once it is durable. docs/checkpoints.md describes the format.
"""

from goku_runtime.checkpoint.checkpointer import Checkpointer
from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.dcp import GokuStorageReader, GokuStorageWriter
from goku_runtime.checkpoint.handle import SaveHandle
from goku_runtime.checkpoint.loading import describe, load, read_values
from goku_runtime.checkpoint.manifest import CheckpointError, Report
from goku_runtime.checkpoint.options import CheckpointOptions, Retention
from goku_runtime.checkpoint.root import latest, prune, set_latest
from goku_runtime.checkpoint.saving import async_save, save
from goku_runtime.checkpoint.verification import verify

__all__ = [
    "CheckpointError",
    "CheckpointOptions",
    "Checkpointer",
    "GokuStorageReader",
    "GokuStorageWriter",
    "Report",
    "Retention",
    "SaveHandle",
    "async_save",
    "crc32c",
    "describe",
    "latest",
    "load",
    "prune",
    "read_values",
    "save",
    "set_latest",
    "verify",
]
