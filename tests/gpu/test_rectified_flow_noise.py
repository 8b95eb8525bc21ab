"""rectified_flow_noise on a CUDA device: the reference's bits, at the sizes it is made for."""

import pytest
import torch

from bench import checks
from bench.cases import Inputs
from bench.packs import GPU_PACKS, Pack
from bench.rectified_flow_noise import function, problem

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


def equals_the_reference(case, device, backend):
    """Bit for bit, on the same device and against the CPU."""
    inputs = case.draw(device, 0).cast(None, False)
    rest = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in inputs.rest.items()}
    on_cpu = Inputs(tuple(x.cpu() for x in inputs.leaves), rest)
    got = function(backend)(inputs)
    for where, given in ((device, inputs), ("cpu", on_cpu)):
        want = function("torch")(given)
        equal = [torch.equal(a.to(where), b) for a, b in zip(got, want, strict=True)]
        assert equal == [True, True], f"{case.case} and the reference on {where}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 63])
@pytest.mark.parametrize("name", ["16K, mixed", "16K, many images", "64K, one clip"])
def test_every_width(name, width, dtype):
    case = problem("latents", width, PACKS[name], dtype)
    equals_the_reference(case, DEVICE, BACKEND)
    checks.all_of([case], function, DEVICE, BACKEND, runs=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["16K, mixed", "16K, many images"])
def test_a_part_of_a_pack(name, dtype):
    case = checks.shard(problem("latents", 64, PACKS[name], dtype))
    equals_the_reference(case, DEVICE, BACKEND)
    checks.all_of([case], function, DEVICE, BACKEND, runs=3)


@pytest.mark.parametrize("name", ["220K, one clip", "220K, many images"])
def test_large_packs(name):
    case = problem("latents", 64, PACKS[name], torch.bfloat16)
    equals_the_reference(case, DEVICE, BACKEND)
    checks.deterministic(case, function(BACKEND), DEVICE, runs=3)


def test_100_runs_give_the_same_bits():
    case = problem("latents", 64, PACKS["16K, many images"], torch.bfloat16)
    checks.deterministic(case, function(BACKEND), DEVICE, runs=100)


def test_rows_beyond_2_to_the_31():
    # 35,000,256 rows of 64 elements, the last sample's element numbers small again
    huge, small = Pack("huge", ((1000, 350, 100), TAIL)), Pack("small", (TAIL,))
    pair = (problem("latents", 64, pack, torch.bfloat16) for pack in (huge, small))
    checks.far_rows(*pair, function(BACKEND), DEVICE)


def test_a_graph_serves_another_pack():
    pair = (problem("latents", 64, pack, torch.bfloat16) for pack in GRAPH)
    checks.replays(*pair, function(BACKEND), DEVICE)
