"""Saves that copy nothing write what saves through windows write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
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


def test_lazy_conjugates_of_a_part_are_resolved(tmp_path: Path) -> None:
    """The DTensor itself does not say that its part is one."""
    values = torch.randn(50, 3, dtype=torch.complex64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = [
            DTensor.from_local(part, mesh, [Shard(0)])
            for part in (
                values.conj(),
                values.conj().imag,
                torch.zeros_like(values),
                values.real * 0,
            )
        ]
        assert spread[0]._local_tensor.is_conj()
        assert spread[1]._local_tensor.is_neg()
        with Checkpointer() as saving:
            saving.save({"conj": spread[0], "neg": spread[1]}, tmp_path / "now")
            saving.async_save({"conj": spread[0], "neg": spread[1]}, tmp_path / "later").result()
        for name in ("now", "later"):
            load({"conj": spread[2], "neg": spread[3]}, tmp_path / name)
            assert torch.equal(spread[2].to_local(), values.conj().resolve_conj())
            assert torch.equal(spread[3].to_local(), -values.imag)
            for each in spread[2:]:
                each.zero_()
    finally:
        dist.destroy_process_group()


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
