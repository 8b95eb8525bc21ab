from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from goku.data import DataConfig, decode, prepare, read_records
from goku.vae import GokuVAE, VAEConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_what_our_vae_gives(
    tmp_path: Path, write_dataset: Callable[[Path], Path], text: Any, dtype: torch.dtype
) -> None:
    folder = write_dataset(tmp_path / "media")
    config = DataConfig(path=str(folder), image_pixels=48 * 64, video_pixels=48 * 64, workers=0)
    small = VAEConfig(channels=4, stem_width=8, width=16, encoder_depth=1, decoder_depth=1)
    vae = GokuVAE(small, seed=0).to(dtype)
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert {item.modality for item in dataset.items} == {"image", "video"}
    for index, record in enumerate(read_records(folder)):
        sample = dataset.read(index)
        with torch.no_grad():
            expected = vae.encode((decode(record, config)[None].float() / 127.5 - 1).to(dtype))
        # The same code on the same input on the same machine: equal to the bit.
        assert torch.equal(sample.mean, expected.mean[0].float())
        assert torch.equal(sample.logvar, expected.logvar[0].float())
        assert not sample.mean.requires_grad
    other = prepare(config, GokuVAE(small, seed=1).to(dtype), text, cache_dir=tmp_path / "cache")
    assert not torch.equal(other.read(0).mean, dataset.read(0).mean)
    assert torch.equal(
        dataset.read(0).mean,
        prepare(replace(config, workers=1), vae, text, cache_dir=tmp_path / "cache").read(0).mean,
    )
