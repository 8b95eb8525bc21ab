"""A trained model on disk: which checkpoint a run's folder means, what it says of itself, and loading it.

`Trained` is read without a tensor, from a checkpoint here or from an exported folder in `goku.export`; `Loaded` has the
weights too. Beyond the sizes that it was trained on, RoPE's positions are scaled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from goku import config as parser
from goku.model import GokuTransformer, ModelConfig
from goku.requests import Request
from goku.text import TextConfig, TextEncoder, load_text_encoder
from goku.vae import VAEDtype, VideoVAE, load_vae
from goku_runtime import checkpoint

__all__ = [
    "Loaded",
    "Trained",
    "assemble",
    "beyond_limits",
    "empty_model",
    "find_checkpoint",
    "load_checkpoint",
    "position_scale",
    "read_checkpoint",
]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint or an exported folder says without its weights.

    path: the checkpoint's folder, or the exported one; step: training steps done; checkpoint_id: SHA-256 of the
    checkpoint's manifest, which names its content; shift: the run's flow.shift; pixels: its area of a clip's frame;
    limits: the largest grid (t, h, w) of tokens trained on, axis by axis, None where it is not recorded;
    motion_caption: the template that training appended motion scores with; fingerprints: of "vae" and "text".
    """

    path: Path
    step: int
    checkpoint_id: str
    model: ModelConfig
    shift: float
    pixels: int
    limits: tuple[int, int, int] | None
    motion_caption: str | None
    fingerprints: Mapping[str, str]
    vae: Path
    vae_dtype: VAEDtype
    text: TextConfig


@dataclass(frozen=True)
class Loaded:
    """What sampling needs: the model (averaged weights), its VAE and text encoder, the step, what else is recorded."""

    model: GokuTransformer
    vae: VideoVAE
    text: TextEncoder
    step: int
    about: Trained


def find_checkpoint(root: Path) -> Path | None:
    """The latest whole checkpoint in `root`, None when there never was one.

    Raises CheckpointError naming the damaged files when there are checkpoints but none is whole: starting anew in
    their place would be the last thing wanted.
    """
    path = checkpoint.latest(root)
    if path is None and root.is_dir():
        for damaged in sorted(root.glob("step_*"), reverse=True):
            checkpoint.verify(damaged)
    return path


def read_checkpoint(run: Path) -> Trained:
    """What the latest checkpoint of a run's folder (or one checkpoint) says.

    `run` may be a recipe's folder too: the last of its stages that has a checkpoint is then meant.

    Raises ValueError when there is no checkpoint, CheckpointError when it is damaged.
    """
    if not run.is_dir():
        raise ValueError(
            f"{run}: no such folder; allowed: the `out` folder of a training run, a checkpoint in it, "
            "or a folder of `goku export`"
        )
    path = run if (run / "manifest.json").exists() else find_checkpoint(run / "checkpoints")
    if path is None and (run / "recipe.yaml").is_file():
        path = _last_stage(run)
    if path is None:
        below = [child for child in sorted(run.iterdir()) if (child / "checkpoints").is_dir()]
        hint = f"; did you mean {below[0]}?" if below else ""
        raise ValueError(
            f"{run} holds no checkpoint; allowed: the `out` folder of a training run, or a checkpoint in it{hint}"
        )
    values = checkpoint.read_values(path)["run"]
    config: Mapping[str, Any] = values["config"]
    grid = (values.get("limits") or {}).get("grid")
    return Trained(
        path=path,
        step=values["step"],
        checkpoint_id=hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest(),
        model=parser.parse(ModelConfig, config["model"], where="model"),
        shift=config["flow"]["shift"],
        pixels=config["data"]["video_pixels"],
        limits=None if grid is None else (grid[0], grid[1], grid[2]),
        motion_caption=_motion_caption(config["data"]),
        fingerprints={name: values["fingerprints"][name] for name in ("vae", "text")},
        vae=Path(config["vae"]["path"]),
        vae_dtype=config["vae"].get("dtype", "auto"),
        text=parser.parse(TextConfig, config["text"], where="text"),
    )


