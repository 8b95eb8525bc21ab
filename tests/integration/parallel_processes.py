"""What the processes of test_parallel.py do; run by tests/launch.py."""

from __future__ import annotations

import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from goku.parallelize import ParallelContext, copy_parameters, local, parallel_context
from goku.prepare import prepare_datasets, prepare_vae
from goku.run_config import RunConfig, load_run_config
from goku.trainer import Trainer


def _join(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _trainer(run: RunConfig, context: ParallelContext) -> Trainer:
    vae = prepare_vae(run, context)
    training, unseen, text = prepare_datasets(run, context, vae)
    trainer = Trainer(run, context, training, vae, text, unseen)
    _open_gates(trainer.model)
    copy_parameters(trainer.model, trainer.ema.module)
    return trainer


@torch.no_grad()
def _open_gates(model: nn.Module) -> None:
    """adaLN-Zero starts with self-attention shut off, and six steps hardly open it: a wrong exchange
    would not be seen. The same noise on every mesh, by the parameter's name."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        local(parameter).add_(local(noise))


def _lose(dataset: Any) -> None:
    """From now on neither the first item's latent nor its media can be read by this process."""
    read, cached = dataset.read, dataset.cached

    def broken(index: int, caption: int = 0) -> Any:
        if index == 0:
            raise OSError("Input/output error")
        return read(index, caption)

    def damaged(index: int, caption: int = 0) -> Any:
        return None if index == 0 else cached(index, caption)

    def gone(index: int, vae: Any) -> Any:
        raise OSError("Stale file handle")

    dataset.read, dataset.cached, dataset.repair = broken, damaged, gone


def _whole(parameter: Tensor) -> np.ndarray:
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().numpy()


def train(
    rank: int,
    world: int,
    config: str,
    overrides: list[str],
    port: int,
    dtypes: bool = False,
    losing: list[int] | None = None,
) -> None:
    """One run to its end; rank 0 writes the whole weights and averages to out/weights.npz.

    Prints how many rounds of packs this rank ran and how many of them idle. dtypes: check those that
    parameters have when they are used. losing: ranks that can read the first item no more.
    """
    _join(rank, world, port)
    run = load_run_config(Path(config), overrides)
    with parallel_context("cpu", timeout_minutes=1, dims=run.parallel) as context:
        trainer = _trainer(run, context)
        if rank in (losing or []):
            _lose(trainer.builder.dataset)
        resume = trainer.resume
        torch.manual_seed(time.time_ns() + rank)  # unlike that of any other launch

        def resumed(log: Any) -> bool:
            found = resume(log)
            print(f"random state of rank {rank}: {zlib.crc32(torch.get_rng_state().numpy())}")
            return found

        trainer.resume = resumed  # type: ignore[method-assign]
        step, seen = trainer.train_step, []
        tell = trainer._log_step

        def counted(*arguments: Any) -> bool:
            packs = trainer.planner.plan(trainer.position).packs
            seen.extend(pack.idle for pack in packs)
            print(f"rounds: {len(packs)}")
            return step(*arguments)

        def told(log: Any, statistics: Any, *arguments: Any) -> None:
            if rank == 0:
                print(f"FLOPs of step {trainer.step}: {statistics.flops:.0f}")
            tell(log, statistics, *arguments)

        trainer.train_step = counted  # type: ignore[method-assign]
        trainer._log_step = told  # type: ignore[method-assign]
        used: dict[str, torch.dtype] = {}
        block = trainer.model.blocks[0]
        for name, module in (("attn1", block.attn1.q_proj), ("norm1", block.norm1.linear)):
            module.register_forward_pre_hook(
                lambda m, _inputs, name=name: used.__setitem__(name, m.weight.dtype)
            )
        assert trainer.run(threading.Event()) == "finished"
        print(f"rank {rank}: {sum(seen)} of {len(seen)} packs idle")
        if dtypes:
            assert used == {"attn1": torch.bfloat16, "norm1": torch.float32}
        sharded = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        assert len(sharded) == (len(list(trainer.model.parameters())) if world > 1 else 0)
        weights = {
            f"{kind}.{name}": _whole(parameter)
            for kind, module in (("model", trainer.model), ("ema", trainer.ema.module))
            for name, parameter in module.named_parameters()
        }
        # What a checkpoint takes must be what is used.
        for name, value in trainer.state()["ema"].items():
            assert np.array_equal(_whole(value), weights[f"ema.{name}"])
        if rank == 0:
            np.savez(trainer.out / "weights.npz", **weights)


def decisions(rank: int, world: int, config: str, port: int) -> None:
    """A gradient that is not finite on one rank, and a stop asked of another, are everybody's."""
    _join(rank, world, port)
    overrides = ["parallel.sp=2", "train.steps=9", "train.eval_every=0"]
    run = load_run_config(Path(config), overrides)
    with parallel_context("cpu", timeout_minutes=1, dims=run.parallel) as context:
        trainer = _trainer(run, context)
        honest, step = trainer.per_sample_loss, trainer.train_step
        stop = threading.Event()

        def poisoned(model: Any, batch: Any) -> Tensor:
            loss = honest(model, batch)
            return loss * float("nan") if trainer.step == 1 and rank == 3 else loss

        def watched(log: Any, stop: threading.Event) -> bool:
            if trainer.step == 3 and rank == 1:
                stop.set()
            weights = [local(p).detach().clone() for p in trainer.model.parameters()]
            poison, stopping = trainer.step == 1, step(log, stop)
            same = all(
                torch.equal(a, local(p))
                for a, p in zip(weights, trainer.model.parameters(), strict=True)
            )
            assert same == poison
            assert trainer.skipped == int(poison)
            return stopping

        trainer.per_sample_loss = poisoned  # type: ignore[method-assign]
        trainer.train_step = watched  # type: ignore[method-assign]
        assert trainer.run(stop) == "stopped"
        assert trainer.step == 4
