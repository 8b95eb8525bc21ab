"""Records: what `torch.save` writes for one contiguous tensor, taken apart around its payload.

A record is a zip archive. All of it but the payload follows from the tensor's dtype and shape, so it
is made without the tensor: a `Skeleton` holds the bytes before and after. Stock `torch.load` and
`torch.distributed.checkpoint` read before + payload + after.

The archive's pickle and small entries are taken over from a real `torch.save` of a probe, once for
each dtype in a process, and the probe is put together again from its parts: only where that gives
back every byte are skeletons made. Elsewhere (a torch whose archives are laid out differently)
records are `plain`: cut out of a `torch.save` of zeros, which takes the time and memory of the
payload; the log says so.

The zip CRC-32 of the payload is not maintained: it is 0, and so is the archive's serialization id.
torch reads neither; tools for zip files call the entry damaged. CRC-32C of the file is kept elsewhere.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

__all__ = ["ALIGNMENT", "DTYPES", "Skeleton", "dtype_name", "skeleton"]

logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""Payloads begin at multiples of this many bytes in their record: torch's default for storages."""

_NAMES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16",
    "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "complex32", "complex64", "complex128",
)  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in _NAMES
    if isinstance(getattr(torch, name, None), torch.dtype)
}
"""What a record can hold, by the dtype's name without `torch.`."""

_PAYLOAD, _PICKLE, _ID = "data/0", "data.pkl", ".data/serialization_id"
_PROBE = (3, 2)
_LIMIT = 0xFFFFFFFF  # from here on zip needs its 64-bit fields


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A record without its payload.

    Attributes:
        before: what stands before the payload; a multiple of 64 bytes unless the record is plain.
        nbytes: the payload: the tensor's elements, row-major, in the machine's byte order.
        after: what stands after it.
    """

    before: bytes
    nbytes: int
    after: bytes

    @property
    def length(self) -> int:
        """Bytes of the whole record."""
        return len(self.before) + self.nbytes + len(self.after)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`, a key of DTYPES.

    Raises:
        ValueError: records of this dtype are not written.
    """
    name = str(dtype).removeprefix("torch.")
    if DTYPES.get(name) != dtype:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(DTYPES)}")
    return name


@lru_cache(maxsize=1 << 16)
def skeleton(dtype: torch.dtype, shape: tuple[int, ...]) -> Skeleton:
    """The record of a contiguous tensor, the same bytes for the same torch, dtype and shape.

    Nothing of the payload's size is allocated. The same object comes back for the same arguments.

    Raises:
        ValueError: a dtype that is not in DTYPES, a negative size, or 2**63 bytes and more.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}; allowed: sizes >= 0")
    nbytes = math.prod(shape) * DTYPES[dtype_name(dtype)].itemsize
    if nbytes >= 1 << 63:
        raise ValueError(f"shape is {tuple(shape)}, {nbytes} bytes; allowed: less than 2**63")
    template = _template(dtype)
    if template is None:
        return _plain(dtype, shape)
    # Another object than `stride` even where they are equal: pickle would write a reference.
    sizes = tuple([*shape])
    entries = [
        _Entry(each.name, template.pickled(sizes), None) if each.name == _PICKLE
        else _Entry(each.name, nbytes, 0) if each.name == _PAYLOAD
        else _Entry(each.name, _fixed(each), None)
        for each in template.entries
    ]  # fmt: skip
    return _assembled(template.prefix, entries, ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of the archive: its bytes (of the payload only how many) and CRC-32 (None: compute)."""

    name: str
    content: bytes | int
    crc: int | None


def _fixed(entry: _Entry) -> bytes:
    """A small entry as every record has it, whatever options of `torch.save` the caller has set."""
    assert isinstance(entry.content, bytes)
    if entry.name == ".storage_alignment":
        return str(ALIGNMENT).encode()
    if entry.name == _ID:  # a hash of the entries' CRCs
        return b"0" * len(entry.content)
    return entry.content


