"""Ulysses sequence parallelism over a packed batch, for any attention.

Between attentions every rank of a group holds an even share of the pack's tokens with all heads; an
exchange gives it all tokens with a share of the heads, so that attention, whichever it is, sees whole
samples; a second one brings the result back (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509).

A pack of T tokens is split evenly, wherever its samples begin and end: S = ceil(T / P) rows a rank,
rank r has the rows from r * S on, and rows at or past T are padding, at the end of the pack alone.
Rows are the first axis. Heads that P does not divide are split unevenly: the first heads % P ranks
have one more, and where P > heads some have none.

Only self-attention needs this. In cross-attention the keys are the text, which every rank has whole,
and each query row is independent of the others: the rows of a shard attend with all heads where they
are. What a shard of queries adds to the gradient of the text is a partial sum, as for every other
input that all ranks share.

Gradients: what is differentiated is the SUM over the ranks of what each of them calls backward on.
Every operation here is the exact transpose of its forward, so a parameter's gradient on one rank is a
partial sum too, and whoever reduces gradients sums them over the group (never averages).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from goku_runtime._exchange import (
    GatherRows,
    HeadPlan,
    HeadsToRows,
    Route,
    RowsToHeads,
    check_served,
    membership,
    plan_heads,
    split_evenly,
)
from goku_runtime._gather_scatter import gather_heads_scatter_seq, gather_seq_scatter_heads

__all__ = [
    "Attention",
    "SequenceParallel",
    "exchange_bytes",
    "gather_heads_scatter_seq",
    "gather_seq_scatter_heads",
]

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""attn(q, k, v, cu_seqlens) -> out: q, out (rows, h, D), k, v (rows, hk, D), hk divides h."""


