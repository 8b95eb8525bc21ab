"""What two checkpoints do not have in common, read side by side a piece at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.plan import Described
from goku_runtime.checkpoint.tools.slabs import SLAB_BYTES, Slab, batches, empty_buffer
from goku_runtime.checkpoint.tools.source import Source, tensor_bytes
from goku_runtime.checkpoint.tools.units import count_text, shape_text, size_text, value_text
from goku_runtime.checkpoint.tree import Flat, leaves

if TYPE_CHECKING:
    from goku_runtime._io import Engine

__all__ = ["Difference", "TensorDifference", "diff"]

# Elements that are widened at once, to compare or subtract them.
_BLOCK = 1 << 18
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class TensorDifference:
    """How far the contents of one tensor differ.

    Attributes:
        elements: of the tensor.
        differing: how many of them differ.
        largest: absolute difference, of floating-point and complex tensors, where neither is NaN; None
            for others, and where one always is.
        nan: how many of the differing ones are NaN in one or both.
    """

    elements: int
    differing: int = 0
    largest: float | None = None
    nan: int = 0

    def add(self, other: TensorDifference) -> None:
        """Adds what another piece of the tensor gave; `elements` stays."""
        self.differing += other.differing
        self.nan += other.nan
        if other.largest is not None:
            self.largest = max(other.largest, self.largest or 0.0)

    def __str__(self) -> str:
        text = f"{self.differing:,} of {self.elements:,} elements differ"
        if self.largest is not None:
            text += f", by at most {self.largest:.6g}"
        return text + (f", {self.nan:,} of them NaN" if self.nan else "")


@dataclass
class Difference:
    """What `diff` found between checkpoints A and B.

    Attributes:
        only_a, only_b: names that one alone has, tensors and plain values.
        kinds: tensors of other dtypes or shapes: (in A, in B), in words.
        tensors: those whose contents differ.
        values: plain values that differ: (in A, in B), as JSON.
        nesting: the values have the same names and are nested otherwise, or keys are of another type.
        compared: how many tensors and values both have, and bytes of those tensors whose contents were
            compared.
    """

    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    kinds: dict[str, tuple[str, str]] = field(default_factory=dict)
    tensors: dict[str, TensorDifference] = field(default_factory=dict)
    values: dict[str, tuple[str, str]] = field(default_factory=dict)
    nesting: bool = False
    compared: tuple[int, int, int] = (0, 0, 0)

    @property
    def equal(self) -> bool:
        """Whether there is none."""
        found = (self.only_a, self.only_b, self.kinds, self.tensors, self.values, self.nesting)
        return not any(found)

    def to_text(self) -> str:
        """A line for each, and one that counts them."""
        tensors, values, nbytes = self.compared
        lines = [f"only in A: {name}" for name in self.only_a]
        lines += [f"only in B: {name}" for name in self.only_b]
        lines += [f"{name}: {a} in A, {b} in B" for name, (a, b) in self.kinds.items()]
        lines += [
            f"{name}: {_short(a)} in A, {_short(b)} in B" for name, (a, b) in self.values.items()
        ]
        lines += [f"{name}: {found}" for name, found in self.tensors.items()]
        if self.nesting:
            lines.append("the same names are nested otherwise, or keys are of other types")
        what = (
            f"{count_text(tensors, 'tensor')} ({size_text(nbytes)}), {count_text(values, 'value')}"
        )
        if self.equal:
            return f"equal: {what}"
        counts = (
            (len(self.tensors), "unequal in content"), (len(self.kinds), "of another dtype or shape"),
            (len(self.values), "unequal in value"), (len(self.only_a), "only in A"),
            (len(self.only_b), "only in B"),
        )  # fmt: skip
        shown = ", ".join(f"{count} {text}" for count, text in counts if count)
        return "\n".join([*lines, f"different: {shown or 'nesting'}; both have {what}"])

    def to_json(self) -> str:
        """The same for programs; a difference that is no number is a string."""
        tensors, values, nbytes = self.compared
        content = {
            "equal": self.equal,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "kinds": {name: {"a": a, "b": b} for name, (a, b) in self.kinds.items()},
            "values": {
                name: {"a": json.loads(a), "b": json.loads(b)}
                for name, (a, b) in self.values.items()
            },
            "tensors": {
                name: {
                    "elements": each.elements,
                    "differing": each.differing,
                    "largest": each.largest
                    if each.largest is None or math.isfinite(each.largest)
                    else str(each.largest),
                    "nan": each.nan,
                }
                for name, each in self.tensors.items()
            },
            "nesting": self.nesting,
            "compared": {"tensors": tensors, "values": values, "bytes": nbytes},
        }
        return json.dumps(content, indent=1, allow_nan=False)


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    tensors: str = "*",
    by_value: bool = False,
    options: CheckpointOptions | None = None,
    slab_bytes: int = SLAB_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compares two checkpoints of any versions, however they were divided among ranks.

    Args:
        a, b: the checkpoints.
        tensors: only names that match this shell pattern are compared, plain values too.
        by_value: compare floating-point elements as numbers: 0 and -0 are then equal, and all NaNs.
            Otherwise bit by bit, by which a NaN equals itself.
        options: of the reading engine.
        slab_bytes: read at once from each; twice that of each is in memory.
        progress: called with the bytes of A that were compared and all that are to be.

    Raises:
        ValueError: `slab_bytes` below 4096; a pattern that no name matches, by which all would be equal.
        CheckpointError: no checkpoint, or a damaged one.
        OSError: a file cannot be read.
    """
    if slab_bytes < 4096:
        raise ValueError(f"slab_bytes is {slab_bytes}; allowed: >= 4096")
    left, right = Source.open(a), Source.open(b)
    found = Difference()
    common = _compare_names(left, right, tensors, found)
    total = sum(tensor_bytes(each) for each in common.values())
    done = 0
    with (options or CheckpointOptions()).engine() as engine:
        for batch, one, other in _side_by_side(engine, left, right, common, slab_bytes):
            for slab in batch:
                part = _compare(slab.of(one), slab.of(other), slab.tensor.dtype, by_value)
                if part.differing:
                    count = math.prod(slab.tensor.shape)
                    found.tensors.setdefault(slab.name, TensorDifference(count)).add(part)
                done += slab.nbytes
            if progress is not None:
                progress(done, total)
    return found


