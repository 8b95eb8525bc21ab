"""How processes are arranged: degrees of parallelism, the mesh of ranks, and its groups.

Axes from the outside in: `dp_replicate` (copies of the parameters), `dp_shard` (parts of them) and
`sp` (processes that share the tokens of a pack). sp is innermost, so that its groups are consecutive
ranks: exchanges, which happen in every layer, stay inside a node wherever sp divides its ranks.
Launchers give the ranks of a node consecutive numbers; what is said about nodes rests on that.

Groups are made with the mesh or, where said, at an accessor's first call, and kept by the mesh.
For thousands of ranks give `init_process_group` a `device_id`: torch then splits the communicator
once per axis instead of making the groups one after another.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = [
    "AXES",
    "ParallelDims",
    "Placement",
    "data_parallel_group",
    "data_parallel_rank",
    "data_parallel_size",
    "sequence_parallel_group",
    "shard_mesh",
]

AXES = ("dp_replicate", "dp_shard", "sp")


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism; their product is the number of processes.

    Attributes:
        dp_replicate: copies of the sharded parameters; gradients are all-reduced over it.
        dp_shard: processes that take different packs and share parameters; -1 is what the others
            leave of the world.
        sp: processes that share each pack (sequence parallelism); parameters are sharded over them
            too.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    sp: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool)
            if not fits or (value < 1 and not (name == "dp_shard" and value == -1)):
                rest = " (dp_shard also -1: what is left)" if name == "dp_shard" else ""
                raise ValueError(f"{name} is {value!r}; allowed: integers >= 1{rest}")

    @property
    def dp(self) -> int:
        """Groups of processes that take packs of their own: dp_replicate * dp_shard."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """The number of processes, once dp_shard is known."""
        return self.dp * self.sp

    def resolve(self, world: int) -> ParallelDims:
        """The degrees on `world` processes, dp_shard filled in.

        Raises:
            ValueError: the product cannot be, or is not, `world`.
        """
        fixed = self.dp_replicate * self.sp
        if self.dp_shard == -1:
            if world < 1 or world % fixed:
                raise ValueError(
                    f"dp_replicate={self.dp_replicate} x sp={self.sp} = {fixed} does not divide the "
                    f"{_processes(world)}; allowed: degrees whose product is {world}"
                )
            return replace(self, dp_shard=world // fixed)
        if self.world != world:
            raise ValueError(
                f"dp_replicate={self.dp_replicate} x dp_shard={self.dp_shard} x sp={self.sp} = "
                f"{self.world}, but there are {_processes(world)}; allowed: degrees whose product is "
                f"{world}"
            )
        return self

    def placement(self, world: int, ranks_per_node: int) -> Placement:
        """What lies inside a node and what crosses nodes, where ranks fill nodes in order.

        Raises:
            ValueError: as for `resolve`, or ranks_per_node < 1.
        """
        if ranks_per_node < 1:
            raise ValueError(f"ranks_per_node is {ranks_per_node}; allowed: >= 1")
        dims, shards = self.resolve(world), self.resolve(world).dp_shard * self.sp
        return Placement(
            dims=dims,
            ranks_per_node=ranks_per_node,
            sp_nodes=_nodes(dims.sp, ranks_per_node, world),
            sp_crossing=_crossing(dims.sp, ranks_per_node, world),
            shard_nodes=_nodes(shards, ranks_per_node, world),
        )

    def build_mesh(self, device_type: str, *, ranks_per_node: int | None = None) -> DeviceMesh:
        """The mesh of all ranks of the default group, axes dp_replicate, dp_shard, sp.

        Where groups of sp cross nodes, a UserWarning of rank 0 says so with the numbers. All groups
        get the timeout that init_process_group was given. Every rank calls it.

        Args:
            device_type: "cuda" or "cpu".
            ranks_per_node: None takes torchrun's LOCAL_WORLD_SIZE; where that is not set either,
                nothing is said about nodes.

        Raises:
            ValueError: torch.distributed is not initialised, the degrees do not fit its world, the
                default group serves no such device, or LOCAL_WORLD_SIZE is no integer >= 0.
        """
        if not dist.is_initialized():
            raise ValueError("there is no process group: call init_process_group before build_mesh")
        served = [each.partition(":")[0] for each in dist.get_backend_config().split(",")]
        if device_type not in served:
            raise ValueError(
                f"device_type is {device_type!r}; allowed: what the default group serves, "
                f"{' or '.join(map(repr, served))}"
            )
        dims = self.resolve(dist.get_world_size())
        if ranks_per_node is None:
            ranks_per_node = _local_world_size()
        if ranks_per_node is not None:
            placed = dims.placement(dims.world, ranks_per_node)
            if placed.sp_nodes > 1 and dist.get_rank() == 0:
                warnings.warn(str(placed), stacklevel=2)
        shape = (dims.dp_replicate, dims.dp_shard, dims.sp)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        sharded = shard_mesh(mesh)  # its groups too, while all ranks are here
        for group in (*mesh.get_all_groups(), *sharded.get_all_groups()):
            _take_timeout(group, dist.group.WORLD, device_type)
        return mesh


def _local_world_size() -> int | None:
    """Of torchrun; None where it is not set."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "0").strip()
    if not value.isdecimal():
        raise ValueError(
            f"LOCAL_WORLD_SIZE is {value!r} in the environment; allowed: an integer >= 1, or none"
        )
    return int(value) or None


