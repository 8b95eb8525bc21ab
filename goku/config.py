"""Configuration: YAML and dotted overrides into frozen, typed dataclasses.

Each section's dataclass lives with its owner and checks its own values when it is built; this file
knows none of them. It reads YAML, applies overrides such as ``model.depth=4``, and turns the nested
mapping into dataclasses strictly: an unknown key, a missing one or a value of another type is a
`ConfigError` that names the dotted path, the value and what is allowed.

YAML here is YAML 1.1 as PyYAML's safe loader reads it, with two differences: a number such as
``1e-4`` is a float (YAML 1.1 wants a dot and a sign, and would hand over the string), and a key
written twice in one mapping is an error (YAML forbids it, PyYAML keeps the last one).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml

__all__ = ["ConfigError", "difference", "dump", "load", "parse", "to_dict"]

T = TypeVar("T")

_ABSENT = object()
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class ConfigError(ValueError):
    """A configuration that cannot be used.

    Attributes:
        path: dotted path of the key, such as ``"model.dim"`` (empty: the whole configuration).
        value: what was found there.
        allowed: what may stand there, in words.
    """

    def __init__(self, path: str, value: object, allowed: str) -> None:
        self.path = path
        self.value = value
        self.allowed = allowed
        found = "nothing" if value is _ABSENT else repr(value)
        super().__init__(f"{path or 'configuration'}: found {found}; {allowed}")


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's floats that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain name", key_node.start_mark
                )
            if key in seen:
                first = seen[key].start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice, first in line {first}",
                    key_node.start_mark,
                )  # fmt: skip
            seen[key] = key_node
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper that knows the loader's floats, so that the string "1e-4" gets quotes."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # These count as line breaks (and the mark of byte order as nothing), but PyYAML with
        # allow_unicode writes them as they are: only double quotes escape them.
        style = '"' if any(c in "\x85\u2028\u2029\ufeff" for c in text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _class in (_Loader, _Dumper):
    # A copy: the resolver table is shared with yaml.SafeLoader until it is assigned.
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in entries if not tag.endswith(":float")]
        for first, entries in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML file (or copies a mapping) and applies dotted overrides.

    Args:
        source: path of a YAML file, or a nested mapping (left unchanged).
        overrides: ``"section.key=value"``, the value in YAML: ``train.lr=1e-4``,
            ``data.cache=null``, ``model.axes_dim=[16, 24, 24]``. Sections that do not exist yet
            are made; later overrides win.

    Returns:
        A new nested dict, unchecked; `parse` gives it types.

    Raises:
        ConfigError: the file is not YAML, holds a key twice or no mapping, or an override does not
            have the form above or goes through a value that is no section.
        OSError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        tree = _copy(source, "")
    else:
        try:
            with open(source, encoding="utf-8") as stream:
                content = yaml.load(stream, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(str(source), _first_line(error), "must be YAML") from error
        except OSError as error:
            # The same type without the bare number.
            what = (error.strerror or "cannot be read").lower()
            raise type(error)(f"{source}: {what}; allowed: a YAML file") from error
        if content is None:
            content = {}
        if not isinstance(content, Mapping):
            raise ConfigError(str(source), content, "must be a mapping of sections")
        tree = _copy(content, "")
    for override in overrides:
        _apply(tree, override)
    return tree


def parse(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls` from a nested mapping, strictly.

    Understood as field types: bool, int, float (an int is accepted and converted), str, None, Any,
    ``Literal``, unions, ``tuple[X, ...]``, ``tuple[X, Y]``, ``list[X]``, ``dict[str, X]`` and
    dataclasses. A bool is never a number. A list stands for a tuple.

    Args:
        cls: a dataclass.
        mapping: its fields; those with a default may be left out.
        where: dotted path of the mapping itself, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, a value of another
            type, or a ValueError from the dataclass' own checks, prefixed with the path.
        TypeError: a field's type is none of the above (a mistake in the dataclass).
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    if not isinstance(mapping, Mapping):
        raise ConfigError(where, mapping, f"must be a section with {_names(cls)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key, value in mapping.items():
        if key not in fields:
            raise ConfigError(_join(where, key), value, _suggest(cls, str(key), where))
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(_join(where, name), _ABSENT, f"must be {_describe(hints[name])}")
    try:
        return cast(T, cls(**values))
    except ConfigError:
        raise
    except ValueError as error:
        shown = {name: value for name, value in mapping.items() if name in str(error)}
        raise ConfigError(where, shown or dict(mapping), str(error)) from error


def to_dict(obj: Any) -> dict[str, Any]:
    """The nested dict of plain values (tuples as lists) that `parse` turns back into `obj`."""
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"{obj!r} is not an instance of a dataclass")
    return {f.name: _plain(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}


def dump(obj: Any) -> str:
    """YAML of a dataclass instance or a nested mapping, keys in their order; `load` reads it."""
    tree = _plain(obj)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, a readable line each: ``model.dim: 192 -> 256``.

    Lists and tuples with equal items are equal, so are 1 and 1.0; True and 1 are not. A key that
    one side lacks is shown as (absent). The order is that of `current`, then what only `saved` has.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(current))
    return [
        f"{key}: {_show(old.get(key, _ABSENT))} -> {_show(new.get(key, _ABSENT))}"
        for key in [*new, *(key for key in old if key not in new)]
        if not _equal(old.get(key, _ABSENT), new.get(key, _ABSENT))
    ]


# --- reading ------------------------------------------------------------------------------------


def _copy(mapping: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """A copy whose sections are new dicts; every key must be a string without dots."""
    result = {}
    for key, value in mapping.items():
        if not isinstance(key, str) or not key or "." in key:
            hint = "a key must be a name without dots (quote yes, no, on and off)"
            raise ConfigError(_join(where, key), value, hint)
        result[key] = _copy(value, _join(where, key)) if isinstance(value, Mapping) else value
    return result


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    path = path.strip()
    parts = path.split(".")
    if not equals or not text.strip() or not all(parts):
        form = "an override must read section.key=value (key=null for none, key='' for empty)"
        raise ConfigError(path, override, form)
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(path, text, f"must be a YAML value: {_first_line(error)}") from error
    section = tree
    for depth, part in enumerate(parts[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(".".join(parts[:depth]), section, f"is no section: {override!r}")
    section[parts[-1]] = _copy(value, path) if isinstance(value, Mapping) else value


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return str(error).splitlines()[0]


# --- types --------------------------------------------------------------------------------------


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError at `where`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        for option in args:
            if type(option) is type(value) and option == value:
                return option
    elif dataclasses.is_dataclass(hint):
        section = cast(type, hint)
        return value if isinstance(value, section) else parse(section, value, where)
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint in (bool, int, str):
        if type(value) is hint:
            return value
    elif origin in (tuple, list):
        if isinstance(value, list | tuple):
            return _convert_items(hint, value, where)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {key: _convert(args[1], value[key], _join(where, key)) for key in value}
    else:
        raise TypeError(f"{where}: a configuration field cannot have the type {hint!r}")
    raise ConfigError(where, value, f"must be {_describe(hint)}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    members = [arg for arg in args if arg is not type(None)]
    if value is None and len(members) < len(args):
        return None
    if len(members) == 1:  # Optional[X]: X's own message says more
        return _convert(members[0], value, where)
    # int | float: an int stays an int whatever the order in which the union was written
    exact = [member for member in members if type(value) is member]
    for member in exact + members:
        try:
            return _convert(member, value, where)
        except ConfigError:
            continue
    raise ConfigError(where, value, f"must be {' or '.join(map(_describe, args))}")


def _convert_items(hint: Any, value: Sequence[Any], where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        item_hints: Sequence[Any] = [args[0]] * len(value)
    else:
        item_hints = args
    if len(item_hints) != len(value):
        raise ConfigError(where, value, f"must be {_describe(hint)}")
    items = [
        _convert(item_hint, item, f"{where}[{i}]")
        for i, (item_hint, item) in enumerate(zip(item_hints, value, strict=True))
    ]
    return origin(items)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    simple = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    if hint in simple:
        return simple[hint]
    if hint is None or hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return "one of " + ", ".join(_show(option) for option in args)
    if origin is list or (origin is tuple and len(args) == 2 and args[1] is Ellipsis):
        return f"a list with {_describe(args[0])} each"
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(map(_describe, args))
    if dataclasses.is_dataclass(hint):
        return f"a section with {_names(hint)}"
    return "a section" if origin is dict else "a value"


def _names(cls: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls) if field.init) or "no keys"


def _suggest(cls: Any, key: str, where: str) -> str:
    """Words for an unknown key: the same name in a section below, else the nearest name here."""
    meant = [path for path in _paths(cls, where) if path.endswith(f".{key}")]
    if not meant:
        here = [field.name for field in dataclasses.fields(cls) if field.init]
        meant = [_join(where, name) for name in difflib.get_close_matches(key, here, n=1)]
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"unknown key; {hint}Known are {_names(cls)}"


def _paths(cls: Any, where: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        path = _join(where, field.name)
        yield path
        for member in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(member):
                yield from _paths(member, path)


# --- writing and comparing ----------------------------------------------------------------------


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _leaves(mapping: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        path = _join(where, key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = yaml.dump(
        _plain(value), Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").rstrip("\n")
