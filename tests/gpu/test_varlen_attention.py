"""varlen_attention on a CUDA device, at the sizes it is made for."""

import dataclasses
import functools

import pytest
import torch

from bench import checks
from bench.ahead import overridden
from bench.cases import Inputs
from bench.packs import GPU_PACKS, Pack
from bench.varlen_attention import function, plain, problem
from goku_kernels import varlen_attention
from goku_kernels.triton import configs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE, BACKEND = torch.device("cuda"), "triton"
PACKS = {pack.name: pack for pack in GPU_PACKS}
GRAPH = (
    Pack("three samples", ((5, 18, 32), (1, 16, 16), (1, 32, 32))),
    Pack("one and empty ones", ((5, 26, 32), (0, 1, 1), (0, 1, 1))),
)
TAIL = (1, 16, 16)
ODD = Pack("odd lengths", ((1, 1, 1), (13, 7, 11), (1, 1, 127), (0, 1, 1), (1, 3, 43), (5, 18, 32)))


def views(case):
    """Queries, keys and values as views of one buffer each as wide as all three."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        leaves = []
        for x in inputs.leaves:
            wide = torch.empty(x.shape[0], 3, *x.shape[1:], dtype=x.dtype, device=x.device)
            leaves.append(wide[:, 1].copy_(x))
        return Inputs(tuple(leaves), inputs.rest)

    return dataclasses.replace(case, case=f"{case.case}, views", draw=draw)


def padded(case, elements):
    """Heads that lie so many elements apart: not adjacent, and, by one, at odd addresses."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        leaves = []
        for x in inputs.leaves:
            *rows, head_dim = x.shape
            wide = torch.empty(*rows, head_dim + elements, dtype=x.dtype, device=x.device)
            leaves.append(wide[..., :head_dim].copy_(x))
        return Inputs(tuple(leaves), inputs.rest)

    return dataclasses.replace(case, case=f"{case.case}, {elements} between heads", draw=draw)


def expanding(make):
    """Makers of functions that expand the only head of keys and values to all of them, by stride 0."""

    def maker(backend):
        def run(inputs):
            q, *others = inputs.leaves
            wide = (x.expand(-1, q.shape[1], -1) for x in others)
            return make(backend)(Inputs((q, *wide), inputs.rest))

        return run

    return maker


def layouts(pack, dtype, heads, head_dim):
    """(problem, how a maker of functions is changed) of layouts that take other kernels, and loads
    by pointers where descriptors cannot say where heads lie."""
    whole = problem("self", heads, head_dim, pack, dtype, probed=False)
    yield padded(whole, 8), lambda make: make
    yield padded(whole, 1), lambda make: make
    yield grouped(whole, 1), expanding


def grouped(case, kv_heads):
    """Fewer heads of keys and values; the truth repeats them."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        q, k, v = inputs.leaves
        return Inputs((q, *(x[:, :kv_heads].contiguous() for x in (k, v))), inputs.rest)

    def reference(inputs):
        q, *others = inputs.leaves
        repeated = (x.repeat_interleave(q.shape[1] // kv_heads, dim=1) for x in others)
        return (plain(Inputs((q, *repeated), inputs.rest), case.probe),)

    name = f"{case.case}, {kv_heads} key heads"
    return dataclasses.replace(case, case=name, draw=draw, reference=reference)


def variants(pack, dtype, heads, head_dim, probed=True):
    whole = problem("self", heads, head_dim, pack, dtype, probed=probed)
    yield whole
    yield problem("cross", heads, head_dim, pack, dtype, cross=True, probed=probed)
    yield views(whole)
    yield grouped(whole, heads // 2)


def both(backend, deterministic=False):
    """The operator, and with its (out, lse) pair the gradient through lse."""

    def run(inputs):
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        limits = [inputs.rest[name] for name in names]
        out, lse = varlen_attention(
            *inputs.leaves, *limits, return_lse=True, deterministic=deterministic, backend=backend
        )
        return out, lse.t()

    return run


def with_lse(pack, dtype, heads, head_dim):
    """Output and log-sum-exp, every row of them: for small packs."""
    whole = problem("lse", heads, head_dim, pack, dtype, probed=False)
    return dataclasses.replace(whole, reference=both("torch"))


# Without it dq is added up by atomics where a kernel for that is shipped.
deterministic = functools.partial(function, deterministic=True)


def fit_both(case, device, backend):
    """Both backwards obey the rule: the one without equal bits, and the one of them."""
    checks.all_fit(case, [function(backend), deterministic(backend)], device)


def fits_in_tf32(pack, heads, head_dim, device, backend):
    """fp32 where torch may multiply it in TF32, in plain PyTorch as in the kernels."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        cases = list(variants(pack, torch.float32, heads, head_dim, probed=False))
        checks.all_of(cases, deterministic, device, backend, runs=2)
    finally:
        torch.set_float32_matmul_precision(before)


