"""The part of a packed batch that one process holds under sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from goku_kernels import Packing

# (q, k, v, cu_seqlens) -> out, on whole sequences.
WholeAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TokenShard:
    """Rows [token_offset, token_offset + rows) of a pack, those past its end being padding.

    Everything in a block acts on rows, but for self-attention: `attend(q, k, v, cu_seqlens, whole)`
    carries shards to whole sequences of some heads, calls `whole` there and carries the result back.
    Cross-attention stays here: its keys are the text, and a row's output needs no other row. Each
    sample's gradients are partial sums, to be added over the processes that share the pack.

    Attributes:
        rows: of this shard, padding included; the same on every process.
        token_offset: row of the pack at which it begins.
        packing: how many rows of every sample are here (often none): offsets from the shard's first
            row, without grids.
        attend: see above.
    """

    rows: int
    token_offset: int
    packing: Packing
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, WholeAttention], Tensor]