def _processes(world: int) -> str:
    if world == 1:
        return "1 process (torchrun --nproc-per-node N starts several)"
    return f"{world} processes"


@dataclass(frozen=True)
class Placement:
    """Which groups lie inside nodes.

    Attributes:
        dims: resolved degrees.
        ranks_per_node: consecutive ranks on one node.
        sp_nodes: most nodes that one group of sp touches; 1 means that exchanges stay inside.
        sp_crossing: how many groups of sp touch more than one node.
        shard_nodes: the same of the groups (dp_shard x sp) over which parameters are sharded.
    """

    dims: ParallelDims
    ranks_per_node: int
    sp_nodes: int
    sp_crossing: int
    shard_nodes: int

    def __str__(self) -> str:
        dims, node = self.dims, self.ranks_per_node
        shards = dims.dp_shard * dims.sp
        if self.sp_nodes == 1:
            exchanges = f"groups of sp={dims.sp} lie inside nodes of {node} ranks"
        else:
            inside = ", ".join(str(n) for n in range(1, node + 1) if node % n == 0)
            exchanges = (
                f"{self.sp_crossing} of {dims.dp} groups of sp={dims.sp} touch up to {self.sp_nodes} "
                f"nodes of {node} ranks, so every layer's exchanges cross nodes; sp in ({inside}) "
                "would stay inside"
            )
        within = "inside one node" if self.shard_nodes == 1 else f"on {self.shard_nodes} nodes"
        return (
            f"{exchanges}; parameters are sharded over {shards} ranks {within}, "
            f"{dims.dp_replicate} copies"
        )


def _take_timeout(group: ProcessGroup, source: ProcessGroup | None, device_type: str) -> None:
    """Give a group of a mesh the timeout of the caller's: torch gives it the backend's default, half
    an hour with gloo, in which a stopped rank of sp would go unnoticed."""
    assert source is not None
    options = getattr(source._get_backend(torch.device(device_type)), "options", None)
    if options is not None:  # the fake backend of tests has none
        dist.distributed_c10d._set_pg_timeout(options._timeout, group)


def _nodes(group: int, node: int, world: int) -> int:
    """Most nodes that one of the groups of consecutive ranks touches."""
    starts = range(0, world, group)
    return max((start + group - 1) // node - start // node + 1 for start in starts)


def _crossing(group: int, node: int, world: int) -> int:
    """How many groups of consecutive ranks touch more than one node."""
    return sum(start // node != (start + group - 1) // node for start in range(0, world, group))


def _check_axes(mesh: DeviceMesh) -> tuple[int, int, int]:
    """The sizes of the three axes."""
    names = mesh.mesh_dim_names
    if names != AXES:
        raise ValueError(
            f"mesh has the axes {names}; needed are {AXES}, as ParallelDims makes them"
        )
    replicate, shard, sp = mesh.shape
    return replicate, shard, sp


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh for `fully_shard`: (dp_replicate, dp_shard_sp), or its second axis without replicas.

    Given the three axes, `fully_shard` would take another meaning from them. The group over
    dp_shard x sp is made at the first call for a mesh, on all ranks together; `build_mesh` does so.

    Raises:
        ValueError: wrong axes.
    """
    replicate, _, sp = _check_axes(mesh)
    # torch has no public way to join two axes into one group; FSDP2 itself flattens like this. The
    # mesh remembers the joint axis, so a second call makes no second group.
    flat = mesh["dp_shard"] if sp == 1 else mesh["dp_shard", "sp"]._flatten("dp_shard_sp")
    if replicate == 1:
        return flat
    # Slicing a flattened axis out of its root together with another one goes away in torch; a mesh
    # of existing groups does not.
    groups = [mesh.get_group("dp_replicate"), flat.get_group()]
    return DeviceMesh.from_group(
        groups,
        mesh.device_type,
        mesh=mesh.mesh.flatten(1),
        mesh_dim_names=("dp_replicate", "dp_shard_sp"),
    )


def sequence_parallel_group(mesh: DeviceMesh) -> ProcessGroup | None:
    """The group that shares this rank's packs; None where sp is 1.

    Raises:
        ValueError: wrong axes.
    """
    _, _, sp = _check_axes(mesh)
    return mesh.get_group("sp") if sp > 1 else None


def data_parallel_group(mesh: DeviceMesh) -> ProcessGroup | None:
    """One rank of every group that takes packs of its own, with this rank's place in sp; None for one.

    Where both dp axes are longer than 1, the group is made at the first call for a mesh, on all
    ranks together.

    Raises:
        ValueError: wrong axes.
    """
    replicate, shard, _ = _check_axes(mesh)
    if replicate * shard == 1:
        return None
    if replicate == 1 or shard == 1:
        return mesh.get_group("dp_shard" if replicate == 1 else "dp_replicate")
    group = mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()  # see shard_mesh
    _take_timeout(group, dist.group.WORLD, mesh.device_type)
    return group


def data_parallel_size(mesh: DeviceMesh) -> int:
    """How many groups take packs of their own: dp_replicate * dp_shard.

    Raises:
        ValueError: wrong axes.
    """
    replicate, shard, _ = _check_axes(mesh)
    return replicate * shard


def data_parallel_rank(mesh: DeviceMesh) -> int:
    """Which of them this rank belongs to.

    Raises:
        ValueError: wrong axes.
    """
    _, shard, _ = _check_axes(mesh)
    return mesh.get_local_rank("dp_replicate") * shard + mesh.get_local_rank("dp_shard")
