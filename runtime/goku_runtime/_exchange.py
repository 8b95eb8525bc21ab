"""All-to-all exchanges between "some tokens, all heads" and "all tokens, some heads".

`goku_runtime.sequence_parallel` is the public side. Here is what moves: which heads of which tensor
go to which rank (`HeadPlan`), the two exchanges, and their autograd. All lengths are Python ints
(SymInts under torch.compile), so nothing here waits for a device.

Shapes: S rows of a shard, R rows of all shards together, H heads of a tensor, and any further axes
that all tensors of an exchange share, for attention (head_dim,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = [
    "GatherRows",
    "HeadPlan",
    "HeadsToRows",
    "Route",
    "RowsToHeads",
    "check_served",
    "membership",
    "plan_heads",
    "split_evenly",
]


def membership(group: ProcessGroup | None) -> tuple[int, int, str, frozenset[str] | None]:
    """(rank, size, name, device types that are served); None serves all."""
    if group is None:
        return 0, 1, "", None
    # What new_group returns to processes outside the group is no group but a number.
    if isinstance(group, int):
        raise ValueError("group: this process is not in it; only its members can use it")
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group is a {type(group).__name__}; a ProcessGroup is needed, of a DeviceMesh "
            "mesh.get_group('sp')"
        )
    size = group.size()
    if size == 1:
        return 0, 1, group.group_name, None
    # "cpu:gloo,cuda:nccl"
    backends = dist.get_backend_config(group).split(",")
    return group.rank(), size, group.group_name, frozenset(b.partition(":")[0] for b in backends)


def check_served(name: str, x: Tensor, devices: frozenset[str] | None) -> None:
    """Meta tensors hold nothing that could travel, so that every group serves them."""
    if devices is not None and x.device.type not in devices and x.device.type != "meta":
        raise ValueError(
            f"{name} is on {x.device}; the group serves {' and '.join(sorted(devices))}"
        )


def split_evenly(count: int, size: int, rank: int) -> range:
    """Part `rank` of range(count) in `size` parts: the first count % size parts have one more."""
    part, more = divmod(count, size)
    start = rank * part + min(rank, more)
    return range(start, start + part + (1 if rank < more else 0))


class Piece(NamedTuple):
    """Heads of one tensor for consecutive ranks with equally wide blocks: what one copy moves."""

    tensor: int  # which one
    ranks: int
    start: int  # its first head
    heads: int  # for each of these ranks
    shared: bool  # all these ranks have the same heads; otherwise each has the next ones
    before: int  # heads in the blocks of all earlier ranks
    width: int  # heads of all tensors in the block of each of these ranks
    offset: int  # where this tensor's heads begin in it

    @property
    def stop(self) -> int:
        return self.start + self.heads * (1 if self.shared else self.ranks)


class HeadPlan(NamedTuple):
    """Which heads go to which rank, for the tensors of one exchange. See `plan_heads`."""

    heads: tuple[int, ...]  # of each tensor
    widths: tuple[int, ...]  # by rank: its heads of all tensors together
    repeated: tuple[bool, ...]  # of each tensor: some head goes to several ranks
    pieces: tuple[Piece, ...]


class Route(NamedTuple):
    """One exchange of one process: a plan, and the rows of each rank."""

    plan: HeadPlan
    rows: tuple[int, ...]  # by rank: the rows that travel
    rank: int
    group_name: str


def plan_heads(ranges: Sequence[Sequence[range]]) -> HeadPlan:
    """The plan for ranges[tensor][rank], the heads that each rank has of each tensor.

    Every head is somebody's. The block for a rank holds its heads of the first tensor, then those
    of the second and so on, so that (rows, heads, ...) of all tensors is one contiguous piece.
    """
    size = len(ranges[0])
    shapes = [tuple(len(of_rank[rank]) for of_rank in ranges) for rank in range(size)]
    widths = [sum(shape) for shape in shapes]
    pieces = []
    for tensor, of_rank in enumerate(ranges):
        rank = 0
        while rank < size:
            # As many ranks as one strided copy can serve; 1 or 2 copies a tensor are the rule.
            heads, first = of_rank[rank], rank
            shared = rank + 1 < size and of_rank[rank + 1] == heads
            step = 0 if shared else len(heads)
            while rank < size and (
                shapes[rank] == shapes[first]
                and of_rank[rank].start == heads.start + step * (rank - first)
            ):
                rank += 1
            if heads:
                pieces.append(
                    Piece(
                        tensor=tensor,
                        ranks=rank - first,
                        start=heads.start,
                        heads=len(heads),
                        shared=shared,
                        before=sum(widths[:first]),
                        width=widths[first],
                        offset=sum(shapes[first][:tensor]),
                    )
                )
    totals = tuple(max(part.stop for part in of_rank) for of_rank in ranges)
    return HeadPlan(
        heads=totals,
        widths=tuple(widths),
        repeated=tuple(
            sum(map(len, of_rank)) > total for of_rank, total in zip(ranges, totals, strict=True)
        ),
        pieces=tuple(pieces),
    )


def _exchange(buffer: Tensor, receive: list[int], send: list[int], group_name: str) -> Tensor:
    """The one collective. Functional, so that it is traced, counted and named by policies."""
    # The functional collectives have no public home; these names are what torch.compile, selective
    # checkpointing and CommDebugMode know.
    received = torch.ops._c10d_functional.all_to_all_single(buffer, receive, send, group_name)
    return torch.ops._c10d_functional.wait_tensor(received)


def _block(buffer: Tensor, piece: Piece, rows: int, rest: Sequence[int]) -> Tensor:
    """The piece's part of a flat buffer of blocks: (ranks, rows, heads, *rest), a view."""
    unit = rows * math.prod(rest)
    flat = buffer.narrow(0, piece.before * unit, piece.ranks * piece.width * unit)
    return flat.view(piece.ranks, rows, piece.width, *rest).narrow(2, piece.offset, piece.heads)


