"""The part of docs/performance.md on what went well on GPUs, from what bench/gpu_check noted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_steps, harness, plots, training

NOT_MEASURED = "not measured"
STALE = "\u2020"
NOTE = (
    "`bench/gpu_check correctness`: the build, the tests of `tests/gpu` (every operator at production "
    "shapes, forward and gradients, beside its specification) and 50 packed training steps.\n"
)
HEAD = ("GPU", "check", "ended", "commit", "date")
TRAINING_HEAD = ("GPU", "model", "steps", "tokens", "first loss", "last loss", "loss", "commit")

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    """What bench/gpu_check noted.

    checks: GPU -> step -> how it ended. trained: the newest losses of each GPU and model. stale:
    (GPU, step) whose sources have changed since; a model's name for training's losses.
    """

    checks: Mapping[str, Mapping[str, Record]] = field(default_factory=dict)
    trained: Sequence[Record] = ()
    stale: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def read(cls, results: Path, root: Path) -> Checked:
        """From a folder of results.

        Raises:
            ValueError: files there that cannot be read.
        """
        checks: dict[str, dict[str, Record]] = {}
        stale = set()
        noted = gpu_steps.read_status(results)
        hashes = {name: s.all() for name, s in gpu_steps.check_sources().items()} if noted else {}
        for device, steps in sorted(noted.items()):
            checks[device] = {name: steps[name] for name in hashes if name in steps}
            stale |= {
                (device, name)
                for name, entry in checks[device].items()
                if entry["sources_sha256"] != hashes[name]
            }
        newest = {}
        for record in _lines(results / training.LOSSES):
            if record["device_type"] == "cuda":
                newest[record["hardware"]["device"], record["preset"]] = record
        stale |= {key for key, record in newest.items() if harness.is_stale(record, root)}
        shown = {device: steps for device, steps in checks.items() if steps}
        return cls(shown, tuple(newest[key] for key in sorted(newest)), frozenset(stale))

    def section(self, table: Table) -> str:
        """Both tables."""
        lines = [
            [device, name, f"{_ended(name, entry)}{self._mark(device, name)}", _commit(entry),
             entry["at"][:10]]
            for device, steps in self.checks.items()
            for name, entry in steps.items()
        ]  # fmt: skip
        trained = [
            [r["hardware"]["device"], r["preset"], str(len(r["losses"])), f"{r['tokens']:,}",
             _loss(r["losses"][0]), _loss(r["losses"][-1]),
             ("fell" if r["fell"] else "DID NOT FALL") + self._mark(*_key(r)), _commit(r)]
            for r in self.trained
        ]  # fmt: skip
        nothing = f"{NOT_MEASURED.capitalize()} on any GPU.\n"
        return "\n".join([
            NOTE, table(HEAD, lines) if lines else nothing,
            "### Fifty training steps\n", "![loss](performance/training.svg)\n",
            table(TRAINING_HEAD, trained) if trained else nothing,
        ])  # fmt: skip

    def picture(self) -> str:
        """The losses as curves."""
        curves = [
            plots.Curve(f"{r['hardware']['device']}: {r['preset']}", r["losses"],
                        _key(r) in self.stale)
            for r in self.trained
        ]  # fmt: skip
        return plots.curves("loss of every training step", curves)

    def _mark(self, device: str, name: str) -> str:
        return STALE if (device, name) in self.stale else ""


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} is no JSON: {error}") from error
        if not isinstance(record, dict) or not record.get("losses"):
            raise ValueError(f"{file}:{number} has no losses")
        found.append(record)
    return found


def _key(record: Record) -> tuple[str, str]:
    return record["hardware"]["device"], record["preset"]


def _ended(name: str, entry: Record) -> str:
    """With pytest's count: a file whose tests are all skipped ends well too."""
    said = f": {entry['said']}" if name.startswith("tests/") and entry["said"] else ""
    return f"{entry['ended']}{said}".replace("|", "\\|")


def _commit(entry: Record) -> str:
    return f"{entry['commit'][:12]}{' with changes' if entry['dirty'] else ''}"


def _loss(value: float | None) -> str:
    return "no number" if value is None else f"{value:.3f}"
