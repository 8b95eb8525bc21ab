"""DeepSpeed's ZeRO engine, stages 1 to 3, with our sequence parallelism in place of its own.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 4 examples/deepspeed_zero.py --stage 3 --sp 2

DeepSpeed shards parameters, gradients and optimizer states over all ranks; the exchanges around
attention are ours, with heads and packs that its own Ulysses refuses. What has to be right is the
scale of the gradient: sp ranks are to be summed, data-parallel ones averaged.

--groups world (the default): DeepSpeed is not told of sequence parallelism. It then averages over all
ranks in every stage and on every path, and the loss that is given to `backward` makes up for it: each
rank's part of one sum, times the number of ranks.

--groups mpu: DeepSpeed is told our sp group (`SequenceGroups`), so that its batch sizes and counts of
samples are right. It then divides by the data-parallel groups alone, except for stage 3 with
reduce_scatter, which goes on averaging over all ranks (0.19.8): every gradient would be sp times too
small. `configuration` switches reduce_scatter off there, which is slower, and a parameter larger than
reduce_bucket_size would still take the wrong path: take "world" for stage 3.

Prints every step's loss and gradient norm: the same numbers for every stage and choice of degrees.
The first start on a CPU compiles DeepSpeed's shared-memory all-reduce, for half a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from command_line import parser_of, show, start
from packed_transformer import HEADS, PACKS, WIDTH, Model, packs_of_step
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from goku_runtime.mesh import (
    data_parallel_rank,
    data_parallel_size,
    sequence_parallel_group,
)
from goku_runtime.sequence_parallel import SequenceParallel


class SequenceGroups:
    """Our groups in the form that DeepSpeed asks of its `mpu`.

    As its own deepspeed.runtime.sequence_parallel.parallel_state_sp: it takes an object that has the
    name `initialize_sequence_parallel` for one without model parallelism, and without
    `get_data_parallel_group` stage 3 shards over data and sequence together (with it over data
    alone, and then sums nothing over sp).
    """

    initialize_sequence_parallel = None

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def get_sequence_parallel_group(self) -> ProcessGroup:
        return self._group

    def get_sequence_parallel_world_size(self) -> int:
        return self._group.size()

    def get_sequence_parallel_rank(self) -> int:
        return self._group.rank()

    def get_sequence_data_parallel_group(self) -> ProcessGroup | None:
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def configuration(stage: int, groups: str, packs: int) -> dict[str, Any]:
    """DeepSpeed's configuration, for `packs` packs a rank and step."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": packs,
        "gradient_clipping": 0.3,
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": stage != 3 or groups == "world",  # see the head of this file
        },
    }


def train(
    model: Model, mesh: DeviceMesh, steps: int, config: dict[str, Any], groups: str
) -> Iterator[tuple[float, float]]:
    """Hand the model to an engine and yield (loss, gradient norm) of each step.

    Args:
        model: with the same weights on every rank; the engine's afterwards.
        mesh: of ParallelDims, whose sp axis is used; DeepSpeed shards over all ranks.
        steps: optimizer steps.
        config: of `configuration`.
        groups: "world" or "mpu", see the head of this file.
    """
    group, dp = sequence_parallel_group(mesh), data_parallel_size(mesh)
    mine = range(data_parallel_rank(mesh), PACKS, dp)
    sequence = SequenceParallel(group, HEADS)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=config,
        mpu=SequenceGroups(group) if groups == "mpu" and group is not None else None,
        dist_init_required=False,
    )
    # What the engine divides by: it averages over the packs of a rank too.
    divided = (dist.get_world_size() if groups == "world" else dp) * len(mine)
    for step in range(steps):
        packs = packs_of_step(step)
        loss = torch.zeros(())
        elements = WIDTH * sum(pack.tokens for pack in packs)
        for index in mine:
            share = engine(packs[index], sequence) / elements
            engine.backward(share * divided)
            engine.step()  # does nothing before the last pack
            loss += share.detach()
        dist.all_reduce(loss)  # to be printed, nothing else
        yield loss.item(), float(engine.get_global_grad_norm())


def main() -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO (default: 3)"
    )
    parser.add_argument("--groups", choices=("world", "mpu"), default="world", help="see above")
    options, dims = start(parser, PACKS)
    mesh = dims.build_mesh(torch.get_default_device().type)
    config = configuration(options.stage, options.groups, PACKS // data_parallel_size(mesh))
    torch.manual_seed(0)
    steps = train(Model(), mesh, options.steps, config, options.groups)
    show(steps)


if __name__ == "__main__":
    main()
