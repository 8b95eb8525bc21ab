"""Hybrid sharding in real processes: each function runs on every rank of one gloo group."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from goku_runtime.mesh import ParallelDims
from goku_runtime.sharding import (
    ShardingPolicy,
    apply_hybrid_sharding,
    clip_gradients,
    gradient_norm,
    materialise,
    microbatch,
)

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages

from sharding_model import (
    ROWS,
    STEPS,
    Block,
    Model,
    batch,
    build,
    close,
    full,
    initial,
    loss_of,
    plain,
    uneven,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BF16 = ShardingPolicy(
    blocks=("blocks.*",), full_precision=("blocks.*.norm1", "time_embed", "head"),
    param_dtype=torch.bfloat16, gradient_divisor=1.0,
)  # fmt: skip


def reference(dtype: torch.dtype, clip: float) -> tuple[list[float], list[float], Model]:
    """Losses, norms and weights of one process: the textbook loop over whole batches."""
    model = plain(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, batch(dtype, step), list(range(ROWS)))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(loss.item())
    assert min(norms) > clip  # the clip is at work
    return losses, norms, model


def train(
    model: Model,
    mesh: DeviceMesh | None,
    dtype: torch.dtype,
    shares: list[list[int]],
    microbatches: int,
    clip: float,
    *,
    keep: bool = False,
    scale: float = 1.0,
) -> tuple[list[float], list[float]]:
    """The sharded loop: this rank's share in as many micro-batches as every rank has."""
    rank = dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses, norms = [], []
    for step in range(STEPS):
        data = batch(dtype, step)
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        mine = shares[rank]
        for index in range(microbatches):
            microbatch(model, last=index == microbatches - 1, keep_unsharded=keep)
            # Unequal micro-batches: the first takes half of what is left, and so on.
            taken = mine if index == microbatches - 1 else mine[: (len(mine) + 1) // 2]
            mine = mine[len(taken) :]
            loss = loss_of(model, data, taken)
            (loss * scale).backward()
            assert all(isinstance(p, DTensor) for p in model.parameters()) or keep
            total += loss.detach()
        dist.all_reduce(total)
        norm = gradient_norm(model.parameters(), mesh)
        assert norm.dtype == torch.float64
        clip_gradients(model.parameters(), clip, mesh, norm=norm if step % 2 else None)
        optimizer.step()
        with torch.no_grad():  # an evaluation between steps leaves nothing behind
            loss_of(model, data, mine)
        losses.append(float(total))
        norms.append(float(norm))
    return losses, norms


def parity(rank: int, world: int, meshes: list[list[int]], dtypes: list[str]) -> None:
    """Losses, norms and weights after 3 steps of AdamW with clipping equal one process's."""
    clip = 0.05
    cases = itertools.cycle([(1, False, 1, True), (3, False, 0, True), (3, True, 2, False)])
    for name in dtypes:
        dtype = getattr(torch, name)
        losses, norms, expected = reference(dtype, clip)
        for dims in meshes:
            mesh = ParallelDims(*dims).build_mesh("cpu")
            microbatches, keep, prefetch, reshard = next(cases)
            # Half of them with FSDP's usual mean, undone by the loss: every divisor is exercised.
            mean = dims[2] == 1 and microbatches == 3
            policy = ShardingPolicy(
                blocks=("blocks.*",), gradient_divisor=None if mean else 1.0,
                prefetch=prefetch, reshard_after_forward=reshard,
            )  # fmt: skip
            model = build(dtype, mesh, policy)
            scale = float(dims[0] * dims[1]) if mean else 1.0
            got = train(
                model, mesh, dtype, uneven(world), microbatches, clip, keep=keep, scale=scale
            )
            tolerance = TOLERANCE[dtype]
            what = f"{dims} {name} {microbatches} keep={keep}"
            close(torch.tensor(got[0]), torch.tensor(losses), tolerance, f"{what} losses")
            close(torch.tensor(got[1]), torch.tensor(norms), tolerance, f"{what} norms")
            for (key, value), want in zip(
                model.state_dict().items(), expected.state_dict().values(), strict=True
            ):
                close(full(value), want, tolerance, f"{what} {key}")


def reduction(rank: int, world: int) -> None:
    """Gradients are exactly the sum over ranks, divided once, on every mesh and in every dtype."""
    for dims in ([4, 1, 1], [1, 4, 1], [2, 2, 1], [1, 2, 2], [2, 1, 2]):
        mesh = ParallelDims(*dims).build_mesh("cpu")
        for dtype, divisor in itertools.product(
            (torch.float64, torch.float32, torch.bfloat16), (1.0, None, 3.0)
        ):
            policy = ShardingPolicy(blocks=("0",), reduce_dtype=None, gradient_divisor=divisor)
            # Small integers: sums have no rounding, so that equality is exact.
            model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(dtype)
            for number, parameter in enumerate(model.parameters()):
                nn.init.constant_(parameter, 1 - number % 2)
            plain_model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(dtype)
            plain_model.load_state_dict(model.state_dict())
            apply_hybrid_sharding(model, mesh, policy)
            for index in range(2):
                microbatch(model, last=index == 1)
                x = torch.full((1, 3), rank + index, dtype=dtype)
                model(x).sum().backward()
                plain_model(x).sum().backward()
            factor = dims[0] * dims[1] if divisor is None else divisor
            for got, mine in zip(model.parameters(), plain_model.parameters(), strict=True):
                assert mine.grad is not None
                want = mine.grad.double()
                dist.all_reduce(want)
                want = (want / factor).to(dtype)
                # A third is rounded in two steps: 2, then 1.5.
                slack = 2 * torch.finfo(dtype).eps if divisor == 3.0 else 0.0
                torch.testing.assert_close(
                    full(got.grad), want, rtol=slack, atol=0, msg=f"{dims} {dtype} {divisor}"
                )


def unused(rank: int, world: int) -> None:
    """A parameter without gradient on one rank, or on all, neither hangs nor mixes gradients up."""
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        return  # torch < 2.13: every parameter needs a gradient on every rank
    for dims in ([4, 1, 1], [1, 4, 1], [2, 2, 1]):
        mesh = ParallelDims(*dims).build_mesh("cpu")
        policy = ShardingPolicy(blocks=("blocks.*",), gradient_divisor=1.0)
        for users in ([1], []):
            model, expected = build(torch.float64, mesh, policy), plain(torch.float64)
            x, t, *_ = batch(torch.float64, rank)
            for index in range(2):
                microbatch(model, last=index == 1)
                extra = rank in users and index == 0
                model(x, t, extra=extra).square().mean().backward()
                expected(x, t, extra=extra).square().mean().backward()
            for (name, got), mine in zip(
                model.named_parameters(), expected.parameters(), strict=True
            ):
                want = torch.zeros_like(mine) if mine.grad is None else mine.grad
                dist.all_reduce(want)
                close(full(got.grad), want, 1e-12, f"{dims} {users} {name}")


def collectives(rank: int, world: int) -> None:
    """How often a step gathers, reduce-scatters and all-reduces; the norm is one number."""
    mesh = ParallelDims(2, 2, 1).build_mesh("cpu")
    micro, x = 3, batch(torch.float32, 0)[:2]
    for keep, reshard, prefetch, gathers in (
        (False, True, 1, lambda units: 2 * units * micro),
        (False, False, 0, lambda units: units * micro),
        (True, True, 2, lambda units: 2 * units),
        (True, False, 1, lambda units: units),
    ):
        policy = ShardingPolicy(
            blocks=("blocks.*",), reshard_after_forward=reshard, prefetch=prefetch
        )
        model = build(torch.float32, mesh, policy)
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        assert units == 4
        counts: Counter[Any] = Counter()
        for index in range(micro):
            microbatch(model, last=index == micro - 1, keep_unsharded=keep)
            with CommDebugMode() as comm:  # a new one each: it follows a module once
                model(*x).square().mean().backward()
            counts += Counter(comm.get_comm_counts())
        c10d = torch.ops.c10d
        assert counts == {
            c10d._allgather_base_: gathers(units),
            c10d._reduce_scatter_base_: units if keep else units * micro,
            c10d.allreduce_: units,
        }, (keep, reshard, counts)
        with CommDebugMode() as comm, NoHostSync() as watch:
            norm = gradient_norm(model.parameters(), mesh)
            clip_gradients(model.parameters(), float("1e-3"), mesh, norm=norm)
        # One number over the shards, and over the replicas, which must not clip differently.
        assert comm.get_total_counts() == 2
        assert watch.reduced == [1, 1]
        # Against torch's own, on the whole gradients.
        grads = [full(p.grad) for p in model.parameters()]
        clipped = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        close(clipped, torch.tensor(1e-3), 1e-3, "clipped")  # torch's 1e-6 beside a norm of 1


class NoHostSync(TorchDispatchMode):
    """Refuses what waits for a device, and notes the elements of every all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "is_nonzero" not in name, name
        assert "nonzero" not in name, name
        if "allreduce" in name:
            self.reduced += [tensor.numel() for tensor in args[0]]
        return func(*args, **(kwargs or {}))


def rounded(name: str, like: Tensor) -> Tensor:
    """As `initial`, exact in bfloat16: a cast of the parameters then changes nothing."""
    return initial(name, like).bfloat16()


def precision(rank: int, world: int) -> None:
    """bf16 blocks with fp32 modulation under autocast equal plain autocast, rank by rank."""
    share = uneven(world)[rank]
    data = batch(torch.float32, 0)
    expected = Model()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(rounded(name, parameter.to("meta")))
    with torch.autocast("cpu", torch.bfloat16):
        want = loss_of(expected, data, share)
    want.backward()
    for dims, recompute in (([2, 2, 1], False), ([1, 2, 2], True), ([4, 1, 1], False)):
        mesh = ParallelDims(*dims).build_mesh("cpu")
        with torch.device("meta"):
            model = Model()
        apply_hybrid_sharding(model, mesh, BF16)
        materialise(model, "cpu", rounded)
        wrapped = {n for n, module in model.named_modules() if isinstance(module, FSDPModule)}
        blocks = {f"blocks.{i}{suffix}" for i in range(3) for suffix in ("", ".norm1")}
        assert wrapped == {"", "time_embed", "head", *blocks}
        model.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = loss_of(model, data, share)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == want.item()
        for block in model.blocks:
            assert isinstance(block, Block)
            assert block.seen == {
                "stream": torch.float32, "norm1": torch.float32,
                "gain": torch.bfloat16, "up": torch.bfloat16,
            }  # fmt: skip
        for (name, got), mine in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert got.dtype == torch.float32
            assert got.grad.dtype == torch.float32
            assert mine.grad is not None
            total = mine.grad.clone()
            dist.all_reduce(total)
            # A gain's and `extra`'s gradient leaves in bf16, the others' are that already.
            tolerance = 2**-8 if "norm2" in name or name == "extra" else 1e-6
            close(full(got.grad), total, tolerance, f"{dims} {name}")


def offload(rank: int, world: int) -> None:
    """Offloaded parameters train to the same bits (here the device is the host, too)."""
    dims, results = [2, 2, 1], []
    for cpu_offload in (False, True):
        mesh = ParallelDims(*dims).build_mesh("cpu")
        policy = ShardingPolicy(blocks=("blocks.*",), cpu_offload=cpu_offload, gradient_divisor=1.0)
        model = build(torch.float32, mesh, policy)
        train(model, mesh, torch.float32, uneven(world), 2, 0.05)
        results.append([full(p) for p in model.parameters()])
    assert all(map(torch.equal, *results))


def bad_input(rank: int, world: int) -> None:
    """Errors that need a mesh."""
    mesh = ParallelDims(2, 2, 1).build_mesh("cpu")
    policy = ShardingPolicy(blocks=("blocks.*",), cpu_offload=True)
    with torch.device("meta"):
        model = Model()
    apply_hybrid_sharding(model, mesh, policy)
    fails("device is cuda; allowed with cpu_offload", materialise, model, "cuda", initial)
    fails("shape", materialise, model, "cpu", lambda name, like: torch.zeros(1))
    other = Model()
    fails("extra is on cpu", materialise, other, "cpu", initial)
    foreign = ParallelDims(1, 2, 2).build_mesh("cpu")
    mesh_of_two = ParallelDims(2, 2, 1).build_mesh("cpu")
    parameter = apply_hybrid_sharding(nn.Linear(4, 4), mesh_of_two, ShardingPolicy(blocks=()))
    parameter(torch.ones(1, 4)).sum().backward()
    fails("over the 4 ranks", gradient_norm, parameter.parameters(), foreign)
    axes = torch.distributed.init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c"))
    fails("dp_shard", apply_hybrid_sharding, Model(), axes, ShardingPolicy(blocks=("blocks.*",)))


def fails(words: str, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        call(*arguments)
