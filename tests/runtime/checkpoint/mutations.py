"""JSON changed at random, as damage and malice would change it.

Everything is drawn from a `random.Random`, which hypothesis and a fuzzer's seed can both stand behind.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

SCALARS = [
    None, True, False, 0, 1, -1, 4, 5, 64, 4096, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**400,
    0.5, -0.0, float("inf"), float("nan"), "", ".", "a", "é", "\ud800", "nan", "float32", "int8",
    "__0_0.distcp", "../x", "0" * 8,
]  # fmt: skip
KEYS = ["", "a", "w", "size", "parts", "$", "$tensor", "$tuple", "$float", "$dict", 0, -1]
PIECES = [
    b"NaN", b"-Infinity", b"1e400", b"-0", b"1.0", b"9" * 5000, b"\\ud800", b"\\u0000", b"\xff",
    b"\xef\xbb\xbf", b"\0", b'"', b",", b"]", b"}", b"[", b"[[", b'{"a":', b'{"$tuple":[', b"0,",
]  # fmt: skip


def node(random: Random, depth: int = 3) -> Any:
    """Any JSON, with the names and tags of a checkpoint's files."""
    kind = random.randrange(8)
    if kind < 4 or not depth:
        return random.choice(SCALARS)
    few = [node(random, depth - 1) for _ in range(random.randrange(4))]
    if kind == 4:
        return few
    if kind == 5:
        return {str(random.choice(KEYS)): each for each in few}
    if kind == 6:
        return {"$dict": [[random.choice(KEYS), each] for each in few]}
    return {str(random.choice(KEYS)): node(random, depth - 1)}


def paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys on the way to everything in it."""
    if path:
        yield path
    if isinstance(content, dict):
        for key, child in content.items():
            yield from paths(child, (*path, key))
    elif isinstance(content, list):
        for i, child in enumerate(content):
            yield from paths(child, (*path, i))


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def mutated(content: Any, random: Random) -> Any:
    """A copy with one to three places dropped, replaced, moved by a little, doubled, ..."""
    content = copy.deepcopy(content)
    for _ in range(random.randrange(1, 4)):
        places = list(paths(content))
        if not places:
            return node(random)
        *way, last = random.choice(places)
        parent = at(content, tuple(way))
        old = parent[last]
        kind = random.choice(["drop", "replace", "nudge", "repeat", "swap", "tag", "name", "other"])
        if kind == "drop":
            del parent[last]
        elif kind == "nudge" and type(old) is int:
            parent[last] = old + random.choice([-1, 1, 64, -64])
        elif kind == "repeat" and isinstance(old, list):
            parent[last] = old + copy.deepcopy(old)
        elif kind == "repeat" and isinstance(parent, dict):
            parent[str(random.choice(KEYS))] = copy.deepcopy(old)
        elif kind == "swap" and isinstance(old, list):
            parent[last] = old[::-1]
        elif kind == "tag":
            parent[last] = {str(random.choice(KEYS)): old}
        elif kind == "name" and isinstance(last, str):
            parent[str(random.choice(KEYS))] = parent.pop(last)
        elif kind == "other":
            parent[last] = copy.deepcopy(at(content, random.choice(places)))
        else:
            parent[last] = node(random)
    return content


def damaged(text: bytes, random: Random) -> bytes:
    """Some bytes taken away, some put there, sometimes very often."""
    place = random.randrange(len(text) + 1)
    gone = random.choice([0, 0, 1, 2, 30])
    kind = random.randrange(3)
    if kind == 0:
        put = bytes(random.randrange(256) for _ in range(random.randrange(4)))
    elif kind == 1:
        put = random.choice(PIECES)
    else:
        put = text[place : place + random.randrange(1, 40)]
    return text[:place] + put * random.choice([1, 1, 1, 2, 100, 1500]) + text[place + gone :]


def mutated_text(text: bytes, random: Random) -> bytes:
    """Changed as JSON if it is that, as bytes if not, and sometimes then."""
    if random.randrange(4):
        try:
            return json.dumps(mutated(json.loads(text), random)).encode()
        except (ValueError, RecursionError):
            return damaged(text, random)
    return damaged(text, random)
