"""Hybrid sharding of parameters, gradients and optimizer states, on FSDP2's `fully_shard`.

Parameters are sharded over (dp_shard, sp) and copied over dp_replicate. Sequence-parallel ranks
hold parts of the same tokens, so that their gradients are summed, where data-parallel ones are
averaged; one divisor on a plain sum over all ranks says both (`ShardingPolicy.gradient_divisor`).

    mesh = ParallelDims(dp_replicate=2, dp_shard=4, sp=2).build_mesh("cuda")
    with torch.device("meta"):
        model = Model()
    apply_hybrid_sharding(model, mesh, ShardingPolicy(blocks=("blocks.*",)))
    materialise(model, device, initial)
    optimizer = torch.optim.AdamW(model.parameters())
    for k, pack in enumerate(packs):
        microbatch(model, last=k == len(packs) - 1)
        loss(model, pack).backward()
    clip_gradients(model.parameters(), 1.0, mesh)
    optimizer.step()
    optimizer.zero_grad()

What FSDP2 asks of a trainer: every rank calls the same wrapped modules in the same order, and runs
`backward` as often, if need be on a dummy batch with loss 0. Modules are entered through their
`forward`. A wrapped module cannot be copied by `copy.deepcopy`; build and shard a second one. With
`reshard_after_forward=False` a forward without a backward (an evaluation) leaves the parameters
gathered: what is written to them then is lost, so call `reshard` after it. Below torch 2.13 every
trainable parameter needs a gradient on every rank, or on none. Choose the current device
(torch.cuda.set_device) before anything is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from goku_runtime.gradients import clip_gradients, gradient_norm
from goku_runtime.memory import MemoryEstimate, memory_estimate
from goku_runtime.mesh import data_parallel_size, shard_mesh
from goku_runtime.sharding_plan import ShardingPolicy, Unit, plan, reduce_dtype, stages

__all__ = [
    "MemoryEstimate",
    "ShardingPolicy",
    "apply_hybrid_sharding",
    "clip_gradients",
    "fill",
    "gradient_norm",
    "materialise",
    "memory_estimate",
    "microbatch",
    "reshard",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Where a wrapped module keeps its policy, for `microbatch` and `materialise`.
_POLICY = "_hybrid_sharding_policy"


def apply_hybrid_sharding(
    module: ModuleT, mesh: DeviceMesh | None, policy: ShardingPolicy
) -> ModuleT:
    """Shard `module` in place over the mesh; its parameters become DTensors.

    On one process with nothing to cast, offload or divide the module stays untouched. Names and the
    keys of its state_dict never change.

    Args:
        module: on the meta device (then `materialise` it), or with values that are the same on
            every rank: nothing is broadcast.
        mesh: of `ParallelDims`, axes dp_replicate, dp_shard, sp; None is one process.
        policy: what is wrapped, and how.

    Returns:
        `module`.

    Raises:
        ValueError: as for `plan`; the mesh lacks an axis; there is no mesh but something to do.
    """
    units = plan(module, policy)
    world = 1 if mesh is None else mesh.size()
    if world == 1 and not _something_to_do(units, policy):
        return module
    if mesh is None:
        raise ValueError(
            f"mesh is None, but {policy} casts, offloads or divides; allowed: a mesh of ParallelDims"
        )
    sharded = shard_mesh(mesh)
    if sharded.ndim == 1 and sharded.size() == 1:
        sharded = mesh["dp_replicate", "dp_shard"]  # see _set_reduction
    divisor = policy.gradient_divisor
    if divisor is None:
        divisor = float(data_parallel_size(mesh))
    offload = OffloadPolicy()
    if policy.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    for unit in reversed(units):  # nested ones first, the root last
        fully_shard(
            unit.module,
            mesh=sharded,
            # Said for the root too, whose default is False: where it is True, `parameters()` gives the
            # sharded ones at any time outside of forward and backward.
            reshard_after_forward=policy.reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=unit.gathered_dtype,
                reduce_dtype=reduce_dtype(unit, policy),
                output_dtype=None,
                cast_forward_inputs=False,
            ),
            offload_policy=offload,
        )
        wrapped = cast(FSDPModule, unit.module)
        _set_reduction(wrapped, divisor, sharded.size(sharded.ndim - 1))
        setattr(wrapped, _POLICY, policy)
    _set_prefetch(units, policy.prefetch)
    return module


def materialise(
    module: nn.Module,
    device: torch.device | str,
    initial: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Give a module on the meta device its memory and its values, one parameter at a time.

    Of a sharded parameter this rank's part alone gets memory, and `initial`'s full value is dropped
    before the next one is asked for: the model never exists on one rank. Where `initial` depends on
    its arguments alone, the weights are bit for bit the same for every mesh.

    Parameter objects may change: build the optimizer afterwards.

    Args:
        module: all of whose parameters and buffers are on the meta device; sharded or not.
        device: where it will live; "cpu" with ``cpu_offload``.
        initial: as of `fill`. None: zeros, for values that are loaded into it.

    Raises:
        ValueError: a tensor is not on the meta device; a value has another shape than its
            parameter; `device` is not the host although parameters are to stay there.
    """
    device = torch.device(device)
    policy = getattr(module, _POLICY, None)
    if policy is not None and policy.cpu_offload and device.type != "cpu":
        raise ValueError(f"device is {device}; allowed with cpu_offload: cpu")
    for name, tensor in _tensors(module):
        if not tensor.is_meta:
            raise ValueError(f"{name} is on {tensor.device}; allowed: every tensor on meta")
    module.to_empty(device=device)
    if initial is not None:
        fill(module, initial)
        return
    with torch.no_grad():
        for _, tensor in _tensors(module):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()


