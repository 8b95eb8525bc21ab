"""Which directory trees a crash can leave, given a log of what was asked of the file system.

The model is POSIX taken at its word; no file system does worse:

- Nothing that was written is on the disk before an fsync of its file that began after the write had ended:
  until then each sector of a write (512 or 4096 bytes) may be there or not, whatever came before or after
  it, and so may the file's new size. Bytes that are inside the size and were never written are zeros.
- No change of a directory (a name made, renamed, exchanged or removed) is on the disk before an fsync of that
  directory. Until then any subset of the changes may be, whatever their order; of two changes of one name
  the later one wins. A change is atomic: a rename removes the old name and makes the new one at once.
- fsync of a file does not make its name durable, nor fsync of a directory what is in its files.

A killed process is the case in which all changes survive.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from goku_runtime.checkpoint.journal import Journal, Operation

# A tree as it is found after a crash: a file's bytes, or a directory's entries.
Tree = dict[str, "bytes | Tree"]


class Step(NamedTuple):
    """An operation of the log, and what it wrote."""

    operation: Operation
    data: bytes = b""


class Recorder(Journal):
    """A journal that keeps the bytes that were written, too: read back at once, before they can go."""

    def __init__(self) -> None:
        super().__init__()
        self._data: dict[Operation, bytes] = {}

    def add(self, operation: Operation) -> None:
        if operation.kind == "write":
            with open(operation.path, "rb") as stream:
                stream.seek(operation.offset)
                self._data[operation] = stream.read(operation.length)
            assert len(self._data[operation]) == operation.length, operation
        super().add(operation)

    @property
    def steps(self) -> list[Step]:
        """All operations in the order of their ends, with their data."""
        return [Step(each, self._data.get(each, b"")) for each in self.operations]


@dataclass
class _Write:
    end_ns: int
    offset: int
    data: bytes | None  # None: the size becomes `offset`


@dataclass
class _File:
    durable: bytes = b""
    pending: list[_Write] = field(default_factory=list)

    def settle(self, begin_ns: int) -> None:
        covered = [each for each in self.pending if each.end_ns <= begin_ns]
        self.pending = [each for each in self.pending if each.end_ns > begin_ns]
        content = bytearray(self.durable)
        for each in covered:
            _write(content, each, lambda: True, 512)
        self.durable = bytes(content)

    def left(self, fate: Fate) -> bytes:
        content = bytearray(self.durable)
        sector = fate.draw.choice((512, 4096))
        for each in self.pending:
            if fate.keeps_data():
                tear = fate.torn and fate.draw.random() < 0.5
                keep = (lambda: fate.draw.random() < 0.5) if tear else (lambda: True)
                _write(content, each, keep, sector)
        if self.pending and fate.torn and fate.draw.random() < 0.3:
            size = fate.draw.choice((len(self.durable), fate.draw.randint(0, len(content))))
            del content[max(size, len(self.durable)) :]
        return bytes(content)


def _write(content: bytearray, write: _Write, keep: Callable[[], bool], sector: int) -> None:
    if write.data is None:
        del content[write.offset :]
        content.extend(bytes(write.offset - len(content)))
        return
    at, stop = write.offset, write.offset + len(write.data)
    while at < stop:
        end = min(at // sector * sector + sector, stop)
        if keep():
            content.extend(bytes(max(end - len(content), 0)))
            content[at:end] = write.data[at - write.offset : end - write.offset]
        at = end


@dataclass
class _Folder:
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[int, dict[str, _File | _Folder | None]]] = field(default_factory=list)

    def change(self, end_ns: int, change: dict[str, _File | _Folder | None]) -> None:
        self.pending.append((end_ns, change))
        _change(self.now, change)

    def settle(self, begin_ns: int) -> None:
        for end_ns, change in self.pending:
            if end_ns <= begin_ns:
                _change(self.durable, change)
        self.pending = [each for each in self.pending if each[0] > begin_ns]

    def left(self, fate: Fate) -> Tree:
        names = dict(self.durable)
        for _, change in self.pending:
            if fate.keeps_name():
                _change(names, change)
        return {name: node.left(fate) for name, node in sorted(names.items())}


def _change(names: dict[str, _File | _Folder], change: dict[str, _File | _Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


@dataclass
class Fate:
    """What happens to changes that no fsync has covered.

    Attributes:
        data, names: how likely one is to survive.
        torn: whether the sectors of one write may have fates of their own.
    """

    draw: random.Random
    data: float
    names: float
    torn: bool = False

    def keeps_data(self) -> bool:
        return self.draw.random() < self.data

    def keeps_name(self) -> bool:
        return self.draw.random() < self.names


def fates(draw: random.Random, samples: int) -> Iterator[Fate]:
    """A killed process; the corners of a power failure; then what chance brings."""
    yield Fate(draw, 1, 1)
    yield Fate(draw, 0, 0)
    yield Fate(draw, 0, 1)  # names without what they name, as in the files of zero length of old
    yield Fate(draw, 1, 0)
    for number in range(samples):
        likely = draw.choice((0.15, 0.5, 0.85))
        yield Fate(draw, draw.choice((0, 0.5, 1)), likely, torn=number % 2 == 0)


class Disk:
    """A file system below one directory, as far as a log has got.

    Args:
        base: what the paths of the log are below of.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = _Folder()

    def copy(self, base: Path) -> Disk:
        """The same disk, for a log of another base."""
        other = copy.deepcopy(self)
        other.base = base
        return other

    def _place(self, path: str) -> tuple[_Folder, str]:
        *above, name = Path(path).relative_to(self.base).parts
        folder = self.root
        for each in above:
            found = folder.now[each]
            assert isinstance(found, _Folder), path
            folder = found
        return folder, name

    def _folder(self, path: str) -> _Folder:
        if Path(path) == self.base:
            return self.root
        folder, name = self._place(path)
        found = folder.now[name]
        assert isinstance(found, _Folder), path
        return found

    def _file(self, path: str) -> _File:
        folder, name = self._place(path)
        found = folder.now[name]
        assert isinstance(found, _File), path
        return found

    def apply(self, step: Step) -> None:
        """Takes one operation of the log."""
        operation = step.operation
        path, end = operation.path, operation.end_ns
        match operation.kind:
            case "mkdir":
                folder, name = self._place(path)
                folder.change(end, {name: _Folder()})
            case "create":
                folder, name = self._place(path)
                assert name not in folder.now, path
                folder.change(end, {name: _File()})
            case "preallocate" | "truncate":
                self._file(path).pending.append(_Write(end, operation.length, None))
            case "write":
                self._file(path).pending.append(_Write(end, operation.offset, step.data))
            case "fsync":
                self._file(path).settle(operation.begin_ns)
            case "fsync_directory":
                if self.base == Path(path) or self.base in Path(path).parents:
                    self._folder(path).settle(operation.begin_ns)
            case "rename" | "exchange":
                folder, old = self._place(path)
                other, new = self._place(operation.other)
                assert folder is other, "renames stay in one directory"
                gone = folder.now[new] if operation.kind == "exchange" else None
                folder.change(end, {old: gone, new: folder.now[old]})
            case "unlink" | "rmdir":
                folder, name = self._place(path)
                folder.change(end, {name: None})
            case "rmtree":
                folder, name = self._place(path)
                self._empty(folder.now[name], end)
                folder.change(end, {name: None})
            case kind:
                assert kind == "close", kind

    def _empty(self, node: _File | _Folder, end_ns: int) -> None:
        if isinstance(node, _Folder):
            for name in list(node.now):
                self._empty(node.now[name], end_ns)
                node.change(end_ns, {name: None})

    def left(self, fate: Fate) -> Tree:
        """A tree that a crash now can leave."""
        return self.root.left(fate)


def digest(tree: Tree) -> bytes:
    """Equal for equal trees."""
    found = hashlib.sha256()
    for name, node in sorted(tree.items()):
        content = hashlib.sha256(node).digest() if isinstance(node, bytes) else digest(node)
        kind = b"f" if isinstance(node, bytes) else b"d"
        found.update(name.encode() + b"\0" + kind + content)
    return found.digest()


def put(tree: Tree, path: Path) -> None:
    """Makes a directory that holds a tree."""
    path.mkdir()
    for name, node in tree.items():
        if isinstance(node, bytes):
            (path / name).write_bytes(node)
        else:
            put(node, path / name)


def without(steps: Sequence[Step], kind: str, part: str) -> list[Step]:
    """A log from which the operations of a kind on paths that contain `part` are missing."""
    left = [
        step
        for step in steps
        if step.operation.kind != kind or part not in Path(step.operation.path).name
    ]
    assert len(left) < len(steps), (kind, part)
    return left
