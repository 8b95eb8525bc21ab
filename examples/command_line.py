"""What the examples share: their options, the process group and the mesh."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist

from goku_runtime.mesh import ParallelDims

__all__ = ["parser_of", "show", "start"]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of every example; `description` is its docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dp-replicate", type=int, default=1, help="copies (default: 1)")
    parser.add_argument("--dp-shard", type=int, default=-1, help="shards (default: what is left)")
    parser.add_argument("--sp", type=int, default=1, help="ranks that share a pack (default: 1)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps (default: 4)")
    return parser


def start(parser: argparse.ArgumentParser, packs: int) -> tuple[argparse.Namespace, ParallelDims]:
    """Parse the command line and join the group that torchrun set up.

    Bad options end the process with code 2 before anything is set up.

    Args:
        parser: of `parser_of`, perhaps with further options.
        packs: of one step; the data-parallel groups have to divide them.

    Returns:
        The options, and the degrees. Tensors are made on the default device from now on.
    """
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        parser.error("no WORLD_SIZE and RANK in the environment: start it by torchrun, see --help")
    try:
        dims = ParallelDims(options.dp_replicate, options.dp_shard, options.sp)
        dims = dims.resolve(int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        parser.error(str(error))
    if packs % dims.dp:
        parser.error(f"{dims.dp} data-parallel groups; allowed: a divisor of the {packs} packs")
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; allowed: >= 1")
    device = torch.device("cpu")
    # DeepSpeed's word for where it computes; the others know nothing of it.
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= (count := torch.cuda.device_count()):
            parser.error(f"LOCAL_RANK is {device.index}; allowed: below {count}, the GPUs here")
        torch.cuda.set_device(device)
    torch.set_default_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return options, dims


def show(steps: Iterable[tuple[float, float]]) -> None:
    """Print each step's loss and gradient norm on rank 0, then leave the group that `start` joined."""
    for step, (loss, norm) in enumerate(steps):
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.6f}, gradient norm {norm:.6f}")
    dist.destroy_process_group()
    # DTensor keeps a mesh's gloo groups alive (torch 2.13). A thread of theirs that has yet to drop its
    # last tensor needs the interpreter for that, and would abort the process once it is gone.
    time.sleep(0.1)
