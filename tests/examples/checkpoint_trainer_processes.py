"""checkpoint_trainer.py, interrupted and not. Run by tests/launch.py."""

import os
import shutil
from pathlib import Path

import checkpoint_trainer as example
import torch.distributed as dist

from goku_runtime.checkpoint import verify


def train(out, steps):
    trainer = example.trainer_of(Path(out), steps)
    trainer.train(resume_from_checkpoint=example.newest(Path(out)))
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    dist.barrier()
    return losses, trainer.model.state_dict()


def resume(rank, world, out):
    """Twelve steps, and eight and four: the same losses and weights to the bit."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # fmt: skip
    expected, weights = train(f"{out}/whole", 12)
    assert len(expected) == 12
    first, _ = train(f"{out}/parts", 8)
    assert first == expected[:8]
    if rank == 0:  # as if the run had been cut short while it saved
        shutil.copytree(f"{out}/parts/checkpoint-8", f"{out}/parts/checkpoint-9")
        os.rename(f"{out}/parts/checkpoint-9/state", f"{out}/parts/checkpoint-9/.state.saving-0")
    dist.barrier()
    assert example.newest(Path(out, "parts")).endswith("checkpoint-8")
    losses, found = train(f"{out}/parts", 12)
    assert losses == expected
    assert all(found[name].equal(weights[name]) for name in weights)
    saved = sorted(path.name for path in Path(out, "whole").iterdir())
    assert saved == ["checkpoint-12", "checkpoint-8"], saved
    for name in saved:
        verify(Path(out, "whole", name, "state"))
        files = {path.name for path in Path(out, "whole", name).iterdir()}
        assert not [each for each in files if each.endswith((".pt", ".pth", ".bin"))], files
