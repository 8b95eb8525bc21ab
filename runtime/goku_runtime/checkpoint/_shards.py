"""Which box of a DTensor each rank holds, from its mesh and placements alone.

torch's rules: placements divide the tensor in the order of the mesh's dimensions, each what the ones
before left. `Shard(d)` cuts axis d as torch.chunk does: n parts of ceil(length / n), the last ones
shorter or empty. `_StridedShard(d, f)`, which FSDP2 uses over tensor parallelism, first cuts f
pieces, each of them into n, and a rank holds its part of every piece. That is one box only where a
later `Shard(d)` divides by the f pieces again (and the lengths allow it); all else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from goku_runtime.checkpoint._boxes import Box

__all__ = [
    "Described",
    "GridLayout",
    "Layout",
    "Mesh",
    "Spec",
    "coordinate_index",
    "mesh_of",
    "spec_of",
]


class Mesh(NamedTuple):
    """A mesh of ranks.

    Attributes:
        shape: its sizes.
        ranks: the global ranks, row-major.
        names: of its dimensions, if they have any.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Described:
    """A tensor or DTensor without its elements.

    Attributes:
        dtype: of its elements.
        shape: of the whole tensor.
        mesh: None for a tensor that every rank holds whole.
        placements: torch's, one for each dimension of the mesh.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    mesh: Mesh | None = None
    placements: tuple[Any, ...] = ()


class Split(NamedTuple):
    """One placement: the axis that it divides (None: it does not), and the pieces it cuts first."""

    axis: int | None
    pieces: int = 1


class Spec(NamedTuple):
    """What decides where a tensor's elements lie: shape, mesh (None: everywhere) and placements."""

    shape: tuple[int, ...]
    mesh: Mesh | None
    splits: tuple[Split, ...]


def mesh_of(mesh: Any, known: dict[int, tuple[Any, Mesh]]) -> Mesh:
    """A DeviceMesh as a Mesh. `known` remembers by identity: reading thousands of ranks takes time."""
    if isinstance(mesh, Mesh):
        return mesh
    found = known.get(id(mesh))
    if found is None:
        ranks = mesh.mesh
        names = mesh.mesh_dim_names
        value = Mesh(
            tuple(ranks.shape), tuple(ranks.flatten().tolist()), tuple(names) if names else None
        )
        found = known[id(mesh)] = (mesh, value)
    return found[1]


def spec_of(name: str, tensor: Tensor | Described, known: dict[int, tuple[Any, Mesh]]) -> Spec:
    """The spec of a tensor.

    Raises:
        ValueError: a placement that is not supported; `name`, the placement and why.
    """
    shape = tuple(tensor.shape)
    if isinstance(tensor, Described):
        if tensor.mesh is None:
            return Spec(shape, None, ())
        mesh, placements = mesh_of(tensor.mesh, known), tensor.placements
    elif type(tensor) in (Tensor, nn.Parameter) or not _is_dtensor(tensor):
        return Spec(shape, None, ())
    else:
        spread: Any = tensor
        mesh, placements = mesh_of(spread.device_mesh, known), tuple(spread.placements)
        _check_order(name, spread)
    if len(placements) != len(mesh.shape):
        raise ValueError(
            f"{name}: {len(placements)} placements on a mesh of shape {mesh.shape}; allowed: one for "
            "each of its dimensions"
        )
    return Spec(shape, mesh, tuple(_split(name, each, len(shape)) for each in placements))


