"""Checkpointer.warm: what the first save needs time for is there before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import Checkpointer, CheckpointOptions, index, load, staging
from goku_runtime.checkpoint import layout as layouts
from goku_runtime.checkpoint.index import CHUNK


def state_of(value: float, count: int = 10_000) -> dict[str, Any]:
    return {"model": {"weight": torch.full((count,), value), "bias": torch.full((3,), value)}}


def value_in(path: Path, count: int = 10_000) -> float:
    state = state_of(0, count)
    load(state, path)
    return float(state["model"]["weight"][-1])


def no_more(*_: object, **__: object) -> None:
    raise AssertionError("warm() has made it already")


def test_nothing_is_made_by_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer() as saving:
        saving.warm(state_of(1))
        assert saving._staged is not None
        layout, memory, _ = saving._staged
        assert not list(tmp_path.iterdir())
        for owner, name in (
            (staging.Memory, "__init__"), (layouts, "make_plan"), (index, "to_json"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, no_more)
        saving.async_save(state_of(2), tmp_path / "2").result()
        assert saving._staged[:2] == (layout, memory)
    assert value_in(tmp_path / "2") == 2


def test_with_little_memory_the_ring_is_made(tmp_path: Path) -> None:
    options = CheckpointOptions(staging_bytes=4 * CHUNK, window_bytes=4 * CHUNK)
    with Checkpointer(options=options) as saving:
        saving.warm(state_of(1, 400_000))
        ring = list(saving._ring)
        assert saving._staged is None
        assert len(ring) == 1
        saving.async_save(state_of(2, 400_000), tmp_path / "c").result()
        assert saving._ring == ring
    assert value_in(tmp_path / "c", 400_000) == 2


def test_another_layout_is_made_anew(tmp_path: Path) -> None:
    with Checkpointer() as saving:
        saving.warm(state_of(1))
        saving.async_save(state_of(2, 20_000), tmp_path / "c").result()
    assert value_in(tmp_path / "c", 20_000) == 2
