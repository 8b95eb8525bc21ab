"""Saves that copy nothing write what saves through windows write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from goku_runtime.checkpoint import Checkpointer, CheckpointOptions, load, staging, verify
from goku_runtime.checkpoint.index import CHUNK

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8)


def draw(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(len(shapes))
    made = {}
    for number, shape in enumerate(shapes):
        dtype = DTYPES[number % len(DTYPES)]
        made[f"t{number}"] = torch.randint(0, 2, shape).to(dtype)
    return made


def strided(tensor: Tensor) -> Tensor:
    """The same values, not as they lie in a record (but for one element, which always does)."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=8
    )
)  # fmt: skip
def test_the_same_bytes_from_where_they_lie_and_through_windows(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("extents")
    dense = draw(shapes)
    options = CheckpointOptions(window_bytes=4 * CHUNK)
    with Checkpointer(options=options) as saving:
        saving.save({"model": dense, "step": 3}, folder / "dense")
        saving.save(
            {"model": {k: strided(v) for k, v in dense.items()}, "step": 3}, folder / "wide"
        )
        saving.async_save({"model": dense, "step": 3}, folder / "async").result()
    for path in folder.glob("dense/*"):
        if path.name == "manifest.json":  # which says when
            continue
        for other in ("wide", "async"):
            assert (folder / other / path.name).read_bytes() == path.read_bytes(), path.name
    verify(folder / "dense")
    found: dict[str, Any] = {
        "model": {k: torch.zeros_like(v) for k, v in dense.items()}, "step": 0,
    }  # fmt: skip
    load(found, folder / "dense")
    assert all(torch.equal(found["model"][k], v) for k, v in dense.items())


def test_windows_are_for_what_does_not_lie_as_in_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_windows(*_: object, **__: object) -> None:
        raise AssertionError("a window was made")

    weight = nn.Parameter(torch.randn(300, 5))
    with Checkpointer() as saving, monkeypatch.context() as patched:
        patched.setattr(staging.Window, "__init__", no_windows)
        saving.save(
            {"weight": weight, "frozen": nn.Parameter(weight.detach(), False)}, tmp_path / "a"
        )
        for other in (weight.detach().T, weight.detach()[:, :2]):
            with pytest.raises(AssertionError, match="a window was made"):
                saving.save({"weight": other}, tmp_path / "b")
    found = {"weight": torch.zeros(300, 5), "frozen": torch.zeros(300, 5)}
    load(found, tmp_path / "a")
    assert torch.equal(found["weight"], weight)


def test_lazy_conjugates_are_resolved(tmp_path: Path) -> None:
    values = torch.randn(1000, dtype=torch.complex64)
    with Checkpointer() as saving:
        saving.save({"conj": values.conj(), "neg": values.conj().imag}, tmp_path / "c")
    found = {"conj": torch.zeros(1000, dtype=torch.complex64), "neg": torch.zeros(1000)}
    load(found, tmp_path / "c")
    assert torch.equal(found["conj"], values.conj().resolve_conj())
    assert torch.equal(found["neg"], -values.imag)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rows", [50, 50_000])  # in a window, and across several
def test_lazy_conjugates_of_a_part_are_resolved(
    mesh: DeviceMesh, tmp_path: Path, rows: int
) -> None:
    """The DTensor itself does not say that its part is one."""
    values = torch.randn(rows, 3, dtype=torch.complex64)
    wanted = {
        "conj": values.conj().resolve_conj(),
        "imag": -values.imag,
        "neg": -values.real,
        "lazy": values.conj().resolve_conj(),
    }
    state = {
        "conj": DTensor.from_local(values.conj(), mesh, [Shard(0)]),
        "imag": DTensor.from_local(values.conj().imag, mesh, [Shard(0)]),
        "neg": DTensor.from_local(torch._neg_view(values.real.contiguous()), mesh, [Shard(0)]),
        "lazy": DTensor.from_local(values, mesh, [Shard(0)]).conj(),
    }
    assert state["conj"]._local_tensor.is_conj()
    assert state["neg"]._local_tensor.is_neg()
    little = CheckpointOptions(window_bytes=256 << 10, staging_bytes=512 << 10)
    for number, options in enumerate([CheckpointOptions(), little]):
        with Checkpointer(options=options) as saving:
            saving.save(state, tmp_path / f"now-{number}")
            saving.async_save(state, tmp_path / f"later-{number}").result()
        for path in (tmp_path / f"now-{number}", tmp_path / f"later-{number}"):
            found = {name: torch.zeros_like(value) for name, value in wanted.items()}
            load(found, path)
            for name, value in wanted.items():
                assert torch.equal(found[name], value), (name, path.name)


def test_another_shape_under_the_same_placement_is_refused(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    """`data = ...` changes the DTensor alone, not the part that would be saved."""
    spread = DTensor.from_local(torch.ones(4, 6), mesh, [Shard(0)])
    with Checkpointer() as saving:
        saving.save({"w": spread}, tmp_path / "a")
        spread.data = DTensor.from_local(torch.ones(8, 6), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"w: this rank's part has shape \(4, 6\)"):
            saving.save({"w": spread}, tmp_path / "b")


def test_the_engine_is_kept_between_saves_and_given_back(tmp_path: Path) -> None:
    with Checkpointer() as saving:
        saving.save(draw([(100,)]), tmp_path / "1")
        engine = saving._engine
        assert engine is not None
        saving.save(draw([(100,), (7, 7)]), tmp_path / "2")
        assert saving._engine is engine
    assert saving._engine is None
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.create(str(tmp_path / "x"), 1)
