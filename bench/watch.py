"""Rows are written as they come, and what runs is noted before it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from bench import harness, timing
from bench.begun import Begun, lost
from bench.refusals import refusals

T = TypeVar("T")
# Rows that are to be written should the process end -> what notes so.
Mark = Callable[[Sequence[harness.Row]], Callable[[], None]]
GONE = "ended its process, or was stopped while it ran; --resume passes it over"


def unmarked(rows: Sequence[harness.Row]) -> Callable[[], None]:
    """Notes nothing: for callers who keep no results."""
    return lambda: None


def reason(error: BaseException) -> str:
    """An error for a row's note."""
    return f"{type(error).__name__}: {error}"[:400]


@dataclass
class Watch:
    """The rows of one benchmark in `folder`, and its note of what runs.

    until: time.time() after which nothing new begins.
    """

    name: str
    folder: Path
    device: torch.device
    until: float = float("inf")
    begun: Begun = field(init=False)
    _origins: dict[tuple[Any, ...], Mapping[str, Any]] = field(default_factory=dict)
    _last: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.begun = Begun(self.folder / f"{self.name}.begun", self.until)

    def recover(self, say: Callable[[str], None]) -> None:
        """Write the rows that a process which ended has left in its note."""
        records, late = self.begun.left()
        for record in records:
            what = f"{record['name']} {record['case']} {record['pack']}: {record['peer']}"
            if late:
                say(f"{what} ran when the process before was stopped, out of time: once more")
            else:
                self._append(record)
                say(harness.describe(record))

    def mark(self, rows: Sequence[harness.Row]) -> Callable[[], None]:
        """What notes `rows`, to be written should the process end from then on."""
        encoded = json.dumps([row.to_json(self._origin(row)) for row in rows], allow_nan=False)
        return lambda: self.begun.begin_encoded(encoded)

    def write(self, row: harness.Row) -> dict[str, Any]:
        """Append a row to the results; returns it as written."""
        record = row.to_json(self._origin(row))
        self._append(record)
        return record

    def forget(self) -> None:
        """Another problem begins: its rows look at clocks and repository again."""
        self._origins.clear()

    def _origin(self, row: harness.Row) -> Mapping[str, Any]:
        """Where the row comes from. The clocks are read, which takes a tenth of a second, for the

        first of the rows that are timed together and for the first that are not timed.
        """
        timed = row.timing is not None
        key = (tuple(row.sources), row.direction if timed else "")
        if key not in self._origins:
            self._origins[key] = harness.origin(row.sources, self.device)
        return self._origins[key]

    def _append(self, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{record['name']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Together(Generic[T]):
    """What was found of each call, and why others failed; lost: who of those took the context along."""

    found: Mapping[str, T]
    failed: Mapping[str, str]
    lost: str = ""


def together(
    calls: Mapping[str, timing.Call], measure: Callable[[Mapping[str, timing.Call]], dict[str, T]],
    marks: Mapping[str, Callable[[], None]], device: torch.device,
) -> Together[T]:  # fmt: skip
    """Measure calls beside each other; one that fails is left out and the others are measured again.

    Args:
        measure: of some of the calls; it runs one after the other.
        marks: by name, run before each of its calls.
    """
    failed: dict[str, str] = {}
    running = ""

    def marked(name: str, call: timing.Call) -> timing.Call:
        prepare, run = call

        def begin(i: int) -> Any:
            nonlocal running
            if running != name:
                timing.synchronise(device)  # what fails so late is the one's before
                running = name
                marks[name]()
            return prepare(i)

        return begin, run

    while True:
        running = ""
        able = {name: marked(name, call) for name, call in calls.items() if name not in failed}
        try:
            return Together(measure(able) if able else {}, failed)
        except refusals() as error:
            if not running:  # nobody's
                raise
            failed[running] = reason(error)
            if lost(device):
                return Together({}, failed, lost=running)
