"""The forward of varlen_attention for sm_90, with specialised warps.

Four warps copy by TMA while two groups of four multiply, each 64 queries of the tile; the compiler
divides the loop between them. What Triton 3.6 and 3.7 can divide decides its shape: descriptors of
two axes (so head_dim must be 64 or 128 and the heads of a row adjacent), and nothing but one loop
that multiplies, so that the mask of the last block is computed in all of them. The launcher starts
one program per tile: the loop over tiles is there because nothing else may surround the other one.
"""

import triton
import triton.language as tl

from .varlen_tiles import find_tile, segment, store_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["B", "Tq", "Tk", "q_row", "k_row", "v_row", "scale"])
def specialised_forward_kernel(
    q, k, v, cu_seqlens_q, cu_seqlens_k, plan, out, lse,
    B: tl.int32, Tq: tl.int64, Tk: tl.int64, q_row: tl.int64, k_row: tl.int64, v_row: tl.int64,
    scale: tl.float32, H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out (Tq, H, D) and lse (H, Tq) of a packed batch; strides of rows in units of ALIGN."""
    G: tl.constexpr = H // HK
    q_row, k_row, v_row = q_row * ALIGN, k_row * ALIGN, v_row * ALIGN
    log2_scale = scale * LOG2E
    q_tiles = tl.make_tensor_descriptor(q, [Tq.to(tl.int32), H * D], [q_row, 1], [QUERIES, D])
    k_tiles = tl.make_tensor_descriptor(k, [Tk.to(tl.int32), HK * D], [k_row, 1], [KEYS, D])
    total = tl.load(plan + 1 + B) * H
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=True):
        sample, block, group, member = find_tile(plan, B, tile, H, G)
        head = group * G + member
        q_first, m_rows = segment(cu_seqlens_q, B, Tq, sample)
        k_first, n_rows = segment(cu_seqlens_k, B, Tk, sample)
        n_rows = tl.where(sample < B, n_rows, 0)
        # Ends with the sample, so that the hardware fills up its last block with zeros: a weight of
        # 0 times a neighbour's NaN must not arise. Scores are masked, so k may reach over the end.
        v_tiles = tl.make_tensor_descriptor(v, [k_first + n_rows, HK * D], [v_row, 1], [KEYS, D])
        m_first = block * QUERIES
        q_tile = q_tiles.load([q_first + m_first, head * D])
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total_weight = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, D), tl.float32)
        for start in tl.range(
            0, n_rows, KEYS, num_stages=STAGES, warp_specialize=True, disable_licm=True
        ):
            k_tile = k_tiles.load([k_first + start, group * D])
            scores = tl.dot(q_tile, tl.trans(k_tile))
            there = start + tl.arange(0, KEYS) < n_rows
            scores = tl.where(there[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * log2_scale)
            shrink = tl.exp2(top - new_top)
            weights = tl.exp2(scores * log2_scale - new_top[:, None])
            total_weight = total_weight * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None]
            v_tile = v_tiles.load([k_first + start, group * D])
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc)
            top = new_top

        rows = m_first + tl.arange(0, QUERIES)
        empty = total_weight == 0.0
        total_weight = tl.where(empty, 1.0, total_weight)
        out_row: tl.constexpr = H * D
        out_base = out + q_first.to(tl.int64) * out_row + head * D
        acc = acc / total_weight[:, None]
        store_rows(out_base, acc, m_first, m_rows, out_row, D, QUERIES, D)
        log_sum = tl.where(empty, float("-inf"), (top + tl.log2(total_weight)) * LN2)
        tl.store(lse + head * Tq + q_first + rows, log_sum, mask=rows < m_rows)
