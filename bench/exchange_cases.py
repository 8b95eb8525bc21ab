"""What `bench.exchange` computes: attentions over packed batches, and what is true of them.

The truth is what one process makes of the whole pack, cut to this rank's rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.packs import GPU_PACKS, Pack
from goku_runtime.sequence_parallel import Attention, exchange_bytes

# Of a result's largest number: the peers' attentions work on other subsets of heads and tokens, in
# another order; bf16's accumulate in fp32 and round at the end. A row or a head in the wrong place is
# off by as much as that number itself.
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 0.03}
Kind = Literal["exchange", "attention"]


@dataclass(frozen=True)
class Case:
    """One attention over a packed batch.

    Attributes:
        model: whose heads these are.
        kind: "exchange" stands a copy of q in for the attention; "attention" computes it.
        pack: the samples; their tokens need not be divisible by anything.
        heads, kv_heads, head_dim: of the attention.
        dtype: of q, k and v.
    """

    model: str
    kind: Kind
    pack: Pack
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def rows_of(self, size: int) -> list[int]:
        """By rank, the tokens that it holds: the last ranks may have fewer, or none."""
        shard = self.shard_rows(size)
        return [min(shard, max(0, self.pack.tokens - rank * shard)) for rank in range(size)]

    def shard_rows(self, size: int) -> int:
        """Rows of a shard with its padding."""
        return -(-self.pack.tokens // size)

    def bytes(self, size: int, *, backward: bool) -> int:
        """Bytes that the busiest rank sends to the others, forward or backward."""
        return max(
            exchange_bytes(
                self.pack.tokens, self.heads, self.kv_heads, self.head_dim, self.dtype.itemsize,
                size, rank=rank, backward=backward,
            )
            for rank in range(size)
        )  # fmt: skip


def cases(device_type: str) -> list[Case]:
    """The attentions that are measured on a device of this type."""
    if device_type == "cuda":
        packs = [p for p in GPU_PACKS if "many" not in p.name]
        shapes = [("goku-2b", 28, 28), ("goku-8b", 48, 48)]
        found = [Case(model, kind, pack, heads, kv, 64, torch.bfloat16)
                 for model, heads, kv in shapes for pack in packs
                 for kind in ("exchange", "attention")]  # fmt: skip
        mixed = next(p for p in packs if p.name == "64K, mixed")
        grouped = Case("28 heads, 4 KV heads", "exchange", mixed, 28, 4, 64, torch.bfloat16)
        return [*found, grouped]
    clip, image = (4, 16, 16), (1, 16, 16)
    small = Pack("4K, mixed", (clip, clip, clip, *[image] * 4))
    large = Pack("16K, mixed", (*[(8, 16, 16)] * 6, *[image] * 16))
    one = Pack("2K, one clip", ((8, 16, 16),))
    kind = torch.float32
    return [
        Case("goku-2b", "exchange", small, 28, 28, 64, kind),
        Case("goku-8b", "exchange", small, 48, 48, 64, kind),
        Case("28 heads, 4 KV heads", "exchange", small, 28, 4, 64, kind),
        Case("30 heads", "exchange", small, 30, 30, 64, kind),
        Case("goku-2b, head_dim 16", "attention", small, 28, 28, 16, kind),
        Case("goku-2b, head_dim 16", "attention", one, 28, 28, 16, kind),
        Case("goku-2b", "exchange", large, 28, 28, 64, kind),
    ]


def custom(shape: Sequence[str], device_type: str) -> list[Case]:
    """--shape LENGTHS HEADS KV_HEADS HEAD_DIM as both kinds of cases.

    Raises:
        ValueError: no numbers, lengths below 0 or no tokens, the others below 1.
    """
    try:
        lengths = [int(n) for n in shape[0].split("+")]
        heads, kv_heads, head_dim = (int(n) for n in shape[1:])
    except ValueError as error:
        raise ValueError(f"--shape is {' '.join(shape)}: whole numbers are needed") from error
    if min(lengths) < 0 or sum(lengths) < 1 or min(heads, kv_heads, head_dim) < 1:
        raise ValueError(f"--shape is {' '.join(shape)}: lengths >= 0 with tokens, others >= 1")
    if heads % kv_heads:
        raise ValueError(f"--shape has {heads} heads and {kv_heads} KV heads: a divisor is needed")
    pack = Pack(f"lengths {shape[0]}", tuple((1, 1, n) for n in lengths))
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    name = f"{heads} heads, {kv_heads} KV, head_dim {head_dim}"
    return [Case(name, kind, pack, heads, kv_heads, head_dim, dtype)
            for kind in ("exchange", "attention")]  # fmt: skip


# ---- the attention ----


class _CopyOfQ(torch.autograd.Function):
    """q in memory of its own, as an attention's result is; its gradient is that of q, k and v alike.

    All three have to have one, or their exchanges would be left out of the backward. That of a key
    head is summed over the query heads that would use it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.kv_heads = k.shape[1]
        return q.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if ctx.kv_heads == grad.shape[1]:
            return grad, grad, grad
        shared = grad.unflatten(1, (ctx.kv_heads, -1)).sum(2)
        return grad, shared, shared