def _compare_names(
    left: Source, right: Source, pattern: str, found: Difference
) -> dict[str, Described]:
    """Compares all but contents; gives the tensors whose contents can be compared."""

    def matching(names: Mapping[str, Any]) -> dict[str, Any]:
        return {name: each for name, each in names.items() if fnmatchcase(name, pattern)}

    ours, theirs = matching(left.tensors), matching(right.tensors)
    values, others = (matching(leaves(Flat(source.tree))) for source in (left, right))
    if pattern != "*" and not (ours or theirs or values or others):
        raise ValueError(f"tensors is {pattern!r}; nothing in either checkpoint has such a name")
    # A tensor here and a value there is in both lists.
    found.only_a = [name for name in ours if name not in theirs]
    found.only_a += [name for name in values if name not in others]
    found.only_b = [name for name in theirs if name not in ours]
    found.only_b += [name for name in others if name not in values]
    common = {}
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None:
            continue
        if (tensor.dtype, tensor.shape) == (other.dtype, other.shape):
            common[name] = tensor
        else:
            found.kinds[name] = _kind(tensor), _kind(other)
    for name, text in values.items():
        if name in others and others[name] != text:
            found.values[name] = text, others[name]
    both = sum(name in theirs for name in ours), sum(name in others for name in values)
    found.compared = *both, sum(tensor_bytes(each) for each in common.values())
    if pattern == "*" and not (found.only_a or found.only_b or found.values):
        found.nesting = _sorted(left.tree) != _sorted(right.tree)
    return common


