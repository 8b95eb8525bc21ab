"""Backward of varlen_attention in Triton, with equal bits on every run or with fewer products.

With P = exp(S - lse) and dP = dout v^T the gradient of the scores is dS = P * (dP - delta), where
delta = rowsum(dout * out) - dlse (FlashAttention-2, arXiv 2307.08691, algorithm 2). `delta_kernel`
computes delta; `gradient_kv_kernel` walks the queries for a block of keys, `gradient_q_kernel` the keys
for a block of queries. Both recompute S and dP: seven matrix products, and equal bits on every run.

Given somewhere to add dq up, `gradient_kv_kernel` computes that too: five products, but the blocks of
keys add to a row of dq in any order, in fp32, so that its last bits vary.
"""

import triton
import triton.language as tl

from .varlen_tiles import describe, find_tile, load_tile, segment, store_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["Tq", "dout_row", "dout_head", "out_row", "out_head"])
def delta_kernel(
    dout, out, dlse, delta, Tq: tl.int64, dout_row: tl.int64, dout_head: tl.int64,
    out_row: tl.int64, out_head: tl.int64,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """delta (H, Tq) fp32 = rowsum(dout * out) - dlse; program (i, h): ROWS rows of head h."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    dout_rows = load_tile(
        dout, first * 0, first, Tq, head, dout_head * ALIGN, dout_row * ALIGN, D, ROWS, COLUMNS,
        False, "zero",
    )  # fmt: skip
    out_rows = load_tile(
        out, first * 0, first, Tq, head, out_head * ALIGN, out_row * ALIGN, D, ROWS, COLUMNS,
        False, "zero",
    )  # fmt: skip
    total = tl.sum(dout_rows.to(tl.float32) * out_rows.to(tl.float32), axis=1)
    rows = first + tl.arange(0, ROWS)
    at = head * Tq + rows
    if dlse is not None:
        total -= tl.load(dlse + at, mask=rows < Tq, other=0.0)
    tl.store(delta + at, total, mask=rows < Tq)


@triton.jit
def _add_queries(
    dk, dv, k_tile, v_tile, q_tile, dout_tile, lse_rows, delta_rows, log2_scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries gives to dk (over scale) and dv; scores lie (keys, queries).

    Returns dk, dv and the gradient of the scores.
    """
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    weights = tl.exp2(scores * log2_scale - (lse_rows * LOG2E)[None, :])
    dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
    dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
    dscores = weights * (dweights - delta_rows[None, :])
    dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv, dscores


@triton.jit
def _add_rows(
    x, value, first, start, rows, head, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Add (ROWS, COLUMNS) to rows start, ... of a sample of `rows` rows from row `first` of x (., H, D).

    REDUCE: x is a descriptor that ends with the sample, and the copy engine adds from shared memory.
    """
    if REDUCE:
        x.atomic_add([head, first + start, 0], value.reshape(1, ROWS, COLUMNS))
    else:
        r = start + tl.arange(0, ROWS)
        c = tl.arange(0, COLUMNS)
        at = x + (first + r).to(tl.int64)[:, None] * (H * D) + head * D + c[None, :]
        tl.atomic_add(at, value, mask=(r < rows)[:, None] & (c < D)[None, :], sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "B", "Tq", "Tk", "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "dout_row",
        "dout_head", "scale",
    ]
)  # fmt: skip
def gradient_kv_kernel(
    q, k, v, dout, lse, delta, cu_seqlens_q, cu_seqlens_k, plan, dq, dk, dv,
    B: tl.int32, Tq: tl.int64, Tk: tl.int64, q_row: tl.int64, q_head: tl.int64, k_row: tl.int64,
    k_head: tl.int64, v_row: tl.int64, v_head: tl.int64, dout_row: tl.int64, dout_head: tl.int64,
    scale: tl.float32, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """dk, dv (Tk, Hk, D): a tile is a block of keys of one sample and key/value head.

    dq: None, or fp32 (Tq, H, D) of zeros, contiguous, to which dq over scale is added.
    """
    G: tl.constexpr = H // HK
    q_row, q_head = q_row * ALIGN, q_head * ALIGN
    k_row, k_head = k_row * ALIGN, k_head * ALIGN
    v_row, v_head = v_row * ALIGN, v_head * ALIGN
    dout_row, dout_head = dout_row * ALIGN, dout_head * ALIGN
    log2_scale = scale * LOG2E
    plan += 2 * B + 3
    k = describe(k, HK, Tk, k_head, k_row, D, KEYS, COLUMNS, TMA)
    v = describe(v, HK, Tk, v_head, v_row, D, KEYS, COLUMNS, TMA)
    # Where dq is asked for, keys past the sample's end meet in its sums.
    LAST: tl.constexpr = "any" if dq is None else "zero"
    total = tl.load(plan + 1 + B) * HK
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=True):
        sample, block, group, _ = find_tile(plan, B, tile, HK, 1)
        q_first, m_rows = segment(cu_seqlens_q, B, Tq, sample)
        k_first, n_rows = segment(cu_seqlens_k, B, Tk, sample)
        m_rows = tl.where(sample < B, m_rows, 0)
        n_first = block * KEYS
        k_tile = load_tile(
            k, k_first, n_first, n_rows, group, k_head, k_row, D, KEYS, COLUMNS, TMA, LAST
        )
        v_tile = load_tile(
            v, k_first, n_first, n_rows, group, v_head, v_row, D, KEYS, COLUMNS, TMA, "any"
        )
        keys_there = (n_first + tl.arange(0, KEYS) < n_rows)[:, None]
        dk_tile = tl.zeros((KEYS, COLUMNS), tl.float32)
        dv_tile = tl.zeros((KEYS, COLUMNS), tl.float32)
        # These descriptors end with the sample: the hardware fills up the last block with zeros.
        end = q_first + m_rows
        q_rows = describe(q, H, end, q_head, q_row, D, QUERIES, COLUMNS, TMA)
        dout_rows = describe(dout, H, end, dout_head, dout_row, D, QUERIES, COLUMNS, TMA)
        if dq is not None:
            dq_rows = describe(dq, H, end, D, H * D, D, QUERIES, COLUMNS, REDUCE)
        BOUND: tl.constexpr = None if TMA else "zero"
        r = tl.arange(0, QUERIES)
        for member in range(G):
            head = group * G + member
            lse_base = lse + head * Tq + q_first
            delta_base = delta + head * Tq + q_first
            for start in tl.range(0, m_rows, QUERIES, num_stages=STAGES, disable_licm=True):
                q_tile = load_tile(
                    q_rows, q_first, start, m_rows, head, q_head, q_row, D, QUERIES, COLUMNS, TMA,
                    BOUND,
                )  # fmt: skip
                dout_tile = load_tile(
                    dout_rows, q_first, start, m_rows, head, dout_head, dout_row, D, QUERIES,
                    COLUMNS, TMA, BOUND,
                )  # fmt: skip
                # Rows past the end get weight 0 from an infinite lse.
                there = start + r < m_rows
                lse_rows = tl.load(lse_base + start + r, mask=there, other=float("inf"))
                delta_rows = tl.load(delta_base + start + r, mask=there, other=0.0)
                dk_tile, dv_tile, dscores = _add_queries(
                    dk_tile, dv_tile, k_tile, v_tile, q_tile, dout_tile, lse_rows, delta_rows,
                    log2_scale, PRECISION,
                )  # fmt: skip
                if dq is not None:
                    # Of keys that are not there it may be infinite: their weight is exp(0 - lse).
                    dscores = tl.where(keys_there, dscores, 0.0).to(k_tile.dtype)
                    dq_tile = tl.dot(tl.trans(dscores), k_tile, input_precision=PRECISION)
                    _add_rows(
                        dq_rows, dq_tile, q_first, start, m_rows, head, H, D, QUERIES, COLUMNS,
                        REDUCE,
                    )  # fmt: skip
        out_row: tl.constexpr = HK * D
        base = k_first.to(tl.int64) * out_row + group * D
        store_rows(dk + base, dk_tile * scale, n_first, n_rows, out_row, D, KEYS, COLUMNS)
        store_rows(dv + base, dv_tile, n_first, n_rows, out_row, D, KEYS, COLUMNS)


@triton.jit(
    do_not_specialize=[
        "B", "Tq", "Tk", "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "dout_row",
        "dout_head", "scale",
    ]
)  # fmt: skip
def gradient_q_kernel(
    q, k, v, dout, lse, delta, cu_seqlens_q, cu_seqlens_k, plan, dq,
    B: tl.int32, Tq: tl.int64, Tk: tl.int64, q_row: tl.int64, q_head: tl.int64, k_row: tl.int64,
    k_head: tl.int64, v_row: tl.int64, v_head: tl.int64, dout_row: tl.int64, dout_head: tl.int64,
    scale: tl.float32, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dq (Tq, H, D): a tile is a block of queries of one sample and head."""
    G: tl.constexpr = H // HK
    q_row, q_head = q_row * ALIGN, q_head * ALIGN
    k_row, k_head = k_row * ALIGN, k_head * ALIGN
    v_row, v_head = v_row * ALIGN, v_head * ALIGN
    dout_row, dout_head = dout_row * ALIGN, dout_head * ALIGN
    log2_scale = scale * LOG2E
    q = describe(q, H, Tq, q_head, q_row, D, QUERIES, COLUMNS, TMA)
    dout = describe(dout, H, Tq, dout_head, dout_row, D, QUERIES, COLUMNS, TMA)
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
        dout_tile = load_tile(
            dout, q_first, m_first, m_rows, head, dout_head, dout_row, D, QUERIES, COLUMNS, TMA,
            "any",
        )  # fmt: skip
        rows = m_first + tl.arange(0, QUERIES)
        at = head * Tq + q_first + rows
        log_sum = tl.load(lse + at, mask=rows < m_rows, other=float("inf")) * LOG2E
        delta_rows = tl.load(delta + at, mask=rows < m_rows, other=0.0)

        # The last block of keys first, masked: a weight of 0 * inf must not arise.
        tail = tl.maximum(n_rows - 1, 0) // KEYS * KEYS
        k_tile = load_tile(
            k, k_first, tail, n_rows, group, k_head, k_row, D, KEYS, COLUMNS, TMA, "zero"
        )
        v_tile = load_tile(
            v, k_first, tail, n_rows, group, v_head, v_row, D, KEYS, COLUMNS, TMA, "any"
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        dscores = tl.exp2(scores * log2_scale - log_sum[:, None])
        dscores = dscores * (dweights - delta_rows[:, None])
        there = tail + tl.arange(0, KEYS) < n_rows
        dscores = tl.where(there[None, :], dscores, 0.0)
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
        for start in tl.range(0, tail, KEYS, num_stages=STAGES, disable_licm=True):
            k_tile = load_tile(
                k, k_first, start, 0, group, k_head, k_row, D, KEYS, COLUMNS, TMA, None
            )
            v_tile = load_tile(
                v, k_first, start, 0, group, v_head, v_row, D, KEYS, COLUMNS, TMA, None
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
            dscores = tl.exp2(scores * log2_scale - log_sum[:, None])
            dscores = dscores * (dweights - delta_rows[:, None])
            acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
        out_row: tl.constexpr = H * D
        base = dq + q_first.to(tl.int64) * out_row + head * D
        store_rows(base, acc * scale, m_first, m_rows, out_row, D, QUERIES, COLUMNS)
