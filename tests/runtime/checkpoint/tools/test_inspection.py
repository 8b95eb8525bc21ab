"""`inspect` says what is there, of every version, and finds the checkpoint that a folder means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated
import torch
import torch.distributed.checkpoint as dcp

from goku_runtime.checkpoint import CheckpointError, load, save, set_latest
from goku_runtime.checkpoint.tools import Source, find, inspect

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("topology", [*simulated.TOPOLOGIES, "version1"])
def test_all_of_it_for_programs(
    topology: str, saved: dict[str, Path], ckpt: Callable[..., Any]
) -> None:
    path = saved[topology]
    done = ckpt("inspect", path, "--json", "--parts")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    version1 = topology == "version1"
    assert found["version"] == (1 if version1 else 2)
    assert found["files"] == json.loads((path / "manifest.json").read_bytes())["files"]
    assert found["bytes"] == sum(each["size"] for each in found["files"].values())
    model = simulated.state()["model"]
    for name, tensor in model.items():
        each = found["tensors"][f"model.{name}"]
        assert each["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert each["shape"] == list(tensor.shape)
        assert each["bytes"] == tensor.nbytes
        volume = sum(torch.Size(size).numel() for _, _, _, size in each["parts"])
        assert volume == tensor.numel()
    assert found["values"]["optimizer.param_groups"] == [
        {"lr": 0.25, "betas": {"$tuple": [0.9, 0.95]}}
    ]
    assert found["values"]["step"] == 7
    assert (found["problems"], found["others"]) == ([], [])
    if version1:
        assert (found["writer"], found["ranks"]) == (None, 1)
    else:
        shape = simulated.TOPOLOGIES[topology].shape
        dims = [list(each) for each in zip("ab", shape, strict=False)]
        assert found["writer"]["meshes"] == [{"dims": dims}]
        assert found["ranks"] == torch.Size(shape).numel()
        assert found["writer"]["torch"] == torch.__version__


def test_parts_are_where_they_are_said_to_be(saved: dict[str, Path]) -> None:
    tensor = simulated.state()["model"]["big"]
    for place in Source.open(saved["grid"]).places("model.big"):
        (row, column), (rows, columns) = place.box
        wanted = tensor[row : row + rows, column : column + columns].contiguous()
        data = (saved["grid"] / place.file).read_bytes()
        assert place.offset is not None
        found = data[place.offset : place.offset + wanted.nbytes]
        assert found == wanted.numpy().tobytes()


def test_text(saved: dict[str, Path], ckpt: Callable[..., Any]) -> None:
    out = ckpt("inspect", saved["hybrid"]).out
    words = " ".join(out.split())
    for text in (
        "format goku-checkpoint 2",
        f"torch {torch.__version__}",
        "ranks 4; meshes a 2 x b 2",
        "tensors 11, ",
        "ema: 2 tensors of 38,916 elements",
        "model.big float32 [300, 129] 151.17 KiB 2 parts",
        "model.scalar float64 [] 8 B 1 part",
        "loss = nan",
        "optimizer.param_groups = [{'lr': 0.25, 'betas': (0.9, 0.95)}]",
    ):
        assert text in words
    out = ckpt("inspect", saved["hybrid"], "--tensors", "*.wide").out
    assert "tensors  2, " in out
    assert "model.big" not in out
    out = ckpt("inspect", saved["hybrid"], "--tensors", "ema.wide", "--parts").out
    assert "[0:3, 0:4, 0:9] in __" in out


def test_long_lists_are_cut_unless_they_are_asked_for(
    tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    save({f"t{i}": torch.zeros(1) for i in range(60)}, tmp_path / "c")
    out = ckpt("inspect", tmp_path / "c").out
    assert "and 20 more tensors: --tensors '*' lists all" in out
    assert "t59 " not in out
    assert "t59 " in ckpt("inspect", tmp_path / "c", "--tensors", "*").out


def test_a_golden_checkpoint_of_version_1() -> None:
    found = inspect(GOLDEN / "version1-torch2.13")
    assert (found.manifest.version, found.ranks, found.problems) == (1, 2, [])
    assert found.tensors["model.rows"].dtype == "float32"
    assert found.values["run.step"] == "7"
    assert found.values["run.loss"] == '{"$float": "inf"}'


@pytest.mark.parametrize("name", ["index.json", "state.json", "__2_0.distcp"])
def test_what_is_damaged_is_shown_with_the_rest(
    name: str, saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    path = Path(shutil.copytree(saved["rows"], tmp_path / "c"))
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    done = ckpt("inspect", path)
    assert done.code == 1
    assert f"DAMAGED  {name}: truncated" in done.out
    assert "__1_0.distcp" in done.out, "the files are listed all the same"
    found = json.loads(ckpt("inspect", path, "--json").out)
    assert found["problems"][0].startswith(f"{name}: truncated")


def test_an_index_and_values_that_contradict_each_other(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    from sealing import seal

    path = Path(shutil.copytree(saved["one"], tmp_path / "c"))
    tree = json.loads((path / "state.json").read_bytes())
    del tree["ema"]["wide"]
    (path / "state.json").write_text(json.dumps(tree))
    seal(path)
    assert inspect(path).problems == [f"{path} is damaged: state.json lacks 'ema.wide'"]
    tree["ema"] |= {"wide": {"$tensor": "ema.wide"}, "more": {"$tensor": "ema.more"}}
    (path / "state.json").write_text(json.dumps(tree))
    seal(path)
    assert inspect(path).problems == [f"{path} is damaged: state.json alone has 'ema.more'"]


# ---- folders


def test_a_folder_means_its_latest(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (8, 9, 10):
        save({"step": step}, root / f"step_{step}")
    (root / ".step_11.saving-0123456789abcdef").mkdir()
    (root / "notes").mkdir()
    (root / "notes.txt").touch()
    before = sorted(path.name for path in root.iterdir())
    for given in (root, tmp_path / "run"):
        assert find(given).path == root / "step_10"
        assert [name for name, _ in find(given).others] == ["step_9", "step_8"]
    set_latest(root, "step_9")
    assert find(root).path == root / "step_9"
    assert find(root / "step_8").path == root / "step_8"
    assert find(root / "step_8").others == ()
    (root / "step_9" / "state.json").unlink()
    found = find(root)
    assert found.path == root / "step_10"
    assert found.others[0] == ("step_8", None)
    assert "state.json: missing" in str(found.others[1][1])
    out = ckpt("inspect", tmp_path / "run").out
    assert out.startswith(f"{root / 'step_10'}\n")
    assert "beside   step_8\n" in out
    assert "beside   step_9  DAMAGED" in out
    assert sorted(path.name for path in root.iterdir()) == sorted([*before, "latest"])


def test_a_pattern_that_no_name_matches(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    save({"model": {"w": torch.ones(2)}, "step": 1}, tmp_path / "c")
    done = ckpt("inspect", tmp_path / "c", "--tensors", "zz*")
    assert (done.code, done.out) == (2, "")
    assert "tensors is 'zz*'; no tensor of" in done.err
    assert "model.w is what they are like" in done.err
    save({"step": 1}, tmp_path / "none")
    assert ckpt("inspect", tmp_path / "none", "--tensors", "zz*").code == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_of_torch_is_told_from_none(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "c", no_dist=True)
    for command in ("inspect", "verify"):
        done = ckpt(command, tmp_path / "c")
        assert done.code == 2
        assert "its .metadata is torch.distributed.checkpoint's, whose load reads it" in done.err
    with pytest.raises(CheckpointError, match=r"no checkpoint of ours; its \.metadata is torch"):
        load({"w": torch.zeros(2)}, tmp_path / "c")


def test_where_there_is_none(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad" / "c").mkdir(parents=True)
    (tmp_path / "bad" / "c" / "manifest.json").write_text("{")
    for name, words in (
        ("file", "is no directory"), ("none", "is no directory"), ("folder", "no checkpoint, nor is one in it"),
        ("bad", "holds no complete checkpoint; "),
    ):  # fmt: skip
        for command in ("inspect", "verify"):
            done = ckpt(command, tmp_path / name)
            assert (done.code, done.out) == (2, "")
            assert done.err.startswith(f"goku-runtime ckpt {command}: ")
            assert words in done.err
            assert done.err.count("\n") == 1
