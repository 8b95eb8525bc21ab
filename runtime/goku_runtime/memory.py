"""What hybrid sharding costs a rank in memory, from shapes alone: no process group, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from goku_runtime.mesh import data_parallel_size
from goku_runtime.sharding_plan import ShardingPolicy, Unit, plan, reduce_dtype, stages

__all__ = ["Degrees", "MemoryEstimate", "memory_estimate"]


class Degrees(Protocol):
    """The three degrees of a resolved `ParallelDims`."""

    @property
    def dp_replicate(self) -> int:
        """Copies of the model."""

    @property
    def dp_shard(self) -> int:
        """Data-parallel shards of a copy."""

    @property
    def sp(self) -> int:
        """Sequence-parallel degree."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. Every rank has the same: FSDP2 pads the last shards.

    Attributes:
        parameters: the sharded parameters.
        gradients: their reduced gradients, from the first backward to the optimizer step.
        optimizer: the states of the optimizer.
        gathered: the most that gathered parameters and the buffers they arrive in take in forward:
            the root's, a stage's twice (arriving and in use) and the prefetched ones'.
        backward: the most that gathered parameters, whole gradients and the buffers those leave in
            take in backward.
        partial: sums that stand for the gradients, in `reduce_dtype`, until the last micro-batch's
            all-reduce over dp_replicate.
        offloaded: True where parameters, gradients and optimizer stay in host memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    backward: int
    partial: int
    offloaded: bool

    @property
    def state(self) -> int:
        """What stays: parameters, optimizer, and the gradients or the sums that stand for them."""
        return self.parameters + self.optimizer + max(self.gradients, self.partial)

    @property
    def device(self) -> int:
        """The peak on the device, without activations."""
        return max(self.gathered, self.backward) + (0 if self.offloaded else self.state)

    @property
    def host(self) -> int:
        """What `cpu_offload` puts into host memory."""
        return self.state if self.offloaded else 0

    def __str__(self) -> str:
        def gib(size: int) -> str:
            return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"

        return (
            f"{gib(self.device)} on the device and {gib(self.host)} on the host: parameters"
            f" {gib(self.parameters)}, gradients {gib(self.gradients)}, optimizer"
            f" {gib(self.optimizer)}, gathered {gib(self.gathered)}, backward {gib(self.backward)}"
        )


def memory_estimate(
    module: nn.Module,
    mesh: DeviceMesh | Degrees,
    policy: ShardingPolicy,
    *,
    optimizer_bytes_per_parameter: float = 8.0,
) -> MemoryEstimate:
    """Bytes per rank that parameters, gradients, optimizer and their exchange take.

    Activations, the allocator's fragmentation and the libraries' own memory come on top.

    Args:
        module: not sharded yet; the meta device suffices.
        mesh: of `ParallelDims`, or the resolved `ParallelDims` itself: no process group is needed.
        policy: as for `apply_hybrid_sharding`.
        optimizer_bytes_per_parameter: 8 is AdamW with two float32 moments.

    Raises:
        ValueError: as for `plan`; a degree below 1.
    """
    replicas, shards = _degrees(mesh)
    units = plan(module, policy)
    parameters = gradients = optimizer = partial = 0
    for unit in units:
        reduced = reduce_dtype(unit, policy)
        for parameter in unit.parameters.values():
            elements = _shard(parameter, shards)
            parameters += elements * parameter.itemsize
            if parameter.requires_grad:
                gradients += elements * parameter.itemsize
                optimizer += math.ceil(elements * optimizer_bytes_per_parameter)
                partial += elements * _itemsize(parameter, unit, reduced)
    one_process = replicas * shards == 1 and not policy.cpu_offload
    if one_process and all(unit.gathered_dtype is None for unit in units):
        return MemoryEstimate(parameters, gradients, optimizer, 0, 0, 0, False)
    forward, backward = _peaks(units, policy, shards)
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        gathered=forward,
        backward=backward,
        partial=partial if replicas > 1 else 0,
        offloaded=policy.cpu_offload,
    )


def _degrees(mesh: DeviceMesh | Degrees) -> tuple[int, int]:
    if isinstance(mesh, DeviceMesh):
        data_parallel_size(mesh)  # refuses a mesh with other axes
        sizes = list(mesh.shape)
    else:
        sizes = [mesh.dp_replicate, mesh.dp_shard, mesh.sp]
    if min(sizes) < 1:
        raise ValueError(f"(dp_replicate, dp_shard, sp) is {tuple(sizes)}; allowed: each >= 1")
    return sizes[0], sizes[1] * sizes[2]


def _shard(parameter: nn.Parameter, shards: int) -> int:
    """Elements of one padded shard: FSDP2 cuts the first dimension."""
    rows = parameter.shape[0]
    return math.ceil(rows / shards) * (parameter.numel() // max(rows, 1))


def _itemsize(parameter: nn.Parameter, unit: Unit, override: torch.dtype | None) -> int:
    return (override or unit.gathered_dtype or parameter.dtype).itemsize


@dataclass
class _Traffic:
    """Bytes of the units of a stage: gathered, whole gradients, and the largest buffer sent."""

    gathered: int = 0
    whole: int = 0
    sent: int = 0

    def add(self, unit: Unit, policy: ShardingPolicy, shards: int) -> None:
        sent = 0
        for parameter in unit.parameters.values():
            padded = shards * _shard(parameter, shards)
            self.gathered += padded * _itemsize(parameter, unit, None)
            if parameter.requires_grad:
                self.whole += parameter.numel() * _itemsize(parameter, unit, None)
                sent += padded * _itemsize(parameter, unit, reduce_dtype(unit, policy))
        self.sent = max(self.sent, sent)


def _peaks(units: list[Unit], policy: ShardingPolicy, shards: int) -> tuple[int, int]:
    """What is gathered at most in forward, and gathered and reduced at most in backward."""
    root = _Traffic()
    root.add(units[0], policy, shards)
    traffic = []
    for group in stages(units):
        traffic.append(_Traffic())
        for unit in group:
            traffic[-1].add(unit, policy, shards)
    sizes = [stage.gathered for stage in traffic]
    ahead = policy.prefetch or 1  # FSDP2's own order is one ahead
    forward = backward = 0
    sending = 0
    for index in reversed(range(len(traffic))):
        stage = traffic[index]
        if policy.reshard_after_forward:
            # FSDP2 keeps the buffer a stage arrived in until the next one has arrived.
            forward = max(forward, 2 * sizes[index] + sum(sizes[index + 1 : index + 1 + ahead]))
            held = sum(sizes[max(0, index - ahead) : index + 1])
        else:
            forward = max(forward, sum(sizes) + sizes[index])
            held = sum(sizes[: index + 1])
        backward = max(backward, held + stage.whole + max(sending, stage.sent))
        sending = stage.sent
    # The root's are gathered throughout, and its gradients are whole until the end.
    forward = root.gathered + max(forward, root.gathered)
    backward = root.gathered + root.whole + max(backward, sending, root.sent)
    return forward, backward
