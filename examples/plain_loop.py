"""A plain training loop: packed samples, sequence parallelism, sharding, recomputation, clipping.

    torchrun --nproc-per-node 4 examples/plain_loop.py --dp-shard 2 --sp 2

Prints every step's loss and gradient norm: the same numbers for every choice of degrees.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from command_line import parser_of, show, start
from packed_transformer import HEADS, PACKS, WIDTH, Model, packs_of_step
from torch.distributed.device_mesh import DeviceMesh

from goku_runtime import activation_checkpoint, sharding
from goku_runtime.mesh import data_parallel_rank, data_parallel_size, sequence_parallel_group
from goku_runtime.sequence_parallel import SequenceParallel

RECOMPUTE = activation_checkpoint.ActivationCheckpointing(mode="full")
# A divisor of 1: all losses are parts of one sum, so that gradients are summed over all ranks.
SHARDING = sharding.ShardingPolicy(blocks=("blocks.*",), gradient_divisor=1.0)


def train(model: Model, mesh: DeviceMesh, steps: int) -> Iterator[tuple[float, float]]:
    """Shard the model, which is the same on all ranks; yield (loss, gradient norm) of each step."""
    sequence = SequenceParallel(sequence_parallel_group(mesh), HEADS)
    mine = range(data_parallel_rank(mesh), PACKS, data_parallel_size(mesh))
    activation_checkpoint.apply_activation_checkpointing(model, RECOMPUTE)
    sharding.apply_hybrid_sharding(model, mesh, SHARDING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        packs, loss = packs_of_step(step), torch.zeros(())
        elements = WIDTH * sum(pack.tokens for pack in packs)  # of all ranks: every rank knows it
        for index in mine:
            sharding.microbatch(model, last=index == mine[-1])
            share = model(packs[index], sequence) / elements
            share.backward()
            loss += share.detach()
        norm = sharding.clip_gradients(model.parameters(), 0.3, mesh)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)  # to be printed, nothing else
        yield loss.item(), norm.item()


def main() -> None:
    """The command."""
    options, dims = start(parser_of(__doc__), PACKS)
    mesh = dims.build_mesh(torch.get_default_device().type)
    torch.manual_seed(0)
    show(train(Model(), mesh, options.steps))


if __name__ == "__main__":
    main()
