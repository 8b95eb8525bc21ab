"""varlen_attention: full attention inside every sample of a packed batch, self and to text.

FLOPs: 4 * heads * head_dim * sum(len_q * len_k) forward, and twice that backward: no recomputation
is counted. flash-attn's own tables count 2.5 times, so their backward figures are 1.25 times ours
for the same speed. Letters in shapes: Tq queries, Tk keys, H heads, D head_dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import attention_peers
from bench.attention_peers import LIMITS, compared_alone
from bench.cases import Function, Inputs, Peer, Problem, draw_normal, needs_triton, packing
from bench.packs import LONG_PACKS, TEXT_TOKENS, Pack, packs
from bench.peers import ours
from goku.model import PRESETS
from goku_kernels import Packing, reference, varlen_attention, varlen_attention_flops

OPERATOR = "varlen_attention"
SOURCES = (
    "kernels/goku_kernels", "bench/varlen_attention.py", "bench/attention_peers.py",
    "bench/packs.py", "bench/cases.py", "bench/judging.py", "bench/batching.py",
    "bench/filler.py", "bench/timing.py",
)  # fmt: skip
MODELS = ("goku-2b", "goku-8b")
# Heads and head_dim of every case. No model has heads of 128: 14 are as wide as goku-2b. 7 are what
# one of two or four sequence-parallel ranks has of them, which 220K tokens are trained on.
SHAPES = {name: (PRESETS[name].heads, PRESETS[name].head_dim) for name in MODELS} | {
    "14 heads of 128": (14, 128), "7 heads of 64": (7, 64), "7 heads of 128": (7, 128),
}  # fmt: skip
# What is measured on a GPU, (cases, packs): the most telling first, since time may run out before the
# last. A fixed-length batch stands beside the pack that is compared with it, in the same run.
_BOTH, _CROSS = ("goku-2b", "14 heads of 128"), f", cross-attention to {TEXT_TOKENS}"
ORDER: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (_BOTH, ("64K, one clip", "64K, mixed", "16K, one clip", "16K, mixed")),
    (_BOTH, tuple(pack.name for pack in LONG_PACKS)),
    # Their rates are what `bench.block` expects of the attention.
    (("goku-8b",), ("64K, mixed", "16K, mixed")),
    (("7 heads of 64", "7 heads of 128"), ("220K, one clip",)),
    (_BOTH, ("64K, many images",)),
    (("goku-2b" + _CROSS,), ("64K, mixed", "64K, many images")),
    (("goku-2b",), ("16K, many images",)),
    (("goku-8b",), ("64K, one clip", "64K, many images", "16K, many images")),
    (("goku-8b" + _CROSS,), ("64K, mixed",)),
    (("goku-2b",), ("220K, mixed", "220K, many images", "220K, one clip")),
)  # fmt: skip
# Of torch's own kernels the first that takes the inputs. Left to itself torch prefers cuDNN on sm_90 where
# that is newer than 9.15, which plans every length anew, and is a peer of its own here.
EAGER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NOTE = (
    "backward FLOPs are counted as 2x forward (flash-attn's tables: 2.5x); eager keeps what its "
    "backward needs, except the scores, which torch's fused attention computes again, and never takes cuDNN"
)

# What is compared with the truth: so many queries of each of so many samples.
PROBED_SAMPLES, PROBED_ROWS = 6, 32
# One unit in the last place of what is multiplied and summed in.
FP32, TF32 = 2.0**-23, 2.0**-10
# All scores are this much below zero, by one channel of queries and keys. A key too many in the last
# partly filled block, which masked loads fill with zeros, has score zero: it outweighs the others,
# and shows among thousands of them. Larger queries would hide it, and plain bf16 rounds their scores.
APART = 6.0


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
    with sdpa_kernel(EAGER, set_priority=True):
        out = reference.varlen_attention(q, k, v, *cu, softmax_scale=scale, return_lse=False)
    assert isinstance(out, Tensor)
    return (out,)


def _deterministic(problem: Problem, device: torch.device) -> Function:
    needs_triton(device)
    return function("triton", deterministic=True)


# The reference walks over the samples on the host: nothing for torch.compile to fuse, which has
# FlexAttention for this.
_eager, _fused = ours(eager, function("triton"), compiled=False)
PEERS = [
    _fused,
    Peer("goku triton, deterministic", _deterministic, backend="triton"),
    *attention_peers.PEERS,
    compared_alone(_eager),
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
    """Attention of some rows (None: of all) in plain PyTorch, scores in memory: (rows, H, D).

    rows: on the CPU, in the order of the samples.
    """
    q, k, v = inputs.leaves
    lengths_q, lengths_k = (list(inputs.rest[name]) for name in ("lengths_q", "lengths_k"))
    rows = torch.arange(sum(lengths_q)) if rows is None else rows
    # Split, whose gradient is one tensor: a slice's is one as long as the pack for every sample.
    chosen = q.index_select(0, rows.to(q.device)).split(_counts(rows, lengths_q))
    outs = []
    for qi, ki, vi in zip(chosen, k.split(lengths_k), v.split(lengths_k), strict=True):
        scores = torch.einsum("thd,shd->hts", qi, ki) * q.shape[2] ** -0.5
        outs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), vi))
    return torch.cat(outs)


def problems(device_type: str) -> Iterator[Problem]:
    known = {pack.name: pack for pack in (*packs(device_type), *LONG_PACKS)}
    order = ORDER
    if device_type != "cuda":
        order = tuple(((m, m + _CROSS), [p.name for p in packs(device_type)]) for m in MODELS)
    for cases, names in order:
        for name, case in itertools.product(names, cases):
            shape = SHAPES[case.removesuffix(_CROSS)]
            yield problem(case, *shape, known[name], torch.bfloat16, cross=case.endswith(_CROSS))


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for a head width of `size`."""
    return problem(f"24 heads of {size}", 24, size, pack, dtype)
