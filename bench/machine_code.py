"""What a loop of a compiled kernel does, read from its machine code (SASS)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);", re.M)
_TARGET = re.compile(r"\b0x([0-9a-f]+)")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LOADS = ("LDG", "LDGSTS")  # the second copies to shared memory and waits for nothing


@dataclass(frozen=True)
class Loop:
    """One loop, the loops in it included.

    instructions: of one pass. counts: by name, without suffixes ("LDG", "SHFL").
    load_bytes, store_bytes: of global memory, a thread and pass.
    narrow: loads and stores of global memory of less than 16 bytes.
    """

    instructions: int
    counts: Mapping[str, int]
    load_bytes: int
    store_bytes: int
    narrow: int

    @property
    def asynchronous(self) -> bool:
        """Whether all it loads goes to shared memory ahead of its use."""
        return self.counts.get("LDGSTS", 0) > 0 and not self.counts.get("LDG", 0)


def loops(sass: str) -> list[Loop]:
    """Every loop: what lies between the target of a branch backwards and the branch."""
    found = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(sass)]
    place = {address: i for i, (address, _, _) in enumerate(found)}
    ranges = []
    for i, (address, name, rest) in enumerate(found):
        targets = [int(t, 16) for t in _TARGET.findall(rest)] if name.startswith("BRA") else []
        # The empty loop behind the end, of one branch to itself, is none.
        ranges += [(place[t], i) for t in targets if t < address and t in place]
    return [_loop([(name, rest) for _, name, rest in found[a : b + 1]]) for a, b in ranges]


def whole(sass: str) -> Loop:
    """All of a kernel as if it were one pass, for kernels without a loop over their rows."""
    return _loop([(m[2], m[3]) for m in _INSTRUCTION.finditer(sass)])


def main_loop(sass: str) -> Loop:
    """The loop over rows: the shortest that both loads and stores 8 bytes or more a thread.

    A loop over several samples is around it; copies of it (for queries and keys) are as long. Where
    there is none, all of the kernel.
    """
    both = [loop for loop in loops(sass) if loop.store_bytes >= 8 and loop.load_bytes >= 8]
    return min(both, key=lambda loop: loop.instructions, default=whole(sass))


def _loop(code: list[tuple[str, str]]) -> Loop:
    counts: Counter[str] = Counter()
    loaded = stored = narrow = 0
    for name, _ in code:
        stem = name.split(".")[0]
        counts[stem] += 1
        if stem in (*_LOADS, "STG"):
            width = _WIDTH.search(name)
            size = _BYTES[width[1]] if width else 4
            narrow += size < 16
            loaded += size if stem in _LOADS else 0
            stored += size if stem == "STG" else 0
    return Loop(len(code), counts, loaded, stored, narrow)
