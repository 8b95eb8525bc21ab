"""The lock of a run's folder, where there are locks and where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from goku.run_folder import locked


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "runs/one"
    with locked(folder):
        with pytest.raises(ValueError, match="which another run is writing to"), locked(folder):
            pass
        with locked(tmp_path / "runs/two"):
            pass
    with locked(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    entered = False
    with pytest.warns(UserWarning, match="a second run in it"), locked(tmp_path):
        entered = True
    assert entered


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refused)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
