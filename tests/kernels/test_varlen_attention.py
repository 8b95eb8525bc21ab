"""varlen_attention against attention written as one big masked softmax, and its contract."""

import math
import subprocess
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from goku_kernels import (
    Packing,
    reference,
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_bytes,
    varlen_attention_flops,
    varlen_attention_forward,
)

D = 8


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def tensors(lengths_q, lengths_k, heads=2, kv_heads=2, padding=0, dtype=torch.float64):
    q = draw(sum(lengths_q) + padding, heads, D, dtype=dtype)
    k = draw(sum(lengths_k) + padding, kv_heads, D, seed=1, dtype=dtype)
    v = draw(sum(lengths_k) + padding, kv_heads, D, seed=2, dtype=dtype)
    return q, k, v


def bounds(lengths_q, lengths_k, slack=0):
    packed = [Packing.from_lengths(lengths) for lengths in (lengths_q, lengths_k)]
    return (*(p.cu_seqlens for p in packed), *(p.max_seqlen + slack for p in packed))


def plain(q, k, v, lengths_q, lengths_k, scale):
    """Every query against every key of every sample, those of other samples masked out."""
    ids_q = [i for i, n in enumerate(lengths_q) for _ in range(n)]
    ids_k = [i for i, n in enumerate(lengths_k) for _ in range(n)]
    ids_q += [-1] * (len(q) - len(ids_q))
    ids_k += [-2] * (len(k) - len(ids_k))
    outs, lses = [], []
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        for t in range(len(q)):
            keys = [s for s in range(len(k)) if ids_k[s] == ids_q[t]]
            if not keys:
                outs.append(torch.zeros(D, dtype=q.dtype))
                lses.append(torch.tensor(-math.inf, dtype=q.dtype))
                continue
            e = torch.exp(scale * (k[keys, g] @ q[t, h]))
            outs.append((e / e.sum()) @ v[keys, g])
            lses.append(e.sum().log())
    shape = (q.shape[1], len(q))
    return torch.stack(outs).view(*shape, D).transpose(0, 1), torch.stack(lses).view(shape)


def close(a, b):
    # fp64: rounding of a softmax over a few keys stays under 1e-12
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


LQ, LK = [3, 1, 4, 0, 2], [2, 5, 0, 3, 1]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_the_plain_reference(kv_heads, scale):
    q, k, v = tensors(LQ, LK, heads=4, kv_heads=kv_heads)
    out = varlen_attention(q, k, v, *bounds(LQ, LK), softmax_scale=scale)
    want, _ = plain(q, k, v, LQ, LK, scale or D**-0.5)
    close(out, want)
    for a, b in zip(
        *(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, want)), strict=True
    ):
        close(a, b)  # fmt: skip


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=20)
@given(lengths.filter(lambda pairs: any(a and b for a, b in pairs)), st.booleans())
def test_any_lengths_and_a_differentiable_lse(pairs, through_lse):
    lq, lk = [a for a, _ in pairs], [b for _, b in pairs]
    q, k, v = tensors(lq, lk)
    got = varlen_attention(q, k, v, *bounds(lq, lk), return_lse=True)
    want = plain(q, k, v, lq, lk, D**-0.5)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    grads = []
    for out, lse in (got, want):
        loss = out.square().sum()
        if through_lse:
            loss = loss + lse[lse > -math.inf].sin().sum()
        grads.append(torch.autograd.grad(loss, (q, k, v)))
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_with_and_without_lse_agree():
    q, k, v = tensors(LQ, LK)
    out = varlen_attention(q, k, v, *bounds(LQ, LK))
    close(varlen_attention(q, k, v, *bounds(LQ, LK), return_lse=True)[0], out)


