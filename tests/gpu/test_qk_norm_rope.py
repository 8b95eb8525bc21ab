"""qk_norm_rope on a CUDA device, at the sizes it is made for."""

import dataclasses

import pytest
import torch

from bench import checks
from bench.cases import Inputs
from bench.packs import GPU_PACKS, Pack
from bench.qk_norm_rope import function, problem
from goku.model import PRESETS

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


def with_options(case, **options):
    """The problem with options of the operator; a gain of one head where the norm is a head's."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        q, k, *gains = inputs.leaves
        if options.get("norm") == "head":
            gains = [gain[: q.shape[2]].clone() for gain in gains]
        if options.get("norm") == "none":
            gains = []
        return Inputs((q, k, *gains), {**inputs.rest, **options})

    return dataclasses.replace(case, case=f"{case.case} {options}", draw=draw)


def variants(pack, dtype, config):
    yield problem("contiguous", config, pack, dtype)
    yield problem("views", config, pack, dtype, views=True)
    whole = problem("contiguous", config, pack, dtype)
    yield with_options(whole, pairing="half")
    yield with_options(whole, norm="head")
    yield with_options(whole, norm="none", pairing="half")
    yield with_options(whole, rotate_k=False)


def grouped(case, kv_heads):
    """Fewer heads of keys than of queries."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        q, k, q_weight, k_weight = inputs.leaves
        few = k[:, :kv_heads].contiguous()
        return Inputs((q, few, q_weight, k_weight[: few[0].numel()].clone()), inputs.rest)

    return dataclasses.replace(case, case=f"{case.case}, {kv_heads} key heads", draw=draw)


def forms(pack, dtype, config):
    """Forms of the arguments that Goku's training does not have."""
    whole = problem("contiguous", config, pack, dtype)
    yield grouped(whole, config.heads // 2)
    yield with_options(grouped(whole, config.heads // 2), norm="head", pairing="half")
    yield checks.shard(whole)
    yield checks.shard(with_options(whole, pairing="half"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_form_of_the_arguments(dtype):
    cases = list(forms(PACKS["16K, mixed"], dtype, PRESETS["goku-2b"]))
    checks.all_of(cases, function, DEVICE, BACKEND, runs=3)


# Not all pairs: every one compiles its own kernels.
@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("goku-1b", torch.bfloat16), ("goku-2b", torch.bfloat16), ("goku-2b", torch.float16),
     ("goku-8b", torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["16K, mixed", "16K, many images"])
def test_every_variant(name, preset, dtype):
    cases = list(variants(PACKS[name], dtype, PRESETS[preset]))
    checks.all_of(cases, function, DEVICE, BACKEND, runs=3)


@pytest.mark.parametrize("name", ["64K, one clip", "220K, one clip", "220K, many images"])
def test_large_packs(name):
    case = problem("goku-8b", PRESETS["goku-8b"], PACKS[name])
    checks.all_of([case], function, DEVICE, BACKEND, runs=3)


def test_100_runs_give_the_same_bits():
    case = problem("goku-2b", PRESETS["goku-2b"], PACKS["16K, many images"])
    checks.deterministic(case, function(BACKEND), DEVICE, runs=100)


def test_rows_beyond_2_to_the_31():
    # 240,256 rows of 9,216 elements, views of QKV
    huge, small = Pack("huge", ((60, 50, 80), TAIL)), Pack("small", (TAIL,))
    pair = (problem("views", PRESETS["goku-8b"], pack, views=True) for pack in (huge, small))
    checks.far_rows(*pair, function(BACKEND), DEVICE)


def test_a_graph_serves_another_pack():
    pair = (problem("goku-2b", PRESETS["goku-2b"], pack) for pack in GRAPH)
    checks.replays(*pair, function(BACKEND), DEVICE)