@dataclass(frozen=True, slots=True)
class _Template:
    """What `torch.save` wrote for a probe of a dtype.

    Attributes:
        prefix: the archive's folder.
        entries: its files in order.
        rebuild: the function that makes a tensor from a storage and `rest`.
        storage: the storage's persistent id without its number of elements.
        per_element: that number for each element of the tensor.
        rest: the arguments of `rebuild` after storage, offset, shape and strides.
    """

    prefix: str
    entries: tuple[_Entry, ...]
    rebuild: Any
    storage: tuple[Any, ...]
    per_element: int
    rest: tuple[Any, ...]

    def pickled(self, shape: tuple[int, ...]) -> bytes:
        """data.pkl of a contiguous tensor."""
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        hooks, *others = self.rest[1:]
        assert hooks == OrderedDict()
        rest = (self.rest[0], OrderedDict(), *others)
        stream = io.BytesIO()
        pickler = _Pickler(stream, protocol=2)
        pickler.pid = (*self.storage, math.prod(shape) * self.per_element)
        pickler.dump(_Call(self.rebuild, (_STORAGE, 0, shape, tuple(reversed(strides)), *rest)))
        return stream.getvalue()


class _Storage:
    """Stands for the tensor's storage in the pickle."""


_STORAGE = _Storage()


class _Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, args: tuple[Any, ...]) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _Pickler(pickle.Pickler):
    pid: tuple[Any, ...]

    def persistent_id(self, obj: Any) -> Any:
        return self.pid if obj is _STORAGE else None


class _Unpickler(pickle.Unpickler):
    """Takes apart what this process has just pickled, without making the tensor."""

    pid: tuple[Any, ...]

    def persistent_load(self, pid: Any) -> Any:
        self.pid = pid
        return _STORAGE

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if name.startswith("_rebuild"):
            return lambda *args: (found, args)
        return found


@cache
def _template(dtype: torch.dtype) -> _Template | None:
    """The template of a dtype; None where an archive cannot be put together from its parts."""
    probe = _zeros(dtype, _PROBE)
    stream = io.BytesIO()
    torch.save(probe, stream)
    try:
        template, alignment = _taken_apart(stream)
        whole = _assembled(template.prefix, template.entries, alignment)
        again = whole.before + bytes(whole.nbytes) + whole.after
        pickled = next(each.content for each in template.entries if each.name == _PICKLE)
        same = again == stream.getvalue() and template.pickled(_PROBE) == pickled
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        logger.warning("records of %s are plain, which is slow: %r", dtype, error)
        return None
    if not same:
        logger.warning(
            "records of %s are plain, which is slow: torch %s lays archives out in a way that is "
            "not known here", dtype, torch.__version__,
        )  # fmt: skip
        return None
    return template


def _taken_apart(stream: io.BytesIO) -> tuple[_Template, int]:
    """The template of a probe's archive, and the alignment with which it was written."""
    entries, prefix = [], ""
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            prefix, _, name = info.filename.partition("/")
            with stream.getbuffer() as view:
                begin = _content_offset(view, info.header_offset)
                content = bytes(view[begin : begin + info.file_size])
            entries.append(_Entry(name, len(content) if name == _PAYLOAD else content, info.CRC))
    found = {entry.name: entry.content for entry in entries}
    pickled, stated = found[_PICKLE], found.get(".storage_alignment", b"64")
    assert isinstance(pickled, bytes)
    assert isinstance(stated, bytes)
    unpickler = _Unpickler(io.BytesIO(pickled))
    rebuild, (_, offset, shape, _, *rest) = unpickler.load()
    per_element, remainder = divmod(unpickler.pid[-1], math.prod(_PROBE))
    if offset != 0 or shape != _PROBE or remainder:
        raise ValueError(f"a pickle of {shape} at {offset}, {unpickler.pid[-1]} elements")
    template = _Template(
        prefix, tuple(entries), rebuild, unpickler.pid[:-1], per_element, tuple(rest)
    )
    return template, int(stated)


