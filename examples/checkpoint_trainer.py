"""Hugging Face's Trainer with checkpoints of ours: written while it trains on, whole or absent.

    torchrun --nproc-per-node 2 examples/checkpoint_trainer.py --out run --steps 8

Each checkpoint-N has a directory `state` with model, optimizer, scheduler and every process's random
states, in place of the files that the Trainer pickles; its trainer_state.json stays what it is. A run
that is started again goes on from the newest one that is whole (with the same number of processes, as
random states belong to processes). Prints the loss of every step, interrupted or not the same.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import Trainer, TrainingArguments

from goku_runtime.checkpoint import Checkpointer, load

STATE = "state"


class CheckpointingTrainer(Trainer):
    """A Trainer for models that lie whole on every process, or in FSDP2's shards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.save_total_limit == 1:  # the newest one is still being written then
            raise ValueError("save_total_limit is 1; allowed: >= 2, or None")
        self._checkpointer = Checkpointer()
        self._random: dict[str, Any] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self._checkpointer.wait()
        return result

    def _state(self) -> dict[str, Any]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # within accelerate's
        weights, moments = get_state_dict(self.model, optimizer)
        name, keys, *rest = np.random.get_state()
        own = {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": weights,
            "optimizer": moments,
            "scheduler": self.lr_scheduler.state_dict(),
            "random": {f"process {self.args.process_index}": own},
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # for a checkpoint, whose weights are in our state
            os.makedirs(output_dir or self.args.output_dir, exist_ok=True)
        else:
            super().save_model(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Waits for the save before, so that one that is whole always stays.
        self._checkpointer.async_save(self._state(), Path(output_dir) / STATE, overwrite=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """It is in the state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are loaded with the rest, once there is an optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._state()
        load(state, Path(checkpoint) / STATE)
        set_state_dict(
            self.model,
            getattr(self.optimizer, "optimizer", self.optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.lr_scheduler.load_state_dict(state["scheduler"])
        (self._random,) = state["random"].values()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            random.setstate(self._random["python"])
            np.random.set_state(self._random["numpy"])
            torch.set_rng_state(self._random["torch"])
            if "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"])


def newest(out: Path) -> str | None:
    """The newest checkpoint that is whole; Trainer's own choice may be one that was cut short."""
    whole = [path for path in out.glob("checkpoint-*") if (path / STATE / "manifest.json").exists()]
    found = [path for path in whole if (path / "trainer_state.json").exists()]
    return str(max(found, key=lambda path: int(path.name.partition("-")[2]), default="")) or None


class Model(nn.Module):
    """Two layers with dropout, so that random states matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


def trainer_of(out: Path, steps: int) -> CheckpointingTrainer:
    """A training up to `steps`, with a checkpoint every 4."""
    torch.manual_seed(0)
    samples = [{"x": torch.randn(8), "y": torch.randn(8)} for _ in range(64)]
    args = TrainingArguments(
        output_dir=str(out), max_steps=steps, save_steps=4, save_total_limit=2, logging_steps=1,
        per_device_train_batch_size=4, lr_scheduler_type="constant", report_to=[], seed=1,
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return CheckpointingTrainer(Model(), args, train_dataset=samples)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory of the checkpoints")
    parser.add_argument("--steps", type=int, default=8, help="steps in all (default: 8)")
    options = parser.parse_args()
    trainer_of(options.out, options.steps).train(resume_from_checkpoint=newest(options.out))


if __name__ == "__main__":
    main()