def _side_by_side(
    engine: Engine, left: Source, right: Source, tensors: Mapping[str, Described], nbytes: int
) -> Iterator[tuple[list[Slab], Tensor, Tensor]]:
    """Batches of both, in buffers that are used again: the next ones are read meanwhile."""
    sources = (left, right)
    buffers = [(empty_buffer(nbytes), empty_buffer(nbytes)) for _ in range(2)]
    previous: tuple[list[Slab], list[Future[None]], tuple[Tensor, Tensor]] | None = None
    # A thread for each: a source reads one batch after another.
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for number, batch in enumerate(batches(tensors.items(), nbytes)):
            pair = buffers[number % 2]
            reading = [
                thread.submit(_read, engine, source, batch, buffer)
                for thread, source, buffer in zip((one, other), sources, pair, strict=True)
            ]
            if previous is not None:
                yield _read_batch(*previous)
            previous = batch, reading, pair
        if previous is not None:
            yield _read_batch(*previous)


def _read_batch(
    batch: list[Slab], reading: Sequence[Future[None]], buffers: tuple[Tensor, Tensor]
) -> tuple[list[Slab], Tensor, Tensor]:
    for each in reading:
        each.result()
    return batch, *buffers


def _read(engine: Engine, source: Source, batch: Sequence[Slab], buffer: Tensor) -> None:
    source.read(engine, [each for slab in batch for each in slab.wanted(buffer)])


# ---- contents


def _compare(one: Tensor, other: Tensor, dtype: torch.dtype, by_value: bool) -> TensorDifference:
    """How two dense pieces, as bytes, differ."""
    found = TensorDifference(0)
    words = one.numel() // 8 * 8
    # As words it takes a tenth of the time that bytes take.
    if torch.equal(one[:words].view(torch.int64), other[:words].view(torch.int64)) and torch.equal(
        one[words:], other[words:]
    ):
        return found
    step = _BLOCK * dtype.itemsize
    for start in range(0, one.numel(), step):
        ours, theirs = one[start : start + step], other[start : start + step]
        if not torch.equal(ours, theirs):
            found.add(_compare_block(ours, theirs, dtype, by_value))
    return found


def _compare_block(
    one: Tensor, other: Tensor, dtype: torch.dtype, by_value: bool
) -> TensorDifference:
    wide = _wide(dtype)
    differing = _bits_differ(one, other, dtype)
    if wide is None:
        return TensorDifference(0, int(differing.sum()))
    left, right = one.view(dtype).to(wide), other.view(dtype).to(wide)
    nan = left.isnan() | right.isnan()
    if by_value:
        differing = torch.where(nan, left.isnan() != right.isnan(), left != right)
    apart = (left - right).abs()[differing & ~nan]
    largest = float(apart.max()) if apart.numel() else None
    return TensorDifference(0, int(differing.sum()), largest, int((differing & nan).sum()))


def _bits_differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize in _INTEGERS:
        kind = _INTEGERS[dtype.itemsize]
        return one.view(kind) != other.view(kind)
    pairs = one.view(torch.int64).view(-1, 2) != other.view(torch.int64).view(-1, 2)
    return pairs.any(1)


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to subtract in; None for what is no number with a fraction."""
    if dtype.is_complex:
        return torch.complex128
    # torch converts none of the formats in which an element holds two values.
    return torch.float64 if dtype.is_floating_point and "_x2" not in str(dtype) else None


# ---- words


def _kind(tensor: Described) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape_text(tensor.shape)}"


def _short(text: str) -> str:
    text = value_text(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sorted(node: Any) -> str:
    """A tree as text that does not depend on the order of keys."""
    if isinstance(node, dict) and node.keys() == {"$dict"}:
        pairs = sorted(f"{json.dumps(key)}: {_sorted(child)}" for key, child in node["$dict"])
        return "{" + ", ".join(pairs) + "}"
    if isinstance(node, dict):
        pairs = sorted(f"{json.dumps(key)}: {_sorted(child)}" for key, child in node.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_sorted, node)) + "]"
    return json.dumps(node)
