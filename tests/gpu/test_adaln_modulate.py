"""adaln_modulate on a CUDA device, at the sizes it is made for."""

import dataclasses

import pytest
import torch

from bench import checks
from bench.adaln_modulate import NAMES, function, problem
from bench.cases import Inputs, draw_normal
from bench.packs import GPU_PACKS, Pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE, BACKEND = torch.device("cuda"), "triton"
PACKS = {pack.name: pack for pack in GPU_PACKS}
# Padded with empty samples, as a graph wants it.
GRAPH = (
    Pack("three samples", ((5, 18, 32), (1, 16, 16), (1, 32, 32))),
    Pack("one and empty ones", ((5, 26, 32), (0, 1, 1), (0, 1, 1))),
)
TAIL = (1, 16, 16)


def variants(pack, dtype, width):
    yield problem("layer", width, pack, dtype)
    yield problem("rms with gain", width, pack, dtype, weight=True, norm="rms")
    yield problem("no norm", width, pack, dtype, norm="none")


def without(case, name):
    """The problem without one of its modulations."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        first = 1
        given = dict(zip(NAMES, inputs.leaves[first:], strict=False))
        del given[name]
        leaves = (*inputs.leaves[:first], *given.values())
        return Inputs(leaves, {**inputs.rest, "names": tuple(given)})

    return dataclasses.replace(case, case=f"{case.case}, no {name}", draw=draw)


def modulated(case, shared):
    """The problem with one row of modulation for all tokens, or with one for each."""

    def draw(device, seed):
        inputs = case.draw(device, seed)
        generator = torch.Generator(device).manual_seed(seed + 2**20)
        first = 1
        tokens, width = inputs.leaves[0].shape
        shape = (width,) if shared else (tokens, width)
        rows = (draw_normal(generator, *shape, dtype=torch.float32) for _ in range(2))
        leaves = (*inputs.leaves[:first], *rows, *inputs.leaves[first + 2 :])
        return Inputs(leaves, {**inputs.rest, "cu_seqlens": None})

    name = "shared" if shared else "a row for every token"
    return dataclasses.replace(case, case=f"{case.case}, {name}", draw=draw)


def forms(pack, dtype, width):
    """Every form of the arguments, of which Goku has one."""
    whole = problem("layer", width, pack, dtype)
    yield from (without(whole, name) for name in ("shift", "scale"))
    yield from (modulated(whole, shared) for shared in (True, False))
    yield checks.shard(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_form_of_the_arguments(dtype):
    cases = list(forms(PACKS["16K, mixed"], dtype, 1152))
    checks.all_of(cases, function, DEVICE, BACKEND, runs=3)


# Not all pairs: every one compiles its own kernels.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(1152, torch.bfloat16), (1792, torch.bfloat16), (1792, torch.float16), (1792, torch.float32),
     (3072, torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["16K, mixed", "16K, many images"])
def test_every_variant(name, width, dtype):
    checks.all_of(list(variants(PACKS[name], dtype, width)), function, DEVICE, BACKEND, runs=3)


@pytest.mark.parametrize("name", ["64K, one clip", "220K, one clip", "220K, many images"])
def test_large_packs(name):
    checks.all_of([problem("layer", 3072, PACKS[name])], function, DEVICE, BACKEND, runs=3)


def test_100_runs_give_the_same_bits():
    case = problem("layer", 1792, PACKS["16K, many images"])
    checks.deterministic(case, function(BACKEND), DEVICE, runs=100)


def test_rows_beyond_2_to_the_31():
    # 700,256 rows of 3,072 elements
    huge, small = Pack("huge", ((100, 70, 100), TAIL)), Pack("small", (TAIL,))
    pair = (problem("layer", 3072, pack) for pack in (huge, small))
    checks.far_rows(*pair, function(BACKEND), DEVICE)


def test_a_graph_serves_another_pack():
    pair = (problem("layer", 1792, pack) for pack in GRAPH)
    checks.replays(*pair, function(BACKEND), DEVICE)
