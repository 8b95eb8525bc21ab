"""varlen_attention's Triton kernels in the interpreter, against attention in fp64.

Most tests call the launchers with blocks of 16, so that samples of some dozen tokens have several
blocks of both kinds, full and partly filled.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton._C.libtriton import ir
from triton.runtime import interpreter

from goku_kernels import varlen_attention, varlen_attention_backward, varlen_attention_forward
from goku_kernels.triton import varlen_attention as kernels
from goku_kernels.triton.launch import launcher

ROW = {"queries": 16, "keys": 16, "num_warps": 4, "num_stages": 1, "programs": 1}


def blocks(queries=16, keys=16, tma=0):
    """Configurations of all kernels; those of the gradients differ, so that none is mixed up."""
    row = ROW | {"queries": queries, "keys": keys, "tma": tma}
    turned = row | {"queries": keys, "keys": queries}
    return {
        "forward": row, "gradient_q": row, "gradient_kv": turned,
        "delta": {"num_warps": 4, "rows": 16},
    }  # fmt: skip


def specialised():
    """The forward of sm_90, whose warps the interpreter does not specialise, and the others' TMA."""
    row = ROW | {"queries": 32, "tma": 1}
    return blocks(tma=1) | {"forward_specialised": row}


def at_once(queries=16, keys=32, tma=0, reduce=0):
    """All gradients in one kernel, where dq is added up by atomics or (reduce) by the copy engine."""
    row = ROW | {"queries": queries, "keys": keys, "tma": tma, "reduce": reduce}
    return blocks(tma=tma) | {"gradient": row}


AT_ONCE = {
    "at once": at_once(), "at once, tma": at_once(32, 16, tma=1),
    "at once, reduced": at_once(tma=1, reduce=1),
}  # fmt: skip
VARIANTS = {"pointers": blocks(16, 32), "tma": blocks(32, 16, tma=1), "specialised": specialised()}
VARIANTS |= AT_ONCE


@pytest.fixture(autouse=True)
def _descriptors_add(monkeypatch):
    """The interpreter knows no addition through a descriptor: here is one, row by row as a store."""

    def create_descriptor_reduce(self, kind, desc, value, indices):
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = desc.materialize_pointers(indices)
        none = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, *none)

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(
        builder, "create_descriptor_reduce", create_descriptor_reduce, raising=False
    )


