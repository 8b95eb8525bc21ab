"""Other people's packed attention: how each is called, and at which problems the slow ones are left out.

They compute the whole operator of bench/varlen_attention.py and get its inputs: q, k and v as (T, H,
D), where T are tokens, H heads and D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Absent, Function, Inputs, Peer, Problem
from bench.peers import LIBRARIES, load, needs_cuda

LIMITS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# Where peers are measured that cost much and tell little elsewhere: eager runs the kernel that
# varlen_attn runs.
COMPARED_CASES = ("goku-2b", "14 heads of 128")
COMPARED = ("64K, one clip", "64K, mixed", "64K, many images")
# FlexAttention compiles every pack anew, and what it adds is a mask, of which one clip has none.
MASKED = COMPARED[1:]
MASK_BLOCK = 128  # rows and columns of a block of FlexAttention's mask, which is its default


def compared_alone(peer: Peer, packs: Sequence[str] = COMPARED) -> Peer:
    """The peer, on a GPU only for COMPARED_CASES on `packs`."""

    def make(problem: Problem, device: torch.device) -> Function:
        here = problem.pack.name in packs and problem.case in COMPARED_CASES
        if device.type == "cuda" and not here:
            raise Absent(f"left out but for {COMPARED_CASES} on {packs}")
        return peer.make(problem, device)

    return Peer(peer.name, make, backend=peer.backend)


def library(name: str) -> Peer:
    """A function with flash_attn_varlen_func's arguments; some versions return (out, lse)."""

    def make(problem: Problem, device: torch.device) -> Function:
        function = LIBRARIES[name]()
        needs_cuda(device)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            # By name: flash-attn 4 has another argument after v.
            out = function(*inputs.leaves, **{name: inputs.rest[name] for name in LIMITS})
            return (out[0] if isinstance(out, tuple) else out,)

        return run

    return Peer(name, make)


def torch_varlen(problem: Problem, device: torch.device) -> Function:
    function = LIBRARIES["torch varlen_attn"]()
    needs_cuda(device)
    # The first seven arguments are the same in every version that has it.
    return lambda inputs: (function(*inputs.leaves, *(inputs.rest[name] for name in LIMITS)),)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's attention of (B, L, H, D), or an error: the context leaves it nothing to fall back to.

    Its tensors are (B, H, L, D) with the strides of (B, L, H, D), which cuDNN takes as they are and
    gives its result and gradients.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _one_length(problem: Problem) -> bool:
    return len(set(problem.pack.lengths)) == 1


def cudnn_batched(problem: Problem, device: torch.device) -> Function:
    """The fixed-length batch: samples of one length need no packing."""
    LIBRARIES["cuDNN SDPA"]()
    if not _one_length(problem):
        raise Absent("the samples differ in length")
    needs_cuda(device)
    samples = len(problem.pack.grids)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        return (_cudnn(*(x.unflatten(0, (samples, -1)) for x in inputs.leaves)).flatten(0, 1),)

    return run


def cudnn_sample_by_sample(problem: Problem, device: torch.device) -> Function:
    LIBRARIES["cuDNN SDPA"]()
    if _one_length(problem):
        raise Absent("left out where one batched call does it")
    needs_cuda(device)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        lengths = [inputs.rest["lengths_q"], *[inputs.rest["lengths_k"]] * 2]
        parts = (x.split(list(n)) for x, n in zip(inputs.leaves, lengths, strict=True))
        # squeeze, not [0]: that one's gradient is written into zeros of the whole
        outs = [
            _cudnn(*(x.unsqueeze(0) for x in sample)).squeeze(0)
            for sample in zip(*parts, strict=True)
        ]
        return (torch.cat(outs),)

    return run


# ---- FlexAttention ----


