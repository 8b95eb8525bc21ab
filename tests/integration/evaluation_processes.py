"""What the processes of test_evaluation.py do; run by tests/launch.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from goku import evaluation
from goku.parallelize import parallel_context
from goku.prepare import prepare_datasets, prepare_vae
from goku.run_config import load_run_config
from goku.trainer import Trainer


def train(rank: int, world: int, config: str, port: int, broken: int) -> None:
    """Trains the run of `config`; the rank `broken` finds no embedding when it samples."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = load_run_config(Path(config))

    class Broken(evaluation.TextCache):
        def get(self, prompts: Any) -> Any:
            raise RuntimeError("out of memory")

    with parallel_context("cpu", timeout_minutes=1, dims=settings.parallel) as context:
        vae = prepare_vae(settings, context)
        training, unseen, text = prepare_datasets(settings, context, vae)
        if rank == broken:
            evaluation.TextCache = Broken  # type: ignore[misc]
        trainer = Trainer(settings, context, training, vae, text, unseen)
        assert trainer.run(threading.Event()) == "finished"
