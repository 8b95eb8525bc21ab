"""What the processes of test_activation_checkpoint.py do; run by tests/launch.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from goku.model import GokuTransformer, ModelConfig, TokenShard
from goku_kernels import Packing
from goku_runtime.activation_checkpoint import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from goku_runtime.sequence_parallel import SequenceParallel

POLICIES = (
    ActivationCheckpointing(mode="full"),
    ActivationCheckpointing(mode="every_nth", every=2),
    ActivationCheckpointing(
        mode="operators", save=("goku_kernels::varlen_attention", "aten::mm", "aten::addmm")
    ),
)
GRIDS, TEXT = [(1, 3, 4), (2, 2, 5)], [4, 7]  # 32 tokens


class _Exchange(torch.autograd.Function):
    """Equal parts of the rows to every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        sizes = [len(x) // dist.get_world_size()] * dist.get_world_size()
        received = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), sizes, sizes, name)
        return torch.ops._c10d_functional.wait_tensor(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.name), None


class _Block(nn.Module):
    """Two exchanges, each between products that need its result."""

    def __init__(self) -> None:
        super().__init__()
        self.group_name = dist.group.WORLD.group_name
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = _Exchange.apply(self.first(x).tanh(), self.group_name)
        return x + _Exchange.apply(self.second(y).tanh(), self.group_name).sin()


