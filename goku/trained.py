"""A trained model on disk: which checkpoint a run's folder means, what it says of itself, and loading it.

`Trained` is read without a tensor, from a checkpoint here or from an exported folder in `goku.export`; `Companions` are
the VAE and the text encoder that belong to it; `Loaded` has the weights too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from goku import config as parser
from goku.conditioning import ConditioningConfig
from goku.model import GokuTransformer, ModelConfig
from goku.text import LazyTextEncoder, TextConfig
from goku.vae import VAEDtype, VideoVAE, has_vae, load_vae
from goku_runtime import checkpoint

__all__ = [
    "Companions",
    "Loaded",
    "Trained",
    "Weights",
    "assemble",
    "check_fingerprint",
    "empty_model",
    "find_checkpoint",
    "load_checkpoint",
    "load_companions",
    "read_checkpoint",
    "read_run",
]

Weights = Literal["ema", "model"]
"""The averaged weights, or those that were trained."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint or an exported folder says without its weights.

    path: the checkpoint's folder, or the exported one; step: training steps done; checkpoint_id: SHA-256 of the
    checkpoint's manifest, which names its content; shift: the run's flow.shift; base_tokens: its flow.base_tokens where
    flow.resolution_shift is on, else None; pixels, image_pixels: its areas of a clip's frame and of an image; fps: of
    its clips, None where they kept their own; limits: the largest grid (t, h, w) of tokens trained on, axis by axis;
    area: the most tokens (h * w) of one frame, both None where they are not recorded; motion_caption: the template that
    training appended motion scores with; conditioning: which frames clips were given, None for a model that takes none
    (or where it is not recorded); fingerprints: of "vae" and "text"; weights, dtype: which weights, stored as what.
    """

    path: Path
    step: int
    checkpoint_id: str
    model: ModelConfig
    shift: float
    base_tokens: int | None
    pixels: int
    image_pixels: int
    fps: float | None
    limits: tuple[int, int, int] | None
    area: int | None
    motion_caption: str | None
    conditioning: ConditioningConfig | None
    fingerprints: Mapping[str, str]
    vae: Path
    vae_dtype: VAEDtype
    text: TextConfig
    weights: Weights = "ema"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Companions:
    """The VAE and the text encoder that a model was trained with."""

    vae: VideoVAE
    text: LazyTextEncoder


@dataclass(frozen=True)
class Loaded:
    """What sampling needs: the model (averaged weights), its VAE and text encoder, the step, what else is recorded."""

    model: GokuTransformer
    vae: VideoVAE
    text: LazyTextEncoder
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
            try:
                checkpoint.verify(damaged)
            except checkpoint.CheckpointError as error:
                raise checkpoint.CheckpointError(
                    f"{error} (no checkpoint of {root} is whole; to begin anew, move that folder away)"
                ) from error
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
        path = last_stage(run)
    if path is None:
        below = [child for child in sorted(run.iterdir()) if (child / "checkpoints").is_dir()]
        hint = f"; did you mean {below[0]}?" if below else ""
        raise ValueError(
            f"{run} holds no checkpoint; allowed: the `out` folder of a training run, or a checkpoint in it{hint}"
        )
    values = read_run(path)
    config: Mapping[str, Any] = values["config"]
    flow, data = config["flow"], config["data"]
    limits = values.get("limits") or {}
    grid = limits.get("grid")
    model = parser.parse(ModelConfig, config["model"], where="model")
    conditioning = None
    if model.condition == "frames":
        given = config.get("conditioning", {})
        conditioning = parser.parse(ConditioningConfig, given, where="conditioning")
    return Trained(
        path=path,
        step=values["step"],
        checkpoint_id=hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest(),
        model=model,
        shift=flow["shift"],
        base_tokens=flow["base_tokens"] if flow.get("resolution_shift") else None,
        pixels=data["video_pixels"],
        image_pixels=data["image_pixels"],
        fps=data.get("fps"),
        limits=None if grid is None else (grid[0], grid[1], grid[2]),
        area=limits.get("area"),
        motion_caption=_motion_caption(data),
        conditioning=conditioning,
        fingerprints={name: values["fingerprints"][name] for name in ("vae", "text")},
        vae=_vae_of(path, config),
        vae_dtype=config["vae"].get("dtype", "auto"),
        text=parser.parse(TextConfig, config["text"], where="text"),
    )


def read_run(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` keeps of its run beside the tensors: step, config, fingerprints and more.

    Raises ValueError when it is not one of `goku train`, CheckpointError when it is damaged.
    """
    run = checkpoint.read_values(path).get("run")
    known: dict[str, Any] = run if isinstance(run, dict) else {}
    for name in ("step", "config", "fingerprints"):
        if name not in known:
            raise ValueError(
                f"{path} is a checkpoint without run.{name}; allowed: those that `goku train` writes"
            )
    return known