def flex(problem: Problem, device: torch.device) -> Function:
    flex_attention: Callable[..., Any] = LIBRARIES["FlexAttention"]()
    if device.type != "cuda":
        raise Absent("FlexAttention has no backward on a CPU")
    # One graph or an error: as plain PyTorch it would hold a matrix of all pairs of tokens. Of the
    # shapes of one pack: general ones are slower.
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    masks: dict[tuple[Any, ...], Any] = {}

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        lengths = inputs.rest["lengths_q"], inputs.rest["lengths_k"]
        if lengths not in masks:
            masks[lengths] = document_mask(*lengths, inputs.leaves[0].device)
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in inputs.leaves)
        return (attend(q, k, v, block_mask=masks[lengths]).transpose(1, 2).squeeze(0),)

    return run


def document_mask(lengths_q: Sequence[int], lengths_k: Sequence[int], device: torch.device) -> Any:
    """FlexAttention's mask of samples that do not see each other.

    Made from the lengths: its own create_block_mask looks at all pairs of tokens, 4 GB for 64K, or
    is compiled for every pack.
    """
    block_mask: Any = load("torch.nn.attention.flex_attention", "BlockMask")
    sample_q, sample_k = (sample_of_rows(n, device) for n in (lengths_q, lengths_k))

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sample_q[i] == sample_k[j]

    partial, full = document_blocks(lengths_q, lengths_k, MASK_BLOCK)
    return block_mask.from_kv_blocks(
        *_ordered(partial, device), *_ordered(full, device), BLOCK_SIZE=MASK_BLOCK, mask_mod=same,
        seq_lengths=(len(sample_q), len(sample_k)),
    )  # fmt: skip


def sample_of_rows(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The sample of every row."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def document_blocks(
    lengths_q: Sequence[int], lengths_k: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """Blocks of size x size pairs that are attended to in part, and those in full: (blocks of q, of k)."""
    first_q, last_q, whole_q = _ends_of_blocks(lengths_q, size)
    first_k, last_k, whole_k = _ends_of_blocks(lengths_k, size)
    some = (first_q[:, None] <= last_k) & (first_k <= last_q[:, None])
    full = (first_q == last_q)[:, None] & (first_k == last_k) & (first_q[:, None] == first_k)
    full &= whole_q[:, None] & whole_k
    return some & ~full, full


def _ends_of_blocks(lengths: Sequence[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every block of rows: the sample of its first and of its last, and whether it is whole."""
    ends = torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int64)
    rows = int(ends[-1])
    first = torch.arange(0, rows, size)
    last = (first + size - 1).clamp(max=rows - 1)
    of_first, of_last = (torch.searchsorted(ends, x, right=True) for x in (first, last))
    return of_first, of_last, first + size <= rows


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every row of blocks how many are set, and their columns before the others: (1, 1, ...)."""
    counts = blocks.sum(1, dtype=torch.int32)
    columns = blocks.byte().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None].to(device), columns[None, None].to(device)


def transformer_engine(problem: Problem, device: torch.device) -> Function:
    module = LIBRARIES["TransformerEngine"]()
    needs_cuda(device)
    heads, size = problem.shape["heads"], problem.shape["head_dim"]
    attention = module(heads, size, qkv_format="thd", attn_mask_type="padding")

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        rest = inputs.rest
        out = attention(
            *inputs.leaves, cu_seqlens_q=rest["cu_seqlens_q"], cu_seqlens_kv=rest["cu_seqlens_k"],
            max_seqlen_q=rest["max_seqlen_q"], max_seqlen_kv=rest["max_seqlen_k"],
        )  # fmt: skip
        return (out.view(inputs.leaves[0].shape),)

    return run


# The packed kernels first; the slow ones last.
PEERS = [
    Peer("torch varlen_attn", torch_varlen),
    Peer("cuDNN SDPA, one batched call", cudnn_batched),
    Peer("cuDNN SDPA, one call a sample", cudnn_sample_by_sample),
    library("flash-attn 4"),
    library("flash-attn 3"),
    library("flash-attn 2"),
    Peer("TransformerEngine", transformer_engine),
    compared_alone(Peer("FlexAttention, document mask", flex), MASKED),
]
