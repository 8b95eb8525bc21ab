"""A run's checkpoints when training or a save fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from goku.run_checkpoints import RunCheckpoints
from goku.run_config import TrainConfig
from goku_runtime.checkpoint import Checkpointer


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
