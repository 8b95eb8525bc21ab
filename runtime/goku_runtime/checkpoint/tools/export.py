"""Safetensors files out of a checkpoint, in the folders that the Hugging Face libraries read.

The format: 8 bytes with the header's length, little-endian; the header, JSON padded with spaces, which
gives each tensor's dtype, shape and bytes; then the tensors' elements, row-major, without gaps.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch

from goku_runtime.checkpoint._boxes import whole
from goku_runtime.checkpoint.directory import NewDirectory, write_durably
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.plan import Described
from goku_runtime.checkpoint.tools.slabs import SLAB_BYTES
from goku_runtime.checkpoint.tools.source import Source, check_outside, tensor_bytes
from goku_runtime.checkpoint.tools.streaming import Elements, FileStream, Piece

__all__ = ["DTYPES", "FORMATS", "MAX_SHARD_SIZE", "Exported", "export"]

FORMATS = {"safetensors": "model", "diffusers": "diffusion_pytorch_model"}
"""How files are named in each."""

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""What elements can be converted to."""

MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of a file, as in Hugging Face's own."""

CONFIG_NAME = "config.json"
_CODES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
}  # fmt: skip
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the folder, and the tensors in each of its files (names as they are there)."""

    path: Path
    files: Mapping[str, Sequence[str]]
    nbytes: int


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Literal["safetensors", "diffusers"] = "safetensors",
    prefix: str = "",
    tensors: str = "*",
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    config: str | os.PathLike[str] | None = None,
    options: CheckpointOptions | None = None,
    window_bytes: int = SLAB_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes a checkpoint's tensors as a new folder of safetensors files.

    One file bears the plain name; of several each has its number in it, and an index of them lies beside.

    Args:
        path: a checkpoint of any version.
        target: the folder to make; its parents are made.
        format: "diffusers" names files as its models do, and needs a config.
        prefix: only tensors whose names begin with it; it is taken off.
        tensors: only those whose names, without the prefix, match this shell pattern.
        dtype: floating-point tensors are converted to it (rounded to nearest); others stay.
        max_shard_size: bytes of tensors in one file; a larger tensor has one to itself.
        config: a JSON file that becomes config.json.
        options: of files.
        window_bytes: of the file in memory at once (three of them); a multiple of 64 KiB.
        progress: called with the bytes written and all bytes.

    Raises:
        ValueError: nothing to export, a target inside of the checkpoint, a dtype that safetensors has
            not, a value beyond the dtype asked for, a config that is none; named.
        FileExistsError: something is at `target`.
        CheckpointError: no checkpoint, or a damaged one. Nothing stays of the folder.
        OSError: as the system raises it. The same.
    """
    _check(format, dtype, max_shard_size, config)
    folder = Path(os.path.abspath(target))
    if folder.suffix == ".safetensors":
        raise ValueError(f"target is {folder.name!r}; allowed: the name of a folder, which is made")
    settings = None if config is None else _config(Path(config))
    options = options or CheckpointOptions()
    check_outside(path, target)
    source = Source.open(path)
    chosen = _chosen(source, prefix, tensors, dtype)
    shards = _shards(chosen, max_shard_size)
    names = _file_names(FORMATS[format], len(shards))
    files = {name: _pieces(shard) for name, shard in zip(names, shards, strict=True)}
    total, done = sum(pieces[-1].end for pieces in files.values()), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    directory = NewDirectory(folder, overwrite=False, fsync=options.fsync)
    try:
        with options.engine() as engine:
            stream = FileStream(engine, source, window_bytes=window_bytes)
            for name, pieces in files.items():
                stream.write(directory.path / name, pieces, fsync=options.fsync, advance=advance)
        written = dict(zip(names, ([each.name for each in shard] for shard in shards), strict=True))
        if len(shards) > 1:
            text = _index(written, sum(each.nbytes for shard in shards for each in shard))
            place = directory.path / f"{FORMATS[format]}.safetensors.index.json"
            write_durably(place, text, fsync=options.fsync)
        if settings is not None:
            write_durably(directory.path / CONFIG_NAME, settings, fsync=options.fsync)
        directory.publish()
    except BaseException:
        directory.discard()
        raise
    return Exported(directory.target, written, total)


@dataclass(frozen=True)
class _Exported:
    """A tensor on its way: its name there, its name here, and what it will be."""

    name: str
    stored: str
    tensor: Described

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.tensor)


def _check(
    format: str,
    dtype: torch.dtype | None,
    max_shard_size: int,
    config: str | os.PathLike[str] | None,
) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(DTYPES)}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}; allowed: >= 1 byte")
    if format == "diffusers" and config is None:
        raise ValueError("config is not given; a diffusers folder needs the model's config.json")


def _config(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path} holds a {type(content).__name__}; allowed: an object")
    return data


def _chosen(
    source: Source, prefix: str, pattern: str, dtype: torch.dtype | None
) -> list[_Exported]:
    found = []
    for stored, tensor in source.tensors.items():
        name = stored.removeprefix(prefix)
        if not stored.startswith(prefix) or not fnmatchcase(name, pattern):
            continue
        if name in ("", _METADATA):
            raise ValueError(f"{stored}: its name would be {name!r}, which safetensors cannot have")
        kind = dtype if dtype is not None and _is_convertible(tensor.dtype) else tensor.dtype
        if kind not in _CODES:
            known = ", ".join(str(each).removeprefix("torch.") for each in _CODES)
            raise ValueError(f"{stored}: dtype is {tensor.dtype}; allowed: {known}")
        found.append(_Exported(name, stored, Described(kind, tensor.shape)))
    if not found:
        heads = sorted({name.partition(".")[0] + "." for name in source.tensors if "." in name})
        there = f"prefixes there are {', '.join(heads[:16])}" if heads else "none has a prefix"
        raise ValueError(
            f"{source.directory} has no tensor with prefix {prefix!r} that matches {pattern!r}; {there}"
        )
    return found


def _is_convertible(dtype: torch.dtype) -> bool:
    # Of the formats in which an element holds two values torch converts none.
    return dtype.is_floating_point and "_x2" not in str(dtype)


def _shards(chosen: Sequence[_Exported], most: int) -> list[list[_Exported]]:
    """Files in the order of the state, each filled until the next tensor would be too much."""
    shards: list[list[_Exported]] = [[]]
    size = 0
    for each in chosen:
        if shards[-1] and size + each.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    return shards


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _pieces(shard: Sequence[_Exported]) -> list[Piece]:
    """A file: its header, then tensors of large elements first, so that all are aligned."""
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    placed = []
    at = 0
    for each in sorted(shard, key=lambda each: -each.tensor.dtype.itemsize):
        header[each.name] = {
            "dtype": _CODES[each.tensor.dtype],
            "shape": list(each.tensor.shape),
            "data_offsets": [at, at + each.nbytes],
        }
        placed.append((at, each))
        at += each.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(math.ceil((len(text) + 8) / 64) * 64 - 8)
    start = len(text) + 8
    pieces = [Piece(0, start, len(text).to_bytes(8, "little") + text)]
    for at, each in placed:
        elements = Elements(each.stored, whole(each.tensor.shape), each.tensor.dtype)
        pieces.append(Piece(start + at, each.nbytes, elements))
    return pieces


def _index(files: Mapping[str, Sequence[str]], nbytes: int) -> bytes:
    weights = {tensor: name for name, tensors in files.items() for tensor in tensors}
    content = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weights.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
