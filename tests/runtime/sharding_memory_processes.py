"""Memory of hybrid sharding in real processes: each function runs on every rank of one group."""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from goku_runtime.mesh import ParallelDims
from goku_runtime.sharding import (
    ShardingPolicy,
    apply_hybrid_sharding,
    materialise,
    memory_estimate,
    microbatch,
)

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages

from sharding_model import (
    build,
    full,
    initial,
)


def thousands_of_ranks(rank: int, world: int) -> None:
    """The 8B model on a mesh of 4,096, as rank 0 of them sees it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from goku.model import PRESETS, GokuTransformer

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4096)
    started = time.perf_counter()
    degrees = ParallelDims(8, 64, 8)
    with torch.device("meta"):
        model = GokuTransformer(PRESETS["goku-8b"])
    policy = ShardingPolicy(
        blocks=("blocks.*",),
        full_precision=("patch_embed", "time_embed", "blocks.*.norm1", "final"),
        param_dtype=torch.bfloat16,
    )
    estimate = memory_estimate(model, degrees, policy)
    apply_hybrid_sharding(model, degrees.build_mesh("cpu"), policy)
    assert time.perf_counter() - started < 30
    local = sum(p.to_local().numel() * p.itemsize for p in model.parameters())
    assert local == estimate.parameters
    assert all(p.is_meta for p in model.parameters())
    assert _status("VmHWM") < 4 * 2**30


class Wide(nn.Module):
    """Large enough for its memory to stand out: 40 blocks of 4 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(40)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory rises at most, in a list of one."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, result = _status("VmRSS"), [0]
    yield result
    result[0] = _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def meta_initialisation(rank: int, world: int) -> None:
    """The weights are the same bits on every mesh, and no rank ever holds more than its part."""
    for dims in ([1, 4, 1], [2, 2, 1], [4, 1, 1], [1, 1, 4]):
        mesh = ParallelDims(*dims).build_mesh("cpu")
        model = build(torch.float32, mesh, ShardingPolicy(blocks=("blocks.*",)))
        for name, parameter in model.named_parameters():
            want = initial(name, torch.empty(parameter.shape, device="meta")).float()
            assert torch.equal(full(parameter), want), (dims, name)
    whole, one = 40 * 2**22, 2**22
    mesh = ParallelDims(1, 4, 1).build_mesh("cpu")
    with peak_growth() as peak:
        with torch.device("meta"):
            model = Wide()
        apply_hybrid_sharding(model, mesh, ShardingPolicy(blocks=("blocks.*",)))
        materialise(model, "cpu", lambda name, like: torch.full(like.shape, 0.5))
    local = sum(p.to_local().nbytes for p in model.parameters())
    assert local == whole // 4
    # Its part, one whole parameter, and what allocation rounds up; never near the whole.
    assert local <= peak[0] < local + one + 24 * 2**20, peak


class Sizes(nn.Module):
    """Parameters large beside the activations of one row, in shapes that 4 ranks cannot share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(255, 510)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(510, 1021), nn.Tanh(), nn.Linear(1021, 510)) for _ in range(4)
        )
        self.frozen = nn.Parameter(torch.ones(3, 510), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x) * self.frozen[:1]
        for block in self.blocks:
            h = h + block(h)
        return h


def memory(rank: int, world: int) -> None:
    """`memory_estimate` against a sharded model's tensors, and against what a step allocates."""
    for dims, reshard in itertools.product(([2, 2, 1], [1, 2, 2]), (True, False)):
        policy = ShardingPolicy(
            blocks=("blocks.*",), gradient_divisor=1.0, reshard_after_forward=reshard
        )
        degrees = ParallelDims(*dims)
        with torch.device("meta"):
            estimate = memory_estimate(Sizes(), degrees, policy)
        mesh = degrees.build_mesh("cpu")
        assert memory_estimate(Sizes(), mesh, policy) == estimate
        model = apply_hybrid_sharding(Sizes(), mesh, policy)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with Allocations() as step:
            for index in range(2):
                microbatch(model, last=index == 1)
                model(torch.ones(1, 255)).sum().backward()
        optimizer.step()
        local = list(model.parameters())
        moments = [
            v for s in optimizer.state.values() for v in s.values() if isinstance(v, DTensor)
        ]
        real = [
            sum(p.to_local().untyped_storage().nbytes() for p in local),
            sum(p.grad.to_local().nbytes for p in local if p.grad is not None),
            sum(v.to_local().nbytes for v in moments),
        ]
        assert estimate.parameters == real[0]
        # Rank 0 has the longest part of every parameter, the one that all others are padded to.
        got = torch.tensor([*real[1:], -estimate.gradients, -estimate.optimizer])
        dist.all_reduce(got, dist.ReduceOp.MAX)
        assert got.tolist() == [
            estimate.gradients, estimate.optimizer, -estimate.gradients, -estimate.optimizer
        ]  # fmt: skip
        # Everything but the parameters came while it was watched. The estimate adds the largest
        # moment of the exchange to all gradients, which in truth comes before the last of them.
        expected = estimate.gradients + max(estimate.gathered, estimate.backward)
        assert 0.8 * expected < step.peak <= expected, (dims, reshard, step.peak / expected)


class Allocations(TorchDispatchMode):
    """Follows the memory of all tensors that operators return, through FSDP2's resizing too."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flat = result if isinstance(result, list | tuple) else [result]
        self.alive += [weakref.ref(t) for t in flat if type(t) is Tensor]
        tensors = [tensor for tensor in (ref() for ref in self.alive) if tensor is not None]
        self.alive = [weakref.ref(tensor) for tensor in tensors]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.peak = max(self.peak, sum(storages.values()))
        return result
