"""Where the model meets the parallel runtime: process groups, replicas, and the reductions of a step.

Today: data parallelism over replicas (gloo or NCCL). Every rank holds the whole model, works on its own packs of the
step's global batch, and the gradients are summed once per step. The loss is already divided by the GLOBAL weight sum
(DESIGN: loss = sum(w_i * mean_i) / sum(w_i)), so a sum, not a mean, is right whatever each rank was given, also when
one rank had more packs than another or none at all. Sequence parallelism and hybrid sharding will join in this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ParallelContext", "broadcast_module", "parallel_context", "reduce_gradients"]

# Elements per all-reduce: 2^23 fp32 values = 32 MiB, large enough to run at link speed and small enough
# that the flattened copy does not matter beside the gradients themselves.
_BUCKET_ELEMENTS = 1 << 23


T = TypeVar("T")


@dataclass(frozen=True)
class ParallelContext:
    """This process among the others.

    rank, world: position and number of processes; device: where this rank computes; group: the process group for
    gradients and statistics, None when world is 1 (every method is then the identity); host_group: a gloo group of
    the same processes for what stays on the host (checkpoint plans would otherwise travel through GPU memory) and
    for waiting, with a timeout of a day.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and files that exist once."""
        return self.rank == 0

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum of `values` (any shape, any float dtype) over all ranks, in place; returned for convenience."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The small picklable `value` of every rank, by rank, on every rank; over the host group."""
        values: list[Any] = [value] * self.world
        if self.host_group is not None:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def barrier(self) -> None:
        """Wait for every rank, however long it works."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank and return its result; when one rank fails, every rank raises.

        For work that one rank may do or fail alone (train a VAE, write a file): a rank that leaves by an exception
        would keep the others waiting in the next collective. ValueError, OSError, ImportError and ArithmeticError
        are agreed on; a rank that did not fail itself raises a ValueError that names the rank that did.
        """
        result: T | None = None
        failure: ValueError | OSError | ImportError | ArithmeticError | None = None
        try:
            result = work()
        except (ValueError, OSError, ImportError, ArithmeticError) as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame: a cycle
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"rank {rank}: {message}")
        return cast(T, result)

    def on_main(self, work: Callable[[], None]) -> None:
        """Do `work` on the main rank while the others wait; when it fails, every rank raises."""
        self.together(lambda: work() if self.is_main else None)


@contextmanager
def parallel_context(
    device: str = "auto", timeout_minutes: float = 30.0
) -> Iterator[ParallelContext]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone.

    device: "auto" (CUDA when there is one), "cpu" or "cuda". timeout_minutes bounds the collectives of a training step,
    so that a lost peer ends the job instead of hanging it. Raises ValueError for a device that is absent. The process
    group is destroyed on the way out.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: 'auto', 'cpu', 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but torch sees no CUDA device here; allowed: 'auto', 'cpu'"
        )
    cuda = torch.cuda.is_available() and device != "cpu"
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if world == 1:
        yield ParallelContext(0, 1, where, None)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=timeout_minutes))
    context = ParallelContext(rank, world, where, None)
    try:
        object.__setattr__(context, "group", dist.group.WORLD)
        # One rank may train a VAE or draw samples for hours; a rank that dies is noticed by its closed connection.
        waiting = timedelta(days=1)
        object.__setattr__(context, "host_group", dist.new_group(backend="gloo", timeout=waiting))
        yield context
    finally:
        # A traceback may keep `context` until the interpreter ends, and a gloo group whose threads still run then
        # aborts the process ("terminate called"), hiding its exit code: the groups must not outlive this block.
        object.__setattr__(context, "group", None)
        object.__setattr__(context, "host_group", None)
        dist.destroy_process_group()


def broadcast_module(module: nn.Module, context: ParallelContext) -> None:
    """Give every rank rank 0's parameters and buffers."""
    if context.group is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0, group=context.group)


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (
            size + gradient.numel() > _BUCKET_ELEMENTS or gradient.dtype != bucket[0].dtype
        ):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def reduce_gradients(module: nn.Module, context: ParallelContext) -> None:
    """Sum every parameter's gradient over the ranks, in place.

    A rank without samples in this step has no gradients: it takes part with zeros, so that no rank waits for ever.
    """
    if context.group is None:
        return
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        context.all_sum(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
