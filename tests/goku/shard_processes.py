"""What the processes of test_parallelize.py do; run by tests/launch.py."""

from __future__ import annotations

import os
import sys
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from goku.cli import main
from goku.flow import per_sample_mse
from goku.model import GokuTransformer, KernelConfig, ModelConfig
from goku.parallelize import PackSharding, parallel_context
from goku_kernels import Packing
from goku_runtime import checkpoint
from goku_runtime.mesh import ParallelDims
from goku_runtime.sequence_parallel import SequenceParallel

CPU = torch.device("cpu")
GRIDS = [(3, 2, 3), (1, 2, 3), (2, 2, 2), (1, 1, 1)]  # 18 + 6 + 8 + 1 = 33 tokens
TEXT = [3, 1, 2, 5]


def _model(heads: int) -> GokuTransformer:
    config = ModelConfig(dim=8 * heads, depth=2, heads=heads, text_dim=12, latent_channels=2)
    model = GokuTransformer(config, KernelConfig()).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # not adaLN-Zero: every gate open, so that every gradient is there
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return model


def model_on_shards(rank: int, world: int, heads: int) -> None:
    """Velocity, losses and every gradient of a pack shared by all ranks are those of one process."""
    generator = torch.Generator().manual_seed(0)
    packing, text_packing = Packing.from_grids(GRIDS), Packing.from_lengths(TEXT)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, target, text = draw(33, 8), draw(33, 8), draw(11, 12)
    t, weights = torch.tensor([0.1, 0.5, 0.7, 0.9]).double(), torch.tensor([1.0, 2.0, 0.5, 1.0])

    model = _model(heads)
    whole = model(x, t, text, packing, text_packing)
    losses = per_sample_mse(whole, target, packing)
    (losses * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    sharding = PackSharding(SequenceParallel(dist.group.WORLD, heads))
    shard = sharding.shard(packing)
    texts = sharding.text(text.split(TEXT), shard)
    if rank == 0:  # it has rows of the first sample alone
        assert [len(text) for text in texts] == [TEXT[0], 0, 0, 0]
    mine = model(
        sharding.rows(x), t, torch.cat(texts), packing, Packing.from_lengths([len(s) for s in texts]), shard
    )  # fmt: skip
    tight = {"rtol": 1e-10, "atol": 1e-11}  # fp64, sums in another order
    torch.testing.assert_close(sharding.gather(mine, 33).detach(), whole.detach(), **tight)
    part = per_sample_mse(mine, sharding.rows(target), packing, token_offset=shard.token_offset)
    (part * weights).sum().backward()
    total = part.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, losses.detach(), **tight)
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(gradient)
        torch.testing.assert_close(
            gradient, wanted[name], **tight, msg=lambda m, n=name: f"{n}: {m}"
        )


def too_few_tokens(rank: int, world: int) -> None:
    sharding = PackSharding(SequenceParallel(dist.group.WORLD, 2))
    with pytest.raises(ValueError, match="tokens"):
        sharding.shard(Packing.from_grids([(1, 1, world - 1)]))


def _join(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def arrangement(rank: int, world: int, port: int) -> None:
    """Which processes share a pack, who leads it, and sums over all."""
    _join(rank, world, port)
    with parallel_context("cpu", 1, ParallelDims(sp=2)) as context:
        assert (context.packs, context.pack_rank) == (world // 2, rank // 2)
        assert context.leads_pack == (rank % 2 == 0)
        sharding = context.pack_sharding(heads=2)
        assert sharding is not None
        assert sharding.size == 2
        assert context.all_sum(torch.tensor([1.0, float(rank)])).tolist() == [
            world, world * (world - 1) / 2,
        ]  # fmt: skip
    assert context.mesh is None


def a_row_of_every_process(rank: int, world: int, port: int, path: str) -> None:
    """Random states are saved for each process, without a collective for them, and come back."""
    _join(rank, world, port)
    torch.manual_seed(rank)
    mine = torch.get_rng_state()
    with parallel_context("cpu", 1, ParallelDims(sp=2)) as context:
        state = {"rng": context.row(mine)}
        checkpoint.save(state, path, process_group=context.host_group)
        dtype, shape = checkpoint.describe(path)["rng"]
        assert (dtype, shape) == (torch.uint8, (world, len(mine)))
        rows = torch.zeros(shape, dtype=dtype)
        checkpoint.load({"rng": rows}, path, process_group=context.host_group)
        for each in range(world):
            torch.manual_seed(each)
            assert torch.equal(rows[each], torch.get_rng_state())
            torch.set_rng_state(rows[each].clone())


def neighbours_alone(rank: int, world: int, port: int, other_port: int) -> None:
    """Many processes are connected to those that they talk to, few to all others."""

    def connected(port: int) -> int:
        _join(rank, world, port)
        before = len(os.listdir("/proc/self/fd"))
        with parallel_context("cpu", 1) as context:
            assert context.gather(rank) == list(range(world))
            assert context.all_sum(torch.tensor([float(rank)])) == world * (world - 1) / 2
            context.barrier()
            return len(os.listdir("/proc/self/fd")) - before

    assert "TORCH_GLOO_LAZY_INIT" not in os.environ
    to_all = connected(port)
    assert "TORCH_GLOO_LAZY_INIT" not in os.environ
    with patch("goku.parallelize.CONNECT_ALL", world - 1):
        # Two groups, two neighbours in each; in one of them those that a message to all passes through, too.
        assert connected(other_port) <= to_all - 2 * (world - 3) + world.bit_length()


def one_dies(rank: int, world: int, port: int) -> None:
    """The others fail as it is gone, each with one line."""
    _join(rank, world, port)

    def train(args: object) -> int:
        with parallel_context("cpu", 1) as context:
            if rank == 1:
                os._exit(9)
            context.all_sum(torch.ones(3))
            context.gather(rank)
        return 0

    with patch("goku.commands.train.run", train):
        code = main(["train", "run.yaml"])
    sys.stderr.flush()
    os._exit(code)  # the launcher tells of SystemExit with a traceback


def bad_arrangement(rank: int, world: int, port: int) -> None:
    _join(rank, world, port)
    with pytest.raises(ValueError, match="3"), parallel_context("cpu", 1, ParallelDims(sp=3)):
        pass


def one_fails(rank: int, world: int, port: int) -> None:
    """When one rank fails all raise, and none waits."""
    _join(rank, world, port)

    def work() -> int:
        if rank == 1:
            raise OSError(28, "No space left on device")
        return 7

    with parallel_context("cpu", timeout_minutes=1) as context:
        assert context.gather(rank * 10) == [10 * k for k in range(world)]
        assert context.together(lambda: rank) == rank
        with pytest.raises(OSError if rank == 1 else ValueError, match="No space left") as caught:
            context.together(work)
        assert rank == 1 or str(caught.value).startswith("rank 1: ")
        context.on_main(lambda: None)
