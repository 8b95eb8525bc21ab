"""qk_norm_rope against a token-by-token reference in Python numbers, and its contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing, qk_norm_rope, qk_norm_rope_bytes, qk_norm_rope_flops

AXES = (4, 6, 2)
D = sum(AXES)


def places(grids):
    return [(a, b, c) for t, h, w in grids for a in range(t) for b in range(h) for c in range(w)]


def plain(x, weight, positions, norm, pairing, rotated=True, theta=100.0, eps=1e-6):
    """One token, head and pair at a time; positions: a (t, h, w) triple per token, or None."""
    tokens = []
    for token, place in zip(x, positions or [None] * len(x), strict=True):
        y = token
        if norm == "full":
            y = y / (y.square().mean() + eps).sqrt()
        elif norm == "head":
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
        if weight is not None:
            y = y * weight.view(-1, D)
        if rotated:
            columns, start = [None] * D, 0
            for size, n in zip(AXES, place, strict=True):
                for i in range(size // 2):
                    a, b = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + size // 2)
                    a, b = start + a, start + b
                    angle = n * theta ** (-2 * i / size)
                    cos, sin = math.cos(angle), math.sin(angle)
                    columns[a] = y[:, a] * cos - y[:, b] * sin
                    columns[b] = y[:, b] * cos + y[:, a] * sin
                start += size
            y = torch.stack(columns, -1)
        tokens.append(y)
    return torch.stack(tokens) if tokens else x


def arguments(grids, norm="full", heads=3, kv_heads=3, tokens_k=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packing = Packing.from_grids(grids)

    def draw(*shape):
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    q = draw(packing.total, heads, D)
    k = draw(packing.total if tokens_k is None else tokens_k, kv_heads, D)
    if norm == "none":
        return packing, q, k, None, None
    per_head = norm == "head"
    return packing, q, k, draw(D if per_head else heads * D), draw(D if per_head else kv_heads * D)


def call(packing, *tensors, **options):
    options = {"theta": 100.0, "axes_dim": AXES, "grid_sizes": packing.grid_sizes} | options
    return qk_norm_rope(*tensors, cu_seqlens=packing.cu_seqlens, **options)


def assert_same_with_gradients(got, want, inputs):
    """Outputs and every gradient; fp64 rounding of a dozen operations stays under 1e-12."""
    inputs = [x for x in inputs if x is not None]
    grads = []
    for outs in (got, want):
        generator = torch.Generator().manual_seed(9)
        loss = sum(
            (o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs
        )
        grads.append(torch.autograd.grad(loss, inputs))
    for a, b in [*zip(got, want, strict=True), *zip(*grads, strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


GRIDS = [(2, 1, 3), (1, 1, 1), (0, 2, 2), (1, 3, 2)]


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("norm", ["full", "head", "none"])
def test_equals_the_plain_reference(norm, pairing):
    packing, q, k, qw, kw = arguments(GRIDS, norm, kv_heads=2)
    got = call(packing, q, k, qw, kw, norm=norm, pairing=pairing)
    want = [plain(x, w, places(GRIDS), norm, pairing) for x, w in ((q, qw), (k, kw))]
    assert_same_with_gradients(got, want, (q, k, qw, kw))


@settings(max_examples=15)
@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=4).filter(
        lambda grids: any(t * h * w for t, h, w in grids)
    ),
    st.sampled_from(["full", "head"]),
)
def test_any_grids(grids, norm):
    packing, q, k, qw, kw = arguments(grids, norm)
    got = call(packing, q, k, qw, kw, norm=norm)
    want = [plain(x, w, places(grids), norm, "interleaved") for x, w in ((q, qw), (k, kw))]
    assert_same_with_gradients(got, want, (q, k, qw, kw))


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_queries_that_begin_at_an_odd_element(pairing):
    packing = Packing.from_grids([(1, 2, 2)])
    arguments = {"cu_seqlens": packing.cu_seqlens, "grid_sizes": packing.grid_sizes,
                 "axes_dim": AXES, "norm": "none", "pairing": pairing}  # fmt: skip
    q = torch.randn(4 * 2 * D + 3)[3:].view(4, 2, D)
    assert q.is_contiguous()
    out = qk_norm_rope(q, **arguments)
    torch.testing.assert_close(out, qk_norm_rope(q.clone(), **arguments), rtol=0, atol=0)


def test_unrotated_keys_may_have_any_length():
    packing, q, k, qw, kw = arguments(GRIDS, tokens_k=7)
    got = call(packing, q, k, qw, kw, rotate_k=False)
    want = [
        plain(q, qw, places(GRIDS), "full", "interleaved"),
        plain(k, kw, None, "full", "interleaved", rotated=False),
    ]
    assert_same_with_gradients(got, want, (q, k, qw, kw))


def test_queries_alone_and_norm_without_gain():
    packing, q, _, _, _ = arguments(GRIDS)
    got = call(packing, q)
    assert_same_with_gradients([got], [plain(q, None, places(GRIDS), "full", "interleaved")], [q])


def test_positions_override_grids_and_zero_does_not_turn():
    packing, q, k, _, _ = arguments(GRIDS, "none")
    positions = [(3, 0, 7), (0, 0, 0), *places(GRIDS)[2:]]
    got = call(packing, q, k, norm="none", positions=torch.tensor(positions), grid_sizes=None)
    want = [plain(x, None, positions, "none", "interleaved") for x in (q, k)]
    assert_same_with_gradients(got, want, (q, k))
    assert torch.equal(got[0][1], q[1])


@pytest.mark.parametrize("per_sample", [False, True])
def test_scale_and_offset_of_positions(per_sample):
    packing, q, _, _, _ = arguments(GRIDS, "none")
    scale = torch.rand(*([4] if per_sample else []), 3, dtype=torch.float64)
    offset = torch.rand(*([4] if per_sample else []), 3, dtype=torch.float64)
    positions = [
        tuple(
            n * scale.expand(4, 3)[i, axis].item() + offset.expand(4, 3)[i, axis].item()
            for axis, n in enumerate(place)
        )
        for i, grid in enumerate(GRIDS)
        for place in places([grid])
    ]
    got = call(packing, q, norm="none", position_scale=scale, position_offset=offset)
    want = plain(q, None, positions, "none", "interleaved")
    assert_same_with_gradients([got], [want], [q])


def test_a_shard_that_begins_inside_a_sample():
    packing, q, k, qw, kw = arguments(GRIDS)
    whole = call(packing, q, k, qw, kw)
    for begin, end in ((0, 4), (4, 9), (9, 13)):
        shard = call(packing, q[begin:end], k[begin:end], qw, kw, token_offset=begin)
        for part, all_rows in zip(shard, whole, strict=True):
            assert torch.equal(part, all_rows[begin:end])


@pytest.mark.parametrize("token_offset", [0, 2])
def test_padding_rows_are_zero_even_when_they_hold_nan(token_offset):
    packing, _, _, qw, kw = arguments([(1, 2, 2)])
    inside = 4 - token_offset
    q, k = (torch.randn(6, 3, D, dtype=torch.float64) for _ in range(2))
    q[inside:], k[inside:] = float("nan"), float("inf")
    q.requires_grad_()
    k.requires_grad_()
    out = call(packing, q, k, qw, kw, token_offset=token_offset)
    grads = torch.autograd.grad(sum(o.sum() for o in out), (q, k, qw, kw))
    for x in (*out, *grads[:2]):
        assert torch.equal(x[inside:], torch.zeros_like(x[inside:]))
        assert x[:inside].abs().sum() > 0
    assert all(grad.isfinite().all() for grad in grads)


def test_bf16_is_computed_in_fp32_and_rounded_once():
    packing, q, k, qw, kw = arguments(GRIDS, dtype=torch.bfloat16)
    qw, kw = qw.float().detach(), kw.float().detach()
    got = call(packing, q, k, qw, kw)
    want = call(packing, q.float(), k.float(), qw, kw)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(packing, q.float(), k.float(), qw, kw)[0], want[0])
    (grad,) = torch.autograd.grad(got[0].sum(), q)
    assert grad.dtype == torch.bfloat16


def test_gradient_is_right_to_second_order_too():
    packing, q, k, qw, kw = arguments([(1, 1, 2)], heads=1, kv_heads=1)
    torch.autograd.gradcheck(lambda *x: call(packing, *x), (q, k, qw, kw))
    torch.autograd.gradgradcheck(lambda *x: call(packing, *x), (q, k, qw, kw))


_P = Packing.from_grids([(1, 2, 3)])
_Q = torch.zeros(6, 2, D)
_BAD = {
    "q has dtype": {"q": _Q.int()},
    r"q has shape \(6, 24\)": {"q": _Q.flatten(1)},
    "q has inner stride": {"q": torch.zeros(6, D, 2).transpose(1, 2)},
    r"k has shape \(5, 2, 12\): wanted \(6, any, 12\)": {"k": _Q[:5]},
    "k has dtype torch.float64: q has torch.float32": {"k": _Q.double()},
    "k is on meta: the tokens are on cpu": {"k": _Q.to("meta")},
    r"q_weight has shape \(12,\): wanted \(24,\)": {"q_weight": torch.zeros(D)},
    r"q_weight has shape \(24,\): wanted \(12,\)": {"q_weight": torch.zeros(24), "norm": "head"},
    'q_weight is given with norm="none"': {"q_weight": torch.zeros(24), "norm": "none"},
    "q_weight has dtype torch.float64: with torch.float32 tokens": {"q_weight": torch.zeros(24).double()},
    "k_weight is given without k": {"k_weight": torch.zeros(24)},
    "cu_seqlens has dtype torch.int64": {"cu_seqlens": _P.cu_seqlens.long()},
    r"cu_seqlens has shape \(1,\)": {"cu_seqlens": _P.cu_seqlens[:1]},
    "cu_seqlens has stride": {"cu_seqlens": torch.zeros(4, dtype=torch.int32)[::2]},
    r"cu_seqlens\[0\] is 1": {"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)},
    "cu_seqlens decreases from 6 to 5 at 2": {"cu_seqlens": torch.tensor([0, 6, 5], dtype=torch.int32)},
    "cu_seqlens is on meta": {"cu_seqlens": _P.cu_seqlens.to("meta")},
    "grid_sizes is None without positions": {"grid_sizes": None},
    "grid_sizes has dtype": {"grid_sizes": _P.grid_sizes.long()},
    r"grid_sizes has shape \(1, 2\): wanted \(1, 3\)": {"grid_sizes": _P.grid_sizes[:, :2]},
    r"grid_sizes\[0\] is \(1, 2, 2\) with 4 tokens: cu_seqlens gives that sample 6": {
        "grid_sizes": torch.tensor([[1, 2, 2]], dtype=torch.int32)
    },
    r"axes_dim is \(4, 4, 2\).*add up to 12": {"axes_dim": (4, 4, 2)},
    r"axes_dim is \(5, 5, 2\)": {"axes_dim": (5, 5, 2)},
    r"axes_dim is \(6, 6\)": {"axes_dim": (6, 6)},
    "norm is 'layer'": {"norm": "layer"},
    "pairing is 'split'": {"pairing": "split"},
    "theta is 0": {"theta": 0},
    "eps is -1": {"eps": -1},
    "token_offset is -1": {"token_offset": -1},
    "positions has dtype": {"positions": torch.zeros(6, 3, dtype=torch.bool)},
    "positions has shape": {"positions": torch.zeros(5, 3)},
    "position_scale is given with positions": {"positions": torch.zeros(6, 3), "position_scale": torch.ones(3)},
    r"position_offset has shape \(2, 3\): wanted \(1, 3\)": {"position_offset": torch.zeros(2, 3)},
    "backend is 'cudnn'": {"backend": "cudnn"},
}  # fmt: skip


@pytest.mark.parametrize("message", _BAD)
def test_refusals(message):
    good = {"q": _Q, "cu_seqlens": _P.cu_seqlens, "grid_sizes": _P.grid_sizes, "axes_dim": AXES}
    with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(**(good | _BAD[message]))


def test_an_absent_backend_says_what_brings_it():
    with pytest.raises(RuntimeError, match=r"'triton' is not available: .*(CUDA|not installed)"):
        call(_P, _Q, backend="triton")
    assert torch.equal(call(_P, _Q, backend="torch"), call(_P, _Q))


def test_costs():
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    assert qk_norm_rope_flops(10, 10, **shape) == 7 * 480
    assert qk_norm_rope_flops(10, 6, rotate_k=False, backward=True, **shape) == 2 * (
        7 * 320 + 4 * 96
    )
    assert qk_norm_rope_bytes(10, 10, itemsize=2, **shape) == 2 * 480 * 2
    assert qk_norm_rope_bytes(10, 10, itemsize=2, backward=True, **shape) == 3 * 480 * 2
