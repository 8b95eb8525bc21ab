"""What goes wrong on one rank alone, and what goes wrong after the checkpoint has its name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import Retention, committing, latest, load, save

Run = Callable[..., str]
SCRIPT = Path(__file__).with_name("one_sided_processes.py")


@pytest.mark.parametrize(
    "case",
    [
        "no_thread",
        pytest.param("no_memory_to_warm", marks=pytest.mark.long),
        "a_placement_on_one_rank",
        pytest.param("other_paths", marks=pytest.mark.long),
    ],
)
def test_all_ranks_learn_of_it(run_processes: Run, tmp_path: Path, case: str) -> None:
    run_processes(2, SCRIPT, (case, {"root": str(tmp_path)}))


def test_a_process_that_ended_is_missed_at_once(run_processes: Run, tmp_path: Path) -> None:
    """Not after the two hours of the group, nor after the time for connecting."""
    case = ("gone_before_the_first_message", {"root": str(tmp_path)})
    run_processes(4, SCRIPT, case, expect=[3, 3, 9, 3])


def test_old_ones_that_cannot_be_removed_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "old")

    monkeypatch.setattr(committing, "prune", refused)
    with caplog.at_level(logging.WARNING):
        save({"w": torch.ones(3)}, tmp_path / "c", latest=True, retention=Retention(1))
    assert latest(tmp_path) == tmp_path / "c"
    assert "is saved; old ones were not removed" in caplog.text


def test_latest_that_cannot_be_moved_says_that_the_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(committing, "set_latest", refused)
    with pytest.raises(OSError, match="No space left") as caught:
        save({"w": torch.ones(3)}, tmp_path / "c", latest=True)
    assert "only `latest` was not moved" in caught.value.__notes__[0]
    found = {"w": torch.zeros(3)}
    load(found, tmp_path / "c")
    assert bool((found["w"] == 1).all())


def test_all_ranks_learn_that_only_latest_was_not_moved(run_processes: Run, tmp_path: Path) -> None:
    run_processes(2, SCRIPT, ("latest_is_not_moved", {"root": str(tmp_path)}), group_timeout=20)


def test_the_default_device_plays_no_part(tmp_path: Path) -> None:
    wide = torch.arange(20.0)
    state: dict[str, Any] = {"strided": wide[::2], "half": torch.ones(5, dtype=torch.float16)}
    with torch.device("meta"):
        save(state, tmp_path / "c")
    found = {
        "strided": torch.zeros(20)[::2], "half": torch.zeros(5, dtype=torch.float64),
    }  # fmt: skip
    with torch.device("meta"):
        load(found, tmp_path / "c", convert=True)
    assert torch.equal(found["strided"], wide[::2])
    assert bool((found["half"] == 1).all())
