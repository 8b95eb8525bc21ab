"""varlen_attention: full attention inside every sample of a packed batch, self and to text.

FLOPs: 4 * heads * head_dim * sum(len_q * len_k) forward, and twice that backward: no recomputation
is counted. flash-attn's own tables count 2.5 times, so their backward figures are 1.25 times ours
for the same speed. Letters in shapes: Tq queries, Tk keys, H heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Absent, Function, Inputs, Peer, Problem, draw_normal, needs_triton, packing
from bench.packs import TEXT_TOKENS, Pack, packs
from bench.peers import LIBRARIES, load, needs_cuda, ours
from goku.model import PRESETS
from goku_kernels import Packing, varlen_attention, varlen_attention_flops

OPERATOR = "varlen_attention"
SOURCES = ("kernels/goku_kernels", "bench/varlen_attention.py", "bench/cases.py", "bench/timing.py")
MODELS = ("goku-2b", "goku-8b")
NOTE = "backward FLOPs are counted as 2x forward (flash-attn's tables: 2.5x)"

# What is compared with the truth: so many queries of each of so many samples.
PROBED_SAMPLES, PROBED_ROWS = 6, 32
LIMITS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def function(backend: str, deterministic: bool = False) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = inputs.leaves
        limits: Any = (inputs.rest[name] for name in LIMITS)
        return (varlen_attention(q, k, v, *limits, deterministic=deterministic, backend=backend),)

    return run


def _deterministic(problem: Problem, device: torch.device) -> Function:
    needs_triton(device)
    return function("triton", deterministic=True)


def _library(name: str) -> Peer:
    """A function with flash_attn_varlen_func's arguments; some versions return (out, lse)."""

    def make(problem: Problem, device: torch.device) -> Function:
        function = LIBRARIES[name]()
        needs_cuda(device)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            out = function(*inputs.leaves, **{name: inputs.rest[name] for name in LIMITS})
            return (out[0] if isinstance(out, tuple) else out,)

        return run

    return Peer(name, make)


def _torch_varlen(problem: Problem, device: torch.device) -> Function:
    function = LIBRARIES["torch varlen_attn"]()
    needs_cuda(device)
    # The first seven arguments are the same in every version that has it.
    return lambda inputs: (function(*inputs.leaves, *(inputs.rest[name] for name in LIMITS)),)


def _cudnn(problem: Problem, device: torch.device) -> Function:
    LIBRARIES["cuDNN SDPA"]()
    needs_cuda(device)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        lengths = [inputs.rest["lengths_q"], *[inputs.rest["lengths_k"]] * 2]
        parts = (x.split(list(n)) for x, n in zip(inputs.leaves, lengths, strict=True))
        outs = []
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            for sample in zip(*parts, strict=True):
                q, k, v = (x.transpose(0, 1)[None] for x in sample)
                outs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
        return (torch.cat(outs),)

    return run


def _flex(problem: Problem, device: torch.device) -> Function:
    flex_attention: Callable[..., Any] = LIBRARIES["FlexAttention"]()
    create: Callable[..., Any] = load("torch.nn.attention.flex_attention", "create_block_mask")
    if device.type != "cuda":
        raise Absent("FlexAttention has no backward on a CPU")
    if "220K" in problem.pack.name or "cross" in problem.case:
        # Its mask is a part of its code: half a minute of compiling a pack, of the few that there are
        raise Absent(
            "left out: every pack compiles it anew; see self-attention of the smaller ones"
        )
    # Both compiled: as plain PyTorch they would hold a matrix of all pairs of tokens.
    attend, create = torch.compile(flex_attention), torch.compile(create)
    masks: dict[tuple[Any, ...], Any] = {}

    def mask(inputs: Inputs) -> Any:
        lengths = inputs.rest["lengths_q"], inputs.rest["lengths_k"]
        if lengths not in masks:
            sample_q, sample_k = (_samples(n, device) for n in lengths)

            def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return sample_q[i] == sample_k[j]

            masks[lengths] = create(same, None, None, len(sample_q), len(sample_k), device=device)
        return masks[lengths]

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs.leaves)
        return (attend(q, k, v, block_mask=mask(inputs))[0].transpose(0, 1),)

    return run


