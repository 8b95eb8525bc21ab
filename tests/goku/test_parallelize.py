"""Reductions on real gloo processes: unequal work, a rank without any, and the device that is not there."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from goku.parallelize import broadcast_module, parallel_context, reduce_gradients


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).double()


def _data() -> torch.Tensor:
    return torch.arange(60, dtype=torch.float64).view(12, 5).sin()


def _worker(rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with parallel_context("cpu", timeout_minutes=1) as context:
        torch.manual_seed(rank)  # different on purpose: the broadcast must make them equal
        model = _model()
        broadcast_module(model, context)
        # rows 0-6 on rank 0, 7-11 on rank 1, none on rank 2
        rows = _data()[[slice(0, 7), slice(7, 12), slice(0, 0)][rank]]
        if len(rows):
            (model(rows).square().sum() / 12).backward()
        reduce_gradients(model, context)

        torch.manual_seed(0)
        alone = _model()
        (alone(_data()).square().sum() / 12).backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            # fp64 sums in another order
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-14)
        total = context.all_sum(torch.tensor([1.0, float(rank)]))
        assert total.tolist() == [3.0, 3.0]


def test_gradients_equal_one_process_with_unequal_and_empty_shares():
    mp.spawn(_worker, args=(3, _free_port()), nprocs=3, join=True)


def test_alone_is_the_identity():
    with parallel_context("cpu") as context:
        assert (context.rank, context.world, context.is_main, context.group) == (0, 1, True, None)
        values = torch.tensor([1.5, 2.5])
        assert context.all_sum(values) is values
        context.barrier()
        model = _model()
        reduce_gradients(model, context)
        assert all(p.grad is None for p in model.parameters())


def test_absent_or_unknown_device_is_named():
    with pytest.raises(ValueError, match="tpu"), parallel_context("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"), parallel_context("cuda"):
            pass


def _one_fails(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def work() -> int:
        if rank == 1:
            raise OSError(28, "No space left on device")
        return 7

    with parallel_context("cpu", timeout_minutes=1) as context:
        assert context.gather(rank * 10) == [0, 10, 20]
        assert context.together(lambda: rank) == rank
        with pytest.raises(OSError if rank == 1 else ValueError, match="No space left") as caught:
            context.together(work)
        assert rank == 1 or str(caught.value).startswith("rank 1: ")
        context.on_main(lambda: None)


def test_when_one_rank_fails_all_raise_and_none_waits():
    mp.spawn(_one_fails, args=(3, _free_port()), nprocs=3, join=True)