# One number of heads for each head_dim, Goku-2B's width: every one compiles its own kernels.
HEADS = {64: 28, 72: 24, 96: 18, 128: 14}


# Not all pairs, for the same reason.
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*((size, torch.bfloat16) for size in (64, 72, 96, 128)), (64, torch.float16),
     (128, torch.float16)],
)  # fmt: skip
@pytest.mark.parametrize("pack", [PACKS["16K, mixed"], PACKS["16K, many images"], ODD],
                         ids=lambda pack: pack.name)  # fmt: skip
def test_every_variant(pack, head_dim, dtype):
    # Every row of the small pack, whose lengths are around the blocks' edges.
    cases = list(variants(pack, dtype, HEADS[head_dim], head_dim, pack is not ODD))
    for case in cases:
        fit_both(case, DEVICE, BACKEND)
        checks.deterministic(case, deterministic(BACKEND), DEVICE, runs=2)
        for make in (function, deterministic):
            checks.does_not_wait(case, make(BACKEND), DEVICE)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_layouts_that_few_have(head_dim):
    for case, change in layouts(ODD, torch.bfloat16, HEADS[head_dim], head_dim):
        makers = [change(function), change(deterministic)]
        checks.all_fit(case, [make(BACKEND) for make in makers], DEVICE)


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_fp32_in_tf32(head_dim):
    fits_in_tf32(ODD, 8, head_dim, DEVICE, BACKEND)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lse_and_its_gradient(head_dim):
    case = with_lse(ODD, torch.bfloat16, HEADS[head_dim], head_dim)
    checks.all_fit(case, [both(BACKEND), both(BACKEND, deterministic=True)], DEVICE)


@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_the_copy_engine_adds_dq_up(head_dim):
    """As no shipped configuration has it, but the tuner may choose it."""
    rows = [
        row | {"config": row["config"] | ({"reduce": 1} if row["kernel"] == "gradient" else {})}
        for row in configs.table("varlen_attention")
    ]
    with overridden("varlen_attention", rows):
        for case in variants(ODD, torch.bfloat16, HEADS[head_dim], head_dim, probed=False):
            checks.fits(case, function(BACKEND), DEVICE)


@pytest.mark.parametrize("name", ["64K, one clip", "220K, mixed", "220K, many images"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_large_packs(name, head_dim):
    case = problem("self", HEADS[head_dim], head_dim, PACKS[name], torch.bfloat16)
    fit_both(case, DEVICE, BACKEND)


def test_100_runs_give_the_same_bits():
    case = problem("self", HEADS[64], 64, PACKS["16K, mixed"], torch.bfloat16)
    checks.deterministic(case, deterministic(BACKEND), DEVICE, runs=100)


def test_3_runs_at_220k_give_the_same_bits():
    case = problem("self", HEADS[64], 64, PACKS["220K, mixed"], torch.bfloat16)
    checks.deterministic(case, deterministic(BACKEND), DEVICE, runs=3)


def test_rows_beyond_2_to_the_31():
    # 240,128 rows of 9,216 elements in samples of 256: little work, far offsets
    grids = ((1, 16, 16),) * 937 + (TAIL,)
    pair = [
        views(problem("self", 48, 64, pack, torch.bfloat16))
        for pack in (Pack("huge", grids), Pack("small", (TAIL,)))
    ]
    for make in (function, deterministic):
        checks.far_rows(*pair, make(BACKEND), DEVICE)


def test_a_graph_serves_another_pack():
    pair = [problem("self", HEADS[64], 64, pack, torch.bfloat16) for pack in GRAPH]
    checks.replays(*pair, deterministic(BACKEND), DEVICE)
    # Sums by atomics come in any order: dq may round to either neighbour, 2^-8 of it apart. What
    # is left of another pack, or of a sum that was not cleared, is as large as dq itself.
    checks.replays(*pair, function(BACKEND), DEVICE, within=2**-7)
