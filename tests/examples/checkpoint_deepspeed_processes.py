"""checkpoint_deepspeed.py, interrupted and not. Run by tests/launch.py."""

import logging
import os
from pathlib import Path

import checkpoint_deepspeed as example
import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import groups

from goku_runtime.checkpoint import CheckpointError, verify

# gloo's all-reduce instead of DeepSpeed's own in shared memory, which it would compile first.
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def train(rank, out, stage, steps):
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does; DeepSpeed asks
    groups.mpu = None  # DeepSpeed's memory of the engine before
    found = list(example.train(Path(out), steps, stage))
    dist.barrier()
    return found


def resume(rank, world, out, stage):
    """Eight steps, and four and four: the same losses to the bit, from files that are whole."""
    expected = train(rank, f"{out}/whole-{stage}", stage, 8)
    first = train(rank, f"{out}/parts-{stage}", stage, 4)
    assert first == expected[:4]
    assert train(rank, f"{out}/parts-{stage}", stage, 8) == expected[4:]
    saved = [
        path for path in Path(out, f"parts-{stage}", "global_step8").iterdir() if path.is_dir()
    ]
    assert len(saved) == world + (world if stage == 3 else 1), saved
    for path in saved:
        verify(path)


def refuse(rank, world, out):
    """Damage is found, and what DeepSpeed's states have not is refused by its name."""
    engine = example.Checkpoints()
    path = Path(out, "parts-2", "global_step8", "mp_rank_00_model_states.pt")
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    dist.barrier()
    data.write_bytes(content)
    dist.barrier()
    try:
        engine.load(str(path))
    except CheckpointError as error:
        assert "altered" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("the damage was not found")
    try:
        engine.save({"a": [1, torch.float32]}, f"{out}/refused")
    except ValueError as error:
        assert "refused[0][1][1]: a <class 'torch.dtype'>" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("it was taken")
