"""What the coordinator of a DCP save makes of all ranks' results: the files that one rank writes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from goku_runtime.checkpoint import index
from goku_runtime.checkpoint._boxes import fault
from goku_runtime.checkpoint._dcp_writing import Written, WrittenFiles, WrittenValue
from goku_runtime.checkpoint._entries import Replicas
from goku_runtime.checkpoint._shards import Layout
from goku_runtime.checkpoint.dcp_metadata import METADATA_NAME, VALUES_NAME, Path, pickled
from goku_runtime.checkpoint.layout import STATE_NAME
from goku_runtime.checkpoint.manifest import FileSum
from goku_runtime.checkpoint.plan import Box, GlobalPlan, TensorEntry, data_file
from goku_runtime.checkpoint.tree import flatten, to_json

__all__ = ["Collected", "files"]


@dataclass
class Collected:
    """All ranks' results: the parts of each tensor as (box, rank, offset), values, sums of files."""

    ranks: int
    parts: dict[str, list[tuple[Box, int, int]]] = field(default_factory=dict)
    values: dict[str, WrittenValue] = field(default_factory=dict)
    sums: dict[str, FileSum] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[Sequence[WriteResult]]) -> Collected:
        """The results of write_items on each rank, in order of rank.

        Raises:
            ValueError: ranks with different versions of torch.
        """
        collected = cls(len(results))
        for rank, each in enumerate(results):
            for result in each:
                found = result.storage_data
                if isinstance(found, Written):
                    parts = collected.parts.setdefault(result.index.fqn, [])
                    parts.append((found.box, rank, found.offset))
                elif isinstance(found, WrittenValue):
                    collected.values[result.index.fqn] = found
                else:
                    assert isinstance(found, WrittenFiles)
                    if found.torch != torch.__version__:
                        raise ValueError(
                            f"torch is {torch.__version__} on the coordinator and {found.torch} on "
                            f"rank {rank}"
                        )
                    collected.sums |= found.sums
        return collected


def files(metadata: Metadata, collected: Collected) -> dict[str, bytes]:
    """index.json, state.json and what stock DCP reads, by name.

    Raises:
        ValueError: parts that do not make up their tensor, or names that the paths of DCP's planner
            do not fit.
    """
    plan = _plan(metadata, collected)
    stream = io.BytesIO()
    places = []
    for name, value in collected.values.items():
        places.append((name, stream.tell(), len(value.data)))
        stream.write(value.data)
    found = {
        index.INDEX_NAME: index.to_json(plan),
        METADATA_NAME: pickled(plan, metadata.planner_data, places),
        STATE_NAME: to_json(_tree(metadata, collected.values)).encode(),
    }
    return found | ({VALUES_NAME: stream.getvalue()} if places else {})


def _plan(metadata: Metadata, collected: Collected) -> GlobalPlan:
    entries: dict[str, TensorEntry] = {}
    layouts: dict[tuple[Box, ...], Layout] = {}  # what is made of one serves all tensors cut alike
    for name, described in metadata.state_dict_metadata.items():
        if not isinstance(described, TensorStorageMetadata):
            continue
        parts = sorted(collected.parts.get(name, []))
        shape = tuple(described.size)
        boxes = tuple(box for box, _, _ in parts)
        wrong = fault(shape, boxes)
        if wrong is not None:
            raise ValueError(f"{name} of shape {shape}: {wrong}")
        owners = torch.tensor([rank for _, rank, _ in parts], dtype=torch.int64, device="cpu")
        offsets = torch.tensor([at for _, _, at in parts], dtype=torch.int64, device="cpu")
        if boxes not in layouts:
            layouts[boxes] = Layout(boxes)
        entries[name] = TensorEntry(
            name, described.properties.dtype, shape, owners, offsets, layouts[boxes],
            Replicas(owners[:, None]),
        )  # fmt: skip
    none = FileSum(0, 0)
    sizes = [collected.sums.get(data_file(rank), none).size for rank in range(collected.ranks)]
    return GlobalPlan(collected.ranks, entries, tuple(sizes), (), None)


# --- the tree, from flat names ----------------------------------------------------------------------

_TENSOR = torch.empty(0, device="cpu")


class _Node(dict[str | int, Any]):
    """A dict or list of the state, whereas a dict may be a leaf."""


def _tree(metadata: Metadata, values: Mapping[str, WrittenValue]) -> Any:
    """The state as tree.py has it, nested by the paths that DCP's planner keeps.

    A list that DCP takes apart becomes a dict with int keys if there are tensors in it, or would be
    another list: names stay what they are for DCP.
    """
    root = _Node()
    paths = {name: _path(metadata.planner_data, name) for name in metadata.state_dict_metadata}
    leaf_paths = set(paths.values())
    for name, described in metadata.state_dict_metadata.items():
        is_tensor = isinstance(described, TensorStorageMetadata)
        leaf: Any = _TENSOR if is_tensor else values[name].value
        path = paths[name]
        # Below another leaf: the keys 0 and "0" of a dict, which are one to DCP.
        if any(path[:depth] in leaf_paths for depth in range(1, len(path))):
            path = (name,)
        *above, last = path
        branch: Any = root
        for key in above:
            branch = branch.setdefault(key, _Node()) if isinstance(branch, _Node) else None
        if not isinstance(branch, _Node) or last in branch:
            raise ValueError(f"{name}: a leaf and a dict of the state have this path")
        branch[last] = leaf
    return flatten({key: _nested(node) for key, node in root.items()}).tree


def _path(paths: Any, name: str) -> Path:
    """The keys to a leaf; its name alone where the planner does not say, or says something else."""
    path = paths.get(name) if isinstance(paths, Mapping) else None
    if not isinstance(path, tuple) or ".".join(map(str, path)) != name:
        return (name,)
    return path


def _nested(node: Any) -> Any:
    if not isinstance(node, _Node):
        return node
    children = {key: _nested(child) for key, child in node.items()}
    # A list only where DCP would find the same names in it: with a dict in it, and without the gaps
    # that empty dicts leave.
    branches = any(isinstance(child, _Node) for child in node.values())
    whole = all(key in children for key in range(len(children)))
    if whole and branches and not any(map(_has_tensor, children.values())):
        return [children[number] for number in range(len(children))]
    return children


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, torch.Tensor)
