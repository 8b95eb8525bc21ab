"""Checkpoints that earlier versions wrote stay loadable: folders under `golden`, named by format and torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from goku_runtime.checkpoint import load, read_values, save, verify

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
import golden_writer

FOLDERS = sorted(Path(__file__).with_name("golden").iterdir())
VERSION2 = [path for path in FOLDERS if not path.name.startswith("version1-")]


def empty(value: Any) -> Any:
    """The same keys and shapes, other contents."""
    if isinstance(value, dict):
        return {key: empty(each) for key, each in value.items()}
    return torch.full_like(value, 9) if torch.is_tensor(value) else None


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if torch.is_tensor(wanted):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    return type(found) is type(wanted) and found == wanted


def test_every_released_version_is_there() -> None:
    names = {path.name for path in FOLDERS}
    wanted = {"version1-torch2.13", *(f"version2-torch2.{minor}" for minor in (11, 12, 13))}
    assert wanted | {"version2-index2-torch2.13"} <= names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_golden_folder_loads(folder: Path) -> None:
    verify(folder)
    wanted = golden_writer.state(golden_writer.tensors())
    found = empty(wanted)
    load(found, folder)
    assert same(found, wanted), found
    assert not same(empty(wanted), wanted)
    assert read_values(folder)["run"] == wanted["run"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("folder", VERSION2, ids=lambda path: path.name)
def test_stock_dcp_loads_a_golden_folder(folder: Path) -> None:
    wanted = golden_writer.tensors()
    found = empty(wanted)
    step = {"state": {0: {"step": torch.tensor(0.0)}}}
    dcp.load({"model": found, "optimizer": step}, checkpoint_id=folder, no_dist=True)
    assert same(found, wanted)
    assert step["state"][0]["step"] == 7.0


@pytest.mark.parametrize("folder", VERSION2, ids=lambda path: path.name)
def test_it_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    """As a job of today would that goes on from it."""
    shutil.copytree(folder, tmp_path / "c")
    state = empty(golden_writer.state(golden_writer.tensors()))
    load(state, tmp_path / "c")
    save(state, tmp_path / "c", overwrite=True)
    again = empty(state)
    load(again, tmp_path / "c")
    assert same(again, golden_writer.state(golden_writer.tensors()))


@pytest.mark.long
def test_the_writer_writes_what_the_folders_hold(tmp_path: Path) -> None:
    script = Path(golden_writer.__file__)
    target = tmp_path / "c"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", str(script), str(rank), str(tmp_path / "store"), str(target)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(golden_writer.RANKS)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    test_a_golden_folder_loads(target)
    assert len(list(target.glob("*_0.distcp"))) == golden_writer.RANKS
