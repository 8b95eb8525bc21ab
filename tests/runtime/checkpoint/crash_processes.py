"""What the ranks of test_crash.py do; started by tests/launch.py."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from goku_runtime.checkpoint import Checkpointer, CheckpointOptions, Retention

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from power_loss import Recorder

NUMBERS = 27_000


def state_of(step: int, world: int) -> dict[str, Any]:
    """As in test_crash.py, divided by the ranks."""
    values = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(step))
    mesh = init_device_mesh("cpu", (world,))
    rows = distribute_tensor(values, mesh, [Shard(0)])
    return {"w": rows, "b": torch.full((5,), step), "step": step}


def record(rank: int, world: int, base: str, logs: str) -> None:
    root = Path(base) / "run" / "checkpoints"
    recorder, commits = Recorder(), []
    options = CheckpointOptions(block_bytes=65536)
    with Checkpointer(options=options, journal=recorder) as saving:
        for step, name in ((1, "a"), (2, "b"), (3, "b")):
            handle = saving.async_save(
                state_of(step, world), root / name, overwrite=True, latest=True,
                retention=Retention(1), stage="background",
            )  # fmt: skip
            handle.result()
            commits.append(time.monotonic_ns())
    steps = [[step.operation, base64.b64encode(step.data).decode()] for step in recorder.steps]
    text = json.dumps({"steps": steps, "commits": commits})
    (Path(logs) / f"{rank}.json").write_text(text)