@torch.no_grad()
def fill(module: nn.Module, initial: Callable[[str, Tensor], Tensor]) -> None:
    """Give a module that has its memory other values, one parameter at a time, as `materialise` does.

    Args:
        module: sharded or not.
        initial: (name, meta tensor of the full shape and dtype) -> its full value on the CPU; called
            on every rank for every parameter and buffer, in the same order.

    Raises:
        ValueError: a value has another shape than its parameter.
    """
    for name, tensor in _tensors(module):
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        value = initial(name, full)
        if value.shape != tensor.shape:
            raise ValueError(
                f"initial gave {name} the shape {tuple(value.shape)};"
                f" allowed: {tuple(tensor.shape)}"
            )
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(_local_part(value, tensor))
        else:
            tensor.copy_(value)
        del value  # before the next one is made


def microbatch(module: nn.Module, *, last: bool, keep_unsharded: bool = False) -> None:
    """Say before a micro-batch's forward whether it is the last one of its optimizer step.

    By default every backward reduce-scatters, so that between micro-batches a rank holds its shard
    of the gradient alone, and only the last one all-reduces it over dp_replicate. A module that is
    not sharded is left alone: autograd accumulates.

    Args:
        module: what `apply_hybrid_sharding` returned, or a module around it.
        last: False for all micro-batches of a step but the last; the same on all ranks. After a
            step that was abandoned half-way the sums so far stay in FSDP2 and join the next step.
        keep_unsharded: accumulate the whole gradient, in `reduce_dtype`, on every rank, keep the
            gathered parameters between micro-batches, and reduce once, in the last one: less
            communication for the memory of all parameters and gradients. Where `reduce_dtype` is
            not the dtype of gathered parameters, each has to receive a gradient in the last
            micro-batch and in an earlier one.
    """
    for wrapped in module.modules():
        policy: ShardingPolicy | None = getattr(wrapped, _POLICY, None)
        if policy is None or not isinstance(wrapped, FSDPModule):
            continue
        holding = keep_unsharded and not last
        wrapped.set_requires_gradient_sync(not holding, recurse=False)
        wrapped.set_requires_all_reduce(last, recurse=False)
        wrapped.set_reshard_after_backward(not holding, recurse=False)
        # Back to the policy's in the last one, so that a forward for evaluation frees memory.
        wrapped.set_reshard_after_forward(
            policy.reshard_after_forward and not holding, recurse=False
        )


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters of a sharded module, so that `parameters()` gives its shards.

    For modules that ran a forward without a backward under ``reshard_after_forward=False``; no
    communication. A module that is not sharded is left alone.
    """
    for wrapped in module.modules():
        if isinstance(wrapped, FSDPModule):
            wrapped.reshard()


def _something_to_do(units: list[Unit], policy: ShardingPolicy) -> bool:
    return (
        policy.cpu_offload
        or policy.gradient_divisor not in (None, 1.0)
        or any(unit.gathered_dtype is not None for unit in units)
    )


def _set_reduction(wrapped: FSDPModule, divisor: float, shards: int) -> None:
    """Sum the gradients over all ranks, then divide by `divisor`, on every backend and mesh."""
    # FSDP2 would otherwise average (gloo cannot) or multiply inside the collective (NCCL alone).
    wrapped.set_force_sum_reduction_for_comms(True)
    if shards > 1:
        wrapped.set_gradient_divide_factor(divisor)
    else:
        # With one shard FSDP2 divides by its factor before the all-reduce and again after it (torch
        # 2.13), so it divides by nothing and the hook, which follows the all-reduce, does it. A
        # one-dimensional mesh has no all-reduce to order the hook's stream: hence the 2-D one.
        wrapped.set_gradient_divide_factor(1.0)
        if divisor != 1.0:
            wrapped.set_all_reduce_hook(partial(_divide, divisor))
    # A parameter that one rank did not use in this backward: zeros, or the ranks' buffers would
    # differ in size. torch has this from 2.13 on.
    if hasattr(wrapped, "set_reduce_scatter_unused_params"):
        wrapped.set_reduce_scatter_unused_params(True, recurse=False)


def _divide(divisor: float, gradient: Tensor) -> None:
    gradient.div_(divisor)


def _set_prefetch(units: list[Unit], ahead: int) -> None:
    """Tell each stage which ones to gather while it computes, forwards and backwards."""
    if not ahead:
        return
    wrapped = [[cast(FSDPModule, unit.module) for unit in stage] for stage in stages(units)]
    root = cast(FSDPModule, units[0].module)
    backwards = wrapped[::-1]
    root.set_modules_to_forward_prefetch(_flat(wrapped[:ahead]))
    root.set_modules_to_backward_prefetch(_flat(backwards[:ahead]))
    for index, stage in enumerate(wrapped):
        stage[0].set_modules_to_forward_prefetch(_flat(wrapped[index + 1 : index + 1 + ahead]))
    for index, stage in enumerate(backwards):
        stage[0].set_modules_to_backward_prefetch(_flat(backwards[index + 1 : index + 1 + ahead]))


def _flat(nested: list[list[FSDPModule]]) -> list[FSDPModule]:
    return [module for stage in nested for module in stage]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _local_part(full: Tensor, sharded: DTensor) -> Tensor:
    """This rank's part of `full`, a view of it."""
    mesh = sharded.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # this rank is in the mesh, or it would hold no part
    for size, index, placement in zip(mesh.shape, coordinate, sharded.placements, strict=True):
        if isinstance(placement, Shard):
            parts = full.chunk(size, placement.dim)  # the last ones may be missing
            empty = full.narrow(placement.dim, 0, 0)
            full = parts[index] if index < len(parts) else empty
        else:
            assert isinstance(placement, Replicate)
    return full
