"""The pickle of DCP's Metadata for a plan, written without making the objects that it holds.

A plan for many ranks has up to a million parts, and five of DCP's objects stand for each: to make
and pickle those of 768,000 parts takes 15 s, and this 0.6 s. Their pickles are alike but for a few
numbers, so they become the rows of a table of bytes, filled column by column. Everything else goes
through an ordinary pickler, whose memo tells by which numbers the rows can refer to classes, names
and sizes.

What an instance is pickled as is asked of an instance (`__reduce_ex__`), so that fields that other
versions of torch have are taken over.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from goku_runtime.checkpoint.plan import GlobalPlan, data_file

__all__ = ["Unknown", "pickled_metadata"]

# The last protocol without frames, whose bytes would have to be counted.
_PROTOCOL = 3
_HEAD, _STOP, _POP, _MARK = b"\x80\x03", b".", b"0", b"("
_DICT, _SET_ITEMS, _LIST, _APPENDS = b"}", b"u", b"]", b"e"
_NEW, _BUILD = b")\x81", b"b"  # an instance without arguments; its attributes


class Unknown(Exception):
    """torch's objects are pickled in a way that is not known here."""


class _Slot:
    """A place in a row: an opcode with a number of so many bytes, little-endian, after it."""

    def __init__(self, opcode: bytes, size: int, column: Tensor) -> None:
        self.text = opcode + bytes(size)
        self.at = len(opcode)
        # int64, of which the first bytes are kept.
        self.content = column.contiguous().view(torch.uint8).view(-1, 8)[:, :size]


class _Stream:
    """A pickle in pieces with one memo. What `of` gives belongs into it in the order of the calls."""

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = [_HEAD]
        self._buffer = io.BytesIO()
        self._pickler = pickle.Pickler(self._buffer, _PROTOCOL)

    def of(self, value: Any) -> bytes:
        """What leaves a value on the stack."""
        self._buffer.seek(0)
        self._buffer.truncate()
        self._pickler.dump(value)
        return self._buffer.getvalue()[len(_HEAD) : -len(_STOP)]

    def keep(self, values: Sequence[Any]) -> list[int]:
        """Writes values for later. Returns their numbers in the memo."""
        self.pieces += (self.of(list(values)), _POP)
        memo = self._pickler.memo.copy()
        try:
            return [memo[id(value)][0] for value in values]
        except KeyError as error:
            raise Unknown("not every object is in the pickler's memo") from error

    def instance(self, probe: Any, *slots: str) -> list[Any]:
        """The bytes that make a copy of a probe, with the names of some attributes in place of their
        values."""
        kind, state = _state(probe)
        if type(state) is not dict or not state.keys() >= set(slots):
            raise Unknown(f"{kind.__name__} has the attributes {state}")
        others = {type(value) for name, value in state.items() if name not in slots}
        if not others <= {type(None), bool, int}:  # those are not in the memo, wherever they stand
            raise Unknown(f"{kind.__name__} has the attributes {state}")
        self.keep([kind, *state])
        pieces: list[Any] = [self.of(kind) + _NEW + _DICT + _MARK]
        for name, value in state.items():
            pieces += (self.of(name), name if name in slots else self.of(value))
        return [*pieces, _SET_ITEMS + _BUILD]

    def copy(self, probe: Any) -> bytes:
        """The bytes that make a copy of a probe with the same objects in it."""
        kind, state = _state(probe)
        return b"".join((_get(self.keep([kind])[0]), _NEW, _get(self.keep([state])[0]), _BUILD))


def _state(probe: Any) -> tuple[type, Any]:
    """The class of an instance, and what pickle keeps of it."""
    make, args, *rest = probe.__reduce_ex__(_PROTOCOL)
    new_object = getattr(copyreg, "__newobj__")  # noqa: B009 (unknown to type checkers)
    if make is not new_object or args != (type(probe),) or not rest or any(rest[1:]):
        raise Unknown(f"{type(probe).__name__} is pickled as {(make, args, *rest)}")
    return type(probe), rest[0]


def _filled(pieces: Iterable[Any], values: Mapping[str, Any]) -> list[Any]:
    return [values[piece] if isinstance(piece, str) else piece for piece in pieces]


def _rows(pieces: Sequence[bytes | _Slot], count: int) -> tuple[memoryview, int]:
    """Rows of bytes that differ in their slots, and the length of one."""
    row = b"".join(piece if isinstance(piece, bytes) else piece.text for piece in pieces)
    data = bytearray(row) * count
    if count:
        table = torch.frombuffer(data, dtype=torch.uint8).view(count, len(row))
        at = 0
        for piece in pieces:
            if isinstance(piece, bytes):
                at += len(piece)
            else:
                table[:, at + piece.at : at + len(piece.text)] = piece.content
                at += len(piece.text)
    return memoryview(data), len(row)


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _memo(numbers: Tensor) -> _Slot:
    return _Slot(b"j", 4, numbers)


