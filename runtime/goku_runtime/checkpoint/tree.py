"""A state as the checkpoint sees it: tensors by name, and a JSON tree of everything else.

A state is a dict of dicts whose leaves are tensors or plain values: None, bool, int, float, str,
and lists and tuples of those (and of dicts). JSON has no tuples, no NaN and only string keys, so
these are tagged, and what comes back is equal to what was saved, type for type:

    {"$tensor": name}    a tensor, stored by DCP under that name (its keys joined by dots)
    {"$tuple": [...]}    {"$float": "nan" | "inf" | "-inf"}    {"$dict": [[key, value], ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from goku_runtime.checkpoint.manifest import CheckpointError

__all__ = [
    "Flat",
    "Match",
    "decode",
    "flatten",
    "is_spread",
    "leaves",
    "local_part",
    "match",
    "merge",
    "parse_tree",
    "to_json",
]

_PLAIN = (bool, int, str, type(None))
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MISSING = object()
_DENSE = (Tensor, nn.Parameter)


@dataclass
class Flat:
    """A state taken apart: `tree` is ready for JSON, `tensors` holds what it refers to by name."""

    tree: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)


def to_json(tree: Any) -> str:
    """The tree as strict JSON text, a line per entry so that it can be read and compared."""
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


# --- taking apart -------------------------------------------------------------------------------


def flatten(state: dict[Any, Any]) -> Flat:
    """Takes a state apart.

    Raises:
        ValueError: a leaf that is neither a dense tensor nor a plain value, a tensor inside a list,
            a key that is no str or int, or two tensors of one name: the key is named; a dict that
            holds itself.
    """
    if not isinstance(state, dict):
        raise ValueError(f"state: found {type(state).__name__}; must be a dict")
    flat = Flat(None)
    try:
        flat.tree = _encode_dict(state, None, flat.tensors)
    except RecursionError:
        raise ValueError("state: nested too deeply, or a part of itself") from None
    return flat


def _encode_dict(
    mapping: dict[Any, Any], where: str | None, tensors: dict[str, Tensor] | None
) -> Any:
    # Written out, without a call for each tensor: a save waits for this, 1,500 or 20,000 times over.
    node: dict[Any, Any] = {}
    plain = True
    before = "" if where is None else f"{where}."
    for key, value in mapping.items():
        if type(key) is str:
            name = before + key
            plain = plain and key[:1] != "$"
        elif type(key) is int:
            name = f"{before}{key}"
            plain = False
        else:
            kind = type(key).__name__
            raise ValueError(
                f"{'state' if where is None else where}: the key {key!r} is a {kind}; must be str or int"
            )
        if isinstance(value, Tensor):
            if tensors is None:
                raise ValueError(f"{name}: a tensor inside a list; tensors must lie in dicts")
            _check_tensor(name, value)
            if name in tensors:
                raise ValueError(f"{name}: two tensors of the state have this name")
            # Lazy conjugation and negation are flags of a view; what is stored are the values. A
            # DTensor does not say what its part is: `Layouts` asks that one.
            lazy = type(value) in _DENSE and (value.is_conj() or value.is_neg())
            tensors[name] = value.resolve_conj().resolve_neg() if lazy else value
            node[key] = {"$tensor": name}
        elif isinstance(value, dict):
            node[key] = _encode_dict(value, name, tensors)
        else:
            node[key] = _encode_value(value, name)
    return node if plain else _dict_node(list(node.items()))


def _dict_node(pairs: Sequence[tuple[Any, Any]]) -> Any:
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [list(pair) for pair in pairs]}


def _encode_value(value: Any, where: str) -> Any:
    # Exact types: a subclass (an enum, numpy's float64) would come back as something else.
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) in (list, tuple):
        items = [_encode_item(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    hint = ""
    if kind.startswith("numpy."):
        hint = " (torch.from_numpy(array), or scalar.item())"
    raise ValueError(
        f"{where}: a {kind}; must be a tensor, None, bool, int, float, str, list, tuple or dict{hint}"
    )


def _encode_item(item: Any, where: str) -> Any:
    if isinstance(item, Tensor):
        raise ValueError(f"{where}: a tensor inside a list; tensors must lie in dicts")
    return _encode_dict(item, where, None) if isinstance(item, dict) else _encode_value(item, where)


def _check_tensor(name: str, tensor: Tensor) -> None:
    # nn.Parameter and nn.Buffer are plain tensors to torch.save; other subclasses are not.
    allowed = type(tensor) in _DENSE or isinstance(tensor, _dtensor())
    part = local_part(tensor)
    if part.layout is not torch.strided or part.is_quantized or part.is_nested:
        raise ValueError(f"{name}: a {part.layout} tensor; must be dense and not quantised")
    if part.is_meta:
        raise ValueError(f"{name}: a tensor on the meta device has no values")
    if not allowed:
        kind = type(tensor).__name__
        raise ValueError(f"{name}: a {kind}; must be a torch.Tensor, nn.Parameter or DTensor")


def is_spread(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which a rank may hold a part."""
    return type(tensor) not in _DENSE and isinstance(tensor, _dtensor())


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself.

    As `to_local` without autograd, in 0.1 us instead of 1 to 5. And a question to a DTensor, whose class
    might answer it, takes 115 ns where its part takes 47.
    """
    part: Tensor = tensor._local_tensor if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return part


@cache
def _dtensor() -> type:
    from torch.distributed.tensor import DTensor  # slow to import, and seldom needed

    return DTensor


# --- between ranks ------------------------------------------------------------------------------


def leaves(flat: Flat) -> dict[str, str]:
    """Each leaf in words, by its name: a plain value as JSON, a tensor by its dtype and shape."""
    found = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in flat.tensors.items()}

    def collect(node: Any, where: str | None) -> None:
        if _is_dict(node):
            for key, child in _children(node):
                collect(child, _join(where, key))
        elif where is not None and _tensor_name(node) is None:
            found[where] = json.dumps(node)

    collect(flat.tree, None)
    return found


def merge(trees: Sequence[Any]) -> Any:
    """One tree with the leaves of all, in the order in which they come.

    Raises:
        ValueError: something is a dict in one tree and none in another, or leaves differ; named.
    """
    return _merge(list(trees), None)


def _merge(nodes: list[Any], where: str | None) -> Any:
    first = nodes[0]
    if not all(_is_dict(node) for node in nodes):
        if any(node != first for node in nodes):
            raise ValueError(f"state: {where} differs between ranks")
        return first
    below: dict[str | int, list[Any]] = {}
    for node in nodes:
        for key, child in _children(node):
            below.setdefault(key, []).append(child)
    pairs = [(key, _merge(found, _join(where, key))) for key, found in below.items()]
    return _dict_node(pairs)


# --- putting together ---------------------------------------------------------------------------


def parse_tree(text: bytes, where: str) -> Any:
    """The tree of a state.json, checked whole. Raises CheckpointError if it is none."""
    try:
        tree = json.loads(text)
        if not _is_dict(tree):
            raise CheckpointError("no JSON object")
        decode(tree)
        _check_names(tree, [], set())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    return tree


def _check_names(node: Any, pieces: list[str], seen: set[str] | None) -> None:
    """Refuses a tensor under a name that is not its key or is in `seen`; all of them without one.

    A tensor that two leaves refer to would be loaded into one of them only. `pieces` are the steps to the
    node: a name for each node would hold a long key as often as there are nodes below it.
    """
    name = _tensor_name(node)
    if name is not None:
        where = _spelled(pieces)
        if seen is None:
            raise CheckpointError(f"{where}: a tensor inside a list")
        if name != where:
            raise CheckpointError(f"{where}: refers to {name!r}, a tensor of another key")
        if name in seen:
            raise CheckpointError(f"{where}: two tensors have this name")
        seen.add(name)
    elif _is_dict(node):
        for key, child in _children(node):
            pieces.append(f".{key}")
            _check_names(child, pieces, seen)
            pieces.pop()
    elif isinstance(node, (list, dict)):
        items = node if isinstance(node, list) else node.get("$tuple", [])
        for i, item in enumerate(items):
            pieces.append(f"[{i}]")
            _check_names(item, pieces, None)
            pieces.pop()


def _spelled(pieces: list[str]) -> str:
    """The steps as `_join` would join them."""
    return "".join(pieces).removeprefix(".")


def decode(node: Any) -> Any:
    """The value of a tree, tensors left out of their dicts. Raises CheckpointError: a bad tag."""
    if isinstance(node, list):
        return [decode(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$tuple" in node and isinstance(node["$tuple"], list) and len(node) == 1:
        return tuple(decode(item) for item in node["$tuple"])
    if "$float" in node and len(node) == 1:
        special = node["$float"]
        if isinstance(special, str) and special in _SPECIAL:
            return _SPECIAL[special]
    return {key: decode(child) for key, child in _children(node) if _tensor_name(child) is None}


def _children(node: dict[str, Any]) -> Iterator[tuple[str | int, Any]]:
    """Keys and child nodes of an encoded dict."""
    if "$dict" in node and len(node) == 1 and isinstance(node["$dict"], list):
        for pair in node["$dict"]:
            if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)):
                raise CheckpointError(f"{pair!r} is no entry of a dict")
            yield pair[0], pair[1]
    else:
        for key, child in node.items():
            if key.startswith("$"):
                raise CheckpointError(f"unknown tag {key!r}")
            yield key, child


def _tensor_name(node: Any) -> str | None:
    if isinstance(node, dict) and len(node) == 1 and isinstance(node.get("$tensor"), str):
        return str(node["$tensor"])
    return None


def _is_dict(node: Any) -> bool:
    """Whether an encoded node stands for a dict (and not for a tensor, tuple or float)."""
    tags = {"$tensor", "$tuple", "$float"}
    return isinstance(node, dict) and not (len(node) == 1 and tags & node.keys())


@dataclass
class Match:
    """How a saved tree fits a caller's state.

    tensors: saved name -> (key in the caller's state, the caller's tensor).
    values: (dict of the caller, key, value to put there).
    unexpected: names of saved leaves for which the caller's state has no key.
    problems: what does not fit, a line each.
    """

    tensors: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    values: list[tuple[dict[Any, Any], Any, Any]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match(state: dict[Any, Any], tree: Any) -> Match:
    """Lays a saved tree over a caller's state, changing nothing.

    A None in the state takes any value without tensors; everything else must have a counterpart of
    its kind (tensor, dict, plain value) under the same key.

    Raises:
        ValueError: the state is no dict, or has a leaf that cannot be loaded into; named.
    """
    if not isinstance(state, dict):
        raise ValueError(f"state: found {type(state).__name__}; must be a dict")
    result = Match()
    _match_dict(state, tree, None, result)
    return result


def _match_dict(state: dict[Any, Any], node: Any, where: str | None, result: Match) -> None:
    saved = dict(_children(node))
    for key, child in saved.items():
        if key not in state:
            result.unexpected += _names(child, _join(where, key))
    for key, wanted in state.items():
        name, child = _join(where, key), saved.get(key, _MISSING)
        if child is _MISSING:
            result.problems += [f"{each}: missing" for each in _wanted_names(wanted, name)]
        elif isinstance(wanted, Tensor):
            _match_tensor(wanted, child, name, result)
        elif _tensor_name(child) is not None:
            kind = type(wanted).__name__
            result.problems.append(f"{name}: a tensor was saved, a {kind} is wanted")
        elif isinstance(wanted, dict):
            if _is_dict(child):
                _match_dict(wanted, child, name, result)
            else:
                kind = type(decode(child)).__name__
                result.problems.append(f"{name}: a {kind} was saved, a dict is wanted")
        elif _is_dict(child) and wanted is not None:
            kind = type(wanted).__name__
            result.problems.append(f"{name}: a dict was saved, a {kind} is wanted")
        elif any(_holds_tensor(child)):
            result.problems.append(f"{name}: tensors were saved, None is wanted")
        else:
            result.values.append((state, key, decode(child)))


def _match_tensor(wanted: Tensor, child: Any, name: str, result: Match) -> None:
    saved_name = _tensor_name(child)
    if saved_name is None:
        kind = "dict" if _is_dict(child) else type(decode(child)).__name__
        result.problems.append(f"{name}: a {kind} was saved, a tensor is wanted")
        return
    _check_tensor(name, wanted)
    spread = any(size > 1 and step == 0 for size, step in _extent(wanted))
    if spread:
        result.problems.append(f"{name}: an expanded tensor cannot be loaded in place")
    result.tensors[saved_name] = (name, wanted)


def _extent(tensor: Tensor) -> Iterator[tuple[int, int]]:
    return zip(tensor.shape, tensor.stride(), strict=True)


def _holds_tensor(node: Any) -> Iterator[bool]:
    if _tensor_name(node) is not None:
        yield True
    elif _is_dict(node):
        for _, child in _children(node):
            yield from _holds_tensor(child)


def _names(node: Any, where: str) -> Iterator[str]:
    """The dotted names of an encoded node's leaves."""
    if _is_dict(node):
        for key, child in _children(node):
            yield from _names(child, _join(where, key))
    else:
        yield where


def _wanted_names(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _wanted_names(child, _join(where, key))
    else:
        yield where


def _join(where: str | None, key: object) -> str:
    """A name, as DCP joins keys; `where` is that of the dict, None of the state itself."""
    return str(key) if where is None else f"{where}.{key}"
