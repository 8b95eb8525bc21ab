"""What is staged is what would be written straight away, whatever lies where in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from goku_runtime.checkpoint import Checkpointer, CheckpointOptions, load, save, verify
from goku_runtime.checkpoint.staging import Window, _boxes


def state_of(seed: int) -> dict[str, Any]:
    """Dense tensors and others between them; 13 MiB, past the caches by more than one thread."""
    made = torch.Generator().manual_seed(seed)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=dtype)

    return {
        "dense": noise(1_300_000),
        "turned": noise(700, 900).t(),
        "conjugate": noise(50, 41, dtype=torch.complex64).conj(),
        "negative": noise(33, dtype=torch.complex64).conj().imag,
        "wide": noise(1, 31).expand(7, 31),
        "step": noise(300, 64)[::2],
        "parameter": torch.nn.Parameter(noise(1_300_001)),
        "half": noise(77).to(torch.bfloat16),
        "flags": noise(5) > 0,
        "scalar": noise(),
        "nothing": noise(0, 3),
        "tail": noise(500_000)[1:],
    }


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("staging_bytes", [None, 2 << 20])
def test_the_file_is_that_of_a_plain_save(
    tmp_path: Path, threads: int, staging_bytes: int | None
) -> None:
    before = torch.get_num_threads()
    options = CheckpointOptions(staging_bytes=staging_bytes, window_bytes=1 << 20)
    torch.set_num_threads(threads)
    try:
        with Checkpointer(options=options) as saving:
            for seed in (1, 2):  # into memory that holds the first
                state = state_of(seed)
                handle = saving.async_save(state, tmp_path / f"staged-{seed}")
                for value in state.values():
                    value.data.untyped_storage().fill_(0)
                handle.result()
    finally:
        torch.set_num_threads(before)
    for seed in (1, 2):
        save(state_of(seed), tmp_path / f"plain-{seed}")
        verify(tmp_path / f"staged-{seed}")
        plain, staged = (
            tmp_path / f"{kind}-{seed}" / "__0_0.distcp" for kind in ("plain", "staged")
        )
        assert staged.read_bytes() == plain.read_bytes()


class Copied(TorchDispatchMode):
    """Counts the bytes that torch copies."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            Copied.nbytes += result.nbytes
        return result


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_a_strided_tensor_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Not once for each window: 512 MiB in windows of 16 would be copied 32 times."""
    real = Window.copy

    def counted(self: Window, *arguments: Any, **options: Any) -> None:
        with Copied():
            real(self, *arguments, **options)

    monkeypatch.setattr(Window, "copy", counted)
    monkeypatch.setattr(Copied, "nbytes", 0)
    state = {"x": torch.randn(1000, 2000).t()}
    options = CheckpointOptions(staging_bytes=1 << 20, window_bytes=256 << 10)
    with Checkpointer(options=options) as saving:
        if how == "save":
            saving.save(state, tmp_path / "c")
        else:
            saving.async_save(state, tmp_path / "c").result()
    assert state["x"].nbytes > 20 * options.window_bytes
    assert 0 < Copied.nbytes <= state["x"].nbytes
    found = {"x": torch.zeros(2000, 1000)}
    load(found, tmp_path / "c")
    assert torch.equal(found["x"], state["x"])


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 4), (3, 1, 2, 2), (1, 1, 6)])
def test_every_range_of_a_strided_tensor(shape: tuple[int, ...]) -> None:
    wide = torch.arange(2 * torch.Size(shape).numel()).reshape(*shape, 2)
    for source in (wide[..., 0], wide.permute(*reversed(range(wide.dim())))[0]):
        dense = source.reshape(-1)
        for start in range(len(dense)):
            for stop in range(start + 1, len(dense) + 1):
                at = start
                for begin, piece in _boxes(source, start, stop):
                    assert begin == at
                    assert torch.equal(piece.reshape(-1), dense[at : at + piece.numel()])
                    at += piece.numel()
                assert at == stop
