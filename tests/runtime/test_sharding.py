"""Hybrid sharding: what a policy makes of a module, and training equal to one process's.

The processes are in sharding_processes.py and sharding_memory_processes.py; one launch runs many of
their functions, as start-up is most of what each would take.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from goku_runtime.mesh import ParallelDims
from goku_runtime.sharding import (
    ShardingPolicy,
    apply_hybrid_sharding,
    clip_gradients,
    gradient_norm,
    materialise,
    memory_estimate,
    microbatch,
)
from goku_runtime.sharding_plan import plan, stages

SCRIPT = Path(__file__).with_name("sharding_processes.py")
MEMORY = Path(__file__).with_name("sharding_memory_processes.py")
BLOCKS = ShardingPolicy(blocks=("blocks.*",))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.Linear(4, 8)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)


class TwoDtypes(nn.Sequential):
    """Casts by itself, as sharding never does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self[0](x.bfloat16())
        assert hidden.dtype == torch.bfloat16
        return self[1](hidden.to(torch.promote_types(self[1].weight.dtype, torch.float32)))


@dataclass(frozen=True)
class Degrees:
    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1


# ---- several processes


@pytest.mark.slow
def test_two_processes_train_as_one(run_processes: Any) -> None:
    """Losses, norms and weights in fp64 (1e-12) and fp32 (1e-6) after 3 clipped AdamW steps."""
    run_processes(2, SCRIPT, _parity([[2, 1, 1], [1, 2, 1], [1, 1, 2]]))


