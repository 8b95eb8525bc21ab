"""A plain FSDP2 loop that saves while it trains on, and resumes on any number of processes.

    torchrun --nproc-per-node 4 examples/checkpoint_fsdp2.py --steps 4 --out run
    torchrun --nproc-per-node 2 examples/checkpoint_fsdp2.py --steps 8 --out run

The state is that of torch's own `get_state_dict`: DTensors by name, so that the number of processes may
change. It is copied during the next forward and backward pass, and written after that. Prints every
step's loss: the same numbers for every number of processes, interrupted or not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from goku_runtime.checkpoint import Checkpointer, Retention, latest, load

BATCH, WIDTH = 8, 30


def samples_of(step: int) -> Tensor:
    """This rank's samples of a step, (BATCH / ranks, WIDTH): all ranks together have the same ones."""
    generator = torch.Generator("cpu").manual_seed(step)
    samples = torch.randn(BATCH, WIDTH, generator=generator, device="cpu")
    mine = samples[dist.get_rank() :: dist.get_world_size()]
    return mine.to(torch.get_default_device(), torch.get_default_dtype())


def train(out: Path, steps: int, every: int) -> Iterator[tuple[int, float]]:
    """Train up to `steps`, from the latest checkpoint in `out` if there is one; yield (step, loss)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    def state_at(step: int) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {
            "model": weights,
            "optimizer": moments,
            "scheduler": scheduler.state_dict(),
            "step": step,
        }

    state, path = state_at(0), latest(out, together=True)  # what rank 0 finds
    if path is not None:
        load(state, path)  # tensors in place, the others in the dicts
        set_state_dict(
            model, optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip
        scheduler.load_state_dict(state["scheduler"])
    saving = None
    with Checkpointer() as checkpointer:  # waits for the last save at its end
        for step in range(state["step"], steps):
            share = (model(samples_of(step)) - samples_of(step + 1)).square().sum() / BATCH
            (share * dist.get_world_size()).backward()  # FSDP2 averages over the ranks
            if saving is not None:
                saving.wait_staged()  # what is being saved must not change before
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if (step + 1) % every == 0:
                saving = checkpointer.async_save(
                    state_at(step + 1), out / f"step_{step + 1}", stage="background",
                    overwrite=True, latest=True, retention=Retention(keep_last=2),
                )  # fmt: skip
            loss = share.detach()
            dist.all_reduce(loss)  # to be printed, nothing else
            yield step, loss.item()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the directory of the checkpoints")
    parser.add_argument("--steps", type=int, default=4, help="steps in all (default: 4)")
    parser.add_argument("--every", type=int, default=2, help="steps between saves (default: 2)")
    options = parser.parse_args()
    if torch.cuda.is_available():
        dist.init_process_group("cpu:gloo,cuda:nccl")
        torch.cuda.set_device(dist.get_node_local_rank())
        torch.set_default_device("cuda")
    else:
        dist.init_process_group("gloo")
    for step, loss in train(options.out, options.steps, options.every):
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.6f}")
    dist.destroy_process_group()
    time.sleep(0.1)  # for gloo's threads, see command_line.py


if __name__ == "__main__":
    main()
