"""The two exchanges for one tensor, under the names that users of Ulysses know."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from goku_runtime._exchange import (
    HeadsToRows,
    Route,
    RowsToHeads,
    check_served,
    membership,
    plan_heads,
    split_evenly,
)

__all__ = ["gather_heads_scatter_seq", "gather_seq_scatter_heads"]


def gather_seq_scatter_heads(
    x: Tensor, seq_dim: int, head_dim: int, group: ProcessGroup | None
) -> Tensor:
    """Some of the sequence and all heads -> all of the sequence and some of the heads.

    The heads are split as by `SequenceParallel`. Differentiable; the backward is
    `gather_heads_scatter_seq`. One exchange a tensor: `SequenceParallel.attention` needs one for
    queries, keys and values together.

    Args:
        x: the axis `seq_dim` has equally many rows on every rank, `head_dim` all heads.
        seq_dim, head_dim: two different axes, negative from the end.
        group: None or a group of one process: x itself is returned.

    Returns:
        x's axes; `seq_dim` P times as long, `head_dim` the heads of this rank, maybe none.

    Raises:
        ValueError: axes that x does not have or that are the same, no heads, a device that the
            group does not serve, a group that this process is not in.
    """
    rank, size, name, devices = membership(group)
    seq, head = _axes(x, seq_dim, head_dim)
    heads = x.shape[head]
    if heads < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: no heads on axis {head_dim}")
    if size == 1:
        return x
    check_served("x", x, devices)
    rows = x.shape[seq]
    plan = plan_heads([[split_evenly(heads, size, p) for p in range(size)]])
    route = Route(plan, (rows,) * size, rank, name)
    return RowsToHeads.apply(route, x.movedim((seq, head), (0, 1))).movedim((0, 1), (seq, head))


def gather_heads_scatter_seq(
    x: Tensor,
    head_dim: int,
    seq_dim: int,
    group: ProcessGroup | None,
    *,
    heads: int | None = None,
) -> Tensor:
    """All of the sequence and some of the heads -> some of the sequence and all heads.

    The inverse and the transpose of `gather_seq_scatter_heads`. Differentiable.

    Args:
        x: the axis `seq_dim` has the whole sequence, `head_dim` this rank's heads.
        head_dim, seq_dim: two different axes, negative from the end.
        group: None or a group of one process: x itself is returned.
        heads: all heads of the group. None: every rank has as many as this one, which nothing
            checks; uneven heads need it.

    Returns:
        x's axes; `seq_dim` the rows of this rank, `head_dim` all heads.

    Raises:
        ValueError: axes that x does not have or that are the same, a sequence that the ranks do
            not divide, another number of heads than this rank's share, a device that the group
            does not serve, a group that this process is not in.
    """
    rank, size, name, devices = membership(group)
    seq, head = _axes(x, seq_dim, head_dim)
    total = x.shape[head] * size if heads is None else heads
    if total < 1:
        raise ValueError(f"heads is {total}; at least 1 is needed")
    share = [split_evenly(total, size, p) for p in range(size)]
    if x.shape[head] != len(share[rank]):
        raise ValueError(
            f"x has {x.shape[head]} heads; of {total} on {size} ranks rank {rank} has "
            f"{len(share[rank])}"
        )
    if size == 1:
        return x
    check_served("x", x, devices)
    if x.shape[seq] % size:
        raise ValueError(f"the sequence has {x.shape[seq]} rows; {size} ranks have to divide it")
    rows = x.shape[seq] // size
    route = Route(plan_heads([share]), (rows,) * size, rank, name)
    (result,) = HeadsToRows.apply(route, x.movedim((seq, head), (0, 1)), rows)
    return result.movedim((0, 1), (seq, head))


def _axes(x: Tensor, seq_dim: int, head_dim: int) -> tuple[int, int]:
    """Both axes, from 0 on."""
    axes = []
    for name, axis in (("seq_dim", seq_dim), ("head_dim", head_dim)):
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"{name} is {axis}; x has {x.dim()} axes")
        axes.append(axis % x.dim())
    if axes[0] == axes[1]:
        raise ValueError(f"seq_dim and head_dim are both axis {axes[0]}; two axes are needed")
    return axes[0], axes[1]
