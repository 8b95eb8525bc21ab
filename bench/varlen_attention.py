"""varlen_attention: full attention inside every sample of a packed batch, self and to text.

FLOPs: 4 * heads * head_dim * sum(len_q * len_k) forward, and twice that backward: no recomputation
is counted. flash-attn's own tables count 2.5 times, so their backward figures are 1.25 times ours
for the same speed. Letters in shapes: Tq queries, Tk keys, H heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Absent, Function, Inputs, Peer, Problem, draw_normal, needs_triton, packing
from bench.packs import TEXT_TOKENS, Pack, packs
from bench.peers import LIBRARIES, load, needs_cuda, ours
from goku.model import PRESETS
from goku_kernels import Packing, reference, varlen_attention, varlen_attention_flops

OPERATOR = "varlen_attention"
SOURCES = ("kernels/goku_kernels", "bench/varlen_attention.py", "bench/cases.py", "bench/timing.py")
MODELS = ("goku-2b", "goku-8b")
NOTE = (
    "backward FLOPs are counted as 2x forward (flash-attn's tables: 2.5x); eager keeps what its "
    "backward needs, except the scores, which torch's fused attention computes again"
)

# What is compared with the truth: so many queries of each of so many samples.
PROBED_SAMPLES, PROBED_ROWS = 6, 32
# One unit in the last place of what is multiplied and summed in.
FP32, TF32 = 2.0**-23, 2.0**-10
# All scores are this much below zero, by one channel of queries and keys. A key too many in the last
# partly filled block, which masked loads fill with zeros, has score zero: it outweighs the others,
# and shows among thousands of them. Larger queries would hide it, and plain bf16 rounds their scores.
APART = 6.0
LIMITS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def function(backend: str, deterministic: bool = False) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        q, k, v = inputs.leaves
        limits: Any = (inputs.rest[name] for name in LIMITS)
        return (varlen_attention(q, k, v, *limits, deterministic=deterministic, backend=backend),)

    return run


def eager(inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference under plain autograd, which keeps what its backward needs.

    Within our operator (backend="torch") the reference runs its forward again in the backward.
    """
    q, k, v = inputs.leaves
    cu = (inputs.rest["cu_seqlens_q"], inputs.rest["cu_seqlens_k"])
    scale = q.shape[2] ** -0.5
    out = reference.varlen_attention(q, k, v, *cu, softmax_scale=scale, return_lse=False)
    assert isinstance(out, Tensor)
    return (out,)


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
    *ours(eager, function("triton"), compiled=False),
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
    case: str, heads: int, head_dim: int, pack: Pack, dtype: torch.dtype, *, cross: bool = False,
    probed: bool = True,
) -> Problem:  # fmt: skip
    """Self-attention of a pack, or its attention to TEXT_TOKENS text tokens a sample.

    probed: compare some rows, which large packs need; all rows without it.
    """
    lengths_q = pack.lengths
    lengths_k = (TEXT_TOKENS,) * len(lengths_q) if cross else lengths_q
    probe = probed_rows(lengths_q) if probed else None
    partitions = [lengths_q, lengths_k]
    if probe is not None:
        partitions.append(_counts(probe, lengths_q))
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        queries = packing(pack, device)
        keys = Packing.from_lengths(lengths_k, device=device) if cross else queries
        q, k, v = (
            draw_normal(generator, n, heads, head_dim, dtype=dtype)
            for n in (queries.total, keys.total, keys.total)
        )
        apart = (APART * head_dim**0.5) ** 0.5
        q[..., 0], k[..., 0] = apart, -apart
        rest = {
            "cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": keys.cu_seqlens,
            "max_seqlen_q": queries.max_seqlen, "max_seqlen_k": keys.max_seqlen,
            "lengths_q": lengths_q, "lengths_k": lengths_k,
        }  # fmt: skip
        return Inputs((q, k, v), rest)

    def work(direction: str) -> float:
        return varlen_attention_flops(
            lengths_q, lengths_k, heads=heads, head_dim=head_dim, backward=direction == "backward"
        )

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype,
        shape={"heads": heads, "head_dim": head_dim, "keys": sum(lengths_k)},
        draw=draw, reference=lambda inputs: (plain(inputs, probe),), work=work, unit="FLOP",
        sources=SOURCES, probe=probe, partitions=tuple(partitions),
        floors=lambda inputs, douts: cancellation(inputs, douts[0], TF32 if tf32 else FP32),
        precision=TF32 if tf32 else 0.0, note=NOTE,
    )  # fmt: skip


def cancellation(inputs: Inputs, dout: Tensor, rounding: float) -> Mapping[str, float]:
    """What rounding leaves of dq and dk however small they are: dS = P * (dP - delta).

    With one key dP equals delta but for the rounding of two sums over head_dim; autograd's softmax
    cancels them exactly. Four times one rounding of the product of the largest rows: both sums are
    rounded, and again where they are multiplied by the other operand.
    """
    q, k, v = inputs.leaves
    if min(q.numel(), k.numel(), dout.numel()) == 0:
        return {}
    norms = dout.float().norm(dim=-1).max() * v.float().norm(dim=-1).max()
    largest = torch.maximum(q.abs().max(), k.abs().max()).float()
    floor = 4 * rounding * float(norms * largest) * q.shape[2] ** -0.5
    return {"gradient 0": floor, "gradient 1": floor}


def _counts(rows: Tensor, lengths: Sequence[int]) -> tuple[int, ...]:
    """How many of `rows` are in each sample."""
    ends = torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int64)
    found = torch.searchsorted(ends, rows, right=True)
    return tuple(found.bincount(minlength=len(lengths)).tolist())


def probed_rows(lengths: Sequence[int]) -> Tensor:
    """Rows that are compared: the last one of every sample, since its block is partly filled, and

    PROBED_ROWS spread evenly over each of the largest and the end samples.
    """
    starts = [0, *itertools.accumulate(lengths)]
    by_size = sorted(range(len(lengths)), key=lambda i: lengths[i])
    chosen = {0, len(lengths) - 1, *by_size[-PROBED_SAMPLES // 2 :], by_size[0]}
    rows = []
    for i, length in enumerate(lengths):
        count = min(PROBED_ROWS, length) if i in chosen else min(1, length)
        rows += [starts[i + 1] - 1 - j * (length - 1) // max(count - 1, 1) for j in range(count)][
            ::-1
        ]
    return torch.tensor(rows, dtype=torch.int64)


def plain(inputs: Inputs, rows: Tensor | None) -> Tensor:
    """Attention of some rows (None: of all) in plain PyTorch, scores in memory: (rows, H, D)."""
    q, k, v = inputs.leaves
    starts_q = [0, *itertools.accumulate(inputs.rest["lengths_q"])]
    starts_k = [0, *itertools.accumulate(inputs.rest["lengths_k"])]
    rows = torch.arange(starts_q[-1]) if rows is None else rows
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
