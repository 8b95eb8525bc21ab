"""`upload`: small tables and whole batches from the host to a device that is busy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["upload", "upload_rows"]


def upload(host: Tensor, device: torch.device | str | None) -> Tensor:
    """`host`, a tensor in host memory, on the device; the host does not wait for the device.

    A copy from pageable memory does: torch waits for the end of everything that its stream was given before. From
    page-locked memory it is queued, and torch reuses that memory only once the copy is done.

    Args:
        host: any shape and dtype, on the CPU.
        device: None gives `host` itself.
    """
    if not _queued(device):
        return host if device is None else host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def upload_rows(pieces: Sequence[Tensor], device: torch.device | str | None) -> Tensor:
    """`torch.cat(pieces)` on the device, as `upload`, by one copy in host memory instead of two.

    Args:
        pieces: at least one; (rows_i, ...) of one dtype and equal further dimensions, on the CPU.
        device: as `upload`.
    """
    if not _queued(device):
        return upload(torch.cat(list(pieces)), device)
    rows = sum(len(piece) for piece in pieces)
    locked = torch.empty((rows, *pieces[0].shape[1:]), dtype=pieces[0].dtype, pin_memory=True)
    torch.cat(list(pieces), out=locked)
    return locked.to(device, non_blocking=True)


def _queued(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"
