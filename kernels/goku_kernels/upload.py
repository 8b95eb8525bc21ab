"""`upload`: small tables and whole batches from the host to a device that is busy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["upload", "upload_rows", "upload_values"]


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
    # What has gaps would be packed in pageable memory before it is copied.
    return host.contiguous().pin_memory().to(device, non_blocking=True)


def upload_values(
    values: Sequence[Any], dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`, as `upload`."""
    if device is None:
        return torch.tensor(values, dtype=dtype)
    return upload(torch.tensor(values, dtype=dtype, device="cpu"), device)


def upload_rows(pieces: Sequence[Tensor], device: torch.device | str | None) -> Tensor:
    """`torch.cat(pieces)` on the device, as `upload`, by one copy in host memory instead of two.

    torch keeps page-locked memory for the next call: the next power of two bytes, twice where a copy is under way.

    Args:
        pieces: at least one; (rows_i, ...) of one dtype and equal further dimensions, on the CPU.
        device: as `upload`.

    Raises:
        ValueError: dtypes that differ.
    """
    dtypes = {piece.dtype for piece in pieces}
    if len(dtypes) > 1:  # what is copied into the first one's would be rounded
        raise ValueError(f"pieces have the dtypes {sorted(map(str, dtypes))}; allowed: one")
    if not _queued(device):
        return upload(torch.cat(list(pieces)), device)
    rows = sum(len(piece) for piece in pieces)
    shape = (rows, *pieces[0].shape[1:])
    locked = torch.empty(shape, dtype=pieces[0].dtype, device="cpu", pin_memory=True)
    torch.cat(list(pieces), out=locked)
    return locked.to(device, non_blocking=True)


def _queued(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"
