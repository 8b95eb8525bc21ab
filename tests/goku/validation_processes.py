"""What the processes of test_validation.py do; run by tests/launch.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from goku.metrics import RunLog
from goku.parallelize import (
    ActivationCheckpointing,
    ShardingConfig,
    build_model,
    parallel_context,
)
from goku.run_config import load_run_config
from goku.text import load_text_encoder
from goku.vae import load_vae
from goku.validation import Validator
from goku_runtime import checkpoint


def validate(
    rank: int, world: int, config: str, run: str, port: int, broken: int | None = None
) -> None:
    """Draws the cases of `config` with the average of `run`, its weights sharded over the processes.

    broken: the rank whose folder cannot be written to.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = load_run_config(json.loads(Path(config).read_text()))
    with parallel_context("cpu", timeout_minutes=1) as context:
        vae, text = load_vae(settings.vae.path), load_text_encoder(settings.text)
        model = build_model(
            settings.model, settings.kernels, context, ShardingConfig(), ActivationCheckpointing(),
            torch.float32, None,
        )  # fmt: skip
        state: dict[str, Any] = {"ema": dict(model.state_dict())}
        checkpoint.load(
            state, Path(run) / "checkpoints" / "step_0000007", partial=True,
            process_group=context.host_group,
        )  # fmt: skip
        out = Path(settings.out)
        log = RunLog(out / "train.jsonl" if context.is_main else None, total_steps=1)
        validator = Validator(settings.validation, settings, context, vae, text)
        if rank == broken:
            validator.out = out / "train.jsonl"  # a file, in which no folder can be
        validator.run(model, 7, log)
        log.close()
