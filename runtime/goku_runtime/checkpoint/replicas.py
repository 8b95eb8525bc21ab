"""What several ranks hold alike, read by one of them and sent to the others.

A plain tensor is held by all ranks of the group, a DTensor's part by the ranks along the dimensions of its
mesh in which it is replicated. Both ends of a broadcast have to name the same tensor, so the ranks first agree
on what is sent, and send it in the order of the names: whose dicts have another order, or lack keys that
others have, would otherwise get the values of another tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.staging import copyable
from goku_runtime.checkpoint.tree import is_spread, local_part

__all__ = ["is_reader", "send", "shared"]

# How a rank wants a tensor: dtype, device, and of a DTensor its mesh (in short) and placements.
_Form = tuple[str, str, str, str]


class _Wanted:
    """How this rank wants its tensors: `forms` by name, `holders` by mesh in short (global ranks)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.holders: dict[str, list[int]] = {}
        self._meshes: dict[int, str] = {}
        self.forms = {name: self._form(tensors[name]) for name in sorted(tensors)}
        text = json.dumps(self.forms, separators=(",", ":"))
        self.digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def _form(self, tensor: Tensor) -> _Form:
        part = local_part(tensor)
        mesh = placements = ""
        if is_spread(tensor):
            spread: Any = tensor
            mesh, placements = self._short(spread.device_mesh), str(spread.placements)
        return str(tensor.dtype), part.device.type, mesh, placements

    def _short(self, mesh: Any) -> str:
        """A mesh has thousands of ranks, and thousands of tensors have the same one."""
        short = self._meshes.get(id(mesh))
        if short is None:
            holders = mesh.mesh.flatten().tolist()
            text = f"{tuple(mesh.shape)} {holders}"
            short = self._meshes[id(mesh)] = hashlib.sha256(text.encode()).hexdigest()[:16]
            self.holders[short] = holders
        return short


def shared(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """The names that all ranks which hold the tensor want alike, in the order in which they are sent.

    All ranks of the group call this together: one all-reduce of a digest, and where that shows that they want
    different things, one gather of the names.
    """

    def alone() -> tuple[_Wanted, int]:
        wanted = _Wanted(tensors)
        return wanted, wanted.digest

    own, same = ranks.agree(alone)
    found = [(own.digest, own.forms)]
    found = found * ranks.count if same else ranks.gather(found[0])
    members = dist.get_process_group_ranks(ranks.group) if ranks.distributed else [0]
    kinds = dict(found)  # most ranks want what many others want
    kind_of = {member: kind for member, (kind, _) in zip(members, found, strict=True)}
    # Of each mesh, and of all: the kinds of those who hold what is spread over it; None is one outside.
    of_mesh: dict[str, set[int | None]] = {"": set(kind_of.values())}
    for mesh, holders in own.holders.items():
        of_mesh[mesh] = {kind_of.get(holder) for holder in holders}
    return [
        name
        for name, form in own.forms.items()
        if all(kind is not None and kinds[kind].get(name) == form for kind in of_mesh[form[2]])
    ]


def is_reader(tensor: Tensor, ranks: Ranks) -> bool:
    """Whether this rank is the one among those with the same part that reads it."""
    if not is_spread(tensor):
        return ranks.is_first
    return all(mesh.get_coordinate()[dim] == 0 for mesh, dim in _replicated(tensor))


def send(tensor: Tensor, ranks: Ranks) -> None:
    """Sends a part from the rank that read it to those that hold the same."""
    if not is_spread(tensor):
        if ranks.count > 1:
            _broadcast(
                tensor, dist.get_global_rank(ranks.group, 0) if ranks.group else 0, ranks.group
            )
        return
    dims = _replicated(tensor)
    for number, (mesh, dim) in enumerate(dims):
        # By coordinates: a group numbers its members in the order of their ranks, which need not be
        # the mesh's.
        front = list(mesh.get_coordinate())
        # Only where the part has arrived: at the front of the dimensions that come later.
        if all(front[later] == 0 for _, later in dims[number + 1 :]):
            front[dim] = 0
            _broadcast(local_part(tensor), int(mesh.mesh[tuple(front)]), mesh.get_group(dim))


def _replicated(tensor: Tensor) -> list[tuple[Any, int]]:
    """The mesh dimensions of a DTensor along which ranks hold the same: (mesh, dimension).

    None on a rank that is not in the mesh: it holds nothing.
    """
    from torch.distributed.tensor import Replicate

    spread: Any = tensor
    mesh = spread.device_mesh
    if mesh.get_coordinate() is None:
        return []
    return [
        (mesh, dim)
        for dim, placement in enumerate(spread.placements)
        if isinstance(placement, Replicate) and mesh.size(dim) > 1
    ]


def _broadcast(tensor: Tensor, source: int, group: Any) -> None:
    """Sends the bytes: not every backend knows every dtype, nor lazy conjugation and negation."""
    with torch.no_grad():
        part = copyable(tensor.detach())
        dense = part.resolve_conj().resolve_neg().contiguous()
        dist.broadcast(dense.reshape(-1).view(torch.uint8), source, group=group)
        if dense.data_ptr() != part.data_ptr():
            part.copy_(dense)
