"""What was saved comes back bit for bit and type for type, and stock DCP reads it too."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from goku_runtime.checkpoint import (
    CheckpointOptions,
    async_save,
    describe,
    load,
    read_values,
    save,
    verify,
)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def bits(tensor: Tensor) -> bytes:
    """The values of a tensor as bytes: NaN payloads and signed zeros included."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A tensor of every bit pattern the dtype has, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (0,), (4, 0, 2)], ids=str)
def test_every_dtype_and_shape_is_bit_exact(tmp_path: Path, shape: tuple[int, ...]) -> None:
    saved = {str(dtype): random_bits(shape, dtype) for dtype in DTYPES}
    wanted = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    save({"t": saved}, tmp_path / "c")
    load({"t": wanted}, tmp_path / "c")
    for name, tensor in saved.items():
        assert wanted[name].dtype == tensor.dtype
        assert wanted[name].shape == tensor.shape
        assert bits(wanted[name]) == bits(tensor), name


def strided(kind: str) -> Tensor:
    base = random_bits((6, 8), torch.float32)
    views = {
        "transposed": base.t(),
        "every second": base[::2, 1::3],
        "last rows of a larger storage": base[4:],
        "expanded": base[:1].expand(5, 8),
        "channels last": base.reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.view_as_complex(base.reshape(6, 4, 2)).conj(),
        "imaginary part of a conjugate": torch.view_as_complex(base.reshape(6, 4, 2)).conj().imag,
        "parameter": nn.Parameter(base),
        "not a leaf": nn.Parameter(base) * 1.0,
    }
    return views[kind]


@pytest.mark.parametrize(
    "kind",
    ["transposed", "every second", "last rows of a larger storage", "expanded", "channels last",
     "conjugate", "imaginary part of a conjugate", "parameter", "not a leaf"],
)  # fmt: skip
def test_any_strides(tmp_path: Path, kind: str) -> None:
    saved = strided(kind)
    before = bits(saved)
    save({"x": saved}, tmp_path / "c")
    assert bits(saved) == before, "saving changes nothing"
    wanted = torch.empty(saved.shape, dtype=saved.dtype)
    load({"x": wanted}, tmp_path / "c")
    assert bits(wanted) == before
    if kind != "expanded":
        target = strided(kind)
        with torch.no_grad():
            target.zero_()
        load({"x": target}, tmp_path / "c")
        assert bits(target) == before


@pytest.mark.parametrize("with_others", [False, True])
def test_zeros_without_memory(tmp_path: Path, with_others: bool) -> None:
    """Autograd makes such gradients; their address is 0."""
    state: dict[str, Any] = {"zeros": torch._efficientzerotensor(7)}
    if with_others:
        state |= {"dense": torch.ones(3), "turned": torch.ones(2, 3).t(), "none": torch.ones(0)}
    save(state, tmp_path / "c")
    async_save(state, tmp_path / "a").result()
    for name in ("c", "a"):
        found = {"zeros": torch.ones(7)}
        load(found, tmp_path / name, partial=True)
        assert not found["zeros"].any()