def rows_to_heads(route: Route, tensors: Sequence[Tensor]) -> Tensor:
    """Send each rank its heads of my rows, of all tensors in one exchange.

    Args:
        route: the plan and the rows.
        tensors: (S, H_i, *rest) each.

    Returns:
        (R, this rank's heads of all tensors, *rest), contiguous, as it was received.
    """
    plan, rows, rank = route.plan, route.rows, route.rank
    mine, rest = rows[rank], tensors[0].shape[2:]
    unit = math.prod(rest)
    buffer = tensors[0].new_empty(mine * sum(plan.widths) * unit)
    for piece in plan.pieces:
        source = tensors[piece.tensor].narrow(0, 0, mine)[:, piece.start : piece.stop]
        if piece.shared:
            source = source.unsqueeze(0)  # copy_ broadcasts
        else:
            source = source.unflatten(1, (piece.ranks, piece.heads)).transpose(0, 1)
        _block(buffer, piece, mine, rest).copy_(source)
    width = plan.widths[rank]
    received = _exchange(
        buffer,
        [count * width * unit for count in rows],
        [mine * count * unit for count in plan.widths],
        route.group_name,
    )
    return received.view(sum(rows), width, *rest)


def heads_to_rows(route: Route, heads: Tensor, shard_rows: int) -> tuple[Tensor, ...]:
    """The transpose of `rows_to_heads`: send each rank its rows of my heads.

    A head that several ranks have is summed, in promote(dtype, float32); padding rows are 0.

    Args:
        route: the plan and the rows.
        heads: (R, this rank's heads of all tensors, *rest); sent without a copy if contiguous.
        shard_rows: S, the rows of a shard; those past route.rows[rank] are padding.

    Returns:
        The tensors, (S, H_i, *rest) each.
    """
    plan, rows, rank = route.plan, route.rows, route.rank
    mine, rest = rows[rank], heads.shape[2:]
    unit = math.prod(rest)
    width = plan.widths[rank]
    buffer = _exchange(
        heads.contiguous().view(sum(rows) * width * unit),
        [mine * count * unit for count in plan.widths],
        [count * width * unit for count in rows],
        route.group_name,
    )
    tensors = []
    for count, repeated in zip(plan.heads, plan.repeated, strict=True):
        shape = (shard_rows, count, *rest)
        if repeated:
            dtype = torch.promote_types(heads.dtype, torch.float32)
            tensors.append(heads.new_zeros(shape, dtype=dtype))
        elif torch.compiler.is_compiling():
            # The padding's length would be a symbol, with a graph each for 0, 1 and more rows.
            tensors.append(heads.new_zeros(shape))
        else:
            tensors.append(heads.new_empty(shape))
            tensors[-1][mine:].zero_()
    for piece in plan.pieces:
        source = _block(buffer, piece, mine, rest)
        tensor = tensors[piece.tensor]
        target = tensor.narrow(0, 0, mine)[:, piece.start : piece.stop]
        if piece.shared:
            target.add_(source.sum(0, dtype=tensor.dtype))
            continue
        target = target.unflatten(1, (piece.ranks, piece.heads)).transpose(0, 1)
        if plan.repeated[piece.tensor]:
            target.add_(source)
        else:
            target.copy_(source)
    return tuple(tensor.to(heads.dtype) for tensor in tensors)


