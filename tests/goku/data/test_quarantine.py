"""quarantine.jsonl: a line for every item and reason, of each stage and source, once."""

from __future__ import annotations

import json
from pathlib import Path

from goku.data import Problem, Quarantine


def test_a_line_for_every_source_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "folder/quarantine.jsonl"
    damaged = Problem("a.png", "truncated")
    held_out = Problem("a.png", "truncated", source="unseen")
    first = Quarantine(path)
    assert first.add([damaged, damaged]) == 1
    assert first.add([held_out]) == 1
    assert first.add([damaged, held_out]) == 0
    # As a new process would: what is written is known.
    again = Quarantine(path)
    assert again.add([damaged, held_out]) == 0
    assert again.add([Problem("a.png", "the file is empty (0 bytes)")]) == 1
    assert again.add([damaged]) == 0
    assert Quarantine(path, "t2i").add([damaged]) == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["stage"], row["source"], row["reason"]) for row in rows] == [
        ("", "", "truncated"),
        ("", "unseen", "truncated"),
        ("", "", "the file is empty (0 bytes)"),
        ("t2i", "", "truncated"),
    ]
