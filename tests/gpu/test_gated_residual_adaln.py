"""gated_residual_adaln on a CUDA device, at the sizes it is made for."""

import pytest
import torch

from bench import checks
from bench.gated_residual_adaln import function, problem
from bench.packs import GPU_PACKS, Pack

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


def variants(pack, dtype, width):
    yield problem("rms", width, pack, dtype)
    yield problem("layer", width, pack, dtype, norm="layer")
    if dtype == torch.float32:
        yield problem("narrower branch", width, pack, dtype, branch_dtype=torch.bfloat16)


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
    checks.all_of([problem("rms", 3072, PACKS[name])], function, DEVICE, BACKEND, runs=3)


def test_100_runs_give_the_same_bits():
    case = problem("rms", 1792, PACKS["16K, many images"])
    checks.deterministic(case, function(BACKEND), DEVICE, runs=100)


def test_rows_beyond_2_to_the_31():
    # 700,256 rows of 3,072 elements; residual, branch, both outputs and all gradients: about 50 GB
    huge, small = Pack("huge", ((100, 70, 100), TAIL)), Pack("small", (TAIL,))
    pair = (problem("rms", 3072, pack) for pack in (huge, small))
    checks.far_rows(*pair, function(BACKEND), DEVICE)


def test_a_graph_serves_another_pack():
    pair = (problem("rms", 1792, pack) for pack in GRAPH)
    checks.replays(*pair, function(BACKEND), DEVICE)
