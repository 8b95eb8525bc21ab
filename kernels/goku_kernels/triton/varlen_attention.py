"""varlen_attention in Triton: the forward kernel, and what launches forward and backward.

Letters in shapes: Tq queries, Tk keys, B samples, H query heads, Hk key/value heads, D head_dim.

FlashAttention (arXiv 2205.14135, 2307.08691): a tile is a block of queries of one sample and head; it
walks the sample's keys once with a running maximum and sum. The last, partly filled block of keys is
taken first, so that the loop over the others needs no mask and never meets an empty maximum.
Head dimensions 72 and 96 are computed as 128: 128/72 and 128/96 times the matrix work.
"""

import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Config, config, find
from .launch import Launcher, alignment
from .varlen_attention_backward import delta_kernel, gradient_kv_kernel, gradient_q_kernel
from .varlen_attention_specialised import specialised_forward_kernel
from .varlen_tiles import describe, find_tile, load_tile, plan_kernel, segment, store_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=[
        "B", "Tq", "Tk", "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "scale"
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, cu_seqlens_q, cu_seqlens_k, plan, out, lse,
    B: tl.int32, Tq: tl.int64, Tk: tl.int64, q_row: tl.int64, q_head: tl.int64, k_row: tl.int64,
    k_head: tl.int64, v_row: tl.int64, v_head: tl.int64, scale: tl.float32,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out (Tq, H, D) and lse (H, Tq) of a packed batch; strides of q, k, v in units of ALIGN."""
    G: tl.constexpr = H // HK
    q_row, q_head = q_row * ALIGN, q_head * ALIGN
    k_row, k_head = k_row * ALIGN, k_head * ALIGN
    v_row, v_head = v_row * ALIGN, v_head * ALIGN
    log2_scale = scale * LOG2E
    q = describe(q, H, Tq, q_head, q_row, D, QUERIES, COLUMNS, TMA)
    k = describe(k, HK, Tk, k_head, k_row, D, KEYS, COLUMNS, TMA)
    v = describe(v, HK, Tk, v_head, v_row, D, KEYS, COLUMNS, TMA)
    total = tl.load(plan + 1 + B) * H
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=True):
        sample, block, group, member = find_tile(plan, B, tile, H, G)
        head = group * G + member
        q_first, m_rows = segment(cu_seqlens_q, B, Tq, sample)
        k_first, n_rows = segment(cu_seqlens_k, B, Tk, sample)
        n_rows = tl.where(sample < B, n_rows, 0)
        m_first = block * QUERIES
        q_tile = load_tile(
            q, q_first, m_first, m_rows, head, q_head, q_row, D, QUERIES, COLUMNS, TMA, "any"
        )

        # The last block of keys, masked. Without keys its maximum is -inf, and everything else 0.
        tail = tl.maximum(n_rows - 1, 0) // KEYS * KEYS
        k_tile = load_tile(
            k, k_first, tail, n_rows, group, k_head, k_row, D, KEYS, COLUMNS, TMA, "any"
        )
        v_tile = load_tile(
            v, k_first, tail, n_rows, group, v_head, v_row, D, KEYS, COLUMNS, TMA, "zero"
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        there = tail + tl.arange(0, KEYS) < n_rows
        scores = tl.where(there[None, :], scores, float("-inf"))
        top = tl.max(scores, axis=1) * log2_scale
        weights = tl.exp2(scores * log2_scale - tl.where(n_rows > 0, top, 0.0)[:, None])
        weights = tl.where(there[None, :], weights, 0.0)
        total_weight = tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)

        for start in tl.range(0, tail, KEYS, num_stages=STAGES, disable_licm=True):
            k_tile = load_tile(
                k, k_first, start, 0, group, k_head, k_row, D, KEYS, COLUMNS, TMA, None
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            new_top = tl.maximum(top, tl.max(scores, axis=1) * log2_scale)
            shrink = tl.exp2(top - new_top)
            weights = tl.exp2(scores * log2_scale - new_top[:, None])
            total_weight = total_weight * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None]
            v_tile = load_tile(
                v, k_first, start, 0, group, v_head, v_row, D, KEYS, COLUMNS, TMA, None
            )
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
            top = new_top

        rows = m_first + tl.arange(0, QUERIES)
        empty = total_weight == 0.0
        total_weight = tl.where(empty, 1.0, total_weight)
        acc = acc / total_weight[:, None]
        out_row: tl.constexpr = H * D
        out_base = out + q_first.to(tl.int64) * out_row + head * D
        store_rows(out_base, acc, m_first, m_rows, out_row, D, QUERIES, COLUMNS)
        log_sum = tl.where(empty, float("-inf"), (top + tl.log2(total_weight)) * LN2)
        tl.store(lse + head * Tq + q_first + rows, log_sum, mask=rows < m_rows)


HEAD_DIMS = (64, 72, 96, 128)
_OP = "varlen_attention"
# Samples that one program of the plan ranks.
_CHUNK = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, *,
    run: Launcher, override: Mapping[str, Config] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (Tq, H, D) of q's dtype and lse (H, Tq) fp32; `override`: configurations by kernel.

    Raises:
        ValueError: no configuration for this head_dim and dtype.
    """
    special = _specialised(q, k, v, run, override)
    found = special or _config("forward", q, run, override)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k, found, None, run)
    kernel = forward_kernel if special is None else specialised_forward_kernel
    arguments = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "plan": plan, "out": out, "lse": lse,
        **_shared(q, k, v, None, cu_seqlens_q, scale, found),
    }  # fmt: skip
    _launch(kernel, found, _tiles(q, found["queries"], cu_seqlens_q), arguments, run)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, *, run: Launcher,
    deterministic: bool = True, override: Mapping[str, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of the inputs' shapes and dtypes, contiguous.

    deterministic: equal bits on every run. Without it one kernel adds dq up by atomics, where a
    configuration of it ("gradient") is shipped.

    Raises:
        ValueError: no configuration for this head_dim and dtype.
    """
    # Autograd hands on expanded and transposed gradients; a descriptor knows no stride of 0.
    dout, out = (
        x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous() for x in (dout, out)
    )
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    dk, dv = (x.new_empty(x.shape) for x in (k, v))
    tokens, heads, size = q.shape
    rows = _config("delta", q, run, override)
    align = alignment(dout, out)
    run(
        delta_kernel,
        (triton.cdiv(tokens, rows["rows"]), heads),
        {
            "dout": dout, "out": out, "dlse": dlse, "delta": delta, "Tq": tokens,
            "dout_row": dout.stride(0) // align, "dout_head": dout.stride(1) // align,
            "out_row": out.stride(0) // align, "out_head": out.stride(1) // align,
            "D": size, "COLUMNS": triton.next_power_of_2(size), "ROWS": rows["rows"],
            "ALIGN": align,
        },
        num_warps=rows["num_warps"],
    )  # fmt: skip
    # Ring attention merges in fp32: delta was computed from that, the products take q's dtype.
    dout = dout.to(q.dtype)
    at_once = None if deterministic else _optional("gradient", q, run, override)
    by_keys = at_once or _config("gradient_kv", q, run, override)
    by_queries = _config("gradient_q", q, run, override)
    plan = _plan(q, k, cu_seqlens_q, cu_seqlens_k, by_queries, by_keys, run)
    inputs = {
        "q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "plan": plan,
    }  # fmt: skip
    sums, reduce = None, False
    if at_once is not None:
        sums = q.new_zeros(q.shape, dtype=torch.float32)
        reduce = bool(at_once["reduce"]) and _describable(sums)
    _launch(
        gradient_kv_kernel, by_keys, _tiles(k, by_keys["keys"], cu_seqlens_k),
        {**inputs, "dq": sums, "dk": dk, "dv": dv, "REDUCE": reduce,
         **_shared(q, k, v, dout, cu_seqlens_q, scale, by_keys)},
        run,
    )  # fmt: skip
    if sums is not None:
        return torch.mul(sums, scale, out=q.new_empty(q.shape)), dk, dv
    dq = q.new_empty(q.shape)
    _launch(
        gradient_q_kernel, by_queries, _tiles(q, by_queries["queries"], cu_seqlens_q),
        {**inputs, "dq": dq, **_shared(q, k, v, dout, cu_seqlens_q, scale, by_queries)},
        run,
    )  # fmt: skip
    return dq, dk, dv


def _config(kernel: str, q: Tensor, run: Launcher, override: Mapping[str, Config] | None) -> Config:
    if override is not None and kernel in override:
        return override[kernel]
    return config(_OP, kernel, q.shape[2], q.dtype, run.chip)


def _optional(
    kernel: str, q: Tensor, run: Launcher, override: Mapping[str, Config] | None
) -> Config | None:
    """The configuration of a kernel that not every chip and dtype has."""
    if override is not None:
        return override.get(kernel)
    return find(_OP, kernel, q.shape[2], q.dtype, run.chip)


def _specialised(
    q: Tensor, k: Tensor, v: Tensor, run: Launcher, override: Mapping[str, Config] | None
) -> Config | None:
    """The configuration of the forward with specialised warps; None where it cannot run.

    One program per tile: the copying warp is ahead of the others and would write the next tile's
    descriptor of v over the one that copies under way still read.
    """
    inputs = (q, k, v)
    adjacent = all(x.stride(1) == x.shape[2] for x in inputs)
    if q.shape[2] not in (64, 128) or not adjacent or not _describable(*inputs):
        return None
    found = _optional("forward_specialised", q, run, override)
    return None if found is None else {**found, "programs": 0}


def _describable(*inputs: Tensor) -> bool:
    """Whether TMA descriptors can be made of these: 16-byte strides above 0, and not empty."""
    return alignment(*inputs) == 8 and all(x.numel() > 0 and 0 not in x.stride() for x in inputs)


def _tiles(x: Tensor, block: int, cu_seqlens: Tensor) -> int:
    """At least as many tiles as there are: every sample and the padding may end in part of one."""
    return (x.shape[0] // block + cu_seqlens.shape[0]) * x.shape[1]


def _plan(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, by_queries: Config,
    by_keys: Config | None, run: Launcher,
) -> Tensor:  # fmt: skip
    """The plan of the tiles of queries, and behind it that of the tiles of keys if wanted."""
    samples = cu_seqlens_q.shape[0]
    plans = 1 if by_keys is None else 2
    plan = cu_seqlens_q.new_empty(plans * (2 * samples + 1))
    run(
        plan_kernel,
        (triton.cdiv(samples, _CHUNK), plans),
        {
            "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "plan": plan,
            "B": samples - 1, "Tq": q.shape[0], "Tk": k.shape[0],
            "QUERIES": by_queries["queries"], "KEYS": (by_keys or by_queries)["keys"],
            "CHUNK": _CHUNK,
        },
        num_warps=4,
    )  # fmt: skip
    return plan


def _shared(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, cu_seqlens_q: Tensor, scale: float,
    found: Config,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all main kernels have."""
    inputs = {"q": q, "k": k, "v": v} | ({} if dout is None else {"dout": dout})
    align = alignment(*inputs.values())
    strides = {}
    for name, x in inputs.items():
        strides[f"{name}_row"], strides[f"{name}_head"] = (s // align for s in x.stride()[:2])
    tma = bool(found["tma"]) and _describable(*inputs.values())
    return {
        **strides,
        "B": cu_seqlens_q.shape[0] - 1, "Tq": q.shape[0], "Tk": k.shape[0], "scale": scale,
        "H": q.shape[1], "HK": k.shape[1], "D": q.shape[2],
        "COLUMNS": triton.next_power_of_2(q.shape[2]),
        "QUERIES": found["queries"], "KEYS": found["keys"], "STAGES": found["num_stages"],
        "TMA": tma, "PRECISION": "tf32" if q.dtype == torch.float32 else "ieee", "ALIGN": align,
    }  # fmt: skip


def _launch(
    kernel: Any, found: Config, tiles: int, arguments: Mapping[str, Any], run: Launcher
) -> None:
    """Launch a main kernel: `programs` a processor (0: one per tile), no more than tiles.

    `arguments` may hold more than the kernel takes.
    """
    arguments = {name: arguments[name] for name in kernel.arg_names}
    programs = min(tiles, found["programs"] * run.processors or tiles)
    if not found["tma"]:
        run(kernel, (programs,), arguments, num_warps=found["num_warps"])
        return

    def launch() -> None:
        # Each program writes its descriptors to memory that Triton asks its allocator for. The
        # allocator is a context variable: set in a copy of the context, nobody else sees it.
        triton.set_allocator(_scratch)
        run(kernel, (programs,), arguments, num_warps=found["num_warps"])

    contextvars.copy_context().run(launch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of the current device and stream (torch aligns to 512 bytes)."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def shipped(chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration: (name, what runs forward and backward on meta tensors)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(size, bf16, 8) for size in HEAD_DIMS]
    cases += [(64, fp16, 8), (128, fp16, 8), (64, fp32, 8), (128, fp32, 8), (128, bf16, 2)]
    assert {row["chip"] for row in configs.table(_OP)} >= {chip}
    for size, dtype, kv_heads in cases:
        name = f"{size} {str(dtype).removeprefix('torch.')} 8:{kv_heads} heads"

        def case(
            run: Launcher, size: int = size, dtype: torch.dtype = dtype, kv_heads: int = kv_heads
        ) -> None:
            qkv = torch.empty((64, 8 + 2 * kv_heads, size), dtype=dtype, device="meta")
            q, k, v = qkv.split((8, kv_heads, kv_heads), dim=1)
            cu = torch.empty(4, dtype=torch.int32, device="meta")
            out, lse = forward(q, k, v, cu, cu, size**-0.5, run=run)
            inputs = (out, q, k, v, out, lse, lse, cu, cu, size**-0.5)
            backward(*inputs, run=run)
            if find(_OP, "gradient", size, dtype, run.chip) is not None:
                backward(*inputs, run=run, deterministic=False)

        yield name, case
