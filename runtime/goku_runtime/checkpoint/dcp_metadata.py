"""What `torch.distributed.checkpoint` needs to read a checkpoint of ours; never read by us.

`.metadata` is the pickle that DCP's FileSystemReader loads: for each tensor its boxes and where their
records lie. Plain values lie in state.json, which DCP does not know: they are written again, each
as `torch.save` writes it, one after another into a file of their own. Names and paths are those that
DCP's default planner gives the nested state, so `dcp.load` and `dcp_to_torch_save` nest it again, with
what that planner loses: int keys become str, empty dicts vanish.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Iterable
from copy import copy
from functools import cache
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import Shard

from goku_runtime.checkpoint._dcp_pickle import Unknown, pickled_metadata
from goku_runtime.checkpoint.plan import (
    Described,
    GlobalPlan,
    Mesh,
    TensorEntry,
    data_file,
    make_plan,
)
from goku_runtime.checkpoint.tree import decode

__all__ = ["METADATA_NAME", "VALUES_NAME", "DcpFiles", "files", "leaves", "pickled"]

logger = logging.getLogger(__name__)

METADATA_NAME = ".metadata"
VALUES_NAME = "__values.distcp"
VERSION = "1.0.0"  # DCP's, of what it pickles

Path = tuple[str | int, ...]


class DcpFiles:
    """The files for one plan. The pickle, most of the work where ranks are many, is kept for as long
    as paths, and lengths of plain values, stay the same."""

    def __init__(self, plan: GlobalPlan) -> None:
        self.plan = plan
        self._last: tuple[Any, bytes] | None = None

    def files(self, tree: Any) -> dict[str, bytes]:
        """The content of `.metadata` and, where there are plain values, of `__values.distcp`.

        Args:
            tree: of the state, as `tree.flatten` gives it. Of two leaves of one name (the keys "a.b"
                and "a" with "b" in it) DCP can have only one: a tensor, or the first.

        Raises:
            ValueError: a tensor of the plan that the tree does not name, or the other way round.
        """
        paths, values = leaves(tree)
        for name in (paths.keys() - values.keys()) ^ self.plan.entries.keys():
            lacking, having = ("tree", "plan") if name in self.plan.entries else ("plan", "tree")
            raise ValueError(f"{name}: a tensor of the {having} that the {lacking} does not name")
        stream = io.BytesIO()
        places = []
        for name, value in values.items():
            begin = stream.tell()
            torch.save(value, stream)
            places.append((name, begin, stream.tell() - begin))
        key = (list(paths.items()), places)
        if self._last is None or self._last[0] != key:
            self._last = key, pickled(self.plan, paths, places)
        found = {METADATA_NAME: self._last[1]}
        return found | ({VALUES_NAME: stream.getvalue()} if values else {})


def files(plan: GlobalPlan, tree: Any) -> dict[str, bytes]:
    """DcpFiles.files for a plan that is used once."""
    return DcpFiles(plan).files(tree)


def pickled(plan: GlobalPlan, paths: Any, places: list[tuple[str, int, int]]) -> bytes:
    """The content of `.metadata`.

    Args:
        plan: of the tensors.
        paths: of all leaves by name, or whatever the planner of a DCP save keeps there.
        places: (name, offset, bytes) of each plain value in `__values.distcp`.
    """
    # Older versions of torch have no version in it; an attribute does no harm there.
    metadata = Metadata({}, planner_data=paths, storage_data={}, storage_meta=StorageMeta())
    metadata.version = VERSION
    plain = {
        name: (BytesStorageMetadata(), MetadataIndex(name), _StorageInfo(VALUES_NAME, begin, length))
        for name, begin, length in places
    }  # fmt: skip
    if _rows_are_known():
        return pickled_metadata(plan, metadata, plain)
    return pickle.dumps(_complete(plan, metadata, plain))


Plain = dict[str, tuple[BytesStorageMetadata, MetadataIndex, _StorageInfo]]


def _complete(plan: GlobalPlan, metadata: Metadata, plain: Plain) -> Metadata:
    """The Metadata with all that it describes: five objects for each part."""
    described: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    names = {rank: data_file(rank) for rank, size in enumerate(plan.sizes) if size}
    for name, entry in plan.entries.items():
        described[name] = _tensor(entry, names, storage)
    for name, (description, place, info) in plain.items():
        described[name] = description
        storage[place] = info
    whole = copy(metadata)
    whole.state_dict_metadata, whole.storage_data = described, storage
    return whole


@cache
def _rows_are_known() -> bool:
    """Whether a small plan's pickle, written in rows, loads as that of its objects does."""
    mesh = Mesh((2,), (0, 1))
    plan = make_plan(
        {
            "w": Described(torch.bfloat16, (70000, 3), mesh, (Shard(0),)),
            "scalar": Described(torch.float32, ()),
        },
        world=2,
    )
    metadata = Metadata({}, {"w": ("w",)}, {}, StorageMeta())
    plain = {"n": (BytesStorageMetadata(), MetadataIndex("n"), _StorageInfo(VALUES_NAME, 0, 9))}
    wanted = _complete(plan, metadata, plain)
    try:
        found = pickle.loads(pickled_metadata(plan, metadata, plain))  # noqa: S301 (made right here)
    except (Unknown, pickle.PickleError, LookupError, TypeError, ValueError) as error:
        logger.warning("%s is pickled object by object, which is slow: %r", METADATA_NAME, error)
        return False
    if repr(found) != repr(wanted):
        logger.warning(
            "%s is pickled object by object, which is slow: torch %s reads otherwise what is "
            "written in rows", METADATA_NAME, torch.__version__,
        )  # fmt: skip
        return False
    return True


