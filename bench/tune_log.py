"""What the tuner has found out, one line for every candidate of a row, and what it is about to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import begun
from bench.candidates import Config, Row
from goku.whole_file import write_whole

MAX_LINES = 2000  # of one operator's file: the oldest go
PATIENCE_SECONDS = 45.0  # what is compiled already, and its truth, take a few
USES = ("unused", "used")  # what is said of a row beside that whose place it takes


@dataclass
class Log:
    """bench/results/tune/<op>.jsonl: every candidate's time, and what runs now.

    A launch that breaks the context ends the process; the configuration that began last, and is in
    <op>.begun then, is left out from there on, unless the process was stopped because its time was up.

    until: time.time() after which nothing new begins. since: winners from before do not count.
    """

    op: str
    folder: Path
    origin: Mapping[str, str]
    until: float = float("inf")
    since: str = ""
    lines: list[str] = field(default_factory=list)
    begun: begun.Begun = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self.lines = self.file.read_text(encoding="utf-8").splitlines()
        self.begun = begun.Begun(
            self.folder / f"{self.op}.begun", self.until, patience=PATIENCE_SECONDS
        )
        left, late = self.begun.left()
        self.add([{**record, "status": "ended the process"} for record in left if not late])

    @property
    def file(self) -> Path:
        return self.folder / f"{self.op}.jsonl"

    def begin(self, row: Row, config: Config) -> None:
        """Note what is about to run for the first time."""
        record = {**named(self.op, row), **self.origin, "config": config}
        self.begun.begin([record])

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append lines; of more than MAX_LINES the last are kept."""
        if not records:
            return
        self.lines = [*self.lines, *(json.dumps(r) for r in records)][-MAX_LINES:]
        write_whole(self.file, "".join(line + "\n" for line in self.lines).encode())

    def _mine(self, row: Row) -> list[dict[str, Any]]:
        wanted = named(self.op, row) | dict(self.origin)
        records = [json.loads(line) for line in self.lines]
        return [r for r in records if all(r.get(k) == v for k, v in wanted.items())]

    def tuned(self, row: Row) -> bool:
        """Whether the row's configuration is a winner on this GPU from these sources."""
        return any(
            r["status"] == "winner"
            and r["measured_at"] >= self.since
            and r["config"] == row["config"]
            for r in self._mine(row)
        )

    def compared(self, row: Row, beside: Mapping[str, Config]) -> bool:
        """Whether the row as it is now has been timed beside the kernels whose place it takes, and says so."""
        wanted = {"config": row["config"], "beside": beside}
        known = [r for r in self._mine(row) if r["status"] in USES]
        known = [r for r in known if all(r[k] == v for k, v in wanted.items())]
        if not known or known[-1]["measured_at"] < self.since:
            return False
        return bool(known[-1]["status"] == USES[not row.get("unused")])

    def deadly(self, row: Row) -> list[Config]:
        """Configurations that ended a process; {} where that ran without the row's kernel."""
        return [r["config"] for r in self._mine(row) if r["status"] == "ended the process"]


def named(op: str, row: Row) -> dict[str, Any]:
    """What tells a row from an operator's others."""
    return {"op": op, **{k: row[k] for k in ("kernel", "size", "dtypes", "chip")}}
