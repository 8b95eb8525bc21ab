"""`diff` names every difference, counts them exactly, and sees none where there is none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated
import torch

from goku_runtime.checkpoint import CheckpointError, save
from goku_runtime.checkpoint.records import DTYPES
from goku_runtime.checkpoint.tools import TensorDifference, diff


def pair(tmp_path: Path, one: dict[Any, Any], other: dict[Any, Any]) -> tuple[Path, Path]:
    save(one, tmp_path / "a")
    save(other, tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("topology", [*simulated.TOPOLOGIES, "version1"])
def test_equal_however_it_was_divided(
    topology: str, saved: dict[str, Path], ckpt: Callable[..., Any]
) -> None:
    found = diff(saved["grid"], saved[topology], slab_bytes=4096)
    assert found.equal
    state = simulated.state()
    nbytes = sum(
        t.nbytes for t in (*state["model"].values(), *state["ema"].values())
    ) + state["optimizer"]["state"][0]["step"].nbytes  # fmt: skip
    assert found.compared == (11, 3, nbytes)
    done = ckpt("diff", saved[topology], saved["grid"])
    assert (done.code, done.err) == (0, "")
    assert "\nequal: 11 tensors (" in done.out


@pytest.mark.parametrize("slab_bytes", [4096, 1 << 20])
def test_everything_that_differs_is_named(
    slab_bytes: int, saved: dict[str, Path], tmp_path: Path
) -> None:
    state = simulated.state()
    model = state["model"]
    model["big"][7, 100] += 0.5
    model["big"][299, 128] -= 2
    model["big"][150] = float("nan")
    model["bytes"][70000] += 1
    model["few"] = model["few"].float()
    model["wide"] = model["wide"].reshape(6, 36)
    model["new"] = torch.zeros(2)
    del model["flags"], state["loss"]
    state["step"] = 8
    state["more"] = None
    simulated.save(state, tmp_path / "b", "hybrid")
    seen: list[tuple[int, int]] = []
    found = diff(
        saved["columns"], tmp_path / "b", slab_bytes=slab_bytes,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert not found.equal
    assert found.only_a == ["model.flags", "loss"]
    assert found.only_b == ["model.new", "more"]
    assert found.kinds == {
        "model.wide": ("bfloat16 [6, 4, 9]", "bfloat16 [6, 36]"),
        "model.few": ("float16 [2, 3]", "float32 [2, 3]"),
    }
    assert found.values == {"step": ("7", "8")}
    assert set(found.tensors) == {"model.big", "model.bytes"}
    big = found.tensors["model.big"]
    assert (big.elements, big.differing, big.nan) == (300 * 129, 2 + 129, 129)
    original = simulated.state()["model"]["big"].double()
    assert big.largest == abs(original - model["big"].double()).nan_to_num(0).max().item()
    assert found.tensors["model.bytes"] == TensorDifference(70001, 1, None, 0)
    assert seen[-1] == (found.compared[2],) * 2
    text = found.to_text()
    for line in (
        "only in A: loss", "only in B: model.new", "model.few: float16 [2, 3] in A, float32 [2, 3] in B",
        "step: 7 in A, 8 in B", "model.bytes: 1 of 70,001 elements differ",
    ):  # fmt: skip
        assert line in text.splitlines()
    narrowed = diff(saved["columns"], tmp_path / "b", tensors="ema.*")
    assert narrowed.equal
    assert narrowed.compared[:2] == (2, 0)


@pytest.mark.parametrize("name", DTYPES)
def test_differing_elements_are_counted_in_every_dtype(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    one = torch.zeros(40 * dtype.itemsize, dtype=torch.uint8)
    other = one.clone()
    for element in (3, 17, 39):
        other[element * dtype.itemsize] = 1
    other[4 * dtype.itemsize - 1] = 1  # both ends of element 3
    a, b = pair(tmp_path, {"w": one.view(dtype)}, {"w": other.view(dtype)})
    found = diff(a, b).tensors["w"]
    assert (found.elements, found.differing) == (40, 3)
    countable = (dtype.is_floating_point or dtype.is_complex) and "_x2" not in name
    assert (found.largest is not None) == countable


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float16, 2.5), (torch.bfloat16, 2.5), (torch.float64, 2.5), (torch.complex64, 2.5),
     (torch.float8_e4m3fn, 2.5), (torch.int32, None)],
)  # fmt: skip
def test_the_largest_difference(dtype: torch.dtype, largest: float | None, tmp_path: Path) -> None:
    one = torch.tensor([1.0, 2.0, -4.0, 8.0]).to(dtype)
    other = torch.tensor([1.0, 3.0, -1.5, 8.0]).to(dtype)
    found = diff(*pair(tmp_path, {"w": one}, {"w": other})).tensors["w"]
    assert (found.differing, found.largest) == (2, largest)


def test_numbers_or_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FC00000, 0], dtype=torch.int32)
    one = bits.view(torch.float32)  # two kinds of NaN, a NaN, 0
    other = one.clone()
    other[1] = one[0]
    other[3] = -0.0
    a, b = pair(tmp_path, {"w": one}, {"w": other})
    assert diff(a, a).equal, "a NaN equals itself"
    found = diff(a, b).tensors["w"]
    assert (found.differing, found.nan, found.largest) == (2, 1, 0.0)
    assert diff(a, b, by_value=True).equal
    save({"w": torch.tensor([float("nan"), 1.0, float("inf"), 0.0])}, tmp_path / "c")
    found = diff(a, tmp_path / "c", by_value=True).tensors["w"]
    assert (found.differing, found.nan, found.largest) == (2, 2, None)
    assert diff(a, tmp_path / "c").tensors["w"].differing == 2


def test_keys_of_other_types_and_other_nestings(tmp_path: Path) -> None:
    a, b = pair(tmp_path, {0: 1, "e": {}}, {"0": 1})
    found = diff(a, b)
    assert found.nesting
    assert not found.equal
    assert "nested otherwise" in found.to_text()
    save({"y": {1: 2, 3: 4}, "x": 1}, tmp_path / "c")
    save({"x": 1, "y": {3: 4, 1: 2}}, tmp_path / "d")
    assert diff(tmp_path / "c", tmp_path / "d").equal, "the order of keys means nothing"
    save({"x": 1.0, "y": {3: True, 1: 2}}, tmp_path / "e")
    assert diff(tmp_path / "c", tmp_path / "e").values == {"x": ("1", "1.0"), "y.3": ("4", "true")}


def test_damage_is_no_difference(
    saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    path = Path(shutil.copytree(saved["rows"], tmp_path / "c"))
    file, place = simulated.place_of(path, "ema.big", 1)
    simulated.flip(file, place)
    with pytest.raises(CheckpointError, match=r"ema\.big.*written by rank 1"):
        diff(saved["rows"], path)
    done = ckpt("diff", path, saved["one"])
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "ema.big" in done.err


def test_the_command(tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    a, b = pair(
        tmp_path,
        {"w": torch.tensor([1.0, 2.0]), "pair": (1, 2)},
        {"w": torch.tensor([math.inf, 2.0]), "pair": (1, 3)},
    )
    done = ckpt("diff", a, b)
    assert done.code == 1
    assert done.out.splitlines() == [
        f"A is {a}, B is {b}",
        "pair: (1, 2) in A, (1, 3) in B",
        "w: 1 of 2 elements differ, by at most inf",
        "different: 1 unequal in content, 1 unequal in value; both have 1 tensor (8 B), 1 value",
    ]
    done = ckpt("diff", a, b, "--json")
    assert done.code == 1
    content = json.loads(done.out)
    assert content["equal"] is False
    assert content["tensors"] == {"w": {"elements": 2, "differing": 1, "largest": "inf", "nan": 0}}
    assert ckpt("diff", a, b, "--tensors", "w").code == 1
    # Nothing was compared: that is no "equal".
    done = ckpt("diff", a, b, "--tensors", "x*")
    assert (done.code, done.out.splitlines()[1:]) == (2, [])
    assert "tensors is 'x*'; nothing in either checkpoint has such a name" in done.err
    assert ckpt("diff", a, tmp_path / "none").code == 2
    with pytest.raises(ValueError, match="slab_bytes is 1; allowed"):
        diff(a, b, slab_bytes=1)
