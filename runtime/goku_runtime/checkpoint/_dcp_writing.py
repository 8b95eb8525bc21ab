"""What a rank writes of a DCP save: its records, laid out from the items of its plan, and plain values."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.directory import write_durably
from goku_runtime.checkpoint.manifest import FileSum
from goku_runtime.checkpoint.options import CHUNK, CheckpointOptions
from goku_runtime.checkpoint.plan import Box, Image, Record, data_file
from goku_runtime.checkpoint.records import ALIGNMENT, skeleton
from goku_runtime.checkpoint.staging import Memory, Window, copyable, write_windows
from goku_runtime.checkpoint.stored import sums_name
from goku_runtime.checkpoint.tree import flatten

if TYPE_CHECKING:
    from goku_runtime._io import FileWriter

__all__ = ["Written", "WrittenFiles", "WrittenValue", "write_items"]

# Windows in flight: one being filled, the others being written.
_RING = 4


class Written(NamedTuple):
    """A part of a tensor: which, and where its record begins in the rank's file."""

    box: Box
    offset: int


class WrittenValue(NamedTuple):
    """A plain value, and what `torch.save` makes of it for stock DCP."""

    value: Any
    data: bytes


class WrittenFiles(NamedTuple):
    """The files of a rank, by name, and the version of torch by which their records are laid out."""

    torch: str
    sums: dict[str, FileSum]


def write_items(
    items: Sequence[WriteItem],
    planner: SavePlanner,
    directory: Path,
    rank: int,
    options: CheckpointOptions,
) -> list[WriteResult]:
    """Writes this rank's data file with its sums.

    Returns:
        A result for each item (but not for a rank's share of nothing) and one of WrittenFiles.

    Raises:
        ValueError: an item that cannot be saved; named.
        OSError: the file cannot be written.
    """
    values = [_value(item, planner) for item in items if item.type == WriteItemType.BYTE_IO]
    tensors = [item for item in items if item.type != WriteItemType.BYTE_IO and _is_held(item)]
    image = _laid_out(tensors, data_file(rank))
    sums = _write_image(directory, image, _Sources(tensors, image, planner), options)
    parts = [
        WriteResult(item.index, record.nbytes, Written(record.box, record.offset))
        for item, record in zip(tensors, image.records, strict=True)
    ]
    files = WriteResult(_index(image.file), 0, WrittenFiles(torch.__version__, sums))
    return [*values, *parts, files]


def _index(name: str) -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    return MetadataIndex(name)


# --- plain values -----------------------------------------------------------------------------------


def _value(item: WriteItem, planner: SavePlanner) -> WriteResult:
    name = item.index.fqn
    stream = planner.resolve_data(item)
    assert isinstance(stream, io.BytesIO)
    try:
        # The planner gives what torch.save has just made; only plain types are wanted out of it.
        value = torch.load(io.BytesIO(stream.getbuffer()), weights_only=True)
    except pickle.UnpicklingError as error:
        kind = str(error).partition("GLOBAL ")[2].partition(" ")[0] or "value that is not plain"
        raise ValueError(
            f"{name}: a {kind}; must be a tensor, None, bool, int, float, str, list, tuple or dict"
        ) from error
    if flatten({name: value}).tensors:
        raise ValueError(
            f"{name}: a {type(value).__name__} with tensors in it; the planner has to take it apart "
            "(flatten_state_dict=True)"
        )
    data = stream.getvalue()
    return WriteResult(item.index, len(data), WrittenValue(value, data))


# --- tensors ----------------------------------------------------------------------------------------


def _is_held(item: WriteItem) -> bool:
    """Whether the item is a part with elements, or the one that stands for a tensor without any."""
    assert item.tensor_data is not None
    if item.tensor_data.size.numel():
        return bool(item.tensor_data.chunk.sizes.numel())
    return not any(item.tensor_data.chunk.offsets)


def _laid_out(items: Sequence[WriteItem], file: str) -> Image:
    records, at = [], 0
    for item in items:
        data = item.tensor_data
        assert data is not None
        sizes = data.chunk.sizes if data.size.numel() else data.size
        box = Box(tuple(data.chunk.offsets), tuple(sizes))
        dtype = data.properties.dtype
        try:
            record = skeleton(dtype, box.size)
        except ValueError as error:
            raise ValueError(f"{item.index.fqn}: {error}") from None
        payload = at + len(record.before)
        records.append(Record(item.index.fqn, dtype, box, record, at, payload))
        at += -(-record.length // ALIGNMENT) * ALIGNMENT
    return Image(file, at, tuple(records))


class _Sources(Sequence[Tensor]):
    """The tensors of the records, asked of the planner when they are wanted: it may make them then."""

    def __init__(self, items: Sequence[WriteItem], image: Image, planner: SavePlanner) -> None:
        self._items, self._image, self._planner = items, image, planner
        self._last: tuple[int, Tensor] | None = None
        self.devices: set[torch.device] = set()

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: Any) -> Any:
        # The one before may go on in the next window: it is made, and made dense, once.
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = number, self._resolved(number)
        return self._last[1]

    def _resolved(self, number: int) -> Tensor:
        record = self._image.records[number]
        found = self._planner.resolve_data(self._items[number])
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise ValueError(f"{record.name}: planned as a tensor; the planner gives a {kind}")
        tensor = flatten({record.name: found}).tensors[record.name].detach()
        planned = self._items[number].tensor_data
        assert planned is not None
        if (tensor.dtype, tensor.shape) != (record.dtype, planned.chunk.sizes):
            raise ValueError(
                f"{record.name}: planned as {record.dtype} {tuple(planned.chunk.sizes)}; the planner "
                f"gives {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.is_cuda:
            self.devices.add(tensor.device)
        return copyable(tensor).contiguous().view(tensor.dtype)


def _write_image(
    directory: Path, image: Image, sources: _Sources, options: CheckpointOptions
) -> dict[str, FileSum]:
    if not image.nbytes:
        return {}
    path = directory / image.file
    with options.engine() as engine:
        writer = engine.create(str(path), image.nbytes, chunk=CHUNK, fsync=options.fsync)
        try:
            _submit(image, sources, writer, options.window_bytes)
            size, crc = writer.finish()
            sums = writer.chunk_crcs()
        except BaseException:
            writer.cancel()
            raise
    beside = directory / sums_name(image.file)
    write_durably(beside, sums, fsync=options.fsync)
    return {path.name: FileSum(size, crc), beside.name: FileSum(len(sums), crc32c(sums))}


def _submit(image: Image, sources: _Sources, writer: FileWriter, window_bytes: int) -> None:
    """Copies the image window by window and waits until all of it is written."""
    size = min(window_bytes, -(-image.nbytes // CHUNK) * CHUNK)
    count = min(_RING, -(-image.nbytes // size))
    ring: list[Memory] = []
    try:
        # Pinned: copies from a GPU are asynchronous then, one wait for all of a window.
        ring += [Memory(size, pin=torch.cuda.is_initialized()) for _ in range(count)]

        def copy(window: Window) -> None:
            window.copy(sources, non_blocking=True)
            for device in sources.devices:
                torch.cuda.current_stream(device).synchronize()

        for ticket in write_windows(image, ring, size, writer, copy):
            writer.wait(ticket)
    except BaseException:
        writer.cancel()  # before the memory goes
        raise
    finally:
        for memory in ring:
            memory.close()