def _samples(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The sample of every row."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def _transformer_engine(problem: Problem, device: torch.device) -> Function:
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


PEERS = [
    # The reference walks over the samples on the host: nothing for torch.compile to fuse, which has
    # FlexAttention for this.
    *ours(function("torch"), function("triton"), compiled=False),
    Peer("goku triton, deterministic", _deterministic, backend="triton"),
    Peer("torch varlen_attn", _torch_varlen),
    Peer("cuDNN SDPA, one call a sample", _cudnn),
    Peer("FlexAttention, document mask", _flex),
    _library("flash-attn 2"),
    _library("flash-attn 3"),
    _library("flash-attn 4"),
    Peer("TransformerEngine", _transformer_engine),
]


def problem(
    case: str, heads: int, head_dim: int, pack: Pack, dtype: torch.dtype, *, cross: bool = False
) -> Problem:
    """Self-attention of a pack, or its attention to TEXT_TOKENS text tokens a sample."""
    lengths_q = pack.lengths
    lengths_k = (TEXT_TOKENS,) * len(lengths_q) if cross else lengths_q
    probe = probed_rows(lengths_q)

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        queries = packing(pack, device)
        keys = Packing.from_lengths(lengths_k, device=device) if cross else queries
        leaves = (
            draw_normal(generator, n, heads, head_dim, dtype=dtype)
            for n in (queries.total, keys.total, keys.total)
        )
        rest = {
            "cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": keys.cu_seqlens,
            "max_seqlen_q": queries.max_seqlen, "max_seqlen_k": keys.max_seqlen,
            "lengths_q": lengths_q, "lengths_k": lengths_k,
        }  # fmt: skip
        return Inputs(tuple(leaves), rest)

    def work(direction: str) -> float:
        return varlen_attention_flops(
            lengths_q, lengths_k, heads=heads, head_dim=head_dim, backward=direction == "backward"
        )

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype,
        shape={"heads": heads, "head_dim": head_dim, "keys": sum(lengths_k)},
        draw=draw, reference=lambda inputs: (plain(inputs, probe),), work=work, unit="FLOP",
        sources=SOURCES, probe=probe, note=NOTE,
    )  # fmt: skip


def probed_rows(lengths: Sequence[int]) -> Tensor:
    """Rows that are compared: PROBED_ROWS spread over each of the largest and the end samples."""
    starts = [0, *itertools.accumulate(lengths)]
    by_size = sorted(range(len(lengths)), key=lambda i: lengths[i])
    chosen = {0, len(lengths) - 1, *by_size[-PROBED_SAMPLES // 2 :], by_size[0]}
    rows = []
    for i in sorted(chosen):
        count = min(PROBED_ROWS, lengths[i])
        rows += [starts[i] + j * lengths[i] // count for j in range(count)]
    return torch.tensor(rows)


def plain(inputs: Inputs, rows: Tensor) -> Tensor:
    """Attention of some rows in plain PyTorch, scores in memory: (rows, H, D)."""
    q, k, v = inputs.leaves
    starts_q = [0, *itertools.accumulate(inputs.rest["lengths_q"])]
    starts_k = [0, *itertools.accumulate(inputs.rest["lengths_k"])]
    outs = []
    for i, (a, b) in enumerate(itertools.pairwise(starts_q)):
        mine = rows[(rows >= a) & (rows < b)].to(q.device)
        if len(mine):
            qi = q.index_select(0, mine)
            ki, vi = (x[starts_k[i] : starts_k[i + 1]] for x in (k, v))
            scores = torch.einsum("thd,shd->hts", qi, ki) * q.shape[2] ** -0.5
            outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), vi))
    return torch.cat(outs)


def problems(device_type: str) -> Iterator[Problem]:
    for model, cross in itertools.product(MODELS, (False, True)):
        config = PRESETS[model]
        case = f"{model}, cross-attention to {TEXT_TOKENS}" if cross else model
        for pack in packs(device_type):
            given = (config.heads, config.head_dim, pack, torch.bfloat16)
            yield problem(case, *given, cross=cross)


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for a head width of `size`."""
    return problem(f"24 heads of {size}", 24, size, pack, dtype)
