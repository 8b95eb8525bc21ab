"""`ckpt verify`: what is damaged, where, and by whom it was written."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated

from goku_runtime.checkpoint.tools import progress
from goku_runtime.checkpoint.tools.progress import ProgressBar


@pytest.fixture
def copied(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / "c"))


@pytest.mark.parametrize("topology", [*simulated.TOPOLOGIES, "version1"])
def test_whole(topology: str, saved: dict[str, Path], ckpt: Callable[..., Any]) -> None:
    done = ckpt("verify", saved[topology])
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{saved[topology]} is whole: ")
    assert "GiB/s" in done.out
    found = json.loads(ckpt("verify", saved[topology], "--json").out)
    assert (found["whole"], found["problems"], found["damages"]) == (True, [], [])
    sizes = json.loads((saved[topology] / "manifest.json").read_bytes())["files"]
    assert found["bytes"] == sum(each["size"] for each in sizes.values())


@pytest.mark.parametrize("topology", ["rows", "grid"])
def test_tensor_bytes_and_rank_are_named(
    topology: str, copied: Callable[[str], Path], ckpt: Callable[..., Any]
) -> None:
    path = copied(topology)
    draw = random.Random(1)
    for name, number in (("model.big", 0), ("model.big", -1), ("ema.wide", -1), ("model.bytes", 0)):
        file, place = simulated.place_of(path, name, number)
        original = file.read_bytes()
        simulated.flip(file, place + draw.randrange(4))
        done = ckpt("verify", path)
        assert done.code == 1
        assert name in done.out
        done = ckpt("verify", path, "--json")
        assert done.code == 1
        found = json.loads(done.out)
        (damage,) = found["damages"]
        assert damage["file"] == file.name
        assert damage["rank"] == int(file.name.split("_")[2])
        assert damage["start"] <= place < damage["stop"]
        assert damage["stop"] - damage["start"] <= 65536
        assert name in damage["tensors"]
        assert "model.empty" not in damage["tensors"], "it has no bytes"
        assert len(found["problems"]) == 1
        file.write_bytes(original)
    assert ckpt("verify", path).code == 0


def test_all_that_is_wrong_is_listed(
    copied: Callable[[str], Path], ckpt: Callable[..., Any]
) -> None:
    path = copied("rows")
    simulated.flip(*simulated.place_of(path, "model.big", 1))
    simulated.flip(*simulated.place_of(path, "model.big", 2))
    (path / "__0_0.distcp").unlink()
    (path / "more").touch()
    done = ckpt("verify", path)
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0] == f"{path} is damaged"
    assert len(lines) == 5
    for words in ("__0_0.distcp: missing", "more: extra", "by rank 1", "by rank 2"):
        assert sum(words in line for line in lines) == 1


@pytest.mark.parametrize("name", [".metadata", "__values.distcp", "index.json", "manifest.json"])
def test_other_files(name: str, copied: Callable[[str], Path], ckpt: Callable[..., Any]) -> None:
    path = copied("rows")
    simulated.flip(path / name, 60)
    done = ckpt("verify", path)
    assert done.code == 1
    assert name in done.out
    assert json.loads(ckpt("verify", path, "--json").out)["whole"] is False


def test_without_a_manifest_there_is_nothing_to_verify(
    copied: Callable[[str], Path], ckpt: Callable[..., Any]
) -> None:
    path = copied("rows")
    (path / "manifest.json").unlink()
    assert ckpt("verify", path).code == 2


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_is_cleared_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    stream = Terminal()
    with ProgressBar("verify", stream=stream) as bar:
        bar(1 << 30, 4 << 30)
        bar(2 << 30, 4 << 30)
        assert bar.done == 2 << 30
    drawn = stream.getvalue().split("\r")
    assert drawn[1].startswith("verify [#######.....")
    assert " 25%  1.00 GiB of 4.00 GiB  " in drawn[1]
    assert " GiB/s " in drawn[1]
    assert " 50%  2.00 GiB of 4.00 GiB  " in drawn[2]
    assert drawn[-1] == "\x1b[K"
    assert "\n" not in stream.getvalue()


def test_a_bar_is_not_redrawn_all_the_time() -> None:
    stream = Terminal()
    with ProgressBar("verify", stream=stream) as bar:
        for done in range(1000):
            bar(done, 1000)
    assert stream.getvalue().count("verify") < 100


def test_elsewhere_there_are_lines_if_asked_for() -> None:
    stream = io.StringIO()
    with ProgressBar("diff", stream=stream) as bar:
        bar(1, 2)
    assert stream.getvalue() == ""
    with ProgressBar("diff", stream=stream, shown=True) as bar:
        bar(0, 100)
        for done in range(100):
            bar(done + 1, 100)
    lines = stream.getvalue().splitlines()
    assert "   0%  0 B of 100 B  " in lines[0]
    assert " 100%  100 B of 100 B  " in lines[-1]
    assert len(lines) == 2, "one every two seconds, and the last"
    assert "\r" not in stream.getvalue()
    with ProgressBar("diff", stream=Terminal(), shown=False) as bar:
        bar(1, 2)
        assert bar._stream.getvalue() == ""  # type: ignore[attr-defined]


def test_the_commands_show_it_when_told(
    saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    for command in (
        ("verify", saved["rows"]), ("diff", saved["rows"], saved["one"]),
        ("reshard", saved["rows"], tmp_path / "r", "--ranks", 1), ("export", saved["rows"], tmp_path / "e"),
    ):  # fmt: skip
        if command[0] == "export":
            command += ("--prefix", "ema.")
        done = ckpt(*command, "--progress")
        assert done.code == 0
        assert f"{command[0]} [" in done.err
        assert "100%" in done.err
    assert ckpt("verify", saved["rows"], "--no-progress").err == ""


# ---- the disk


def test_probe(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    done = ckpt("probe", tmp_path, "--seconds", 0.2, "--bytes", "1MiB")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{tmp_path}: files of 1.00 MiB")
    assert lines[1].split()[0] == "backend"
    assert lines[-1].startswith("choice: CheckpointOptions(backend=")
    from goku_runtime.checkpoint import CheckpointOptions

    options = eval(lines[-1].removeprefix("choice: "), {"CheckpointOptions": CheckpointOptions})
    options.engine().close()
    found = json.loads(ckpt("probe", tmp_path, "--seconds", 0.1, "--bytes", "1MiB", "--json").out)
    assert found["bytes"] == 1 << 20
    assert found["trials"]
    assert list(tmp_path.iterdir()) == []
    done = ckpt("probe", tmp_path / "none")
    assert done.code == 2
    assert str(tmp_path / "none") in done.err
