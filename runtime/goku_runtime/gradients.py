"""The norm of a sharded gradient, and clipping by it, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from goku_runtime.mesh import AXES

__all__ = ["clip_gradients", "gradient_norm"]


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor], mesh: DeviceMesh | None) -> Tensor:
    """L2 norm of the whole gradient: one all-reduce of one number over (dp_shard, sp), and one over
    dp_replicate where there are replicas: each may have summed in another order, and factors that
    differ by a rounding would let the replicas' weights drift apart.

    Norms of the local parts are taken in float32 (float64 for float64 gradients), squared and
    summed in float64. The copies that dp_replicate holds, and plain tensors, which every rank
    holds, count once. Nothing waits for the device.

    Args:
        parameters: whose `grad` counts where it is not None; sharded by `apply_hybrid_sharding` on
            `mesh`, or plain tensors that are equal on all ranks.
        mesh: the mesh of `ParallelDims`; None is one process.

    Returns:
        float64, of no dimension, on the device of the mesh (of the gradients where mesh is None);
        equal on all ranks.

    Raises:
        ValueError: a parameter is a DTensor that is not sharded over dp_shard x sp of this mesh.
    """
    parameters = list(parameters)
    group, shards = _shard_group(parameters, mesh)
    squares: dict[torch.device, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        local = _local(gradient)
        dtype = torch.promote_types(local.dtype, torch.float32)
        square = torch.linalg.vector_norm(local, dtype=dtype).double().square()
        if not isinstance(gradient, DTensor):
            square = square / shards
        squares.setdefault(square.device, []).append(square)
    device = _device(mesh) or next(iter(squares), torch.device("cpu"))
    sums = [torch.stack(values).sum().to(device) for values in squares.values()]
    total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    if mesh is not None and mesh.size() > shards:
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=mesh.get_group("dp_replicate"))
    return total.sqrt()


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor],
    max_norm: float,
    mesh: DeviceMesh | None,
    *,
    norm: Tensor | None = None,
) -> Tensor:
    """Scale the gradients in place so that their norm is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`: they are multiplied by min(1, max_norm / (norm + 1e-6)).
    Nothing waits for the device, save that gradients in host memory wait for the norm.

    Args:
        parameters, mesh: as for `gradient_norm`.
        max_norm: > 0.
        norm: what `gradient_norm` has returned for these gradients, where that is known.

    Returns:
        The norm before.

    Raises:
        ValueError: `max_norm` is no number, or not positive and finite, or as for `gradient_norm`.
    """
    if not isinstance(max_norm, (int, float)) or not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm is {max_norm!r}; allowed: a number > 0 and finite")
    parameters = list(parameters)
    if norm is None:
        norm = gradient_norm(parameters, mesh)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    on: dict[torch.device, Tensor] = {}
    for gradient in _gradients(parameters):
        local = _local(gradient)
        if local.device not in on:
            on[local.device] = factor.to(local.device)
        local.mul_(on[local.device])
    return norm


def _gradients(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    return (p.grad for p in parameters if p.grad is not None)


def _local(gradient: Tensor) -> Tensor:
    """This rank's part, in the gradient's own memory."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _shard_group(
    parameters: list[Tensor], mesh: DeviceMesh | None
) -> tuple[dist.ProcessGroup | None, int]:
    """The group that the norm is summed over, and its size; None and 1 where there are no parts."""
    wanted = 1
    if mesh is not None:
        if mesh.mesh_dim_names != AXES:
            raise ValueError(f"mesh has the axes {mesh.mesh_dim_names}; allowed: {AXES}")
        wanted = mesh.size(1) * mesh.size(2)
    group = None
    shards = 1
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        own = parameter.device_mesh
        placements = parameter.placements
        cuts = [axis for axis, placement in enumerate(placements) if isinstance(placement, Shard)]
        rest = [placement for placement in placements if not isinstance(placement, Shard)]
        shards = math.prod(own.size(axis) for axis in cuts)
        if shards != wanted or len(cuts) != 1 or not all(isinstance(p, Replicate) for p in rest):
            raise ValueError(
                f"a parameter is placed as {placements} on a mesh of {tuple(own.shape)};"
                f" allowed: sharded once, over the {wanted} ranks of dp_shard x sp"
            )
        if shards > 1 and group is None:
            group = own.get_group(cuts[0])
    return group, shards


def _device(mesh: DeviceMesh | None) -> torch.device | None:
    if mesh is None:
        return None
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    # Without an index: the current device, as for FSDP2 itself.
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