def _is_dtensor(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor  # slow to import, and seldom needed

    return isinstance(tensor, DTensor)


def _check_order(name: str, tensor: Any) -> None:
    """Newer torch can divide an axis in another order than that of the mesh."""
    for entry in getattr(tensor._spec, "shard_order", None) or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            raise ValueError(
                f"{name}: axis {entry.tensor_dim} is sharded over the mesh dimensions "
                f"{tuple(entry.mesh_dims)} in this order; allowed: ascending"
            )


def _split(name: str, placement: Any, axes: int) -> Split:
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    # In some versions of torch a _StridedShard is a Shard too.
    if type(placement) is Replicate:
        return Split(None)
    if type(placement) in (Shard, _StridedShard):
        axis = placement.dim + axes if placement.dim < 0 else placement.dim
        if not 0 <= axis < axes:
            raise ValueError(f"{name}: {placement} of a tensor with {axes} axes")
        return Split(axis, int(placement.split_factor) if type(placement) is _StridedShard else 1)
    raise ValueError(
        f"{name}: the placement {placement} cannot be saved; allowed: Replicate, Shard and "
        "_StridedShard (redistribute the tensor first)"
    )


# --- one axis ---------------------------------------------------------------------------------------


Ranges = list[tuple[int, int]]


def _chunks(length: int, count: int) -> Ranges:
    """(begin, end) of torch.chunk's parts, the empty ones too."""
    step = -(-length // count)
    return [(min(i * step, length), min((i + 1) * step, length)) for i in range(count)]


@lru_cache(maxsize=4096)
def _divided(length: int, cuts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...] | None:
    """(start, size) of each part of an axis that is cut again and again, the last cut fastest.

    Args:
        length: of the axis.
        cuts: (parts, pieces) of each cut.

    Returns:
        None where a part is not one range.
    """
    parts: list[Ranges] = [[(0, length)]]  # each a list of (start, size)
    for count, pieces in cuts:
        parts = [part for whole in parts for part in _cut(whole, count, pieces)]
    if any(len(part) > 1 for part in parts):
        return None
    return tuple(part[0] if part else (length, 0) for part in parts)


def _cut(ranges: Ranges, count: int, pieces: int) -> list[Ranges]:
    length = sum(size for _, size in ranges)
    if pieces == 1 and len(ranges) == 1:
        first = ranges[0][0]
        return [[(first + a, b - a)] if b > a else [] for a, b in _chunks(length, count)]
    parts: list[Ranges] = [[] for _ in range(count)]
    for begin, end in _chunks(length, pieces):
        for part, (a, b) in zip(parts, _chunks(end - begin, count), strict=True):
            for start, size in _taken(ranges, begin + a, begin + b):
                if part and sum(part[-1]) == start:
                    part[-1] = (part[-1][0], part[-1][1] + size)
                else:
                    part.append((start, size))
    return parts


def _taken(ranges: Ranges, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Elements begin to end of the sequence that ranges are."""
    at = 0
    for start, size in ranges:
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            yield start + low - at, high - low
        at += size


# --- all axes ---------------------------------------------------------------------------------------


class Layout:
    """The boxes of a tensor, in row-major order of their starts; many share few sizes.

    Attributes:
        sizes: the sizes that occur, and perhaps some that do not.
        codes: (boxes,) int64, the index of each box's size.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        table: dict[tuple[int, ...], int] = {}
        codes = [table.setdefault(box.size, len(table)) for box in boxes]
        self.sizes = list(table)
        self.codes = torch.tensor(codes, dtype=torch.int64, device="cpu")
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self.codes)

    def box(self, index: int) -> Box:
        """One of the boxes."""
        return self._boxes[index]

    def boxes(self) -> Iterator[Box]:
        """All of them, the empty ones too."""
        return iter(self._boxes)


class GridLayout(Layout):
    """The boxes that a spec makes: the product of the ranges of each axis.

    Args:
        spec: of a tensor that is no tensor of zero elements.

    Attributes:
        order: of the mesh's dimensions: those that divide axis 0, axis 1 and so on, then those that
            replicate. In that order the ranks of the mesh are (boxes, replicas), row-major.

    Raises:
        ValueError: a rank holds more than one box.
    """

    def __init__(self, spec: Spec) -> None:
        mesh_shape = spec.mesh.shape if spec.mesh else ()
        self.order: list[int] = []
        self._axes: list[tuple[tuple[int, int], ...]] = []
        for axis, length in enumerate(spec.shape):
            dims = [dim for dim, split in enumerate(spec.splits) if split.axis == axis]
            cuts = tuple((mesh_shape[dim], spec.splits[dim].pieces) for dim in dims)
            ranges = _divided(length, cuts)
            if ranges is None:
                raise ValueError(
                    f"axis {axis} of length {length} is split by _StridedShard into parts that are "
                    f"not one range (over {cuts}, as (ranks, pieces)); allowed: one range a rank"
                )
            self._axes.append(ranges)
            self.order += dims
        self.order += [dim for dim, split in enumerate(spec.splits) if split.axis is None]
        self.sizes, self.codes = self._sizes()

    def _sizes(self) -> tuple[list[tuple[int, ...]], Tensor]:
        codes = torch.zeros(1, dtype=torch.int64, device="cpu")
        sides: list[list[int]] = []
        for ranges in self._axes:
            table: dict[int, int] = {}
            each = [table.setdefault(size, len(table)) for _, size in ranges]
            own = torch.tensor(each, dtype=torch.int64, device="cpu")
            codes = (codes[:, None] * len(table) + own).flatten()
            sides.append(list(table))
        return list(product(*sides)), codes

    def box(self, index: int) -> Box:
        start, size = [], []
        for ranges in reversed(self._axes):
            index, at = divmod(index, len(ranges))
            start.append(ranges[at][0])
            size.append(ranges[at][1])
        return Box(tuple(reversed(start)), tuple(reversed(size)))

    def boxes(self) -> Iterator[Box]:
        if not self._axes:
            yield Box((), ())
            return
        for sides in product(*self._axes):
            start, size = zip(*sides, strict=True)
            yield Box(start, size)


def coordinate_index(spec: Spec, layout: GridLayout, rank: int) -> int | None:
    """Which box a global rank holds; None for a rank outside of the mesh."""
    if spec.mesh is None:
        return 0
    if rank not in spec.mesh.ranks:
        return None
    at, coordinate = spec.mesh.ranks.index(rank), []
    for size in reversed(spec.mesh.shape):
        at, place = divmod(at, size)
        coordinate.append(place)
    coordinate.reverse()
    index = 0
    for dim in layout.order:
        if spec.splits[dim].axis is not None:
            index = index * spec.mesh.shape[dim] + coordinate[dim]
    assert index < len(layout)
    return index