def _content_offset(view: memoryview, header: int) -> int:
    """Where the bytes of an entry begin, from its local header."""
    name, extra = struct.unpack_from("<HH", view, header + 26)
    return int(header + 30 + name + extra)


def _assembled(prefix: str, entries: Sequence[_Entry], alignment: int) -> Skeleton:
    """A zip archive of stored entries, as torch writes it: every content aligned by a field `FB` of
    filler in its local header, sizes and CRC after the content, a 64-bit directory end."""
    parts: list[bytes] = []
    before, at, directory, nbytes = b"", 0, [], 0
    for entry in entries:
        payload = isinstance(entry.content, int)
        size = entry.content if isinstance(entry.content, int) else len(entry.content)
        crc = entry.crc
        if crc is None:
            assert isinstance(entry.content, bytes)
            crc = zlib.crc32(entry.content)
        name = f"{prefix}/{entry.name}".encode()
        # The local header leaves the stored size to what stands after the content.
        wide, local = _wide(size, size, at), _wide(size, 0, at)
        filler = -(at + 30 + len(name) + len(wide) + 4) % alignment
        extra = local + b"FB" + struct.pack("<H", filler) + b"Z" * filler
        # Nothing stands after an empty entry, and a flag says so.
        flags = 0x808 if size else 0x800
        header = struct.pack(
            "<4sHHHHHLLLHH", b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)
        )
        sums = "<4sLQQ" if wide else "<4sLLL"
        descriptor = struct.pack(sums, b"PK\x07\x08", crc, size, size) if size else b""
        parts += (header, name, extra)
        if payload:
            before, nbytes = b"".join(parts), size
            parts = [descriptor]
        else:
            assert isinstance(entry.content, bytes)
            parts += (entry.content, descriptor)
        short = min(size, _LIMIT)
        directory.append(
            struct.pack(
                "<4sHHHHHHLLLHHHHHLL", b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc, short, short,
                len(name), len(wide), 0, 0, 0, 0, min(at, _LIMIT),
            )
            + name
            + wide
        )  # fmt: skip
        at += len(header) + len(name) + len(extra) + size + len(descriptor)
    listing = b"".join(directory)
    count, end = len(entries), at + len(listing)
    wide_end = struct.pack(
        "<4sQHHLLQQQQ", b"PK\x06\x06", 44, 0x31E, 45, 0, 0, count, count, len(listing), at
    )
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    short_end = struct.pack(
        "<4sHHHHLLH", b"PK\x05\x06", 0, 0, count, count, len(listing), min(at, _LIMIT), 0
    )
    return Skeleton(before, nbytes, b"".join([*parts, listing, wide_end, locator, short_end]))


def _wide(size: int, stored: int, at: int) -> bytes:
    """The extra field with what 32 bits do not hold; empty where they hold all of it."""
    fields = struct.pack("<QQ", size, stored) if size >= _LIMIT else b""
    fields += struct.pack("<Q", at) if at >= _LIMIT else b""
    return struct.pack("<HH", 1, len(fields)) + fields if fields else b""


def _zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    # Not every dtype can be filled with zeros; every one can be a view of bytes.
    count = math.prod(shape) * dtype.itemsize
    return torch.zeros(count, dtype=torch.uint8, device="cpu").view(dtype).view(shape)


def _plain(dtype: torch.dtype, shape: tuple[int, ...]) -> Skeleton:
    """The skeleton cut out of a whole record of zeros."""
    stream = io.BytesIO()
    torch.save(_zeros(dtype, shape), stream)
    with zipfile.ZipFile(stream) as archive:
        info = next(each for each in archive.infolist() if each.filename.endswith(f"/{_PAYLOAD}"))
    with stream.getbuffer() as view:
        begin = _content_offset(view, info.header_offset)
        before, after = bytes(view[:begin]), bytes(view[begin + info.file_size :])
    return Skeleton(before, info.file_size, after)