def _motion_caption(data: Mapping[str, Any]) -> str | None:
    """The data section's template, else the first that a source of it has."""
    sources = data.get("sources") or {}
    templates = [data, *sources.values()]
    return next((t["motion_caption"] for t in templates if t.get("motion_caption")), None)


def _last_stage(out: Path) -> Path | None:
    """The last checkpoint of the last stage, in the recipe's order, that has one."""
    stages = parser.load(out / "recipe.yaml").get("stages")
    for name in reversed(list(stages) if isinstance(stages, Mapping) else []):
        path = find_checkpoint(out / "stages" / name / "checkpoints")
        if path is not None:
            return path
    return None


def load_checkpoint(
    about: Trained, device: torch.device, *, weights: Literal["ema", "model"] = "ema"
) -> Loaded:
    """The weights of a checkpoint, verified as they are read, on `device`, with its VAE and text encoder.

    Raises CheckpointError when it is damaged, ValueError when the VAE or the text encoder does not fit the model.
    """
    model = empty_model(about.model)
    state: dict[str, Any] = {weights: dict(model.state_dict())}
    checkpoint.load(state, about.path, partial=True)
    return assemble(about, model, device)


def empty_model(config: ModelConfig) -> GokuTransformer:
    """A model on the CPU whose weights are to be loaded over; no time is spent on initial values."""
    with torch.device("meta"):
        model = GokuTransformer(config)
    return model.to_empty(device="cpu")


def assemble(about: Trained, model: GokuTransformer, device: torch.device) -> Loaded:
    """The loaded model with its VAE and text encoder; ValueError where they do not fit it."""
    vae = load_vae(about.vae, dtype=about.vae_dtype)
    if vae.channels != about.model.latent_channels:
        raise ValueError(
            f"the VAE has {vae.channels} channels, the model {about.model.latent_channels}"
        )
    encoder = load_text_encoder(about.text)
    return Loaded(model.to(device).eval(), vae.to(device), encoder, about.step, about)


def position_scale(
    grid: tuple[int, int, int], limits: tuple[int, int, int] | None
) -> tuple[float, float, float]:
    """Factors of RoPE's positions (t, h, w) that put a grid's last position where the largest trained one was.

    1 on an axis within the limits, and where training saw a single position and so no scale; (limit - 1) / (size - 1)
    beyond. The rule is position interpolation (Chen et al., arXiv 2306.15595); using it on axes of video is ours.
    """
    if limits is None:
        return (1.0, 1.0, 1.0)
    scales = [
        (limit - 1) / (size - 1) if size > limit > 1 else 1.0
        for size, limit in zip(grid, limits, strict=True)
    ]
    return (scales[0], scales[1], scales[2])


def beyond_limits(
    request: Request, limits: tuple[int, int, int] | None, *, scaled: bool = True
) -> str | None:
    """A line that says how a request exceeds the trained sizes and what RoPE makes of it; None when it does not."""
    if limits is None or all(size <= most for size, most in zip(request.grid, limits, strict=True)):
        return None
    t, h, w = limits
    line = (
        f"{request.height} x {request.width}, {request.frames} frames: beyond the trained "
        f"{16 * h} x {16 * w}, {4 * (t - 1) + 1}"
    )
    if not scaled:
        return f"{line}; RoPE positions as they are"
    scale = position_scale(request.grid, limits)
    named = list(zip("thw", scale, request.grid, limits, strict=True))
    parts = [f"{name} {factor:.2f}" for name, factor, *_ in named if factor != 1]
    line += f"; RoPE positions scaled by {', '.join(parts)}" if parts else ""
    single = [name for name, _, size, most in named if size > most == 1]
    if single:
        line += f"; not along {', '.join(single)}, where training had one position"
    return line