def _number(numbers: Tensor) -> _Slot:
    return _Slot(b"\x8a\x08", 8, numbers)  # an int of 8 bytes, however small it is


def _get(number: int) -> bytes:
    return struct.pack("<sI", b"j", number)


class _Sizes:
    """The shapes, starts and sizes of a plan, of which few differ, by their places in one list."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}

    def of(self, values: Iterable[tuple[int, ...]]) -> list[int]:
        """The places of some."""
        return [self.places.setdefault(value, len(self.places)) for value in values]


def pickled_metadata(
    plan: GlobalPlan, described: Metadata, plain: Mapping[str, tuple[Any, Any, Any]]
) -> bytes:
    """The pickle of a Metadata.

    Args:
        plan: of the tensors.
        described: the rest: all but `state_dict_metadata` and `storage_data`, which are not looked at.
        plain: (description, index, storage) of each value that is no tensor.

    Raises:
        Unknown: torch's objects are not pickled as is known here.
    """
    stream = _Stream()
    # The classes come first: their numbers in the memo then are the short ones.
    some = torch.Size((1,))
    outer = stream.instance(described, *vars(described))
    tensor_probe = TensorStorageMetadata(TensorProperties(), some, [])
    tensor = stream.instance(tensor_probe, "properties", "size", "chunks")
    chunk = stream.instance(ChunkStorageMetadata(some, some), "offsets", "sizes")
    index = stream.instance(MetadataIndex("", some, 0), "fqn", "offset", "index")
    info = stream.instance(_StorageInfo("", 0, 0), "relative_path", "offset", "length")

    kinds, ranks, offsets = plan.columns()
    entries = plan.entries.values()
    properties = {
        dtype: stream.copy(TensorProperties(dtype=dtype))
        for dtype in {entry.dtype: None for entry in entries}
    }
    sizes = _Sizes()
    shapes = sizes.of(entry.shape for entry in entries)
    boxes = {
        id(kind): (sizes.of(box.start for box in kind.boxes), sizes.of(box.size for box in kind.boxes))
        for kind in {id(kind): kind for kind in kinds}.values()
    }  # fmt: skip
    size_numbers = stream.keep([torch.Size(size) for size in sizes.places])
    name_numbers = stream.keep(list(plan.entries))
    files = [rank for rank, size in enumerate(plan.sizes) if size]
    file_numbers = torch.zeros(plan.world, dtype=torch.int64, device="cpu")
    file_numbers[_column(files)] = _column(stream.keep([data_file(rank) for rank in files]))

    size_column = _column(size_numbers)
    starts, lengths = (
        size_column[_column(list(chain.from_iterable(boxes[id(kind)][which] for kind in kinds)))]
        for which in (0, 1)
    )
    counts = [len(kind.boxes) for kind in kinds]
    names = _column(name_numbers).repeat_interleave(_column(counts))
    within = list(chain.from_iterable(map(range, counts)))
    records = torch.cat([kind.lengths for kind in kinds]) if kinds else _column([])

    chunk = _filled(chunk, {"offsets": _memo(starts), "sizes": _memo(lengths)})
    chunks, step = _rows(chunk, len(ranks))
    index = _filled(
        index,
        {"fqn": _memo(names), "offset": _memo(starts), "index": _Slot(b"J", 4, _column(within))},
    )
    info = _filled(
        info,
        {
            "relative_path": _memo(file_numbers[ranks]),
            "offset": _number(offsets),
            "length": _number(records),
        },
    )
    storage, _ = _rows(index + info, len(ranks))

    end = 0
    for piece in outer:
        if piece == "state_dict_metadata":
            stream.pieces += (_DICT, _MARK)
            rows = zip(entries, name_numbers, shapes, counts, strict=True)
            for entry, name, shape, count in rows:
                begin, end = end, end + count * step
                values = {
                    "properties": properties[entry.dtype],
                    "size": _get(size_numbers[shape]),
                    "chunks": b"".join((_LIST, _MARK, chunks[begin:end], _APPENDS)),
                }
                stream.pieces += (_get(name), *_filled(tensor, values))
            for key, (description, _, _) in plain.items():
                stream.pieces += (stream.of(key), stream.of(description))
            stream.pieces.append(_SET_ITEMS)
        elif piece == "storage_data":
            stream.pieces += (_DICT, _MARK, storage)
            for _, place, stored in plain.values():
                stream.pieces += (stream.of(place), stream.of(stored))
            stream.pieces.append(_SET_ITEMS)
        else:
            known = isinstance(piece, bytes)
            stream.pieces.append(piece if known else stream.of(getattr(described, piece)))
    return b"".join([*stream.pieces, _STOP])
