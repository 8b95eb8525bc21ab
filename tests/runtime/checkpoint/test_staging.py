"""What is staged is what would be written straight away, whatever lies where in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import Checkpointer, CheckpointOptions, save, verify


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
