"""A tiny world for whole runs: a few media, a small random VAE, a config of seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from goku.vae import GokuVAE, VAEConfig

TINY_VAE = {"stem_width": 8, "width": 8, "encoder_depth": 1, "decoder_depth": 1}


def _picture(seed: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((16, 16, 1), np.uint8))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images and two clips of different sizes, with captions."""
    folder = tmp_path_factory.mktemp("media")
    for i, (height, width) in enumerate([(32, 32), (32, 48), (48, 32)]):
        Image.fromarray(_picture(i, height, width)).save(folder / f"image{i}.png")
        (folder / f"image{i}.txt").write_text(f"picture number {i}")
    for i, frames in enumerate([5, 9]):
        path = folder / f"clip{i}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            for t in range(frames):
                pixels = np.roll(_picture(10 + i, 32, 48), 2 * t, axis=1)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        (folder / f"clip{i}.txt").write_text(f"clip number {i}")
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    GokuVAE(VAEConfig(**TINY_VAE), seed=3).save(folder)
    return folder


@pytest.fixture(scope="session")
def settings(
    media: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run's config as a mapping, without `out`; the latent cache is shared by all tests."""
    return {
        "seed": 5,
        "data": {
            "path": str(media),
            "image_pixels": 1536,
            "video_pixels": 1536,
            "max_frames": 9,
            "workers": 0,
            "cache": str(tmp_path_factory.mktemp("cache")),
        },
        "vae": {"path": str(vae_folder), "model": TINY_VAE},
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
        "packing": {"tokens_per_step": 48, "tokens_per_pack": 24},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "train": {
            "steps": 8,
            "precision": "float32",
            "device": "cpu",
            "eval_every": 4,
            "eval_times": 2,
            "checkpoint_every": 4,
            "keep_checkpoints": 3,
        },
    }


@pytest.fixture
def write_config(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """write_config(out, **sections) -> YAML file; given sections are merged into the settings."""

    def write(out: Path, **sections: Mapping[str, Any]) -> Path:
        merged = json.loads(json.dumps(settings)) | {"out": str(out)}
        for name, values in sections.items():
            if isinstance(values, dict) and isinstance(merged.get(name), dict):
                merged[name] |= values
            else:
                merged[name] = values
        path = tmp_path / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(merged))
        return path

    return write


@pytest.fixture(scope="session")
def goku() -> Callable[..., subprocess.CompletedProcess[str]]:
    """goku("train", "run.yaml", processes=1, limit=None): the command as a process of its own."""

    def run(
        *arguments: object, processes: int = 1, preexec: Callable[[], None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command += ["-m"]
        command += ["goku.cli", *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=preexec,
            check=False,
        )

    return run
