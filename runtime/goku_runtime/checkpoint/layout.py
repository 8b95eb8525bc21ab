"""From a state to a layout that all ranks share, and back out of it when they do not.

Each rank works the layout out alone. One all-reduce of a digest shows whether all ranks have the same state:
names, shapes, dtypes, meshes, placements and plain values. Where they do not, everything is gathered
once: states that contradict each other are refused, and those that merely differ (a pipeline's stages, a
generator for each rank) are joined, which the log says because it takes time on many ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from goku_runtime.checkpoint import dcp_metadata, index
from goku_runtime.checkpoint.collection import no_collection
from goku_runtime.checkpoint.plan import (
    GlobalPlan,
    Held,
    Image,
    data_file,
    held,
    make_plan,
    make_plan_gathered,
)
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.staging import Extents
from goku_runtime.checkpoint.tree import Flat, flatten, leaves, local_part, merge, to_json

__all__ = ["STATE_NAME", "Layout", "Layouts", "global_rank"]

logger = logging.getLogger(__name__)

STATE_NAME = "state.json"


class Layout:
    """Where everything goes, for as long as the state keeps its form.

    Attributes:
        plan: for all ranks.
        image: this rank's file; `file` is its name. `expected`: the parts that it is made of.
        on_gpu: whether any tensor of the image lies on a GPU.
    """

    def __init__(self, plan: GlobalPlan, rank: int, *, on_gpu: bool) -> None:
        self.plan = plan
        self.image: Image = plan.local(rank)
        self.file = data_file(rank)
        self.on_gpu = on_gpu
        # (name, shape, whether there are elements) of each record: worked out once, for each takes 2 us.
        self.expected = [(each.name, each.shape, each.nbytes > 0) for each in self.image.records]
        self._index: bytes | None = None
        self._dcp = dcp_metadata.DcpFiles(plan)

    @cached_property
    def extents(self) -> Extents:
        """Of the image, for saves that copy nothing."""
        with no_collection():
            return Extents(self.image)

    def files(self, tree: Any) -> dict[str, bytes]:
        """The files that rank 0 writes: the index, the values, and what stock DCP reads of both."""
        if self._index is None:
            self._index = index.to_json(self.plan)
        return {
            index.INDEX_NAME: self._index,
            **self._dcp.files(tree),
            STATE_NAME: to_json(tree).encode(),
        }


class Layouts:
    """The layouts of one group's states; the last one is kept."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._members = _members(ranks)
        self._last: tuple[tuple[Any, ...], Layout] | None = None

    def of(self, state: dict[Any, Any]) -> tuple[Layout, Any, list[Tensor]]:
        """Lays a state out, on all ranks together.

        Returns:
            The layout, the tree of the plain values, and this rank's tensors in the order of the
            image's records.

        Raises:
            ValueError: a leaf that cannot be saved, or states that contradict each other; named.
        """

        def alone() -> tuple[tuple[Flat, Layout], int]:
            flat = flatten(state)
            layout = self._laid_out(flat.tensors)
            digest = hashlib.sha256(layout.plan.digest())
            digest.update(json.dumps(flat.tree, separators=(",", ":")).encode())
            return (flat, layout), int.from_bytes(digest.digest()[:8], "little") >> 1

        with no_collection():
            (flat, layout), same = self._ranks.agree(alone)
        tree = flat.tree
        if not same:
            plan, tree = self._gathered(flat)
            layout = Layout(plan, self._ranks.rank, on_gpu=_on_gpu(flat.tensors))
        # A tensor that is larger or smaller than its placement says would be spread or cut silently.
        return layout, tree, self._ranks.together(lambda: _sources(layout, flat.tensors))

    def _laid_out(self, tensors: Mapping[str, Tensor]) -> Layout:
        key = _form(tensors)
        if self._last is None or self._last[0] != key:
            plan = make_plan(tensors, world=self._ranks.count, members=self._members)
            self._last = key, Layout(plan, self._ranks.rank, on_gpu=_on_gpu(tensors))
        return self._last[1]

    def _gathered(self, flat: Flat) -> tuple[GlobalPlan, Any]:
        """The joined layout and values of ranks whose states differ."""

        def describe() -> tuple[str, dict[str, str], list[Held], Any]:
            texts = leaves(flat)
            return torch.__version__, texts, held(flat.tensors, rank=global_rank()), flat.tree

        found = self._ranks.collect(describe)
        first: dict[str, tuple[int, str]] = {}
        for rank, (version, texts, _, _) in enumerate(found):
            if version != found[0][0]:
                raise ValueError(f"torch is {found[0][0]} on rank 0 and {version} on rank {rank}")
            for name, text in texts.items():
                earlier, other = first.setdefault(name, (rank, text))
                if text != other:
                    raise ValueError(
                        f"state: {name} differs between ranks; rank {earlier} has {other}, "
                        f"rank {rank} has {text}"
                    )
        tree = merge([each[3] for each in found])
        lacking = [rank for rank, each in enumerate(found) if len(each[1]) < len(first)]
        logger.warning(
            "%d of %d ranks lack keys that others have, or meshes differ: layouts were gathered, which "
            "takes time on many ranks (rank %s, for one)",
            len(lacking), len(found), lacking[0] if lacking else 0,
        )  # fmt: skip
        return make_plan_gathered([each[2] for each in found]), tree


def global_rank() -> int:
    """This process's rank in the default group, by which meshes go; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _members(ranks: Ranks) -> list[int] | None:
    return dist.get_process_group_ranks(ranks.group) if ranks.distributed else None


def _form(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What the layout depends on. Meshes and placements compare by value."""
    form: list[Any] = []
    for name, tensor in tensors.items():
        part = local_part(tensor)
        form += (name, part.is_cuda, part.dtype, tensor.shape)
        if part is not tensor:
            spec = tensor._spec  # type: ignore[attr-defined]
            form += (spec.mesh, spec.placements, getattr(spec, "shard_order", None))
    return tuple(form)


def _on_gpu(tensors: Mapping[str, Tensor]) -> bool:
    return any(local_part(tensor).is_cuda for tensor in tensors.values())


def _sources(layout: Layout, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    found = []
    for name, shape, filled in layout.expected:
        tensor = tensors[name]
        local = local_part(tensor)
        # Of a tensor without elements one box stands for all: nothing is copied.
        if filled and (local.shape != shape or local.dtype != tensor.dtype):
            raise ValueError(
                f"{name}: this rank's part has shape {tuple(local.shape)} and {local.dtype}; its mesh "
                f"and placements make it {shape}, {tensor.dtype}"
            )
        local = local.detach() if local.requires_grad else local
        if local is not tensor and (local.is_conj() or local.is_neg()):
            local = local.resolve_conj().resolve_neg()
        found.append(local)
    return found
