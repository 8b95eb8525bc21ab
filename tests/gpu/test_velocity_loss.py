"""velocity_loss on a CUDA device, at the sizes it is made for."""

import dataclasses

import pytest
import torch

from bench import checks
from bench.packs import GPU_PACKS, Pack
from bench.velocity_loss import WEIGHT_SUM, function, problem
from goku_kernels.velocity_loss import velocity_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE, BACKEND = torch.device("cuda"), "triton"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PACKS = {pack.name: pack for pack in GPU_PACKS}
GRAPH = (
    Pack("three samples", ((5, 18, 32), (1, 16, 16), (1, 32, 32))),
    Pack("one and empty ones", ((5, 26, 32), (0, 1, 1), (0, 1, 1))),
)
TAIL = (1, 16, 16)


def both(backend):
    """The loss and every sample's own, (B, 1), and the gradient through both."""

    def run(inputs):
        rest = (inputs.rest[name] for name in ("target", "weights", "cu_seqlens"))
        options = {"weight_sum": WEIGHT_SUM, "backend": backend, **inputs.rest.get("options", {})}
        loss, per_sample = velocity_loss(*inputs.leaves, *rest, **options)
        return loss, per_sample[:, None]

    return run


def per_sample(case):
    """The problem with every sample's own loss, each judged by itself."""
    one_each = (1,) * len(case.pack.grids)
    partitions = (*(case.partitions or (case.pack.lengths,)), one_each)
    name = f"{case.case}, per sample"
    return dataclasses.replace(case, case=name, reference=both("torch"), partitions=partitions)


def forms(pack, dtype, width):
    """The loss of every sample, of a whole pack and of a rank's part of it."""
    whole = problem("latents", width, pack, dtype)
    yield per_sample(whole)
    yield per_sample(checks.shard(whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 63])
@pytest.mark.parametrize("name", ["16K, mixed", "16K, many images", "220K, one clip"])
def test_every_width(name, width, dtype):
    case = problem("latents", width, PACKS[name], dtype)
    checks.all_of([case], function, DEVICE, BACKEND, runs=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["16K, mixed", "16K, many images"])
def test_every_sample_and_a_part_of_a_pack(name, dtype):
    checks.all_of(list(forms(PACKS[name], dtype, 64)), both, DEVICE, BACKEND, runs=3)


def test_100_runs_give_the_same_bits():
    case = problem("latents", 64, PACKS["16K, many images"], torch.bfloat16)
    checks.deterministic(case, function(BACKEND), DEVICE, runs=100)


def test_rows_beyond_2_to_the_31():
    # 35,000,256 rows of 64 elements; the loss has one gradient, so that of every row is compared
    huge, small = Pack("huge", ((1000, 350, 100), TAIL)), Pack("small", (TAIL,))
    pair = (problem("latents", 64, pack, torch.bfloat16) for pack in (huge, small))
    checks.far_rows(*pair, function(BACKEND), DEVICE)


def test_a_graph_serves_another_pack():
    pair = (problem("latents", 64, pack, torch.bfloat16) for pack in GRAPH)
    checks.replays(*pair, function(BACKEND), DEVICE)