class SequenceParallel:
    """One group's sequence parallelism for attentions with one number of heads.

    Construction communicates nothing; one object serves all layers and batches. The group stays the
    caller's: it is kept as `group` and never destroyed here.

    float32, bfloat16, float16 and float64 travel as they are, through gloo as through NCCL; sums
    over ranks are computed in promote(dtype, float32). No operation waits for a device: all lengths
    are Python ints. All ranks of the group have to call the same operations in the same order; if
    one fails, the others get the backend's error (gloo: RuntimeError at once if its process ended,
    else after the group's timeout; torch gives the groups of a DeviceMesh the backend's default,
    `ParallelDims.build_mesh` that of init_process_group). torch's fake group cannot play a rank
    without heads, which sends nothing and yet receives, except on meta or fake tensors.

    Args:
        group: the ranks that share a pack, in order of their tokens. None, or a group of one
            process, means no parallelism: nothing is exchanged, copied or padded.
        heads: heads of the queries, at least 1. Fewer than ranks are allowed.
        kv_heads: heads of keys and values, a divisor of `heads`; `heads` if None. Where a rank's
            query heads need a key head that others need too, each of them receives it, and its
            gradients are summed.

    Attributes:
        group, heads, kv_heads: as given.
        rank: this process within the group.
        size: P, the processes of the group.

    Raises:
        ValueError: heads that are no integer >= 1 or not divisible by kv_heads, a group that is no process group or
            that this process is not in.
    """

    def __init__(self, group: ProcessGroup | None, heads: int, kv_heads: int | None = None) -> None:
        if not _is_integer(heads) or heads < 1:
            raise ValueError(f"heads is {heads!r}; at least 1, an integer, is needed")
        if kv_heads is None:
            kv_heads = heads
        if not _is_integer(kv_heads) or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"kv_heads is {kv_heads!r}; with {heads} heads a divisor of {heads} is needed"
            )
        self.group = group
        self.heads = heads
        self.kv_heads = kv_heads
        self.rank, self.size, self._group_name, self._devices = membership(group)
        ranks = range(self.size)
        q = [self.heads_of(rank) for rank in ranks]
        kv = [self.kv_heads_of(rank) for rank in ranks]
        self._there = plan_heads([q, kv, kv])
        self._back = plan_heads([q])
        # How many of this rank's query heads use each of its key heads, and how often the latter
        # are repeated so that all serve equally many.
        per_kv = heads // kv_heads
        used = [head // per_kv for head in q[self.rank]]
        uses = [used.count(head) for head in kv[self.rank]]
        self._repeats = [count // math.gcd(*uses) for count in uses]

    def heads_of(self, rank: int) -> range:
        """The query heads of a rank; empty for ranks past the last head."""
        self._check_rank(rank)
        return split_evenly(self.heads, self.size, rank)

    def kv_heads_of(self, rank: int) -> range:
        """The key and value heads that the query heads of a rank use; ranks may share some."""
        q, per_kv = self.heads_of(rank), self.heads // self.kv_heads
        return range(q.start // per_kv, -(-q.stop // per_kv)) if q else range(0)

    def rows(self, tokens: int) -> int:
        """S = ceil(tokens / P), the rows of each shard.

        Raises:
            ValueError: fewer tokens than ranks.
        """
        if tokens < (self.size if self.size > 1 else 0):
            raise ValueError(
                f"tokens is {tokens}; with {self.size} ranks at least {self.size} are needed"
            )
        return -(-tokens // self.size)

    def token_offset(self, tokens: int) -> int:
        """The pack's row that is the first of this rank's shard."""
        return self.rank * self.rows(tokens)

    def shard(self, x: Tensor) -> Tensor:
        """This rank's rows of what all ranks have whole.

        Args:
            x: (T, ...), the same on every rank.

        Returns:
            (S, ...), a view of `x` unless it ends with padding, which is 0. The backward fills
            the rows of other ranks with 0.

        Raises:
            ValueError: fewer rows than ranks.
        """
        if self.size == 1:
            return x
        if x.dim() < 1:
            raise ValueError("x has no axes; its first one has to be tokens")
        tokens = x.shape[0]
        mine = self._rows_of_ranks(tokens)[self.rank]
        start = min(self.token_offset(tokens), tokens)
        part = x.narrow(0, start, mine)
        padding = self.rows(tokens) - mine
        if not padding:
            return part
        return torch.cat((part, part.new_zeros((padding, *x.shape[1:]))))

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """The rows of all shards, on every rank.

        Args:
            x: (S, ...), this rank's shard.
            tokens: T.

        Returns:
            (T, ...). The backward sums the gradients of all ranks, in promote(dtype, float32).

        Raises:
            ValueError: fewer tokens than ranks, rows that are not S, a device that the group does
                not serve.
        """
        rows = self.rows(tokens)
        if x.dim() < 1 or x.shape[0] != rows:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; {tokens} tokens on {self.size} ranks are "
                f"{rows} rows each"
            )
        if self.size == 1:
            return x
        check_served("x", x, self._devices)
        return GatherRows.apply(self._route(self._back, self._rows_of_ranks(tokens)), x)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        attn: Attention,
        *,
        tokens: int | None = None,
    ) -> Tensor:
        """Self-attention of the whole pack: two exchanges, and two in the backward.

        `attn` gets views of what was received, rows (h + 2 hk) * D elements apart and otherwise
        contiguous, and may not change them in place. Where this rank's query heads use its key
        heads unequally often (uneven splits of GQA), keys and values are repeated as far as needed.
        A rank without heads takes part in every exchange and does not call `attn`.

        Args:
            q: (S, heads, D), this rank's rows.
            k, v: (S, kv_heads, D), of q's dtype and device.
            cu_seqlens: the offsets of the samples in the whole pack; passed to `attn` as it is.
            attn: attn(q, k, v, cu_seqlens) with whole samples, q (rows, h, D), k and v
                (rows, hk, D), query head i with key head i // (h // hk); returns (rows, h, D) in
                q's dtype (under autocast q, k and v, but for fp64, arrive in autocast's). h are the
                heads of this rank, hk divides h.
            tokens: T. attn's rows are exactly those, padding does not travel, and padding rows of
                the result and of the gradients are 0. None: attn's rows are all P * S, and what
                becomes of the padding is up to `attn`.

        Returns:
            (S, heads, D).

        Raises:
            ValueError: wrong shapes, numbers of heads or rows, dtypes that differ, a device that
                the group does not serve, or a result of `attn` of another shape or dtype.
        """
        if self.size == 1:
            self._check_qkv(q, k, v, tokens)
            return attn(q, k, v, cu_seqlens)
        q, k, v = _as_autocast(q, k, v)
        shard_rows = self._check_qkv(q, k, v, tokens)
        if tokens is None:
            rows: Sequence[int] = (shard_rows,) * self.size
        else:
            rows = self._rows_of_ranks(tokens)
        heads, kv_heads = len(self.heads_of(self.rank)), len(self._repeats)
        received = RowsToHeads.apply(self._route(self._there, rows), q, k, v)
        # split's backward is one concatenation: the gradient leaves in one piece, as this came.
        whole_q, whole_k, whole_v = received.split((heads, kv_heads, kv_heads), dim=1)
        if heads:
            whole_k = self._repeat_unevenly(whole_k)
            whole_v = self._repeat_unevenly(whole_v)
            out = attn(whole_q, whole_k, whole_v, cu_seqlens)
            self._check_result(out, whole_q)
        else:
            out = whole_q  # empty, but what the backward's exchanges hang on
        (result,) = HeadsToRows.apply(self._route(self._back, rows), out, shard_rows)
        return result

    def _repeat_unevenly(self, x: Tensor) -> Tensor:
        """Keys or values such that every head serves equally many of this rank's query heads."""
        if max(self._repeats) == 1:
            return x
        parts = zip(x.split(1, dim=1), self._repeats, strict=True)
        return torch.cat([part.expand(-1, repeats, -1) for part, repeats in parts], dim=1)

    def _rows_of_ranks(self, tokens: int) -> tuple[int, ...]:
        """By rank, the rows of its shard that are no padding."""
        rows = self.rows(tokens)
        last = tokens - (self.size - 1) * rows
        if last >= 0:  # all but tiny packs; torch.compile's symbols stay linear
            return (*(rows,) * (self.size - 1), last)
        return tuple(min(rows, max(0, tokens - rank * rows)) for rank in range(self.size))

    def _route(self, plan: HeadPlan, rows: Sequence[int]) -> Route:
        return Route(plan, tuple(rows), self.rank, self._group_name)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"rank is {rank}; the group has the ranks 0 to {self.size - 1}")

    def _check_qkv(self, q: Tensor, k: Tensor, v: Tensor, tokens: int | None) -> int:
        """The rows of a shard, if all is well."""
        for name, x, heads in (
            ("q", q, self.heads),
            ("k", k, self.kv_heads),
            ("v", v, self.kv_heads),
        ):
            if x.dim() != 3 or x.shape[1] != heads:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; (rows, {heads} heads, head_dim) is needed"
                )
            if x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2]:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)} and q {tuple(q.shape)}; rows and head_dim "
                    "have to agree"
                )
            if x.dtype != q.dtype:
                raise ValueError(f"{name} is {x.dtype} and q {q.dtype}; one dtype is needed")
            if x.device != q.device:
                raise ValueError(f"{name} is on {x.device} and q on {q.device}; one is needed")
            check_served(name, x, self._devices)
        if tokens is not None and self.rows(tokens) != q.shape[0]:
            raise ValueError(
                f"q has {q.shape[0]} rows; {tokens} tokens on {self.size} ranks are "
                f"{self.rows(tokens)} rows each"
            )
        return q.shape[0]

    @staticmethod
    def _check_result(out: Tensor, q: Tensor) -> None:
        if out.shape != q.shape or out.dtype != q.dtype:
            raise ValueError(
                f"attn returned {out.dtype} of shape {tuple(out.shape)} for {q.dtype} queries of "
                f"shape {tuple(q.shape)}; the result has to be like the queries"
            )


