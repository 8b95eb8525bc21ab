"""DCP's storage, read with checks: what version 1 took its tensors from."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from goku_runtime.checkpoint.manifest import CheckpointError

__all__ = ["StagingReader"]


class StagingReader(StorageReader):
    """Reads a checkpoint's tensors aside; `commit` puts them where they belong.

    Nothing of the caller's changes before every rank has read and checked everything of its own.
    The price is host memory: once more what this rank loads.
    """

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self._directory = directory
        self._metadata = metadata
        self._staged: list[tuple[Tensor, Tensor]] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forgets what was read."""
        self._staged = []

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata given at construction."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this reader could read such a place: any path."""
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads this rank's part. Raises CheckpointError for a record that is not as described."""
        storage = cast("dict[Any, Any]", self._metadata.storage_data)
        items = sorted(plan.items, key=lambda item: _place(storage[item.storage_index]))
        place, whole = None, torch.empty(0, device="cpu")
        for item in items:
            # Several parts of one record (the checkpoint had fewer ranks): read it once.
            if place != _place(storage[item.storage_index]):
                place = _place(storage[item.storage_index])
                whole = self.read_record(item.storage_index, *place)
            part = whole
            for axis, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                part = part.narrow(axis, start, length)
            # A view would keep the whole record in memory.
            part = part.clone() if part.numel() < whole.numel() else part
            self._staged.append((planner.resolve_tensor(item).detach(), part))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_record(self, index: Any, file: str, offset: int, length: int) -> Tensor:
        with open(self._directory / file, "rb") as stream:
            stream.seek(offset)
            record = io.BytesIO(stream.read(length))
        try:
            tensor = torch.load(record, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file}: the record of {index.fqn!r} is refused: {error}"
            ) from error
        described = self._metadata.state_dict_metadata[index.fqn]
        sizes = next(c.sizes for c in described.chunks if c.offsets == index.offset)  # type: ignore[union-attr]
        dtype = described.properties.dtype  # type: ignore[union-attr]
        if type(tensor) is not Tensor or tensor.dtype != dtype or tensor.shape != sizes:
            raise CheckpointError(
                f"{file}: the record of {index.fqn!r} is not {dtype} {tuple(sizes)}"
            )
        return tensor

    @torch.no_grad()
    def commit(self) -> None:
        """Copies what was read into the caller's tensors."""
        for target, source in self._staged:
            target.copy_(source)
        self._staged = []


def _place(info: Any) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length