class _Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(_Block() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Graphs:
    """A backend that runs what torch.compile traced as it is, and counts the exchanges in it.

    torch.compile leaves a function alone where a dispatch mode such as CommDebugMode is active.
    """

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []

    def count(self, found: list[int], graph: torch.fx.GraphModule, _: object) -> Any:
        exchange = torch.ops._c10d_functional.all_to_all_single.default
        found.append(sum(node.target is exchange for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def compile(self, module: nn.Module) -> None:
        """Each block by itself, from nothing."""
        torch._dynamo.reset()
        backend = aot_autograd(
            fw_compiler=partial(self.count, self.forward),
            bw_compiler=partial(self.count, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        for block in module.blocks:
            block.compile(fullgraph=True, backend=backend)


def _run(
    module: nn.Module, forward: Callable[[], Tensor], compiled: bool = False
) -> tuple[int, int, dict[str, Tensor]]:
    """Exchanges of the forward and of the backward, and the gradients."""
    if compiled:
        graphs = _Graphs()
        graphs.compile(module)
        forward().square().sum().backward()
        # One graph serves all blocks that are alike; each has as many exchanges as the others.
        counts = [len(module.blocks) * n for (n,) in map(set, (graphs.forward, graphs.backward))]
    else:
        # One mode for both: it follows the modules, and has to know those that are recomputed.
        with CommDebugMode() as mode:
            loss = forward().square().sum()
            there = mode.get_total_counts()
            loss.backward()
        assert all("all_to_all" in str(name) for name in mode.get_comm_counts())
        counts = [there, mode.get_total_counts() - there]
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return counts[0], counts[1], gradients


def _check_equal(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(ours) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=0, msg=name)


def exchanges_are_not_repeated(rank: int, world: int) -> None:
    """In every mode, eager and compiled: as many as without checkpointing, and equal gradients."""
    x = torch.randn(4 * world, 6, generator=torch.Generator().manual_seed(rank))
    for compiled in (False, True):
        plain = _Stack(3)
        there, back, wanted = _run(plain, lambda plain=plain: plain(x), compiled)
        assert (there, back) == (6, 6)
        # Compiled, a block of "every_nth" is one of the others.
        for policy in (POLICIES[0], POLICIES[2]) if compiled else POLICIES:
            module = apply_activation_checkpointing(_Stack(3), policy)
            there, back, ours = _run(module, lambda module=module: module(x), compiled)
            assert (there, back) == (6, 6), (policy, compiled)
            _check_equal(ours, wanted)
    # What is counted can be wrong: checkpoint as torch has it repeats the exchanges in backward.
    plain = _Stack(1)
    _, back, _ = _run(plain, lambda: checkpoint(plain, x, use_reentrant=False))
    assert back == 4


def _goku(policy: ActivationCheckpointing, dtype: torch.dtype) -> GokuTransformer:
    config = ModelConfig(dim=48, depth=3, heads=3, text_dim=24, latent_channels=4)
    model = GokuTransformer(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no zero gates
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    apply_activation_checkpointing(model, policy)
    return model


def sequence_parallel_goku(rank: int, world: int) -> None:
    """Goku on shards of a pack, heads split unevenly: 2 exchanges a block forwards and backwards."""
    packing, generator = Packing.from_grids(GRIDS), torch.Generator().manual_seed(2)
    sp = SequenceParallel(dist.group.WORLD, 3)
    rows, offset = sp.rows(packing.total), sp.token_offset(packing.total)
    here, begin = [], -offset
    for length in packing.lengths:
        here.append(max(0, min(begin + length, rows) - max(begin, 0)))
        begin += length
    shard = TokenShard(rows, offset, Packing.from_lengths(here), sp.attention)
    x = sp.shard(torch.randn(packing.total, 16, generator=generator, dtype=torch.float64))
    text = torch.randn(sum(TEXT), 24, generator=generator, dtype=torch.float64)
    arguments = (x, torch.tensor([0.2, 0.7]), text, packing, Packing.from_lengths(TEXT), shard)
    for compiled in (False, True):
        wanted: dict[str, Tensor] = {}
        policies = POLICIES[2:] if compiled else POLICIES
        for policy in (ActivationCheckpointing(), *policies):
            model = _goku(policy, torch.float64)
            there, back, ours = _run(model, lambda model=model: model(*arguments), compiled)
            assert (there, back) == (6, 6), (policy, compiled)
            assert len(ours) == len(list(model.parameters()))
            wanted = wanted or ours
            _check_equal(ours, wanted)


def fully_sharded_goku(rank: int, world: int, compiled: bool = False) -> None:
    """`fully_shard` afterwards, in bf16 but for a module inside each block, prefetched: equal bits.

    Twice in a row, so that the second pass meets FSDP2's steady state.
    """
    mesh = init_device_mesh("cpu", (world,))
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    low = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    packing, generator = Packing.from_grids(GRIDS), torch.Generator().manual_seed(3 + rank)
    x = torch.randn(packing.total, 16, generator=generator)
    text = torch.randn(sum(TEXT), 24, generator=generator)
    arguments = (x, torch.tensor([0.2, 0.7]), text, packing, Packing.from_lengths(TEXT))
    wanted: dict[str, Tensor] = {}
    for policy in (ActivationCheckpointing(), *(POLICIES[2:] if compiled else POLICIES)):
        model = _goku(policy, torch.float32)
        blocks = list(model.blocks)
        if compiled:
            _Graphs().compile(model)
        for block in blocks:
            if not compiled:  # a compiled block is one graph: no gathering inside
                fully_shard(block.norm1, mesh=mesh, mp_policy=full)
                fully_shard(block.mlp, mesh=mesh, mp_policy=low)
            fully_shard(block, mesh=mesh, mp_policy=low)
        fully_shard(model, mesh=mesh, mp_policy=full)
        for i, block in enumerate(blocks):
            inner = [(b,) if compiled else (b, b.norm1, b.mlp) for b in blocks]
            block.set_modules_to_forward_prefetch([m for ms in inner[i + 1 : i + 2] for m in ms])
            block.set_modules_to_backward_prefetch(
                [m for ms in inner[max(i - 1, 0) : i] for m in ms]
            )
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(*arguments).square().sum().backward()
        ours = {name: p.grad.to_local() for name, p in model.named_parameters()}
        wanted = wanted or ours
        _check_equal(ours, wanted)


class _Tail(nn.Module):
    """A block whose recomputation stops, having all that it needs, inside of its last module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).sin())


def a_sharded_module_ends_the_block(rank: int, world: int) -> None:
    """FSDP2 never sees that module's recomputation return, in three steps with equal gradients."""
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank))
    wanted: dict[str, Tensor] = {}
    for policy in (ActivationCheckpointing(), POLICIES[0]):
        torch.manual_seed(0)
        module = nn.Module()
        module.blocks = nn.Sequential(_Tail(), _Tail(), _Tail())
        apply_activation_checkpointing(module, policy)
        for block in module.blocks:
            fully_shard(block.last, mesh=mesh)
            fully_shard(block, mesh=mesh)
        for _ in range(3):
            module.blocks(x).square().sum().backward()
        ours = {name: p.grad.to_local() for name, p in module.named_parameters()}
        wanted = wanted or ours
        _check_equal(ours, wanted)
