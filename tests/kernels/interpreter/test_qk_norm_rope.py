"""The Triton qk_norm_rope in the interpreter, against the eager reference in fp64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing, qk_norm_rope
from goku_kernels.triton.launch import launcher
from goku_kernels.triton.rotation import cos_sin

AXES = (4, 6, 2)
D = sum(AXES)
_NAMES = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")


def grid(n, turn=0):
    """A grid of n tokens, as near to a cube as n allows, its axes turned round `turn` times."""
    w = max((i for i in range(1, 8) if n % i == 0), default=1)
    h = max((i for i in range(1, 8) if n // w % i == 0), default=1)
    sizes = (n // (w * h), h, w)
    return sizes[turn % 3 :] + sizes[: turn % 3]


def packed(lengths):
    return Packing.from_grids([grid(n, i) for i, n in enumerate(lengths)])


class Case:
    """Inputs of one call, the same numbers for every backend and dtype."""

    def __init__(
        self, packing, tokens, heads=3, kv_heads=3, norm="full", dtype=torch.float32, gain=None,
        tokens_k=None, **options,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.packing, self.dtype = packing, dtype
        self.q = draw(tokens, heads, D)
        self.k = draw(tokens if tokens_k is None else tokens_k, kv_heads, D)
        self.weights = [None, None]
        if norm != "none":
            widths = [D, D] if norm == "head" else [heads * D, kv_heads * D]
            self.weights = [draw(n, dtype=gain or dtype) for n in widths]
        self.grads = [draw(*self.q.shape), draw(*self.k.shape)]
        self.options = {
            "axes_dim": AXES, "norm": norm, "theta": 100.0, "grid_sizes": packing.grid_sizes,
            "cu_seqlens": packing.cu_seqlens,
        } | options  # fmt: skip

    def results(self, backend, wide=False):
        """q, k and all gradients, by one backend; wide: in fp64."""

        def leaf(x):
            if x is None:
                return None
            return (x.detach().double() if wide else x.detach()).requires_grad_()

        inputs = [leaf(x) for x in (self.q, self.k, *self.weights)]
        options = {
            name: x.double()
            if wide and isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for name, x in self.options.items()
        }
        outs = qk_norm_rope(*inputs, **options, backend=backend)
        given = [x for x in inputs if x is not None]
        douts = [g.to(o.dtype) for g, o in zip(self.grads, outs, strict=True)]
        grads = iter(torch.autograd.grad(outs, given, douts))
        return [*outs, *(None if x is None else next(grads) for x in inputs)]

    def judge(self, flash_rule):
        token_offset = self.options.get("token_offset", 0)
        results = [self.results("torch"), self.results("torch", wide=True)]
        # NaN in the gradients of padding rows, too (eager's gradient of the gain is 0 * NaN there).
        end = int(self.packing.cu_seqlens[-1]) - token_offset
        grads = self.grads
        if end < len(self.q) and self.options.get("rotate_k", True):
            self.grads = [g.clone() for g in grads]
            for g in self.grads:
                g[max(end, 0) :] = float("nan")
        results.insert(0, self.results("triton"))
        self.grads = grads
        turned = {"q", "dq"} | ({"k", "dk"} if self.options.get("rotate_k", True) else set())
        for name, got, same, exact in zip(_NAMES, *results, strict=True):
            if got is None:
                assert exact is None
                continue
            cu = self.packing.cu_seqlens if name in turned else None
            flash_rule(name, got, same, exact, cu, token_offset)


_KINDS = {
    "full": {"norm": "full"},
    "full, half pairs, fp16": {"norm": "full", "pairing": "half", "dtype": torch.float16},
    "head, fp16, fp32 gain": {"norm": "head", "dtype": torch.float16, "gain": torch.float32},
    "head, half pairs": {"norm": "head", "pairing": "half"},
}


@pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS.keys())
def test_forward_and_every_gradient(pack, kind, flash_rule):
    lengths, padding = pack
    case = Case(packed(lengths), sum(lengths) + padding, **kind)
    if padding:
        for x in (case.q, case.k):
            x[sum(lengths) :] = float("nan")
    case.judge(flash_rule)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_a_shard_from_the_middle_of_a_sample_into_the_padding(pairing, flash_rule):
    packing = packed([4, 12, 6])
    Case(packing, 20, token_offset=7, pairing=pairing, kv_heads=1).judge(flash_rule)
    Case(packing, 3, token_offset=22, pairing=pairing).judge(flash_rule)
    Case(packing, 2, token_offset=5).judge(flash_rule)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([*_KINDS.values(), {"norm": "none"}]),
)
def test_any_packing(flash_rule, lengths, padding, offset, kind):
    tokens = max(sum(lengths) + padding - offset, 0)
    Case(packed(lengths), tokens, token_offset=offset, **kind).judge(flash_rule)


def test_samples_past_the_first_1024():
    """Offsets are searched 1,024 at a time."""
    packing = packed([0] * 1030 + [2, 0, 6])
    case = Case(packing, 8, norm="none")
    got, want = case.results("triton"), case.results("torch")
    # Four fp32 roundings of numbers below 4: 1e-6.
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)


def test_fewer_heads_of_keys(flash_rule):
    for norm in ("full", "head"):
        Case(packed([6, 5]), 11, heads=4, kv_heads=2, norm=norm).judge(flash_rule)


@pytest.mark.parametrize("norm", ["full", "head", "none"])
def test_keys_that_are_only_normed(norm, flash_rule):
    case = Case(packed([4, 3]), 7, tokens_k=5, norm=norm, rotate_k=False)
    case.judge(flash_rule)


def test_infinities_stay_where_they_are_without_norm_and_rotation():
    case = Case(packed([4, 3]), 7, tokens_k=5, norm="none", rotate_k=False)
    case.k[1, 0, 3] = float("inf")
    case.grads[1][2, 1, 4] = float("-inf")
    results = case.results("triton")
    assert torch.equal(results[1], case.k)
    assert torch.equal(results[3], case.grads[1])


def test_queries_alone_and_gains_absent(flash_rule):
    packing = packed([4, 3])
    x = torch.randn(7, 2, D, requires_grad=True)
    options = {"cu_seqlens": packing.cu_seqlens, "grid_sizes": packing.grid_sizes, "axes_dim": AXES}
    outs = [qk_norm_rope(y, **options, backend=b) for y, b in ((x, "triton"), (x, "torch"))]
    exact = qk_norm_rope(x.double(), **options)
    g = torch.randn(7, 2, D)
    grads = [torch.autograd.grad(o, x, g.to(o.dtype))[0] for o in (*outs, exact)]
    flash_rule("q", *outs, exact, packing.cu_seqlens)
    flash_rule("dq", *grads, packing.cu_seqlens)


@pytest.mark.parametrize("per_sample", [False, True])
def test_scale_and_offset_of_positions(per_sample, flash_rule):
    lead = (3,) if per_sample else ()
    scale, offset = torch.rand(*lead, 3) + 0.5, torch.rand(*lead, 3) * 9
    Case(packed([6, 0, 4]), 10, position_scale=scale, position_offset=offset).judge(flash_rule)
    Case(packed([6, 0, 4]), 5, position_offset=offset, token_offset=4).judge(flash_rule)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float32])
def test_positions_given(dtype, flash_rule):
    positions = torch.randint(0, 900, (3, 9)).to(dtype).t()
    positions[2] = 0
    case = Case(packed([3, 4]), 9, positions=positions, grid_sizes=None, norm="none")
    case.judge(flash_rule)
    assert torch.equal(case.results("triton")[0][2], case.q[2])


def test_views_of_a_fused_projection_are_read_where_they_lie(flash_rule):
    """Columns of (T, 3, H, D), and of (H, T, D); strided, expanded and transposed gradients."""
    for norm in ("full", "head"):
        case = Case(
            packed([5, 6]), 11, norm=norm, pairing="half" if norm == "head" else "interleaved"
        )
        fused = torch.randn(11, 3, 3, D)
        case.q, case.k = fused[:, 0], fused[:, 1]
        case.grads[0] = torch.randn(11, 3, 2 * D)[..., 3 : 3 + D]
        case.grads[1] = torch.randn(1, 3, 1).expand(11, 3, D)
        before = fused.clone()
        case.judge(flash_rule)
        assert torch.equal(fused, before)
        case.q, case.k = torch.randn(3, 11, D).transpose(0, 1), torch.randn(11, 6, D)[:, ::2]
        case.grads[0] = torch.randn(D, 3, 11).permute(2, 1, 0)
        case.judge(flash_rule)


def test_rows_of_8_elements_and_rows_that_are_not():
    """Strides go to the kernel in units of 8 elements where all are multiples of 8."""
    packing = packed([5])
    options = {"cu_seqlens": packing.cu_seqlens, "grid_sizes": packing.grid_sizes}
    options |= {"axes_dim": (8, 4, 4), "backend": "triton"}
    wide = torch.randn(5, 2, 27)
    aligned = wide[..., 3:19].contiguous()
    # The same arithmetic on the same numbers.
    assert torch.equal(qk_norm_rope(wide[..., 3:19], **options), qk_norm_rope(aligned, **options))


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_row_offsets_pass_2_to_the_31(pairing):
    """Two rows 2^31 elements and more apart, in memory that is never touched between them."""
    packing = packed([3])
    case = Case(packing, 3, heads=2, kv_heads=2, pairing=pairing)
    want = case.results("triton")
    stride = 2**30 + 2**20
    spread = [torch.empty_strided((3, 2, D), (stride, D, 1)) for _ in range(4)]
    for far, near in zip(spread, (case.q, case.k, *case.grads), strict=True):
        far.copy_(near)
    case.q, case.k, *case.grads = spread
    for got, wanted in zip(case.results("triton"), want, strict=True):
        assert torch.equal(got, wanted)


def test_head_offsets_pass_2_to_the_31():
    packing = packed([3])
    case = Case(packing, 3, heads=3, kv_heads=1)
    want = case.results("triton")
    far = torch.empty_strided((3, 3, D), (D, 2**30 + 2**20, 1))
    case.q = far.copy_(case.q)
    for got, wanted in zip(case.results("triton"), want, strict=True):
        assert torch.equal(got, wanted)


def test_the_same_bits_every_time():
    case = Case(packed([9, 30, 2]), 41, norm="head")
    runs = [case.results("triton") for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_a_program_walks_several_samples(flash_rule):
    """q and k have 24 programs in the interpreter: 3 or 4 rows to each."""
    Case(packed([1] * 40 + [30, 3]), 73, heads=1, kv_heads=2).judge(flash_rule)


@pytest.mark.parametrize(("norm", "rotate_k"), [("full", True), ("head", False), ("none", True)])
def test_opcheck(norm, rotate_k):
    packing = packed([3, 2])
    case = Case(packing, 5, norm=norm, rotate_k=rotate_k)
    turn = (
        packing.cu_seqlens, packing.grid_sizes, list(AXES), norm, "interleaved", rotate_k, 100.0,
        1e-6, None, None, None, 0,
    )  # fmt: skip
    inputs = [x if x is None else x.requires_grad_() for x in (case.q, case.k, *case.weights)]
    torch.library.opcheck(torch.ops.goku_kernels.qk_norm_rope.default, (*inputs, *turn))
    plain = [x if x is None else x.detach() for x in inputs]
    has_gain = norm != "none"
    torch.library.opcheck(
        torch.ops.goku_kernels.qk_norm_rope_backward.default,
        (*case.grads, *plain, has_gain, has_gain, *turn),
    )
    torch.library.opcheck(
        torch.ops.goku_kernels.qk_norm_rope.default, (inputs[0], None, inputs[2], None, *turn)
    )


def test_gradient_of_one_gain_alone():
    case = Case(packed([5]), 5)
    want = case.results("triton")
    weight = case.weights[0].clone().requires_grad_()
    q, _ = qk_norm_rope(case.q, case.k, weight, case.weights[1], **case.options, backend="triton")
    (grad,) = torch.autograd.grad(q, weight, case.grads[0])
    assert torch.equal(grad, want[4])


def test_refusals():
    packing = packed([2])
    options = {"cu_seqlens": packing.cu_seqlens, "grid_sizes": packing.grid_sizes}
    wide = torch.zeros(2, 129, 64)
    with pytest.raises(ValueError, match="qk_norm_rope: q has 129 heads of 64 channels, 16384"):
        qk_norm_rope(wide, **options, axes_dim=(16, 24, 24), backend="triton")
    with pytest.raises(ValueError, match=r"qk_norm_rope: q has dtype torch\.float64"):
        qk_norm_rope(torch.zeros(2, 1, D).double(), **options, axes_dim=AXES, backend="triton")
    assert qk_norm_rope(wide, **options, axes_dim=(16, 24, 24)).shape == wide.shape


@triton.jit
def _cos_sin_kernel(positions, turns, cos, sin, N: tl.constexpr):
    i = tl.arange(0, N)
    t = tl.load(positions + i)
    c, s = cos_sin(t, t, t, tl.load(turns + i), i * 0)
    tl.store(cos + i, c)
    tl.store(sin + i, s)


@pytest.mark.parametrize("reach", [1, 1000, 2**20])
def test_cosines_and_sines_are_right_to_a_unit_or_two_in_the_last_place(reach):
    n = 2**15
    generator = torch.Generator().manual_seed(reach)
    angle = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) * reach
    angle[:9] = torch.arange(-4, 5) * (math.pi / 2)  # and the ends of every quadrant
    angle[9:18] = torch.arange(-4, 5) * (math.pi / 2) + math.pi / 4
    cos, sin = torch.empty(n), torch.empty(n)
    launcher(cos)(
        _cos_sin_kernel, (1,),
        {
            "positions": angle, "turns": torch.full((n,), 2 / math.pi, dtype=torch.float64),
            "cos": cos, "sin": sin, "N": n,
        },
    )  # fmt: skip
    for got, exact in ((cos, angle.cos()), (sin, angle.sin())):
        error = (got.double() - exact).abs()
        assert error.max() < 9e-8  # 1.5 units in the last place of 1; measured 8.8e-8
        # Without fused multiply-adds, as here, up to 2.4 units of the value itself; near a zero what
        # counts is the angle's own error, some 2^-53 of the angle.
        unit = torch.finfo(torch.float32).eps * 2.0 ** torch.frexp(exact)[1].sub(1)
        assert ((error - reach * 2.0**-50) / unit).max() < 2.5