def _tensor(
    entry: TensorEntry, names: dict[int, str], storage: dict[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata:
    chunks: list[ChunkStorageMetadata] = []
    for number, part in enumerate(entry.parts()):
        start = torch.Size(part.box.start)
        chunks.append(ChunkStorageMetadata(start, torch.Size(part.box.size)))
        index = MetadataIndex(entry.name, start, number)
        storage[index] = _StorageInfo(names[part.rank], part.offset, part.length)
    properties = TensorProperties(dtype=entry.dtype)
    return TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)


# --- the tree as DCP's planner would flatten the state -----------------------------------------------


def leaves(tree: Any) -> tuple[dict[str, Path], dict[str, Any]]:
    """The path of every leaf that DCP gets, by name, and the plain ones among them."""
    paths: dict[str, Path] = {}
    plain: list[tuple[str, Path, Any]] = []
    _walk("", (), tree, paths, plain)
    values: dict[str, Any] = {}
    for name, path, node in plain:
        if name not in paths:
            paths[name] = path
            values[name] = decode(node)
    return paths, values


def _walk(
    name: str,
    path: Path,
    node: Any,
    paths: dict[str, Path],
    plain: list[tuple[str, Path, Any]],
) -> None:
    """Collects the leaves of an encoded node: tensors, values, and lists without dicts in them."""
    children: Iterable[tuple[str | int, Any]]
    if _is_dict(node):
        pairs = node["$dict"] if "$dict" in node else node.items()
        children = ((str(key), child) for key, child in pairs)
    elif isinstance(node, list) and _branches(node):
        children = enumerate(node)
    else:
        plain.append((name, path, node))
        return
    before = f"{name}." if path else ""
    for key, child in children:
        below = f"{before}{key}"
        if isinstance(child, dict) and len(child) == 1 and "$tensor" in child:
            paths[below] = (*path, key)
        else:
            _walk(below, (*path, key), child, paths, plain)


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict) and not ({"$tensor", "$tuple", "$float"} & node.keys())


def _branches(node: Any) -> bool:
    """Whether DCP looks into a list: there is a dict in it, or in a list in it (not in a tuple)."""
    return _is_dict(node) or (isinstance(node, list) and any(map(_branches, node)))
