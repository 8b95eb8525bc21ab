"""Checkpoints that are either whole or absent, and are checked before they are read.

A checkpoint is a directory: tensors in the files of `torch.distributed.checkpoint` (stock
``dcp.load`` reads them), everything else in ``state.json``, and in ``manifest.json`` the size and
CRC-32C of every file. It is written beside its final place and renamed once it is durable.
"""

from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.manifest import CheckpointError, Report, verify
from goku_runtime.checkpoint.root import latest, prune, set_latest
from goku_runtime.checkpoint.state import load, read_values, save

__all__ = [
    "CheckpointError",
    "Report",
    "crc32c",
    "latest",
    "load",
    "prune",
    "read_values",
    "save",
    "set_latest",
    "verify",
]