@pytest.fixture(autouse=True)
def _tf32_allowed():
    """The kernels take fp32 only then; the interpreter multiplies it exactly all the same."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def draw(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def by_rule(flash_rule, name, got, same, exact, cu, floor=0.0):
    """flash_rule, but where an error below `floor` (absolute) is all right without it."""
    if floor:
        small = (got.double() - exact).abs() <= floor
        got = torch.where(small, exact.to(got.dtype), got)
    flash_rule(name, got, same, exact, cu)


class Case:
    """Inputs of one packed call; `padding` rows at the end hold NaN."""

    def __init__(self, lengths_q, lengths_k, dtype, heads=2, kv_heads=2, d=64, padding=0):
        self.cu = offsets(lengths_q), offsets(lengths_k)
        tq, tk = sum(lengths_q), sum(lengths_k)
        self.scale = d**-0.5
        shapes = [(tq, heads), (tk, kv_heads), (tk, kv_heads), (tq, heads)]
        tensors = []
        for seed, (rows, n) in enumerate(shapes):
            x = draw(rows + padding, n, d, seed=seed, dtype=dtype)
            x[rows:] = float("nan")
            tensors.append(x)
        self.q, self.k, self.v, self.dout = tensors
        self.dlse = draw(heads, tq + padding, seed=9, dtype=torch.float32)

    def kernels(self, override=None, dlse=True):
        override = override or blocks()
        run = launcher(self.q)
        inputs = (self.q, self.k, self.v)
        out, lse = kernels.forward(*inputs, *self.cu, self.scale, run=run, override=override)
        grads = kernels.backward(
            self.dout, *inputs, out, lse, self.dlse if dlse else None, *self.cu, self.scale,
            run=run, override=override, deterministic="gradient" not in override,
        )  # fmt: skip
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))

    def plain(self, dtype, dlse=True):
        """Attention operation by operation in `dtype`, and what autograd makes of it."""
        ends_q, ends_k = (cu.tolist() for cu in self.cu)
        inputs = [x.to(dtype).nan_to_num() for x in (self.q, self.k, self.v)]
        q, k, v = (x.requires_grad_() for x in inputs)
        wide = torch.promote_types(dtype, torch.float32)
        out, lse = torch.zeros_like(q), torch.full(q.shape[1::-1], -math.inf, dtype=wide)
        group = q.shape[1] // k.shape[1]
        outs, lses = [], []
        for i in range(len(ends_q) - 1):
            a, b = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
            if k[b].shape[0] == 0 or q[a].shape[0] == 0:
                continue
            ki, vi = (x[b].repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("thd,shd->hts", q[a], ki) * self.scale
            lses.append((a, scores.to(wide).logsumexp(-1)))
            outs.append((a, torch.einsum("hts,shd->thd", scores.softmax(-1), vi)))
        loss = q.sum() * 0 + k.sum() * 0 + v.sum() * 0
        for (a, o), (_, rows) in zip(outs, lses, strict=True):
            out[a], lse[:, a] = o.detach(), rows.detach()
            loss = loss + (o * self.dout[a].to(dtype)).sum()
            if dlse:
                loss = loss + (rows * self.dlse[:, a].to(wide)).sum()
        grads = torch.autograd.grad(loss, (q, k, v))
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse, *grads), strict=True))

    def judge(self, flash_rule, got=None, dlse=True, override=None):
        got = got or self.kernels(override, dlse)
        same, exact = self.plain(self.q.dtype, dlse), self.plain(torch.float64, dlse)
        for name, cu in zip(got, (*self.cu[:1] * 3, *self.cu[1:] * 2), strict=True):
            tensors = [x[name] for x in (got, same, exact)]
            if name == "lse":
                total = int(cu[-1])
                assert torch.equal(got["lse"][:, total:], exact["lse"][:, total:].float())
                tensors = [x[:, :total].t() for x in tensors]
            by_rule(flash_rule, name, *tensors, cu, self.cancellation(name))

    def cancellation(self, name):
        """Rounding that a result has however small it is itself.

        lse: of a score, an fp32 sum over head_dim whose terms cancel; with one key it is the score.
        dq, dk: dS = P * (dP - delta), where with one key dP equals delta but for the rounding of two
        such sums; autograd's softmax cancels them exactly.
        """
        q, k, v, dout = (x.double().nan_to_num() for x in (self.q, self.k, self.v, self.dout))
        if name in ("out", "dv") or min(q.numel(), k.numel()) == 0:
            return 0.0
        rounding = torch.finfo(torch.float32).eps * self.scale
        if name == "lse":
            return float(rounding * q.norm(dim=-1).max() * k.norm(dim=-1).max())
        products = dout.norm(dim=-1).max() * v.norm(dim=-1).max()
        return float(rounding * products * max(q.abs().max(), k.abs().max()))


DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_self_attention(pack, dtype, flash_rule):
    lengths, padding = pack
    Case(lengths, lengths, dtype, heads=1, kv_heads=1, padding=padding).judge(flash_rule)


# Queries without keys, keys without queries, neither, and both of different lengths.
LQ, LK = [5, 0, 33, 0, 17, 20], [40, 3, 0, 0, 16, 19]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("override", VARIANTS.values(), ids=VARIANTS.keys())
def test_cross_attention_of_grouped_heads(dtype, override, flash_rule):
    case = Case(LQ, LK, dtype, heads=4, kv_heads=2, padding=3)
    case.judge(flash_rule, override=override)


@pytest.mark.parametrize("override", [blocks(), blocks(tma=1), *AT_ONCE.values()],
                         ids=["pointers", "tma", *AT_ONCE])  # fmt: skip
@pytest.mark.parametrize("d", [72, 96, 128])
def test_head_dims(d, override, flash_rule):
    case = Case([35, 4], [18, 33], torch.float16, heads=2, kv_heads=1, d=d)
    case.judge(flash_rule, dlse=False, override=override)


lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4)


@settings(max_examples=16)
@given(
    lengths, st.sampled_from(DTYPES), st.integers(0, 2), st.sampled_from([(1, 1), (2, 1)]),
    st.sampled_from([blocks(), at_once()]),
)  # fmt: skip
def test_any_packing(flash_rule, pairs, dtype, padding, heads, override):
    lq, lk = [a for a, _ in pairs], [b for _, b in pairs]
    Case(lq, lk, dtype, *heads, padding=padding).judge(flash_rule, override=override)


def test_the_plan_orders_samples_by_their_tiles_cost():
    """Costliest first, ties by index, the padding last, and how many blocks come before each."""
    lengths_q = [3, 0, 40, 7, 40, 0, 16] * 20
    lengths_k = [9, 5, 0, 30, 30, 0, 17] * 20
    cu = offsets(lengths_q), offsets(lengths_k)
    tq, tk = sum(lengths_q) + 20, sum(lengths_k)
    q, k = (torch.zeros(t, 1, 64) for t in (tq, tk))
    plan = kernels._plan(q, k, *cu, ROW, ROW, launcher(q)).view(2, -1)
    for got, outer, inner, rows in (
        (plan[0], lengths_q, lengths_k, 20), (plan[1], lengths_k, lengths_q, 0)
    ):  # fmt: skip
        samples = len(outer) + 1
        order = [*sorted(range(samples - 1), key=lambda i: -inner[i]), samples - 1]
        outer = [*outer, rows]
        # The padding has no cost either, like samples with nothing on the other side: the last index.
        before = [0, *itertools.accumulate(-(-outer[i] // 16) for i in order)]
        assert got.tolist() == [*before, *order]


def test_more_samples_than_one_look_finds(flash_rule):
    lengths = [0] * 1100
    lengths[3], lengths[1040], lengths[1099] = 20, 1, 17
    Case(lengths, lengths, torch.float32, heads=1, kv_heads=1).judge(flash_rule)


@pytest.mark.parametrize("override", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_neighbours_nan_does_not_leak(override):
    case = Case([20, 33, 5], [20, 33, 5], torch.float32, heads=1, kv_heads=1)
    clean = case.kernels(override)
    rows = slice(20, 53)
    for x in (case.q, case.k, case.v, case.dout):
        x[rows] = float("nan")
    dirty = case.kernels(override)
    for name, x in clean.items():
        if name == "lse":
            x, dirty[name] = x.t(), dirty[name].t()
        for part in (slice(0, 20), slice(53, 58)):
            assert torch.equal(x[part], dirty[name][part]), name


@pytest.mark.parametrize("override", VARIANTS.values(), ids=VARIANTS.keys())
def test_views_into_one_fused_buffer(override, flash_rule):
    case = Case([21, 18], [21, 18], torch.float16)
    fused = torch.stack((case.q, case.k, case.v), dim=1)  # rows of 3 * heads * head_dim
    case.q, case.k, case.v = fused.unbind(1)
    # A gradient of rows that are not contiguous, and one that expand() made.
    case.dout = case.dout.transpose(0, 1).contiguous().transpose(0, 1)
    case.judge(flash_rule, override=override)
    case.dout = draw(1, 1, 64, seed=4, dtype=torch.float16).expand(39, 2, 64)
    case.judge(flash_rule, override=override)
    case.dout = draw(39, 64, 2, seed=4, dtype=torch.float16).transpose(1, 2)
    case.judge(flash_rule, override=override)


def test_unaligned_strides(flash_rule):
    case = Case([21, 18], [21, 18], torch.float16)
    for name in ("q", "k", "v", "dout"):
        x = getattr(case, name)
        wide = x.new_zeros(len(x), 2, 67)
        wide[..., 1:65] = x
        setattr(case, name, wide[..., 1:65])
    case.judge(flash_rule, override=blocks(tma=1))


@pytest.mark.parametrize("override", VARIANTS.values(), ids=VARIANTS.keys())
def test_offsets_past_2_to_the_31(override, flash_rule):
    """A row stride of 2^26: row 32 begins at 2^31. Only the pages of the rows are ever touched."""
    case = Case([3, 37], [3, 37], torch.float16, heads=1, kv_heads=1)
    for name in ("q", "k", "v", "dout"):
        x = getattr(case, name)
        far = torch.empty_strided(x.shape, (2**26, 64, 1), dtype=x.dtype)
        assert (len(x) - 1) * far.stride(0) > 2**31
        setattr(case, name, far.copy_(x))
    case.judge(flash_rule, override=override)


def test_equal_bits_on_every_run_and_for_every_number_of_programs():
    case = Case(LQ, LK, torch.float16, heads=2, kv_heads=1)
    first, second = case.kernels(), case.kernels()
    assert first["out"].abs().max() > 0
    alone = {name: row | {"programs": 0} for name, row in blocks().items()}  # one per tile
    third = case.kernels(alone)
    for name, x in first.items():
        assert torch.equal(x, second[name])
        assert torch.equal(x, third[name])


@pytest.mark.parametrize("override", AT_ONCE.values(), ids=AT_ONCE.keys())
def test_keys_that_are_not_there_weigh_nothing_however_low_lse_is(override, flash_rule):
    """Their weight is exp(0 - lse), infinite here, and dq is the only sum that they would meet in."""
    case = Case([20, 33], [20, 33], torch.float16, heads=1, kv_heads=1)
    case.q[..., 0], case.k[..., 0] = 20.0, -50.0  # all scores of a row fall by the same 125
    got = case.kernels(override)
    assert got["lse"].max() < -100
    case.judge(flash_rule, got)


# ---- the public operator, with the shipped configuration of sm_80


def limits(case):
    return *case.cu, *(int(cu.diff().max()) for cu in case.cu)


@pytest.mark.parametrize("through_lse", [False, True])
def test_autograd_gives_what_the_launchers_give(through_lse, flash_rule):
    case = Case([7, 3], [5, 9], torch.float16, kv_heads=1)
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = varlen_attention(q, k, v, *limits(case), return_lse=True, backend="triton")
    loss = (out * case.dout).sum()
    if through_lse:
        loss = loss + (lse * case.dlse).sum()
    got = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, (q, k, v)), strict=True))
    case.q, case.k, case.v = (x.detach() for x in (q, k, v))
    case.judge(flash_rule, {"out": out.detach(), "lse": lse.detach()} | got, dlse=through_lse)


@pytest.mark.parametrize("demanded", [False, True])
def test_who_asks_torch_for_determinism_gets_it(demanded, monkeypatch):
    """Whatever the call says: the launcher is told, and what is asked for in the call as well."""
    told = []
    backward = kernels.backward

    def spy(*args, deterministic, **options):
        told.append(deterministic)
        return backward(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(kernels, "backward", spy)
    case = Case([7, 3], [5, 9], torch.float16, kv_heads=1)
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(demanded)
    try:
        for deterministic in (False, True):
            out = varlen_attention(
                q, k, v, *limits(case), deterministic=deterministic, backend="triton"
            )
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert told == [demanded, True]


def test_only_lse_is_differentiated(flash_rule):
    case = Case([7, 3], [5, 9], torch.float32, heads=1, kv_heads=1)
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = varlen_attention(q, k, v, *limits(case), return_lse=True, backend="triton")
    dq, dk, dv = torch.autograd.grad((lse * case.dlse).sum(), (q, k, v))
    assert torch.equal(dv, torch.zeros_like(v))
    case.q, case.k, case.v = (x.detach() for x in (q, k, v))
    case.dout = torch.zeros_like(case.dout)
    got = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
    case.judge(flash_rule, got)


def test_the_pair_merges_halves_of_the_keys():
    """As ring attention does: out and lse merged in fp32, then one backward per half."""
    case = Case([40], [48], torch.float32)
    whole = varlen_attention_forward(case.q, case.k, case.v, *limits(case), backend="triton")
    half = case.cu[0], offsets([24]), 40, 24
    parts = [(case.k[:24], case.v[:24]), (case.k[24:], case.v[24:])]
    outs, lses = zip(
        *(varlen_attention_forward(case.q, *kv, *half, backend="triton") for kv in parts),
        strict=True,
    )
    lse = torch.stack(lses).logsumexp(0)
    out = sum(
        (one - lse).exp().t()[..., None] * o.float() for one, o in zip(lses, outs, strict=True)
    )
    # fp32 sums over 48 keys in another order
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, whole[0], **close)
    torch.testing.assert_close(lse, whole[1], **close)
    grads = [
        varlen_attention_backward(case.dout, case.q, *kv, out, lse, *half, backend="triton")
        for kv in parts
    ]
    want = varlen_attention_backward(
        case.dout, case.q, case.k, case.v, *whole, *limits(case), backend="triton"
    )
    torch.testing.assert_close(grads[0][0] + grads[1][0], want[0], **close)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([g[i] for g in grads]), want[i], **close)


def test_opcheck():
    case = Case([7, 3], [5, 9], torch.float32, heads=2, kv_heads=1)
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    forward = torch.ops.goku_kernels.varlen_attention.default
    options = (*limits(case), case.scale, False, True, "triton")
    torch.library.opcheck(forward, (q, k, v, *options))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = forward(q, k, v, *options)
    backward = torch.ops.goku_kernels.varlen_attention_backward.default
    for dlse in (None, case.dlse):
        torch.library.opcheck(
            backward,
            (case.dout, q, k, v, out, lse, dlse, *limits(case), case.scale, False, "triton"),
        )


@pytest.mark.parametrize(
    ("message", "shape", "dtype", "precision"),
    [
        (r"q has head_dim 80: allowed .* \[64, 72, 96, 128\]", (4, 2, 80), torch.float16, "high"),
        ("q has dtype torch.float64: allowed", (4, 2, 64), torch.float64, "high"),
        ("q has dtype torch.float32: allowed .*set_float32", (4, 2, 64), torch.float32, "highest"),
    ],
)
def test_refusals(message, shape, dtype, precision):
    torch.set_float32_matmul_precision(precision)
    q = torch.zeros(shape, dtype=dtype)
    cu = offsets([4])
    with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        varlen_attention(q, q, q, cu, cu, 4, 4, backend="triton")
