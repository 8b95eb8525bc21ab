from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from goku.stopping import stop_signals
from goku.whole_file import write_whole

BEFORE, AFTER = b"before", b"after" * 1000


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_in_folders_that_were_not_there(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (BEFORE, AFTER):
        write_whole(path, content, durable=durable)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        write_whole(path, AFTER)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BEFORE)
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == BEFORE
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").mkdir() if name == "file" else (tmp_path / "file").write_bytes(BEFORE)
    with pytest.raises(OSError, match="file") as caught:
        write_whole(tmp_path / name, AFTER)
    assert str(tmp_path / "file") in str(caught.value)
    assert "partial" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["open", "os.fsync", "os.replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_ends_it_as_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(BEFORE)
    module, _, name = call.rpartition(".")
    target = os if module else __import__("goku.whole_file", fromlist=["open"])
    real: Callable[..., object] = getattr(target, name, open)

    def interrupted(*args: object) -> object:
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        result = real(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(target, name, interrupted, raising=False)
    with stop_signals(), pytest.raises(SystemExit) as left:
        write_whole(path, AFTER, durable=True)
    assert left.value.code == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == (AFTER if (call, when) == ("os.replace", "after") else BEFORE)