@pytest.mark.slow
def test_four_processes(run_processes: Any) -> None:
    """Four ranks: parity, exact sums, collectives counted, precision, offload, errors."""
    run_processes(
        4, SCRIPT, _parity([[2, 2, 1], [1, 4, 1], [4, 1, 1], [2, 1, 2], [1, 2, 2]]),
        "reduction", "unused", "collectives", "precision", "offload", "bad_input",
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
def test_memory_of_four_processes(run_processes: Any) -> None:
    """The meta device never leads to a whole model; the estimate is what a step allocates."""
    run_processes(4, MEMORY, "meta_initialisation", "memory")


@pytest.mark.slow
def test_eight_processes_train_as_one(run_processes: Any) -> None:
    """2 x 2 x 2, every rank with a part of the rows of its own, in fp64 and fp32."""
    run_processes(8, SCRIPT, _parity([[2, 2, 2]]))


def _parity(meshes: list[list[int]]) -> tuple[str, dict[str, object]]:
    return "parity", {"meshes": meshes, "dtypes": ["float64", "float32"]}


def test_a_plan_for_4096_ranks(run_processes: Any) -> None:
    """The 8B model is sharded over a fake group of 4,096 within 30 s and 4 GiB of memory."""
    run_processes(1, MEMORY, "thousands_of_ranks", backend="none")


# ---- one process


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_stays_untouched(group_of_one: None) -> None:
    model = Model()
    before = list(model.parameters())
    policies = (
        BLOCKS,
        ShardingPolicy(blocks=("blocks.*",), param_dtype=torch.float32, gradient_divisor=1.0),
        ShardingPolicy(blocks=("blocks.*",), full_precision=("head",), reduce_dtype=None),
    )
    for mesh in (None, ParallelDims(1, 1, 1).build_mesh("cpu")):
        for policy in policies:
            assert apply_hybrid_sharding(model, mesh, policy) is model
        assert type(model) is Model
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
        microbatch(model, last=False)
        model.head.weight.grad = torch.full((2, 4), 3.0)
        model.head.bias.grad = torch.full((2,), 6.0)  # 8 * 9 + 2 * 36 = 144
        model.head.bias.grad.neg_()
        assert gradient_norm(model.parameters(), mesh) == pytest.approx(12, rel=1e-7)
        assert clip_gradients(model.parameters(), 1.0, mesh) == pytest.approx(12, rel=1e-7)
        # 1e-6 beside a norm of 12 makes the clipped one 8e-8 too small.
        assert gradient_norm(model.parameters(), mesh) == pytest.approx(1, rel=2e-7)
        before_again = model.head.weight.grad.clone()
        clip_gradients(model.parameters(), 2.0, mesh)
        assert torch.equal(model.head.weight.grad, before_again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_process_that_casts_or_divides(group_of_one: None, dtype: torch.dtype) -> None:
    """Wrapped on a mesh of one: bf16 where it was asked for, the divisor applied once."""
    mesh = ParallelDims(1, 1, 1).build_mesh("cpu")
    model = TwoDtypes(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    policy = ShardingPolicy(
        blocks=("0",), full_precision=("1",), param_dtype=torch.bfloat16, gradient_divisor=4.0
    )
    apply_hybrid_sharding(model, mesh, policy)
    assert isinstance(model, FSDPModule)
    seen = []
    for layer in model:  # before forward, after FSDP2's own hook
        layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    model(torch.ones(1, 3)).sum().backward()
    assert seen == [torch.bfloat16, torch.promote_types(dtype, torch.float32)]
    for parameter in model.parameters():
        assert parameter.grad.dtype == parameter.dtype == dtype
    assert model[1].bias.grad.to_local().tolist() == [0.25, 0.25]


def test_gradient_norm_adds_in_float64() -> None:
    """Ten thousand gradients of 1e-4 beside one of 1: float32 sums of squares would lose them."""
    tensors = [torch.zeros(1) for _ in range(10_001)]
    for tensor in tensors:
        tensor.grad = torch.full((1,), 1e-4)
    tensors[0].grad = torch.ones(1)
    norm = gradient_norm(tensors, None)
    torch.testing.assert_close(norm.item(), (1 + 1e4 * 1e-8) ** 0.5, rtol=1e-9, atol=0)
    assert gradient_norm([torch.zeros(2)], None) == 0


def test_materialise_without_sharding() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    seen = []

    def initial(name: str, like: torch.Tensor) -> torch.Tensor:
        assert like.is_meta
        seen.append(name)
        return torch.full(like.shape, 7, dtype=like.dtype)

    materialise(model, "cpu", initial)
    assert seen == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert all(tensor.eq(7).all() for tensor in model.state_dict().values())


# ---- the plan


def test_plan_names_units_and_their_precision() -> None:
    policy = ShardingPolicy(
        blocks=("blocks.*",), full_precision=("blocks.*.norm1", "head"), param_dtype=torch.bfloat16
    )
    model = Model()
    units = plan(model, policy)
    assert [unit.name for unit in units] == [
        "", "blocks.0", "blocks.0.norm1", "blocks.1", "blocks.1.norm1", "blocks.2",
        "blocks.2.norm1", "head",
    ]  # fmt: skip
    assert {unit.name for unit in units if unit.gathered_dtype is None} == {
        "blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "head",
    }  # fmt: skip
    held = [name for unit in units for name in unit.parameters]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    assert list(units[0].parameters) == ["embed.weight", "embed.bias"]
    assert [[unit.name for unit in stage] for stage in stages(units)][1:] == [
        ["blocks.1", "blocks.1.norm1"], ["blocks.2", "blocks.2.norm1"], ["head"],
    ]  # fmt: skip
    # Where nothing is narrowed nothing needs a unit of its own.
    stored = ShardingPolicy(blocks=("blocks.*",), full_precision=("blocks.*.norm1",))
    assert [unit.name for unit in plan(model, stored)] == ["", "blocks.0", "blocks.1", "blocks.2"]
    # Parameters stored in bfloat16 are widened instead.
    widened = plan(Model().bfloat16(), stored)
    assert {u.name for u in widened if u.gathered_dtype == torch.float32} == {
        "blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1",
    }  # fmt: skip


def test_a_block_in_full_precision() -> None:
    policy = ShardingPolicy(
        blocks=("blocks.*",), full_precision=("blocks.1",), param_dtype=torch.bfloat16
    )
    dtypes = {unit.name: unit.gathered_dtype for unit in plan(Model(), policy)}
    low = torch.bfloat16
    assert dtypes == {"": low, "blocks.0": low, "blocks.1": None, "blocks.2": low}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": ("layers.*",)}, "blocks has 'layers.*', which matches no module"),
        ({"blocks": ("layers.*",)}, "allowed: names like 'blocks.0', 'blocks.1', 'blocks.2'"),
        ({"blocks": ("*.norm1",)}, "'*.norm1', which matches no module"),
        ({"blocks": ("blocks",)}, "a ModuleList without forward"),
        ({"blocks": (), "full_precision": ("tail",)}, "full_precision has 'tail'"),
    ],
)
def test_patterns_that_cannot_be_meant(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(Model(), ShardingPolicy(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": "blocks.*"}, "blocks is 'blocks.*'; allowed: a tuple"),
        ({"blocks": None}, "blocks is None; allowed: a tuple"),
        ({"blocks": (1,)}, "blocks is (1,); allowed: a tuple"),
        ({"full_precision": None}, "full_precision is None; allowed: a tuple"),
        ({"prefetch": -1}, "prefetch is -1; allowed: integers >= 0"),
        ({"prefetch": "1"}, "prefetch is '1'; allowed: integers >= 0"),
        ({"prefetch": 1.5}, "prefetch is 1.5; allowed: integers >= 0"),
        ({"prefetch": True}, "prefetch is True; allowed: integers >= 0"),
        ({"param_dtype": torch.int8}, "param_dtype is torch.int8"),
        ({"param_dtype": "bfloat16"}, "param_dtype is 'bfloat16'; allowed: a floating dtype"),
        ({"reduce_dtype": 32}, "reduce_dtype is 32; allowed: a floating dtype"),
        ({"gradient_divisor": 0.0}, "gradient_divisor is 0.0; allowed: > 0"),
        ({"gradient_divisor": math.nan}, "gradient_divisor is nan; allowed: > 0"),
        ({"gradient_divisor": "1"}, "gradient_divisor is '1'; allowed: > 0"),
    ],
)
def test_policies_that_cannot_be_meant(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ShardingPolicy(**{"blocks": ()} | options)


def test_modules_that_cannot_be_sharded() -> None:
    tied = Model()
    tied.blocks[1].norm1.weight = tied.blocks[0].norm1.weight
    with pytest.raises(ValueError, match=r"blocks.1.norm1.weight is shared between 'blocks.0'"):
        plan(tied, BLOCKS)
    mixed = Model()
    mixed.blocks[1].norm1.double()
    with pytest.raises(ValueError, match=r"'blocks.1' are stored in .*allowed: one dtype"):
        plan(mixed, BLOCKS)
    low = ShardingPolicy(blocks=(), param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mesh is None, but"):
        apply_hybrid_sharding(Model(), None, low)
    for refused in (0, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match=f"max_norm is {refused!r}; allowed: a number > 0"):
            clip_gradients([], refused, None)


# ---- memory


def test_memory_estimate_counts_by_hand() -> None:
    """One Linear of 10 x 6 on 4 shards: 3 rows of 6 and 3 of bias; bf16 gathers 12 rows."""
    model = nn.Sequential(nn.Linear(6, 10))
    policy = ShardingPolicy(blocks=("0",), param_dtype=torch.bfloat16, prefetch=0)
    got = memory_estimate(
        model, Degrees(2, 2, 2), policy, optimizer_bytes_per_parameter=6
    )  # fmt: skip
    local, padded, whole = 3 * 6 + 3, 12 * 6 + 12, 10 * 6 + 10
    assert (got.parameters, got.gradients, got.optimizer) == (4 * local, 4 * local, 6 * local)
    assert got.partial == 4 * local
    assert got.gathered == 2 * 2 * padded  # arriving and in use
    assert got.backward == 2 * padded + 2 * whole + 4 * padded  # parameters, gradients, sent fp32
    assert got.state == 14 * local
    assert got.device == got.state + got.backward
    assert got.host == 0
    kept = ShardingPolicy(blocks=("0",), param_dtype=torch.bfloat16, cpu_offload=True)
    away = memory_estimate(model, Degrees(2, 2, 2), kept)
    assert (away.host, away.device) == (away.state, away.backward)
    with pytest.raises(ValueError, match=re.escape("(dp_replicate, dp_shard, sp) is (1, -1, 1)")):
        memory_estimate(model, Degrees(1, -1, 1), policy)
    alone = memory_estimate(model, Degrees(), BLOCKS_OF_ONE)
    assert (alone.gathered, alone.backward, alone.device) == (0, 0, 16 * whole)


BLOCKS_OF_ONE = ShardingPolicy(blocks=("0",))


def test_memory_of_8b_at_4096_ranks() -> None:
    """Seconds, from shapes alone; and the state of a rank falls as 1 / shards."""
    from goku.model import PRESETS, GokuTransformer

    with torch.device("meta"):
        model = GokuTransformer(PRESETS["goku-8b"])
    policy = ShardingPolicy(blocks=("blocks.*",), param_dtype=torch.bfloat16)
    started = time.perf_counter()
    estimates = [memory_estimate(model, Degrees(16, 256 // sp, sp), policy) for sp in (1, 8)]
    assert time.perf_counter() - started < 5
    assert estimates[0] == estimates[1]
    ideal = sum(p.numel() for p in model.parameters()) * 16 / 256
    assert ideal <= estimates[0].state < 1.01 * ideal  # what padding costs
    assert "on the device" in str(estimates[0])