@pytest.mark.parametrize("return_lse", [False, True])
def test_empty_key_sets_give_zero_and_minus_infinity(return_lse):
    q, k, v = tensors([2, 1], [0, 0])
    got = varlen_attention(q, k, v, *bounds([2, 1], [0, 0]), return_lse=return_lse)
    out = got[0] if return_lse else got
    assert torch.equal(out, torch.zeros_like(out))
    if return_lse:
        assert torch.equal(got[1], torch.full((2, 3), -math.inf, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(grad, torch.zeros_like(q))


@pytest.mark.parametrize("return_lse", [False, True])
def test_padding_rows_are_zero_even_when_they_hold_nan(return_lse):
    q, k, v = (x.detach() for x in tensors([3, 2], [2, 2], padding=2))
    for x, n in ((q, 5), (k, 4), (v, 4)):
        x[n:] = float("nan")
        x.requires_grad_()
    got = varlen_attention(q, k, v, *bounds([3, 2], [2, 2]), return_lse=return_lse)
    out = got[0] if return_lse else got
    assert torch.equal(out[5:], torch.zeros_like(out[5:]))
    if return_lse:
        assert torch.equal(got[1][:, 5:], torch.full((2, 2), -math.inf, dtype=torch.float64))
    for grad, n in zip(torch.autograd.grad(out.sum(), (q, k, v)), (5, 4, 4), strict=True):
        assert torch.equal(grad[n:], torch.zeros_like(grad[n:]))
        assert grad[:n].isfinite().all()


def test_max_seqlen_is_only_an_upper_bound():
    q, k, v = tensors(LQ, LK)
    a = varlen_attention(q, k, v, *bounds(LQ, LK))
    assert torch.equal(a, varlen_attention(q, k, v, *bounds(LQ, LK, slack=1000)))


def test_another_samples_tokens_change_no_bit():
    q, k, v = (x.detach() for x in tensors([3, 4], [3, 4]))
    a = varlen_attention(q, k, v, *bounds([3, 4], [3, 4]))
    for x in (q, k, v):
        x[:3] *= 2
    b = varlen_attention(q, k, v, *bounds([3, 4], [3, 4]))
    assert torch.equal(a[3:], b[3:])
    assert not torch.equal(a[:3], b[:3])


@pytest.mark.parametrize("with_dlse", [False, True])
def test_forward_and_backward_pair_equals_autograd(with_dlse):
    q, k, v = tensors(LQ, LK, heads=4, padding=1)
    cu = bounds(LQ, LK)
    dout, dlse = draw(*q.shape, seed=5).detach(), draw(4, len(q), seed=6).detach()
    out, lse = varlen_attention(q, k, v, *cu, return_lse=True)
    seen = torch.isfinite(lse)
    loss = (out * dout).sum() + ((lse[seen] * dlse[seen]).sum() if with_dlse else 0)
    want = torch.autograd.grad(loss, (q, k, v))

    pair_out, pair_lse = varlen_attention_forward(q, k, v, *cu)
    assert not pair_out.requires_grad
    assert torch.equal(pair_out, out)
    assert torch.equal(pair_lse, lse)
    got = varlen_attention_backward(
        dout, q, k, v, pair_out, pair_lse, *cu, dlse=dlse if with_dlse else None
    )
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_key_blocks_merge_as_ring_attention_does():
    """out and gradients from two halves of the keys, merged by their lse, equal the whole."""
    q, k, v = tensors([5], [8])
    dout = draw(5, 2, D, seed=5).detach()
    whole = varlen_attention(q, k, v, *bounds([5], [8]))
    want = torch.autograd.grad((whole * dout).sum(), (q, k, v))
    half = bounds([5], [4])
    blocks = [(k[:4], v[:4]), (k[4:], v[4:])]
    outs, lses = zip(*(varlen_attention_forward(q, *block, *half) for block in blocks), strict=True)
    lse = torch.stack(lses).logsumexp(0)
    shares = [(part - lse).exp().t().unsqueeze(-1) for part in lses]
    out = sum(share * part for share, part in zip(shares, outs, strict=True))
    close(out, whole)
    grads = [varlen_attention_backward(dout, q, *block, out, lse, *half) for block in blocks]
    close(grads[0][0] + grads[1][0], want[0])
    close(torch.cat([grads[0][1], grads[1][1]]), want[1])
    close(torch.cat([grads[0][2], grads[1][2]]), want[2])


def test_precision_by_dtype():
    q, k, v = tensors(LQ, LK, dtype=torch.bfloat16)
    out, lse = varlen_attention(q, k, v, *bounds(LQ, LK), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact = varlen_attention(*(x.float() for x in (q, k, v)), *bounds(LQ, LK), return_lse=True)
    assert torch.equal(out, exact[0].bfloat16())  # in fp32, rounded once
    assert torch.equal(lse, exact[1])
    q32, k32, v32 = tensors(LQ, LK, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention(q32, k32, v32, *bounds(LQ, LK)).dtype == torch.bfloat16
        assert varlen_attention(*tensors(LQ, LK), *bounds(LQ, LK)).dtype == torch.float64


_Q, _K = torch.zeros(5, 4, D), torch.zeros(6, 2, D)
_CUQ, _CUK, _MQ, _MK = bounds([2, 3], [6, 0])
_BOUNDS = {"cu_seqlens_q": _CUQ, "cu_seqlens_k": _CUK, "max_seqlen_q": _MQ, "max_seqlen_k": _MK}
_BAD = {
    "q has dtype": {"q": _Q.int()},
    r"q has shape \(5, 32\)": {"q": _Q.flatten(1)},
    "q has inner stride": {"q": torch.zeros(5, D, 4).transpose(1, 2)},
    r"k has shape \(6, 2, 4\): wanted \(any, any, 8\)": {"k": _K[..., :4]},
    r"v has shape \(5, 2, 8\): wanted \(6, 2, 8\)": {"v": _K[:5]},
    "k has dtype torch.float64: q has torch.float32": {"k": _K.double()},
    "v is on meta": {"v": _K.to("meta")},
    "k has 3 heads: allowed are divisors of q's 4": {"k": torch.zeros(6, 3, D), "v": torch.zeros(6, 3, D)},
    "cu_seqlens_q has dtype": {"cu_seqlens_q": _CUQ.long()},
    r"cu_seqlens_k\[0\] is 1": {"cu_seqlens_k": _CUK + 1},
    r"cu_seqlens_k has shape \(2,\): cu_seqlens_q has \(3,\)": {"cu_seqlens_k": _CUK[:2]},
    "cu_seqlens_q ends at 5: q has 4 rows": {"q": _Q[:4]},
    "max_seqlen_q is 2: the longest segment has 3 tokens": {"max_seqlen_q": 2},
    "max_seqlen_k is 5: the longest segment has 6 tokens": {"max_seqlen_k": 5},
    "max_seqlen_k is 6.0": {"max_seqlen_k": 6.0},
    "softmax_scale is 0": {"softmax_scale": 0},
    "backend is 'cudnn'": {"backend": "cudnn"},
}  # fmt: skip


@pytest.mark.parametrize("message", _BAD)
def test_refusals(message):
    good = {"q": _Q, "k": _K, "v": _K, "cu_seqlens_q": _CUQ, "cu_seqlens_k": _CUK}
    good |= {"max_seqlen_q": _MQ, "max_seqlen_k": _MK}
    with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        varlen_attention(**(good | _BAD[message]))
    with pytest.raises(ValueError, match=f"varlen_attention: {message}"):
        varlen_attention_forward(**(good | _BAD[message]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [np.zeros((5, 4, D), np.float32), [1.0], None], ids=type)
def test_what_is_no_tensor_is_refused_by_name(name, value, autocast):
    given = {"q": _Q, "k": _K, "v": _K, name: value}
    message = f"varlen_attention: {name} is a {type(value).__name__}: allowed is a torch.Tensor"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match=message):
            varlen_attention(**given, **_BOUNDS)
        with pytest.raises(ValueError, match=message):
            varlen_attention_backward(_Q, out=_Q, lse=torch.zeros(4, 5), **given, **_BOUNDS)


def test_tokens_without_memory_are_refused():
    meta = [x.to("meta") for x in (_Q, _K, _K, _CUQ, _CUK)]
    with pytest.raises(ValueError, match="varlen_attention: the tokens are on meta: allowed are"):
        varlen_attention(*meta, _MQ, _MK)


def test_the_backward_refuses_too():
    q, k, cu = _Q, _K, (_CUQ, _CUK, _MQ, _MK)
    lse = torch.zeros(4, 5)
    with pytest.raises(ValueError, match="dout has shape"):
        varlen_attention_backward(q[:4], q, k, k, q, lse, *cu)
    with pytest.raises(ValueError, match=r"lse has shape \(5, 4\): wanted \(4, 5\)"):
        varlen_attention_backward(q, q, k, k, q, lse.t(), *cu)
    with pytest.raises(ValueError, match="lse is a NoneType"):
        varlen_attention_backward(q, q, k, k, q, None, *cu)
    with pytest.raises(ValueError, match="out is a list"):
        varlen_attention_backward(q, q, k, k, [q], lse, *cu)


@pytest.mark.parametrize("backend", ["triton", "cuda", "flash"])
def test_an_absent_backend_says_what_brings_it(backend):
    with pytest.raises(RuntimeError, match=f"'{backend}' is not available"):
        varlen_attention(_Q, _K, _K, _CUQ, _CUK, _MQ, _MK, backend=backend)


def test_costs():
    assert varlen_attention_flops([3, 2], [4, 5], heads=2, head_dim=8) == 4 * 16 * (12 + 10)
    assert varlen_attention_flops([3], [4], heads=2, head_dim=8, backward=True) == 8 * 16 * 12
    with pytest.raises(ValueError, match="lengths_q has 1"):
        varlen_attention_flops([3], [4, 5], heads=2, head_dim=8)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8, "itemsize": 2}
    assert varlen_attention_bytes(10, 20, **shape) == (80 + 80) * 8 * 2 + 4 * 10 * 4
    assert varlen_attention_bytes(10, 20, backward=True, **shape) == (80 + 80) * 8 * 4 + 160


def test_the_halves_agree_under_autocast_and_gradients_keep_their_dtype():
    q, k, v, dout = (torch.randn(7, 2, 8) for _ in range(4))
    cu = (torch.tensor([0, 3, 7], dtype=torch.int32),) * 2 + (4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = varlen_attention_forward(q, k, v, *cu)
        grads = varlen_attention_backward(dout, q, k, v, out, lse, *cu)
    low = [x.bfloat16() for x in (q, k, v)]
    expected = varlen_attention_backward(dout.bfloat16(), *low, out, lse, *cu)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert all(torch.equal(g, e.float()) for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"), [("dout", torch.int64), ("out", torch.int64), ("lse", torch.float16)]
)
def test_backward_refuses_other_dtypes(name, dtype):
    q = torch.randn(4, 2, 8)
    cu = (torch.tensor([0, 4], dtype=torch.int32),) * 2 + (4, 4)
    tensors = {"dout": q, "out": q, "lse": torch.zeros(2, 4)}
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(ValueError, match=f"{name} has dtype"):
        varlen_attention_backward(tensors["dout"], q, q, q, tensors["out"], tensors["lse"], *cu)


def test_differentiable_once():
    q, k, v = tensors(LQ, LK)
    out = varlen_attention(q, k, v, *bounds(LQ, LK))
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)does not require grad|no autograd formula"):
        torch.autograd.grad(first.sum(), q)


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse):
    q, k, v = tensors(LQ, LK, heads=4)
    forward = torch.ops.goku_kernels.varlen_attention.default
    torch.library.opcheck(forward, (q, k, v, *bounds(LQ, LK), 0.3, False, return_lse, "torch"))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = forward(q, k, v, *bounds(LQ, LK), 0.3, False, True, "torch")
    backward = torch.ops.goku_kernels.varlen_attention_backward.default
    for saved in ((out, lse), (None, None)):
        torch.library.opcheck(
            backward,
            (torch.ones_like(out), q, k, v, *saved, None, *bounds(LQ, LK), 0.3, False, "torch"),
        )


def test_a_dispatch_mode_changes_nothing():
    q, k, v = tensors(LQ, LK)
    grads = []
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        with mode:
            out = varlen_attention(q, k, v, *bounds(LQ, LK))
            grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_one_graph_serves_packs_of_any_size():
    compilations = []

    def count(graph, _):
        compilations.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def call(q, k, v, cu_q, cu_k, max_q, max_k):
        out, lse = varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, return_lse=True)
        return out.sum() + lse.exp().sum()

    torch._dynamo.reset()
    for n in range(3, 12):
        lq, lk = list(range(1, n)), list(range(n, 1, -1))
        q, k, v = tensors(lq, lk)
        got = torch.autograd.grad(call(q, k, v, *bounds(lq, lk)), (q, k, v))
        out, lse = varlen_attention(q, k, v, *bounds(lq, lk), return_lse=True)
        want = torch.autograd.grad(out.sum() + lse.exp().sum(), (q, k, v))
        for a, b in zip(got, want, strict=True):
            close(a, b)
    assert len(compilations) <= 2


class FlashAttn:
    """A stand-in with the interface of flash_attn.flash_attn_interface 2.7 and 2.8.

    Exact attention in fp32 on the CPU: it tests what is handed over and what is made of the result,
    not flash-attn. Like that, it leaves padding rows unwritten and calls an empty lse +inf.
    """

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal) == (0.0, False)
        wide = [x.float().nan_to_num() for x in (q, k, v)]
        out, lse = reference.varlen_attention(
            *wide, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, return_lse=True
        )
        out[int(cu_seqlens_q[-1]) :] = float("nan")
        return out.to(q.dtype), lse.masked_fill(lse.isneginf(), float("inf")), None, None

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, deterministic) == (0.0, False, 0.0, True)
        assert (window_size_left, window_size_right, alibi_slopes) == (-1, -1, None)
        grads = reference.varlen_attention_backward(
            *(x.float().nan_to_num() for x in (dout, q, k, v, out)), softmax_lse,
            cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, dlse=None,
        )  # fmt: skip
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)


