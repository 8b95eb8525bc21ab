"""Kernels of adaln_modulate and gated_residual_adaln: one pass over the tokens each way.

The gated operator is the plain one with a sum before its norm, so both share these kernels; a
tensor that an operator lacks is None, and what depends on it is not compiled.

A program walks a contiguous run of rows and keeps the modulation of their sample in registers: read
again for every row, fp32 rows of shift and scale would be twice the bytes of the bf16 tokens
themselves. Letters in shapes: T tokens, B samples, D width, P programs.
"""

import triton
import triton.language as tl

from .segments import sample_of

_INTEGERS = (
    "T", "B", "token_offset", "run", "x_stride", "branch_stride", "gate_stride", "shift_stride",
    "scale_stride", "dy_stride", "dout_stride",
)  # fmt: skip


@triton.jit
def _statistics(x, columns, D: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """The normalised rows of x (ROWS, BLOCK) and 1/deviation (ROWS, 1), in two passes over it.

    E[x^2] - E[x]^2 would cancel; x is in registers, so the second pass costs no traffic.
    """
    if NORM == "layer":
        x = tl.where(columns < D, x - tl.sum(x, axis=1, keep_dims=True) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)
    return x * rstd, rstd


@triton.jit(do_not_specialize=_INTEGERS)
def forward_kernel(
    x,  # (T, D), rows x_stride * ALIGN apart
    branch,  # (T, D) or None
    gate,  # rows of the modulation, or None
    shift,
    scale,
    weight,  # (D,) or None
    cu_seqlens,  # int32 (B + 1,) or None
    y,  # (T, D) contiguous, or None
    out,  # (T, D) contiguous: x + gate * branch; None without a branch
    T: tl.int64,
    B: tl.int32,
    token_offset: tl.int64,
    run: tl.int64,  # rows of a program
    x_stride: tl.int64,
    branch_stride: tl.int64,
    gate_stride: tl.int64,
    shift_stride: tl.int64,
    scale_stride: tl.int64,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,  # modulation has one row per token
    EPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = norm(out) * (1 + scale) + shift, with out = x + gate * branch rounded as it is stored."""
    row = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(row + run, T)
    columns = tl.arange(0, BLOCK)[None, :]
    lanes = tl.arange(0, ROWS)[:, None].to(tl.int64)  # offsets pass 2^31
    in_row = columns < D
    sample = tl.zeros((), tl.int32)
    if cu_seqlens is not None:
        sample = sample_of(cu_seqlens, B, row + token_offset)
    gain = tl.zeros((1, BLOCK), tl.float32)
    if weight is not None:
        gain = tl.load(weight + columns, mask=in_row, other=0.0).to(tl.float32)
    g = tl.zeros((1, BLOCK), tl.float32)
    a = tl.zeros((1, BLOCK), tl.float32)
    s = tl.zeros((1, BLOCK), tl.float32)

    while row < end:
        # Rows up to `stop` have one sample, or are all padding.
        stop = end
        here = True
        if cu_seqlens is not None:
            here = sample < B
            if here:
                stop = tl.minimum(end, tl.load(cu_seqlens + sample + 1) - token_offset)
        if not PER_TOKEN:
            at = sample.to(tl.int64) * ALIGN
            known = in_row & here
            if gate is not None:
                g = tl.load(gate + at * gate_stride + columns, mask=known, other=0.0).to(tl.float32)
            if shift is not None:
                a = tl.load(shift + at * shift_stride + columns, mask=known, other=0.0).to(
                    tl.float32
                )
            if scale is not None:
                s = tl.load(scale + at * scale_stride + columns, mask=known, other=0.0).to(
                    tl.float32
                )
        for first in tl.range(row, stop, ROWS, num_stages=STAGES):
            t = first + lanes
            mask = (t < stop) & in_row
            # A padding row is read as zero (it may hold NaN) and, with a shift of zero, stays so.
            read = mask & here
            value = tl.load(x + t * (x_stride * ALIGN) + columns, mask=read, other=0.0).to(
                tl.float32
            )
            if branch is not None:
                added = tl.load(
                    branch + t * (branch_stride * ALIGN) + columns, mask=read, other=0.0
                ).to(tl.float32)
                if gate is not None:
                    if PER_TOKEN:
                        g = tl.load(
                            gate + t * (gate_stride * ALIGN) + columns, mask=mask, other=0.0
                        ).to(tl.float32)
                    added = added * g
                value = (value + added).to(out.dtype.element_ty)
                tl.store(out + t * D + columns, value, mask=mask)
                value = value.to(tl.float32)
            if y is not None:
                if NORM != "none":
                    value, _ = _statistics(value, columns, D, NORM, EPS)
                if weight is not None:
                    value = value * gain
                if scale is not None:
                    if PER_TOKEN:
                        s = tl.load(
                            scale + t * (scale_stride * ALIGN) + columns, mask=mask, other=0.0
                        ).to(tl.float32)
                    value = value * (1.0 + s)
                if shift is not None:
                    if PER_TOKEN:
                        a = tl.load(
                            shift + t * (shift_stride * ALIGN) + columns, mask=mask, other=0.0
                        ).to(tl.float32)
                    value = value + a
                tl.store(y + t * D + columns, value.to(y.dtype.element_ty), mask=mask)
        row = stop
        if cu_seqlens is not None:
            sample = _next_sample(cu_seqlens, B, sample, row + token_offset)


@triton.jit
def _next_sample(cu_seqlens, B, sample, row):
    """The sample of `row`, at or after `sample`: over the end of one, and over empty ones."""
    behind = sample < B
    while behind:
        if tl.load(cu_seqlens + sample + 1) <= row:
            sample += 1
            behind = sample < B
        else:
            behind = False
    return sample


@triton.jit(do_not_specialize=_INTEGERS)
def backward_kernel(
    dy,  # (T, D) or None, rows dy_stride * ALIGN apart
    dout,  # (T, D) or None: gradient of the stored sum
    x,  # (T, D): what was normalised
    branch,  # (T, D); None where the gate's gradient is not wanted
    gate,
    scale,
    weight,
    cu_seqlens,
    dx,  # (T, D) contiguous, of the residual
    dbranch,  # (T, D) contiguous or None
    dscale,  # (T, D) contiguous: only with PER_TOKEN
    dgate,  # likewise
    sum_shift,  # fp32 (P + B, D) partial sums of dy, or None
    sum_scale,  # of dy * normalised x, times (1 + scale) with PER_TOKEN
    sum_gate,  # of the residual's gradient times branch
    T: tl.int64,
    B: tl.int32,
    token_offset: tl.int64,
    run: tl.int64,
    x_stride: tl.int64,
    branch_stride: tl.int64,
    gate_stride: tl.int64,
    scale_stride: tl.int64,
    dy_stride: tl.int64,
    dout_stride: tl.int64,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    EPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All gradients in one pass; sums over a sample's rows go to row (program + sample) of buffers.

    Walking the rows, each new pair (program, sample) increases program + sample, so that every pair
    has a row of its own and no addition is atomic.
    """
    program = tl.program_id(0)
    row = program.to(tl.int64) * run
    end = tl.minimum(row + run, T)
    columns = tl.arange(0, BLOCK)[None, :]
    lanes = tl.arange(0, ROWS)[:, None].to(tl.int64)  # offsets pass 2^31
    in_row = columns < D
    sample = tl.zeros((), tl.int32)
    if cu_seqlens is not None:
        sample = sample_of(cu_seqlens, B, row + token_offset)
    gain = tl.zeros((1, BLOCK), tl.float32)
    if weight is not None:
        gain = tl.load(weight + columns, mask=in_row, other=0.0).to(tl.float32)
    g = tl.zeros((1, BLOCK), tl.float32)
    s = tl.zeros((1, BLOCK), tl.float32)

    while row < end:
        stop = end
        here = True
        if cu_seqlens is not None:
            here = sample < B
            if here:
                stop = tl.minimum(end, tl.load(cu_seqlens + sample + 1) - token_offset)
        if not PER_TOKEN:
            at = sample.to(tl.int64) * ALIGN
            known = in_row & here
            if gate is not None:
                g = tl.load(gate + at * gate_stride + columns, mask=known, other=0.0).to(tl.float32)
            if scale is not None:
                s = tl.load(scale + at * scale_stride + columns, mask=known, other=0.0).to(
                    tl.float32
                )
        # One row of lanes each, folded after the loop.
        by_shift = tl.zeros((ROWS, BLOCK), tl.float32)
        by_scale = tl.zeros((ROWS, BLOCK), tl.float32)
        by_gate = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in tl.range(row, stop, ROWS, num_stages=STAGES):
            t = first + lanes
            mask = (t < stop) & in_row
            read = mask & here
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            if dy is not None:
                grad = tl.load(dy + t * (dy_stride * ALIGN) + columns, mask=read, other=0.0).to(
                    tl.float32
                )
                if sum_shift is not None:
                    by_shift += grad
                if PER_TOKEN and scale is not None:
                    s = tl.load(
                        scale + t * (scale_stride * ALIGN) + columns, mask=mask, other=0.0
                    ).to(tl.float32)
                # Without a norm, x is only needed for the gradient of the scale.
                if NORM != "none" or scale is not None:
                    value = tl.load(x + t * (x_stride * ALIGN) + columns, mask=read, other=0.0).to(
                        tl.float32
                    )
                    if NORM != "none":
                        value, rstd = _statistics(value, columns, D, NORM, EPS)
                    if dscale is not None:
                        normed = value
                        if weight is not None:
                            normed = normed * gain
                        tl.store(
                            dscale + t * D + columns,
                            (grad * normed).to(dscale.dtype.element_ty),
                            mask=mask,
                        )
                    if sum_scale is not None:
                        if PER_TOKEN:
                            by_scale += grad * (1.0 + s) * value
                        else:
                            by_scale += grad * value
                if scale is not None:
                    grad = grad * (1.0 + s)
                if NORM != "none":
                    if weight is not None:
                        grad = grad * gain
                    along = tl.sum(grad * value, axis=1, keep_dims=True) / D
                    if NORM == "layer":
                        grad = grad - tl.sum(grad, axis=1, keep_dims=True) / D
                    grad = (grad - value * along) * rstd
                total += grad
            if dout is not None:
                total += tl.load(
                    dout + t * (dout_stride * ALIGN) + columns, mask=read, other=0.0
                ).to(tl.float32)
            tl.store(dx + t * D + columns, total.to(dx.dtype.element_ty), mask=mask)
            if gate is not None:
                if PER_TOKEN:
                    g = tl.load(
                        gate + t * (gate_stride * ALIGN) + columns, mask=mask, other=0.0
                    ).to(tl.float32)
                if branch is not None:
                    added = tl.load(
                        branch + t * (branch_stride * ALIGN) + columns, mask=read, other=0.0
                    ).to(tl.float32)
                    if dgate is not None:
                        tl.store(
                            dgate + t * D + columns,
                            (total * added).to(dgate.dtype.element_ty),
                            mask=mask,
                        )
                    if sum_gate is not None:
                        by_gate += total * added
                total = total * g
            if dbranch is not None:
                tl.store(dbranch + t * D + columns, total.to(dbranch.dtype.element_ty), mask=mask)
        if here:
            slot = (program + sample).to(tl.int64) * D + columns
            if sum_shift is not None:
                tl.store(sum_shift + slot, tl.sum(by_shift, axis=0, keep_dims=True), mask=in_row)
            if sum_scale is not None:
                tl.store(sum_scale + slot, tl.sum(by_scale, axis=0, keep_dims=True), mask=in_row)
            if sum_gate is not None:
                tl.store(sum_gate + slot, tl.sum(by_gate, axis=0, keep_dims=True), mask=in_row)
        row = stop
        if cu_seqlens is not None:
            sample = _next_sample(cu_seqlens, B, sample, row + token_offset)


@triton.jit(do_not_specialize=["T", "B", "token_offset", "run"])
def reduce_kernel(
    sums,  # fp32 (P + B, D) partial sums
    weight,  # (D,) or None: the result is multiplied by it
    cu_seqlens,  # or None: one sample of T rows
    result,  # (B, D) contiguous
    plain,  # fp32 (B, D) contiguous or None: the result without the weight
    T: tl.int64,
    B: tl.int32,
    token_offset: tl.int64,
    run: tl.int64,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Adds a sample's partial sums in the order of the programs: the second stage."""
    sample = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    begin = tl.zeros((), tl.int64)
    end = T
    if cu_seqlens is not None:
        begin = tl.maximum(tl.load(cu_seqlens + sample) - token_offset, begin)
        end = tl.minimum(tl.load(cu_seqlens + sample + 1) - token_offset, T)
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    if end > begin:
        first = begin // run
        programs = (end - 1) // run + 1 - first
        for i in range(0, programs, SLOTS):
            p = i + tl.arange(0, SLOTS)[:, None]
            total += tl.load(
                sums + (first + p + sample) * D + columns,
                mask=(p < programs) & (columns < D),
                other=0.0,
            )
    folded = tl.sum(total, axis=0, keep_dims=True)
    at = sample.to(tl.int64) * D + columns
    if plain is not None:
        tl.store(plain + at, folded, mask=columns < D)
    if result is not None:
        if weight is not None:
            folded = folded * tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        tl.store(result + at, folded.to(result.dtype.element_ty), mask=columns < D)
