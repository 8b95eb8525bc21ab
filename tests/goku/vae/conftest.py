"""Public VAEs with small random weights, built by diffusers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GROUPED: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    "AutoencoderKLHunyuanVideo": GROUPED,
    "AutoencoderKLCogVideoX": GROUPED,
}


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """build(name, seed=0, **fields): a model of diffusers, the same weights for the same seed."""
    diffusers = pytest.importorskip("diffusers")

    def make(name: str, seed: int = 0, **fields: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(diffusers, name)(**{**SMALL[name], **fields}).eval()

    return make


@pytest.fixture(scope="session")
def folders(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each of the three, as diffusers' save_pretrained writes it."""
    made = {}
    for name in SMALL:
        made[name] = tmp_path_factory.mktemp(name)
        build(name).save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def clip() -> Callable[..., torch.Tensor]:
    """clip(frames, height=16): a video (1, 3, frames, height, 24) of noise in [-1, 1]."""

    def make(frames: int, height: int = 16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(1, 3, frames, height, 24, generator=generator) * 2 - 1

    return make


@pytest.fixture(scope="session")
def latent() -> Callable[..., torch.Tensor]:
    """latent(frames, seed=2): (1, 16, frames, 2, 3), standard normal."""

    def make(frames: int, seed: int = 2) -> torch.Tensor:
        return torch.randn(1, 16, frames, 2, 3, generator=torch.Generator().manual_seed(seed))

    return make
