"""checkpoint_fsdp2.py, interrupted and not. Run by tests/launch.py."""

import json
from pathlib import Path

import checkpoint_fsdp2 as example
import torch

from goku_runtime.checkpoint import latest, verify


def train(rank, world, out, steps, start=0):
    """Go on to `steps`, and keep the losses beside the checkpoints."""
    torch.set_default_dtype(torch.float64)
    found = list(example.train(Path(out), steps, every=2))
    assert [step for step, _ in found] == list(range(start, steps))
    assert latest(out).name == f"step_{steps}"
    verify(latest(out))
    if rank == 0:
        path = Path(out) / "losses.json"
        before = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*before, *(loss for _, loss in found)]))
