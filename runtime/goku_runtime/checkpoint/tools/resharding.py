"""Rewriting a checkpoint as another number of ranks would have written it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.tensor import Replicate, Shard

from goku_runtime.checkpoint import dcp_metadata, index
from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.directory import NewDirectory, check_name, write_durably
from goku_runtime.checkpoint.layout import STATE_NAME
from goku_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    FileSum,
    Manifest,
    file_problems,
    raise_problems,
)
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.plan import Described, GlobalPlan, Image, Mesh, make_plan
from goku_runtime.checkpoint.stored import sums_name
from goku_runtime.checkpoint.tools.slabs import SLAB_BYTES
from goku_runtime.checkpoint.tools.source import Source, check_outside, tensor_bytes
from goku_runtime.checkpoint.tools.streaming import Elements, FileStream, Piece
from goku_runtime.checkpoint.tree import to_json

__all__ = ["Resharded", "reshard"]


@dataclass(frozen=True)
class Resharded:
    """What `reshard` wrote.

    Attributes:
        path: the new checkpoint.
        data_files: how many hold tensors; no more than ranks.
        nbytes: of all files but the manifest.
    """

    path: Path
    data_files: int
    nbytes: int


def reshard(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    ranks: int,
    dp_shard: int | None = None,
    whole_below: int = 0,
    options: CheckpointOptions | None = None,
    window_bytes: int = SLAB_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Resharded:
    """Writes a checkpoint anew as `ranks` ranks would have: tensors divided by rows, as FSDP2 does.

    Tensors are divided on dimension 0 by torch's chunk rule: n parts of ceil(rows / n) rows, the last
    ones shorter or absent. Scalars, and what is below `whole_below`, are written whole, by the ranks in
    turn. Contents and plain values stay the same; a checkpoint of version 1 becomes one of version 2.

    Args:
        path: a checkpoint of any version.
        target: the directory to make; its parents are made.
        ranks: that write a file each. 1 merges all files into one.
        dp_shard: how many ranks share a tensor; the others would hold the same, and are given parts to
            write so that files are about as large. None: all.
        whole_below: bytes; smaller tensors are not divided.
        options: of files.
        window_bytes: of the file in memory at once (three of them); a multiple of 64 KiB.
        progress: called with the bytes written and all bytes.

    Raises:
        ValueError: `ranks`, `dp_shard` or a target that is not allowed.
        FileExistsError: something is at `target`.
        CheckpointError: no checkpoint, or a damaged one. Nothing stays of the new one.
        OSError: as the system raises it. The same.
    """
    plan_shape = _checked(ranks, dp_shard, whole_below)
    options = options or CheckpointOptions()
    check_name(Path(os.path.abspath(target)))
    check_outside(path, target)
    source = Source.open(path)
    plan = _plan(source, ranks, plan_shape, whole_below)
    total, done = sum(plan.sizes), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    directory = NewDirectory(Path(os.path.abspath(target)), overwrite=False, fsync=options.fsync)
    try:
        with options.engine() as engine:
            stream = FileStream(engine, source, window_bytes=window_bytes)
            sums: dict[str, FileSum] = {}
            for rank, size in enumerate(plan.sizes):
                if size:
                    image = plan.local(rank)
                    found, crcs = stream.write(
                        directory.path / image.file,
                        list(_pieces(image)),
                        fsync=options.fsync,
                        advance=advance,
                    )
                    sums[image.file] = found
                    _write(directory.path, {sums_name(image.file): crcs}, sums, options)
        contents = {
            index.INDEX_NAME: index.to_json(plan),
            **dcp_metadata.files(plan, source.tree),
            STATE_NAME: to_json(source.tree).encode(),
        }
        _write(directory.path, contents, sums, options)
        manifest = Manifest.of(sums)
        write_durably(directory.path / MANIFEST_NAME, manifest.to_bytes(), fsync=options.fsync)
        raise_problems(directory.path, file_problems(directory.path, manifest, sums=False))
        directory.publish()
    except BaseException:
        directory.discard()
        raise
    written = sum(each.size for each in sums.values())
    return Resharded(directory.target, sum(map(bool, plan.sizes)), written)


def _checked(ranks: int, dp_shard: int | None, whole_below: int) -> tuple[int, ...]:
    """The shape of the mesh."""
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; allowed: >= 1")
    if dp_shard is not None and (dp_shard < 1 or ranks % dp_shard):
        raise ValueError(f"dp_shard is {dp_shard}; allowed: divisors of ranks, which is {ranks}")
    if whole_below < 0:
        raise ValueError(f"whole_below is {whole_below}; allowed: >= 0 bytes")
    if dp_shard is None or dp_shard == ranks:
        return (ranks,)
    return ranks // dp_shard, dp_shard


def _plan(source: Source, ranks: int, shape: tuple[int, ...], whole_below: int) -> GlobalPlan:
    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    mesh = Mesh(shape, tuple(range(ranks)), names)
    placements = (*(Replicate() for _ in shape[1:]), Shard(0))
    tensors = {
        name: Described(tensor.dtype, tensor.shape, mesh, placements)
        if tensor.shape and tensor_bytes(tensor) >= whole_below
        else tensor
        for name, tensor in source.tensors.items()
    }
    return make_plan(tensors, world=ranks)


def _pieces(image: Image) -> Iterator[Piece]:
    """A rank's file: each record's bytes around its payload, and zeros up to the next."""
    ends = [record.offset for record in image.records[1:]] + [image.nbytes]
    for record, end in zip(image.records, ends, strict=True):
        before, after = record.skeleton.before, record.skeleton.after
        last = record.payload + record.nbytes
        yield Piece(record.offset, len(before), before)
        yield Piece(record.payload, record.nbytes, Elements(record.name, record.box, record.dtype))
        yield Piece(last, end - last, after.ljust(end - last, b"\0"))


def _write(
    directory: Path,
    contents: dict[str, bytes],
    sums: dict[str, FileSum],
    options: CheckpointOptions,
) -> None:
    for name, data in contents.items():
        write_durably(directory / name, data, fsync=options.fsync)
        sums[name] = FileSum(len(data), crc32c(data))
