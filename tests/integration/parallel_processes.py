"""What the processes of test_parallel.py do; run by tests/launch.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
from torch.distributed.tensor import DTensor

from goku.parallelize import parallel_context
from goku.prepare import prepare_datasets, prepare_vae
from goku.run_config import load_run_config
from goku.trainer import Trainer


def train(rank: int, world: int, config: str, overrides: list[str], port: int) -> None:
    """One run to its end; rank 0 writes the whole weights and averages to out/weights.npz."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = load_run_config(Path(config), overrides)
    with parallel_context("cpu", timeout_minutes=1, dims=run.parallel) as context:
        vae = prepare_vae(run, context)
        training, unseen, text = prepare_datasets(run, context, vae)
        trainer = Trainer(run, context, training, vae, text, unseen)
        assert trainer.run(threading.Event()) == "finished"
        sharded = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        assert len(sharded) == (len(list(trainer.model.parameters())) if world > 1 else 0)
        weights = {}
        for kind, module in (("model", trainer.model), ("ema", trainer.ema.module)):
            for name, parameter in module.named_parameters():
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                weights[f"{kind}.{name}"] = whole.detach().numpy()
        if rank == 0:
            np.savez(trainer.out / "weights.npz", **weights)