@pytest.fixture
def _flash_attn_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", FlashAttn)


@pytest.mark.usefixtures("_flash_attn_stand_in")
def test_flash_hands_over_what_flash_attn_wants():
    q, k, v = tensors(LQ, LK, heads=4, padding=2, dtype=torch.bfloat16)
    cu = bounds(LQ, LK)
    dout = draw(*q.shape, seed=5, dtype=torch.bfloat16).detach()
    results = []
    for backend in ("flash", "torch"):
        out, lse = varlen_attention(
            q, k, v, *cu, softmax_scale=0.3, deterministic=True, return_lse=True, backend=backend
        )
        results.append([out, lse, *torch.autograd.grad((out * dout).sum(), (q, k, v))])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0][2:], results[1][2:], strict=True):
        # The gradients are rounded to bf16 from out rounded to bf16, and from out in fp32.
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("_flash_attn_stand_in")
def test_flash_refuses_what_flash_attn_cannot_do():
    q, k, v = tensors(LQ, LK)
    with pytest.raises(ValueError, match=r'allowed with backend="flash" are fp16 and bf16'):
        varlen_attention(q, k, v, *bounds(LQ, LK), backend="flash")
    q, k, v = tensors(LQ, LK, dtype=torch.float16)
    _, lse = varlen_attention(q, k, v, *bounds(LQ, LK), return_lse=True, backend="flash")
    with pytest.raises(RuntimeError, match="no gradient through lse"):
        lse[lse.isfinite()].sum().backward()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_where_no_query_sees_a_key(rows, return_lse):
    q = torch.randn(rows, 4, 8, requires_grad=True)
    k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(2))
    none, keys = (torch.tensor([0, n], dtype=torch.int32) for n in (0, 7))
    result = varlen_attention(q, k, v, none, keys, 0, 7, return_lse=return_lse)
    out = result[0] if return_lse else result
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.any()


def test_fp32_under_torchs_newer_tf32_setting():
    code = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from goku_kernels import varlen_attention\n"
        "q, cu = torch.ones(3, 1, 64), torch.tensor([0, 3], dtype=torch.int32)\n"
        "print(varlen_attention(q, q, q, cu, cu, 3, 3).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "192.0"), done.stderr