def _is_integer(value: object) -> bool:
    # A torch.SymInt where a batch's size is part of it and is traced.
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What attention would make of them under autocast, before they travel: half the bytes, and one
    dtype on ranks with heads and without. fp64 stays, as everywhere under autocast."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # no autocast for meta tensors
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(low) for x in tensors)


def exchange_bytes(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int,
    size: int,
    *,
    rank: int = 0,
    backward: bool = False,
) -> int:
    """Bytes that `rank` sends to other ranks in the two exchanges of one attention.

    With N = tokens and everything divisible: (2 heads + 2 kv_heads) (N / P) (P - 1) / P elements
    (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.2, with kv_heads keys and values), which falls
    with P. In general: rank r has n_r rows and h_r + 2 hk_r heads of q, k and v. Forward it sends
    n_r rows of the others' heads, then the others' rows of its h_r heads:

        n_r * sum_{p != r} (h_p + 2 hk_p) + (N - n_r) * h_r

    and backward the transpose: the others' rows of its h_r + 2 hk_r heads, n_r rows of the others'
    query heads. Over all ranks both directions are the same. Without `tokens` in
    `SequenceParallel.attention` padding travels too: pass the padded number here.

    Raises:
        ValueError: as `SequenceParallel`, or a rank outside 0 to size - 1.
    """
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank is {rank} of size {size}; 0 to size - 1 is needed")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads is {heads} and kv_heads {kv_heads}; a divisor of it is needed")
    if tokens < size:
        raise ValueError(f"tokens is {tokens}; with {size} ranks at least {size} are needed")
    shard = -(-tokens // size)
    mine = min(shard, max(0, tokens - rank * shard))
    shares = [split_evenly(heads, size, p) for p in range(size)]
    per_kv = heads // kv_heads
    q = [len(share) for share in shares]
    widths = [
        len(share) + 2 * len({head // per_kv for head in share}) for share in shares
    ]  # fmt: skip
    others = tokens - mine
    if backward:
        elements = others * widths[rank] + mine * (heads - q[rank])
    else:
        elements = mine * (sum(widths) - widths[rank]) + others * q[rank]
    return elements * head_dim * itemsize
