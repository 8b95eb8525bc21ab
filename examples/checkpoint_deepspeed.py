"""DeepSpeed's ZeRO engine with checkpoints of ours: durable, checked as they are read, never unpickled.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/checkpoint_deepspeed.py --out run --steps 4
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/checkpoint_deepspeed.py --out run --steps 8

`engine.checkpoint_engine = Checkpoints()` is all that a training needs. Each of DeepSpeed's files
becomes a checkpoint directory of the same name, which its rank writes alone while the others write
theirs; `commit`, before DeepSpeed moves its `latest`, waits for them. DeepSpeed loads with the number of
ranks that saved. Prints every step's loss, interrupted or not the same.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from checkpoint_fsdp2 import BATCH, WIDTH, samples_of
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from goku_runtime.checkpoint import SaveHandle, async_save, describe, load, read_values


def _object(kind: type) -> tuple[type, Callable[[Any], Any], Callable[[Any], Any]]:
    def made(attributes: dict[str, Any]) -> Any:
        new = kind.__new__(kind)
        new.__dict__.update(attributes)
        return new

    return kind, vars, made


# What is no JSON in DeepSpeed's states, by name: (type, to something plainer, and back).
KINDS = {
    "dict": (dict, lambda value: [list(item) for item in value.items()], dict),
    "OrderedDict": (OrderedDict, lambda value: [list(each) for each in value.items()], OrderedDict),
    "tuple": (tuple, list, tuple),
    "Size": (torch.Size, list, torch.Size),
    "set": (set, sorted, set),
    "ZeroStageEnum": (ZeroStageEnum, int, ZeroStageEnum),
    "LossScaler": _object(LossScaler),
    "DynamicLossScaler": _object(DynamicLossScaler),
    "fragment_address": _object(fragment_address),
}


def taken_apart(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """A value as JSON; its tensors go into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if type(value) is list:
        return [taken_apart(each, tensors, f"{where}[{i}]") for i, each in enumerate(value)]
    for name, (kind, plainer, _) in KINDS.items():
        if type(value) is kind:
            return {"kind": name, "value": taken_apart(plainer(value), tensors, where)}
    raise ValueError(
        f"{where}: a {type(value)}; allowed: tensors, plain values, {', '.join(KINDS)}"
    )


def put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The other way."""
    if isinstance(value, list):
        return [put_together(each, tensors) for each in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return KINDS[value["kind"]][2](put_together(value["value"], tensors))
    return value


class Checkpoints(CheckpointEngine):
    """DeepSpeed's interface to whatever writes and reads its files."""

    def __init__(self) -> None:
        super().__init__()
        # Ranks save what others do not: each is a group of its own.
        self._alone = dist.new_group(
            [dist.get_rank()], backend="gloo", use_local_synchronization=True
        )
        self._saving: list[SaveHandle] = []

    def create(self, info: Any) -> None:
        """A checkpoint is about to be saved."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        tensors: dict[str, Tensor] = {}
        tree = taken_apart(state_dict, tensors, Path(path).name)
        state = {"tensors": tensors, "tree": tree}
        self._saving.append(async_save(state, path, overwrite=True, process_group=self._alone))

    def load(self, path: str, map_location: Any = None) -> Any:
        shapes = describe(path)
        tensors = {
            name.removeprefix("tensors."): torch.empty(shape, dtype=dtype, device="cpu")
            for name, (dtype, shape) in shapes.items()
        }
        load({"tensors": tensors}, path, partial=True, process_group=self._alone)
        if map_location is not None and not callable(map_location):
            tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
        return put_together(read_values(path)["tree"], tensors)

    def commit(self, info: Any) -> bool:
        """Wait until all that this rank saved is durable; what failed is raised."""
        saving, self._saving = self._saving, []
        for handle in saving:
            handle.result()
        return True

    def preserves_storage_sharing(self) -> bool:
        return False  # views need not be cloned: their elements alone are written


def train(out: Path, steps: int, stage: int) -> Iterator[tuple[int, float]]:
    """Train up to `steps`, from the latest checkpoint in `out` if there is one; yield (step, loss)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=config,
        dist_init_required=False,
    )
    engine.checkpoint_engine = Checkpoints()
    if (out / "latest").exists():
        engine.load_checkpoint(str(out))
    for step in range(engine.global_steps, steps):
        inputs, targets = (samples_of(each).to(engine.device) for each in (step, step + 1))
        share = (engine(inputs) - targets).square().sum() / BATCH
        engine.backward(share * dist.get_world_size())  # DeepSpeed averages over the ranks
        engine.step()
        loss = share.detach()
        dist.all_reduce(loss)  # to be printed, nothing else
        yield step, loss.item()
    engine.save_checkpoint(str(out), client_state={"note": "saved at the end"})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory of the checkpoints")
    parser.add_argument("--steps", type=int, default=4, help="steps in all (default: 4)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=2, help="of ZeRO (default: 2)"
    )
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed()
    for step, loss in train(options.out, options.steps, options.stage):
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.6f}")
    dist.destroy_process_group()
    time.sleep(0.1)  # for gloo's threads, see command_line.py


if __name__ == "__main__":
    main()
