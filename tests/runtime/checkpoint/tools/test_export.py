"""What is exported is what the Hugging Face libraries read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from goku_runtime.checkpoint import CheckpointError, save, verify
from goku_runtime.checkpoint.records import DTYPES
from goku_runtime.checkpoint.tools import export

WINDOW = 1 << 16
MODEL = simulated.state()["model"]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by safetensors' own reader, which refuses gaps and overlaps."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return simulated.same(dict(sorted(one.items())), dict(sorted(other.items())))


@pytest.mark.parametrize("topology", [*simulated.TOPOLOGIES, "version1"])
def test_contents(topology: str, saved: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = export(
        saved[topology], tmp_path / "out", prefix="model.", window_bytes=WINDOW,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert equal(read(tmp_path / "out"), MODEL)
    assert {name: list(names) for name, names in written.files.items()} == {
        "model.safetensors": list(MODEL)
    }
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written.nbytes == size
    assert seen[-1] == (size, size)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0, "tensors are aligned"


def test_every_dtype_that_both_have(tmp_path: Path) -> None:
    lacking = {"complex32", "complex128", "float4_e2m1fn_x2", "float8_e8m0fnu"}
    tensors = {
        name: torch.arange(24 * dtype.itemsize).to(torch.uint8).view(dtype).view(2, 12)
        for name, dtype in DTYPES.items()
    }
    tensors["bool"] = torch.arange(24).view(2, 12) % 2 == 0
    save({"w": tensors}, tmp_path / "c")
    wanted = {name: tensor for name, tensor in tensors.items() if name not in lacking}
    export(tmp_path / "c", tmp_path / "out", prefix="w.", tensors="[!cf]*")
    export(tmp_path / "c", tmp_path / "floats", prefix="w.", tensors="float[136]*")
    found = read(tmp_path / "out") | read(tmp_path / "floats")
    for name in wanted:
        if name.startswith("float8") or name == "complex64":
            export(tmp_path / "c", tmp_path / name, prefix="w.", tensors=name)
            found |= read(tmp_path / name)
    assert equal(found, wanted)
    for name in lacking:
        with pytest.raises(ValueError, match=rf"w\.{name}: dtype is torch\.{name}; allowed: bool"):
            export(tmp_path / "c", tmp_path / "x", prefix="w.", tensors=name)
    assert not (tmp_path / "x").exists()


def test_several_files_and_their_index(saved: dict[str, Path], tmp_path: Path) -> None:
    written = export(
        saved["columns"], tmp_path / "out", prefix="model.", max_shard_size=80_000,
        window_bytes=WINDOW,
    )  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    # `big` is too large for a file and has one to itself; the others share what room there is.
    assert names == [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in MODEL.values())}
    assert set(index["weight_map"]) == set(MODEL)
    for name in names:
        there = set(load_file(tmp_path / "out" / name))
        assert there == {t for t, file in index["weight_map"].items() if file == name}
        assert there == set(written.files[name])
    assert set(written.files[names[0]]) == {"big"}
    assert equal(read(tmp_path / "out"), MODEL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_conversion(dtype: torch.dtype, saved: dict[str, Path], tmp_path: Path) -> None:
    export(saved["grid"], tmp_path / "out", prefix="model.", dtype=dtype, window_bytes=WINDOW)
    wanted = {n: t.to(dtype) if t.is_floating_point() else t for n, t in MODEL.items()}
    assert equal(read(tmp_path / "out"), wanted)


def test_a_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = {"fine": torch.tensor([1.0, float("inf"), float("nan")]), "w": torch.tensor([1e6, 2.0])}
    save(state, tmp_path / "c")
    with pytest.raises(ValueError, match=r"w: holds 1e\+06; allowed: up to 65504"):
        export(tmp_path / "c", tmp_path / "out", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    export(tmp_path / "c", tmp_path / "out", tensors="fine", dtype=torch.float16)
    assert equal(read(tmp_path / "out"), {"fine": state["fine"].half()})


def test_names_need_not_be_ascii(tmp_path: Path) -> None:
    state = {'größe "q"\n': torch.arange(3), "層": torch.ones(2)}
    save(state, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "out")
    assert equal(read(tmp_path / "out"), state)


def test_what_is_not_allowed(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.json").write_text("{")
    path = saved["one"]
    for arguments, words in (
        (
            {"prefix": "emo."},
            r"no tensor with prefix 'emo\.'.*prefixes there are ema\., model\., opt",
        ),
        ({"tensors": "x"}, "that matches 'x'"),
        ({"prefix": "model.big"}, "its name would be ''"),
        ({"format": "onnx"}, "format is 'onnx'; allowed: safetensors, diffusers"),
        ({"format": "diffusers"}, "config is not given"),
        ({"config": tmp_path / "list.json"}, "holds a list; allowed: an object"),
        ({"config": tmp_path / "bad.json"}, "is no JSON"),
        ({"dtype": torch.int8}, "dtype is torch.int8; allowed: float16"),
        ({"max_shard_size": 0}, "max_shard_size is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            export(path, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: the name of a folder"):
        export(path, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        export(path, path / "out")
    with pytest.raises(FileNotFoundError):
        export(path, tmp_path / "out", config=tmp_path / "none.json")
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError):
        export(path, tmp_path / "there")
    left = sorted(each.name for each in tmp_path.iterdir())
    assert left == ["bad.json", "list.json", "there"]
    verify(path)


def test_damage_is_named_and_nothing_stays(
    saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    path = Path(shutil.copytree(saved["rows"], tmp_path / "in"))
    file, place = simulated.place_of(path, "model.big", 0)
    simulated.flip(file, place)
    with pytest.raises(CheckpointError, match=r"model\.big"):
        export(path, tmp_path / "out")
    done = ckpt("export", path, tmp_path / "out", "--prefix", "model.")
    assert done.code == 2
    assert "model.big" in done.err
    assert done.err.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["in"]
    # What is not read may be damaged: this one lies whole in rank 3's file.
    assert ckpt("export", path, tmp_path / "out", "--prefix", "optimizer.").code == 0


def test_the_command(saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    done = ckpt(
        "export", saved["rows"], tmp_path / "out", "--prefix", "ema.", "--dtype", "bfloat16",
        "--max-shard-size", "50KB",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "2 tensors, " in done.out
    assert " in 2 files in " in done.out
    ema = simulated.state()["ema"]
    assert equal(read(tmp_path / "out"), {n: t.bfloat16() for n, t in ema.items()})


def test_a_folder_that_diffusers_loads(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    model = AutoencoderTiny(**sizes, **blocks)
    model.to_json_file(tmp_path / "config.json")
    simulated.save({"ema": model.state_dict()}, tmp_path / "c", "rows")
    done = ckpt(
        "export", tmp_path / "c", tmp_path / "out", "--format", "diffusers", "--prefix", "ema.",
        "--config", tmp_path / "config.json", "--max-shard-size", "4KiB",
    )  # fmt: skip
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    assert "config.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    loaded = AutoencoderTiny.from_pretrained(tmp_path / "out")
    assert simulated.same(dict(loaded.state_dict()), dict(model.state_dict()))
