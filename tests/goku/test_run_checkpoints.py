"""A run's checkpoints when training or a save fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from goku.run_checkpoints import RunCheckpoints, random_states
from goku.run_config import TrainConfig
from goku_runtime.checkpoint import Checkpointer, save


def test_what_training_failed_with_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpointer, "close", fail)
    with pytest.raises(SystemExit) as caught, RunCheckpoints(tmp_path, TrainConfig(), None):
        raise SystemExit(3)
    assert caught.value.code == 3
    with (
        pytest.raises(OSError, match="No space left"),
        RunCheckpoints(tmp_path, TrainConfig(), None),
    ):
        pass


def test_random_states_of_other_checkpoints(tmp_path: Path) -> None:
    """Of as many processes as this run has: in place. Of others, and of those that say no number: as the file is."""
    own, other = torch.zeros((1, 8), dtype=torch.uint8), torch.zeros((3, 8), dtype=torch.uint8)
    save({"rng": {"torch": own}}, tmp_path / "alike")
    save({"rng": {"torch": other}}, tmp_path / "others")
    nowhere = tmp_path / "not read"
    found, same = random_states(own, nowhere, {"processes": 1}, 1)
    assert (found is own, same) == (True, True)
    found, same = random_states(own, tmp_path / "alike", {}, 1)
    assert (found is own, same) == (True, True)
    for run in ({}, {"processes": 3}):
        found, same = random_states(own, tmp_path / "others", run, 1)
        assert (found.shape, found.dtype, same) == (other.shape, torch.uint8, False)