def _vae_of(path: Path, config: Mapping[str, Any]) -> Path:
    """Where the VAE was that the checkpoint at `path` was trained with. Where it is gone and the run's folder
    was moved with it, in it or beside it (as in a recipe's): where it lies now. Its fingerprint says which it is."""
    vae, out = Path(config["vae"]["path"]), Path(config.get("out", ""))
    if has_vae(vae) or not out.is_absolute() or path.parent.name != "checkpoints":
        return vae
    now = Path(os.path.normpath(path.absolute().parents[1] / os.path.relpath(vae, out)))
    return now if has_vae(now) else vae


def _motion_caption(data: Mapping[str, Any]) -> str | None:
    """The data section's template, else the first that a source of it has."""
    sources = data.get("sources") or {}
    templates = [data, *sources.values()]
    return next((t["motion_caption"] for t in templates if t.get("motion_caption")), None)


def last_stage(out: Path) -> Path | None:
    """The last checkpoint of the last stage, in the recipe's order, that has one."""
    stages = parser.load(out / "recipe.yaml").get("stages")
    for name in reversed(list(stages) if isinstance(stages, Mapping) else []):
        path = find_checkpoint(out / "stages" / name / "checkpoints")
        if path is not None:
            return path
    return None


def load_checkpoint(
    about: Trained,
    device: torch.device,
    *,
    weights: Weights = "ema",
    companions: Companions | None = None,
) -> Loaded:
    """The weights of a checkpoint, verified as they are read, on `device`, with its VAE and text encoder.

    Raises CheckpointError when it is damaged, ValueError as `load_companions`, whose answer may be given.
    """
    model = empty_model(about.model)
    state: dict[str, Any] = {weights: dict(model.state_dict())}
    checkpoint.load(state, about.path, partial=True)
    return assemble(replace(about, weights=weights), model, device, companions)


def empty_model(config: ModelConfig) -> GokuTransformer:
    """A model on the CPU whose weights are to be loaded over; no time is spent on initial values."""
    with torch.device("meta"):
        model = GokuTransformer(config)
    return model.to_empty(device="cpu")


def assemble(
    about: Trained,
    model: GokuTransformer,
    device: torch.device,
    companions: Companions | None = None,
) -> Loaded:
    """The loaded model with its VAE and text encoder. ValueError as `load_companions`, whose answer may be given."""
    if companions is None:
        companions = load_companions(about, device)
    vae, text = companions.vae, companions.text
    return Loaded(model.to(device).eval(), vae, text, about.step, about)


def load_companions(about: Trained, device: torch.device) -> Companions:
    """The VAE and the text encoder on `device`; `text.release()` lets go of the encoder's weights.

    Raises ValueError where one of them cannot be loaded, does not fit the model, or is another than the model was
    trained with.
    """
    vae = load_vae(about.vae, dtype=about.vae_dtype)
    if vae.channels != about.model.latent_channels:
        raise ValueError(
            f"the VAE has {vae.channels} channels, the model {about.model.latent_channels}"
        )
    check_fingerprint(about, "vae", vae.fingerprint())
    text = LazyTextEncoder(about.text, device=device)
    check_fingerprint(about, "text", text.fingerprint())
    return Companions(vae.to(device), text)


def check_fingerprint(about: Trained, name: Literal["vae", "text"], found: str) -> None:
    """ValueError where the VAE or the text encoder, of fingerprint `found`, is another than was trained with."""
    if found != about.fingerprints[name]:
        part = "VAE" if name == "vae" else "text encoder"
        path = about.vae if name == "vae" else about.text.path
        place = "the embedded one" if path is None else path
        raise ValueError(
            f"{about.path}: the {part} is another than the one that the model was trained with: {place} has "
            f"fingerprint {found}, that of training {about.fingerprints[name]}"
        )
