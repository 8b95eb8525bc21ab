"""The list of items that were set aside: quarantine.jsonl, one line per item, reason, source and stage."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from goku.data.errors import Problem


class Quarantine:
    """Appends to `path`: {time (seconds since 1970), stage, source, name, kind, reason} a line. One process writes."""

    def __init__(self, path: str | os.PathLike[str], stage: str = "") -> None:
        self.path = Path(path)
        self.stage = stage
        self._known = {
            tuple(str(row.get(part, "")) for part in ("stage", "source", "name", "reason"))
            for row in read_quarantine(path)
        }

    def add(self, problems: Iterable[Problem]) -> int:
        """Write those that this stage has no line of yet, or one with another reason; how many that were. OSError when
        it cannot be written."""
        lines = []
        for problem in problems:
            key = self.stage, problem.source, problem.name, problem.reason
            if key in self._known:
                continue
            self._known.add(key)
            row = {
                "time": time.time(),
                "stage": self.stage,
                "source": problem.source,
                "name": problem.name,
                "kind": problem.kind,
                "reason": problem.reason,
            }
            lines.append(json.dumps(row) + "\n")
        if lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                whole = file.read()
                # A line that a kill cut off must not swallow the next one.
                file.write(("\n" if whole and not whole.endswith("\n") else "") + "".join(lines))
        return len(lines)


def read_quarantine(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Every whole line of the file; [] when there is none. A last line that a kill cut off is passed by."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"stage", "name"} <= set(row):
            rows.append(row)
    return rows


def quarantine_message(
    problems: Sequence[Problem], listed: int, path: str | os.PathLike[str]
) -> str:
    """ "12 of 212 items are quarantined (damaged 8, caption 3, duplicate 1): see PATH"; "" when there are none."""
    if not problems:
        return ""
    kinds = Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    are = "item is" if listed == 1 else "items are"
    return f"{len(problems)} of {listed} {are} quarantined ({counts}): see {os.fspath(path)}"