# Each of the two is linear and the other's transpose, so each other's backward, to any order. What
# the backward needs of the sizes is used or taken from a tensor in the forward too: otherwise
# torch.compile, where sizes are symbols, does not carry it over.
class RowsToHeads(torch.autograd.Function):
    """`rows_to_heads(route, tensors)`, differentiable."""

    @staticmethod
    def forward(ctx: Any, route: Route, *tensors: Tensor) -> Tensor:
        ctx.route, ctx.shard_rows = route, tensors[0].shape[0]
        return rows_to_heads(route, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *HeadsToRows.apply(ctx.route, grad, ctx.shard_rows)


class HeadsToRows(torch.autograd.Function):
    """`heads_to_rows(route, heads, shard_rows)`, differentiable."""

    @staticmethod
    def forward(ctx: Any, route: Route, heads: Tensor, shard_rows: int) -> tuple[Tensor, ...]:
        ctx.route = route
        return heads_to_rows(route, heads, shard_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, RowsToHeads.apply(ctx.route, *grads), None


class GatherRows(torch.autograd.Function):
    """The rows of all ranks, (S, ...) -> (sum(rows), ...), on every rank."""

    @staticmethod
    def forward(ctx: Any, route: Route, shard: Tensor) -> Tensor:
        ctx.route, ctx.shard_rows = route, shard.shape[0]
        whole = torch.ops._c10d_functional.all_gather_into_tensor(
            shard.contiguous(), len(route.rows), route.group_name
        )
        return torch.ops._c10d_functional.wait_tensor(whole)[: sum(route.rows)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, SumRows.apply(ctx.route, grad, ctx.shard_rows)


class SumRows(torch.autograd.Function):
    """The transpose: (sum(rows), ...) of every rank -> the sum of this rank's rows, (S, ...).

    A reduce-scatter, made of an exchange and a local sum in promote(dtype, float32): the same bytes,
    one rounding, and an order of summation that depends on no backend.
    """

    @staticmethod
    def forward(ctx: Any, route: Route, whole: Tensor, shard_rows: int) -> Tensor:
        ctx.route = route
        rows, mine = route.rows, route.rows[route.rank]
        rest = whole.shape[1:]
        unit = math.prod(rest)
        received = _exchange(
            whole.contiguous().view(sum(rows) * unit),
            [mine * unit] * len(rows),
            [count * unit for count in rows],
            route.group_name,
        ).view(len(rows), mine, *rest)
        dtype = torch.promote_types(whole.dtype, torch.float32)
        total = received.sum(0, dtype=dtype).to(whole.dtype)
        return torch.cat((total, total.new_zeros((shard_rows - mine, *rest))))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, GatherRows.apply(ctx.route, grad), None
