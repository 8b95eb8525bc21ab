"""What `bench.checkpoint` saves and loads: states of random bytes, where they go, how many processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

MEDIA = ("disk", "tmpfs")
DTYPE = torch.float32


@dataclass(frozen=True)
class Kind:
    """A state: `count` tensors of one shape."""

    name: str
    count: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.count * self.shape[0] * self.shape[1] * DTYPE.itemsize


KINDS = {
    kind.name: kind
    for kind in (
        Kind("64 x 16 MiB", 64, (2048, 2048)),
        Kind("20,000 x 52.5 KiB", 20_000, (128, 105)),
        Kind("512 x 16 MiB", 512, (2048, 2048)),  # 8 GiB, by --large
        Kind("8 x 1 MiB", 8, (512, 512)),  # for tests of the benchmark itself
    )
}
LARGE, SMALL, HUGE, TINY = KINDS


@dataclass(frozen=True)
class Case:
    """One case of the rates: a state, split over processes on its first dimension, and a medium."""

    kind: str
    processes: int
    medium: str

    @property
    def name(self) -> str:
        return f"{self.kind}, P={self.processes}"

    @property
    def nbytes(self) -> int:
        return KINDS[self.kind].nbytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cases(*, large: bool = False) -> list[Case]:
    """All cases, the ones of one process first."""
    found = [Case(kind, 1, medium) for kind in (LARGE, SMALL) for medium in MEDIA]
    found += [Case(LARGE, processes, medium) for processes in (2, 4) for medium in MEDIA]
    return found + ([Case(HUGE, 1, "disk")] if large else [])


def draw(kind: Kind, rank: int, processes: int, *, zeros: bool = False) -> dict[str, Any]:
    """A state of random bytes: tensors for one process, DTensors sharded on dim 0 for several."""
    rows, columns = kind.shape
    if rows % processes:
        raise ValueError(f"processes is {processes}: allowed are divisors of {rows}")
    local = (rows // processes, columns)
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, Tensor] = {}
    mesh = init_device_mesh("cpu", (processes,)) if processes > 1 else None
    for number in range(kind.count):
        # Memory of its own each, as parameters have.
        tensor = torch.empty(local, dtype=DTYPE)
        if zeros:
            tensor.zero_()
        else:  # any bits: as floats they are compared by their bits too
            bits = tensor.flatten().view(torch.int64)
            bits.random_(generator=generator)
        if mesh is not None:
            tensor = DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
        tensors[f"layers.{number}.weight"] = tensor
    return {"model": tensors}


def locals_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's tensors of a state, by name."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state["model"].items()
    }


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether two ranks' tensors are equal, bit by bit."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].view(torch.int32), tensor.view(torch.int32))
        for name, tensor in wanted.items()
    )


# ---- files ----


@contextmanager
def fresh(folder: Path, main: bool = True) -> Iterator[Path]:
    """A directory that is not there yet, for one checkpoint; `main` removes what was made."""
    path = folder / "checkpoint"
    try:
        yield path
    finally:
        barrier()
        if main:
            remove(path)
        barrier()


def remove(path: Path) -> None:
    """Removes a directory or file, all written first, so that no peer pays for what another left."""
    if path.exists():
        drop_cache(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    settle(path.parent)


def settle(folder: Path) -> None:
    """Waits until the file system has taken note of what was made or removed in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_cache(path: Path) -> None:
    """Puts all files below a path on the disk and out of the page cache (tmpfs has but that)."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def file_system(path: Path) -> str:
    """The type of the file system that a path lies on, as Linux says."""
    best, found = -1, "unknown"
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, place, kind, *_ = line.split()
        if path.resolve().is_relative_to(place) and len(place) > best:
            best, found = len(place), kind
    return found


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
