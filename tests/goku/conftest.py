"""A trained model without training: a checkpoint of random weights, as a run leaves one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku.model import GokuTransformer, ModelConfig
from goku.text import TextConfig, load_text_encoder
from goku.vae import GokuVAE, VAEConfig, load_vae
from goku_runtime import checkpoint

MODEL = {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32}
TEXT = {"tiny_dim": 32, "tiny_heads": 2}


def _random(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Every weight away from zero: an adaLN-zero model would ignore its inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = GokuTransformer(config)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """trained_run(condition="none", vae=None, text=None, limits=None, area=None, shift=1.5, ...) -> a run's folder."""
    root = tmp_path_factory.mktemp("runs")
    vae_folder = root / "vae"
    tiny = VAEConfig(stem_width=8, width=8, encoder_depth=1, decoder_depth=1)
    GokuVAE(tiny, seed=3).save(vae_folder)
    made: dict[str, Path] = {}

    def make(
        *,
        condition: str = "none",
        vae: Path = vae_folder,
        text: dict[str, Any] | None = None,
        limits: list[int] | None = None,
        area: int | None = None,
        shift: float = 1.5,
        flow: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        conditioning: dict[str, Any] | None = None,
    ) -> Path:
        own = [condition, str(vae), text, limits, area, shift, flow, data, conditioning]
        key = json.dumps(own)
        if key in made:
            return made[key]
        config = ModelConfig(**MODEL, condition=condition)  # type: ignore[arg-type]
        encoder = TEXT if text is None else text
        run: dict[str, Any] = {
            "step": 7,
            "fingerprints": {
                "vae": load_vae(vae).fingerprint(),
                "text": load_text_encoder(TextConfig(**encoder)).fingerprint(),
            },
            "config": {
                "model": MODEL | {"condition": condition},
                "flow": {"shift": shift} | (flow or {}),
                "data": {"video_pixels": 1536, "image_pixels": 1024} | (data or {}),
                "vae": {"path": str(vae)},
                "text": encoder,
            },
        }
        if conditioning is not None:
            run["config"]["conditioning"] = conditioning
        if limits is not None:
            run["limits"] = {"grid": limits} | ({} if area is None else {"area": area})
        out = root / f"run{len(made)}"
        state = {"model": _random(config, 1), "ema": _random(config, 2), "run": run}
        checkpoint.save(state, out / "checkpoints" / "step_0000007", latest=True)
        made[key] = out
        return out

    return make


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """signal_at(owner, name, number, at=N): this process gets the signal in the call N (from 1) of owner.name; the list
    has an entry for every call."""

    def patch(owner: Any, name: str, number: int, *, at: int) -> list[int]:
        calls: list[int] = []
        wrapped = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(calls) + 1)
            if calls[-1] == at:
                os.kill(os.getpid(), number)
            return wrapped(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return patch
