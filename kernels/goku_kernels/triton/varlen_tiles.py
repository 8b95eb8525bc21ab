"""What the attention kernels share: the plan of a pack's tiles, finding a tile, loading rows.

A pack mixes hundreds of short images with one clip of 220K tokens, and the lengths are on the device
only. `plan_kernel` therefore writes, per call, the order of the samples (those with the costliest
tiles first) and how many blocks come before each. Program p of P then takes tiles p, p + P, p + 2P
...: as costs never grow along the order, no program has more than one tile's work more than another,
and the short samples fill up what a long one leaves. A counter on the device that hands out tiles
would balance no better, and Triton cannot warp-specialise inside its `while` loop.

Samples are numbered with one more at the end: the padding rows, whose other side is empty. So they
get what every sample gets that has nothing to look at: zeros, and -inf for lse.

A plan, int32 (2S + 1,) for S = B + 1: [i], i <= S: blocks before the i-th sample of the order, the
last being all blocks; [S + 1 + i]: which sample the i-th is.
"""

import triton
import triton.language as tl


@triton.jit
def segment(cu_seqlens, B, rows, i):
    """First row and length of sample i; i = B is the padding up to `rows`."""
    first = tl.load(cu_seqlens + i)
    end = tl.load(cu_seqlens + tl.minimum(i + 1, B))
    return first, tl.where(i < B, end - first, (rows - first).to(tl.int32))


@triton.jit
def _lengths(cu_seqlens, B, rows, i, mask):
    """Lengths of samples i (a vector), 0 where not `mask`; i = B is the padding."""
    first = tl.load(cu_seqlens + i, mask=mask, other=0)
    end = tl.load(cu_seqlens + i + 1, mask=mask & (i < B), other=0)
    return tl.where(mask, tl.where(i < B, end, rows.to(tl.int32)) - first, 0)


@triton.jit
def _plan(cu_outer, cu_inner, plan, B, outer_rows, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    samples = B + 1
    own = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    valid = own < samples
    # What one tile of the sample costs; the padding costs nothing, so it comes last.
    work = _lengths(cu_inner, B, 0 * outer_rows, own, valid & (own < B))
    rank = tl.zeros((CHUNK,), tl.int32)
    before = tl.zeros((CHUNK,), tl.int32)
    total = tl.zeros((), tl.int32)
    for first in range(0, samples, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = other < samples
        other_work = _lengths(cu_inner, B, 0 * outer_rows, other, there & (other < B))
        blocks = tl.cdiv(_lengths(cu_outer, B, outer_rows, other, there), BLOCK)
        earlier = (other_work[None, :] > work[:, None]) | (
            (other_work[None, :] == work[:, None]) & (other[None, :] < own[:, None])
        )
        earlier = earlier & there[None, :]
        rank += tl.sum(earlier.to(tl.int32), axis=1)
        before += tl.sum(tl.where(earlier, blocks[None, :], 0), axis=1)
        total += tl.sum(blocks, axis=0)
    tl.store(plan + rank, before, mask=valid)
    tl.store(plan + samples + 1 + rank, own, mask=valid)
    if tl.program_id(0) == 0:
        tl.store(plan + samples, total)


@triton.jit(do_not_specialize=["B", "Tq", "Tk"])
def plan_kernel(
    cu_seqlens_q, cu_seqlens_k, plan, B: tl.int32, Tq: tl.int64, Tk: tl.int64,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Plan tiles of QUERIES queries (programs (., 0)) and of KEYS keys (programs (., 1)).

    Every program ranks CHUNK samples by comparing them with all others and adds up the blocks of
    those that come earlier, so that none waits for another: B * B comparisons in all, for 4,096
    samples a few microseconds on a whole chip.
    """
    if tl.program_id(1) == 0:
        _plan(cu_seqlens_q, cu_seqlens_k, plan, B, Tq, QUERIES, CHUNK)
    else:
        _plan(cu_seqlens_k, cu_seqlens_q, plan + 2 * B + 3, B, Tk, KEYS, CHUNK)


@triton.jit
def find_tile(plan, B, tile, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """(sample, block, group, head in group) of a tile.

    Tiles of one sample and group (the query heads of one key/value head) follow each other: they
    read the same keys and values, which then come from L2.
    """
    block = tile // HEADS
    position = tl.zeros((), tl.int32)
    # One load of 1,024 ends costs one latency, a search by halves ten.
    for start in range(0, B, 1024):
        i = start + tl.arange(0, 1024)
        ends = tl.load(plan + 1 + i, mask=i < B, other=2147483647)
        position += tl.sum((ends <= block).to(tl.int32), axis=0)
    first = tl.load(plan + position)
    blocks = tl.load(plan + 1 + position) - first
    local = tile - first * HEADS
    rest = local % (blocks * GROUP)
    sample = tl.load(plan + 2 + B + position)
    return sample, rest // GROUP, local // (blocks * GROUP), rest % GROUP


@triton.jit
def describe(
    x, heads, rows, head_stride, row_stride, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A TMA descriptor of x (rows, heads, D) with tiles of one head; x itself where there is no TMA.

    It spans all samples and is made once a program. So a tile may reach into the next sample:
    load_tile says what becomes of those rows.
    """
    if TMA:
        return tl.make_tensor_descriptor(
            x, [heads, rows.to(tl.int32), D], [head_stride, row_stride, 1], [1, ROWS, COLUMNS]
        )
    else:
        return x


@triton.jit
def load_tile(
    x, first, start, rows, head, head_stride, row_stride, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TMA: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Rows start, ... of a sample of `rows` rows from row `first` of x (what `describe` returned).

    (ROWS, COLUMNS), zeros past D. LAST None: all rows are there. "zero": rows past the sample's end
    are zeros. "any": they are anything, for a side whose rows do not meet in a sum.
    """
    r = start + tl.arange(0, ROWS)
    if TMA:
        tile = x.load([head, first + start, 0]).reshape(ROWS, COLUMNS)
        if LAST == "zero":
            tile = tl.where((r < rows)[:, None], tile, 0.0)
        return tile
    else:
        c = tl.arange(0, COLUMNS)
        # int64: in a fused QKV buffer a row offset passes 2^31 from 140K tokens on.
        base = x + first.to(tl.int64) * row_stride + head * head_stride
        if LAST is None:
            # The offsets inside the block stay the same from one iteration to the next.
            inside = tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride + c[None, :]
            at = base + start * row_stride + inside
            if COLUMNS == D:
                return tl.load(at)
            return tl.load(at, mask=(c < D)[None, :], other=0.0)
        else:
            at = base + r.to(tl.int64)[:, None] * row_stride + c[None, :]
            return tl.load(at, mask=(r < rows)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    x, value, first, rows, stride, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Store (ROWS, COLUMNS) at rows first, ... of x (rows, D), what lies past the ends left out."""
    r = first + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = x + r.to(tl.int64)[:, None] * stride + c[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(r < rows)[:, None] & (c < D)[None, :])