@pytest.mark.parametrize("window_bytes", [256 << 10, 16 << 20])
@pytest.mark.parametrize("wide", [False, True])
def test_a_dtype_that_pytorch_does_not_copy(tmp_path: Path, window_bytes: int, wide: bool) -> None:
    options = CheckpointOptions(window_bytes=window_bytes, staging_bytes=window_bytes)
    raw = random_bits((1500, 400), torch.uint8)
    turned = {
        "x": raw.view(torch.float4_e2m1fn_x2).t(),
        "y": raw.view(torch.float4_e2m1fn_x2)[:, ::2] if wide else raw[:, ::2],
    }
    save(turned, tmp_path / "c", options=options)
    async_save(turned, tmp_path / "a", options=options).result()
    for name in ("c", "a"):
        for shape in ((1500, 400), (400, 1500)):
            found = torch.zeros(shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
            found = found.t() if shape[0] == 1500 else found
            load({"x": found}, tmp_path / name, partial=True)
            assert torch.equal(found.view(torch.uint8), raw.t())


def test_only_the_values_of_a_view_are_stored(tmp_path: Path) -> None:
    save({"x": torch.zeros(1 << 20)[:4]}, tmp_path / "c")
    assert verify(tmp_path / "c").total_bytes < 8192


def test_shared_storage(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    save({"embed": weight, "head": weight, "row": weight[1]}, tmp_path / "c")
    other = torch.zeros(4, 3)
    load({"embed": other, "head": other, "row": other[1]}, tmp_path / "c")
    assert bits(other) == bits(weight)


def test_model_and_optimizer_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
        optimizer.zero_grad()
        model(torch.full((3, 4), value)).square().sum().backward()
        optimizer.step()

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}

    model, optimizer = build(0)
    step(model, optimizer, 0.5)
    save(state(model, optimizer), tmp_path / "c")
    step(model, optimizer, -1.5)

    again, again_optimizer = build(1)
    step(again, again_optimizer, 9.0)
    resumed = state(again, again_optimizer)
    resumed["optimizer"]["param_groups"][0]["lr"] = 7.0
    load(resumed, tmp_path / "c")
    again_optimizer.load_state_dict(resumed["optimizer"])
    assert again_optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert again_optimizer.param_groups[0]["lr"] == 0.1
    step(again, again_optimizer, -1.5)
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert bits(old) == bits(new)


PLAIN = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from([-0.0, 5e-324, 1.7976931348623157e308, "$tensor", "\ud800", "\x00"])
)  # fmt: skip
KEYS = st.text(max_size=5) | st.integers(-5, 5) | st.sampled_from(["$dict", "$tuple", "$float"])
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def exact(value: Any) -> Any:
    """A form in which equal means the same types and, for floats, the same bits."""
    if isinstance(value, dict):
        return {"dict": [(exact(key), exact(item)) for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return (type(value).__name__, [exact(item) for item in value])
    if isinstance(value, float):
        return ("float", "nan" if math.isnan(value) else struct.pack("d", value))
    return (type(value).__name__, value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(values=st.dictionaries(KEYS, VALUES, max_size=4))
def test_plain_values(values: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("values") / "c"
    save({"v": values}, path)
    assert exact(read_values(path)["v"]) == exact(values)
    wanted = {"v": None}
    load(wanted, path)
    assert exact(wanted["v"]) == exact(values)
    again = {"v": json_free_copy(values)}
    load(again, path)
    assert exact(again["v"]) == exact(values)


def json_free_copy(value: Any) -> Any:
    """The same dicts with every leaf replaced."""
    if isinstance(value, dict):
        return {key: json_free_copy(item) for key, item in value.items()}
    return "to be replaced"


def test_values_are_replaced_in_the_callers_dicts(tmp_path: Path) -> None:
    save({"a": {"x": 1, "l": [1, {"k": 2}]}, "n": None}, tmp_path / "c")
    inner: dict[str, Any] = {"l": [9], "x": 0}
    old_list = inner["l"]
    state = {"n": 5, "a": inner}
    load(state, tmp_path / "c")
    assert state == {"a": {"x": 1, "l": [1, {"k": 2}]}, "n": None}
    assert state["a"] is inner
    assert old_list == [9]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tensors_under_empty_keys(tmp_path: Path) -> None:
    """A name is the keys joined by dots, as DCP has it, whichever of them are empty."""
    saved: dict[str, Any] = {
        "": {"w": torch.ones(2), "": {"": torch.full((3,), 2.0)}, "n": 1},
        "w": torch.full((2,), 3.0),
        "a": {"": torch.full((1,), 4.0)},
    }
    save(saved, tmp_path / "c")
    assert sorted(describe(tmp_path / "c")) == ["..", ".w", "a.", "w"]
    for read in (load, lambda state, path: dcp.load(state, checkpoint_id=path, no_dist=True)):
        found: dict[str, Any] = {
            "": {"w": torch.zeros(2), "": {"": torch.zeros(3)}, "n": 0},
            "w": torch.zeros(2),
            "a": {"": torch.zeros(1)},
        }
        read(found, tmp_path / "c")
        assert found[""]["n"] == 1
        assert torch.equal(found[""]["w"], saved[""]["w"])
        assert torch.equal(found[""][""][""], saved[""][""][""])
        assert torch.equal(found["w"], saved["w"])
        assert torch.equal(found["a"][""], saved["a"][""])


def test_read_values_leaves_the_tensors_out(tmp_path: Path) -> None:
    save({"config": {"lr": 0.1, "empty": {}}, "model": {"w": torch.ones(2)}}, tmp_path / "c")
    assert read_values(tmp_path / "c") == {"config": {"lr": 0.1, "empty": {}}, "model": {}}


def test_a_state_without_tensors_and_an_empty_one(tmp_path: Path) -> None:
    save({"step": 3}, tmp_path / "a")
    save({}, tmp_path / "b")
    state = {"step": 0}
    load(state, tmp_path / "a")
    load({}, tmp_path / "b")
    assert state == {"step": 3}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_reads_the_tensors(tmp_path: Path) -> None:
    weight = torch.randn(3, 4).to(torch.bfloat16)
    save({"model": {"layer.weight": weight}, "step": 1}, tmp_path / "c")
    wanted = {"model": {"layer.weight": torch.zeros(3, 4, dtype=torch.bfloat16)}}
    dcp.load(wanted, checkpoint_id=tmp_path / "c", no_dist=True)
    assert bits(wanted["model"]["layer.weight"]) == bits(weight)


def test_the_files(tmp_path: Path) -> None:
    save({"w": torch.ones(3), "step": 1}, tmp_path / "made" / "on" / "the way" / "c")
    directory = tmp_path / "made" / "on" / "the way" / "c"
    names = {path.name for path in directory.iterdir()}
    ours = {"__0_0.distcp", "__0_0.crc", "index.json", "state.json", "manifest.json"}
    assert names == ours | {".metadata", "__values.distcp"}
    assert [path.name for path in directory.parent.iterdir()] == ["c"]
    manifest = json.loads((directory / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["version"]) == ("goku-checkpoint", 2)
    assert set(manifest["files"]) == names - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["size"] == (directory / name).stat().st_size
    report = verify(directory)
    assert report.files == {name: entry["size"] for name, entry in manifest["files"].items()}
    assert report.total_bytes == sum(report.files.values())