def sample_by_sample(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention within each sample; rows past the last one are padding, whose result is 0."""
    offsets = [0, *itertools.accumulate(lengths)]
    outs = []
    for begin, end in itertools.pairwise(offsets):
        if end == begin:
            continue
        rows_q, rows_k, rows_v = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            rows_q, rows_k, rows_v, enable_gqa=k.shape[1] != q.shape[1]
        )
        outs.append(out[0].transpose(0, 1))
    padding = q.shape[0] - offsets[-1]
    return torch.cat(outs + ([q.new_zeros(padding, *q.shape[1:])] if padding else []))


def attention(case: Case) -> Attention:
    """What all peers compute."""
    if case.kind == "exchange":
        return lambda q, k, v, cu: _CopyOfQ.apply(q, k, v)
    return lambda q, k, v, cu: sample_by_sample(q, k, v, case.pack.lengths)


def offsets(case: Case, device: torch.device) -> Tensor:
    """cu_seqlens of the pack."""
    return torch.tensor(
        [0, *itertools.accumulate(case.pack.lengths)], dtype=torch.int32, device=device
    )


# ---- right before fast ----


@dataclass(frozen=True)
class Shards:
    """This rank's rows of the inputs, and of what one process makes of the whole."""

    inputs: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    truth: tuple[Tensor, ...]  # the result, dq, dk, dv

    @classmethod
    def draw(cls, case: Case, rank: int, size: int, device: torch.device) -> Shards:
        """Random numbers, the same pack on every rank."""
        generator = torch.Generator().manual_seed(0)
        heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        q, k, v, grad = (
            torch.randn(case.pack.tokens, n, case.head_dim, generator=generator)
            .to(device, case.dtype)
            for n in heads
        )  # fmt: skip
        leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
        if case.kind == "exchange":
            shared = grad.unflatten(1, (case.kv_heads, -1)).sum(2)
            truth: tuple[Tensor, ...] = (q.detach(), grad, shared, shared)
        else:
            out = attention(case)(*leaves, offsets(case, device))
            truth = (out.detach(), *torch.autograd.grad(out, leaves, grad))
        rows, mine = case.shard_rows(size), case.rows_of(size)[rank]
        begin = sum(case.rows_of(size)[:rank])

        def part(x: Tensor) -> Tensor:
            shard = x.new_zeros(rows, *x.shape[1:])
            shard[:mine] = x.detach()[begin : begin + mine]
            return shard

        shard_q, shard_k, shard_v = (part(x).requires_grad_() for x in leaves)
        return cls((shard_q, shard_k, shard_v), part(grad), tuple(map(part, truth)))


def differs(found: Sequence[Tensor], truth: Sequence[Tensor]) -> str:
    """Which of the result, dq, dk and dv, or of the first of them, is off by how much; "" if none."""
    names = ("the result", "dq", "dk", "dv")[: len(truth)]
    for name, got, want in zip(names, found, truth, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{name} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        allowed = _ALLOWED[want.dtype] * float(want.abs().max())
        error = float((got.detach() - want).abs().max())
        if not error <= allowed:  # NaN too
            return f"{name} is off by {error:.3g}, allowed are {allowed:.3g}"
    return ""
