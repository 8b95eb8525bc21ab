"""W&B beside the training: what it is sent, and that nothing that it does ends or holds up anything."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from goku import media_log, media_wandb
from goku.media_wandb import WandbMedia, check_wandb

# What is used of wandb: it notes what it is told, and behaves as FAKE_WANDB says.
FAKE = """
import json, os, sys, time

class Error(Exception): pass
class CommError(Error): pass
class UsageError(Error): pass

behaviour = os.environ.get("FAKE_WANDB", "")

def note(**what):
    with open(os.environ["FAKE_WANDB_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def login(verify=True):
    assert not verify  # no network
    assert not sys.stdin.isatty() and sys.stdin.read() == ""
    if behaviour == "no key":
        raise UsageError("No API key configured.")

class Run:
    def log(self, values, step):
        note(logged=values, step=step)
    def finish(self):
        if behaviour == "hang":
            time.sleep(600)
        note(finished=True)

def init(**arguments):
    note(init=arguments, pid=os.getpid())
    if behaviour == "fail":
        print("wandb: ERROR retrying", file=sys.stderr)
        raise CommError("no network")
    if behaviour == "ask":
        input("enter your key: ")
    return Run()

def Image(path, caption): return ["image", path, caption]
def Video(path, caption, format): return ["video", path, caption, format]
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Puts a package of that name before all others; fake() is what it noted."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(package.parent))
    notes = tmp_path / "notes.jsonl"
    monkeypatch.setenv("FAKE_WANDB_LOG", str(notes))
    notes.touch()
    return lambda: [json.loads(line) for line in notes.read_text().splitlines()]


ITEMS = [("v/0", Path("a.png"), "a cat"), ("v/1", Path("b.mp4"), "a dog")]


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_wandb_gets_the_files(tmp_path: Path, fake: Callable[[], list[dict[str, Any]]]) -> None:
    for step in (7, 9):  # the training was resumed in between
        media = WandbMedia(tmp_path, "animals")
        assert media.show(ITEMS, step) == []
        assert media.close() == []
    first, logged, finished, second, *rest = fake()
    assert logged == {
        "logged": {"v/0": ["image", "a.png", "a cat"], "v/1": ["video", "b.mp4", "a dog", "mp4"]},
        "step": 7,
    }
    assert finished == {"finished": True}
    assert rest[0]["step"] == 9
    # One run of W&B, by a process of its own each.
    assert first["init"] == second["init"]
    assert first["init"] | {"id": ""} == {
        "project": "animals", "name": tmp_path.name, "dir": str(tmp_path), "id": "", "resume": "allow",
    }  # fmt: skip
    assert len(first["init"]["id"]) == 16
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("fail", "CommError: no network"), ("ask", "EOFError: ")]
)
def test_what_fails_is_told(
    behaviour: str,
    reason: str,
    tmp_path: Path,
    fake: Callable[[], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_WANDB", behaviour)
    media = WandbMedia(tmp_path, "animals")
    assert media.show(ITEMS, 7) == []
    until(lambda: media._process is not None and media._process.poll() is not None)
    monkeypatch.setenv("FAKE_WANDB", "")
    told = media.show(ITEMS, 9)  # it tells of the step before, and goes on
    assert len(told) == 1
    assert "W&B: step 7: " in told[0]
    assert reason in told[0]
    assert media.close() == []
    assert fake()[-1] == {"finished": True}


def test_nothing_waits_for_what_never_ends(
    tmp_path: Path, fake: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is gone in `finish`, as W&B's client retries for ever."""
    monkeypatch.setenv("FAKE_WANDB", "hang")
    media = WandbMedia(tmp_path, "animals", limit=4.0)
    began = time.monotonic()
    assert media.show(ITEMS, 7) == []
    (told,) = media.show(ITEMS, 9)
    assert "step 9 is left out, since step 7 is being sent" in told
    (told,) = media.close(wait=0.5)
    assert "step 7 is still being sent" in told
    assert time.monotonic() - began < 3
    until(lambda: any("logged" in note for note in fake()))
    # And without anybody looking it ends itself.
    process = media._process
    assert process is not None
    until(lambda: process.poll() is not None)
    assert media.close() == [f"W&B: step 7: not sent within 4 s ({tmp_path / 'wandb.log'})"]
    assert {"finished": True} not in fake()


def test_a_key_is_asked_for_before_training(
    fake: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    media_log.check_places(["wandb"])
    monkeypatch.setenv("FAKE_WANDB", "no key")
    with pytest.raises(ValueError, match=r"No API key configured\..*WANDB_MODE=offline"):
        media_log.check_places(["wandb"])
    with pytest.raises(ValueError, match=r"no answer of W&B in 0\.01 s"):
        check_wandb(wait=0.01)


def test_the_id_of_a_run_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the middle must not leave half an id, which would be used from then on."""

    def full(self: Path, data: str, encoding: str | None = None) -> int:
        with self.open("w") as file:
            file.write(data[:3])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            media_wandb.run_id(tmp_path)
        assert "No space" in media_log.MediaLog(["wandb"], tmp_path, "p").show([], 3)[0]
    assert list(tmp_path.iterdir()) == []
    assert media_wandb.run_id(tmp_path) == media_wandb.run_id(tmp_path)


def test_a_tensorboard_that_does_not_import_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its generated files raise what they like where they do not fit the protobuf that is there."""
    media_log.check_places(["tensorboard"])
    package = tmp_path / "tensorboard"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise TypeError('Descriptors cannot be created directly.')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match="cannot be imported: TypeError: Descriptors"):
        media_log.check_places(["tensorboard"])


def test_a_folder_of_that_name_is_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="pip install"):
        media_log.check_places(["wandb"])


def test_every_place_can_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goku.media_log.find_spec", lambda name: None)
    for place in media_log.PLACES:
        with pytest.raises(ImportError, match=rf"pip install 'goku\[{place}\]'"):
            media_log.check_places([place])
