"""From a folder to a VAE, ours or one of diffusers', refusing whatever does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from goku.vae.causal_vae import GokuVAE, VAEConfig
from goku.vae.cogvideox import CogVideoXVAE
from goku.vae.diffusers_vaes import DiffusersVAE, VAEDtype, load_diffusers_vae
from goku.vae.folder import CONFIG, WEIGHTS, read_config, read_folder
from goku.vae.hunyuan import HunyuanVideoVAE
from goku.vae.interface import STRIDES
from goku.vae.refusals import reason
from goku.vae.wan import WanVAE

_PUBLIC: dict[str, type[DiffusersVAE]] = {
    kind.name: kind for kind in (WanVAE, HunyuanVideoVAE, CogVideoXVAE)
}


def vae_folder(directory: str | os.PathLike[str]) -> Path:
    """Where in `directory` a VAE lies: itself, or `vae` in it, as a whole pipeline's folder has it."""
    folder = Path(directory)
    inner = folder / "vae"
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def has_vae(directory: str | os.PathLike[str]) -> bool:
    """Whether there is a VAE in `directory` (see `vae_folder`). Its config.json is written last: a folder without one
    is a training that was cut off while it wrote."""
    return (vae_folder(directory) / CONFIG).is_file()


def load_vae(
    directory: str | os.PathLike[str], *, dtype: VAEDtype = "auto"
) -> GokuVAE | DiffusersVAE:
    """The VAE in `directory` (see `vae_folder`), on the CPU, in eval mode.

    Either what `GokuVAE.save` wrote, or AutoencoderKLWan, AutoencoderKLHunyuanVideo or
    AutoencoderKLCogVideoX as diffusers' `save_pretrained` writes them. dtype: of weights and
    arithmetic; "auto" as saved (diffusers' fp16 becomes fp32).

    Raises ValueError that names the file: missing, truncated, altered, another class (with the
    reason), strides other than 4x8x8, a size out of range, weights that do not fit the configuration
    or are not finite, a latent_std that is not positive, and for GokuVAE no fingerprint or another
    than the weights'. ImportError when diffusers is needed and absent.
    """
    if dtype not in get_args(VAEDtype):
        raise ValueError(f"vae.dtype is {dtype!r}; allowed: {', '.join(get_args(VAEDtype))}")
    folder = vae_folder(directory)
    name = read_config(folder).get("_class_name")
    if name is None:
        vae = _load_goku_vae(folder)
        return vae if dtype == "auto" else vae.to(getattr(torch, dtype))
    if name not in _PUBLIC:
        raise ValueError(f"{folder / CONFIG}: {reason(name, _PUBLIC)}")
    return load_diffusers_vae(_PUBLIC[name], folder, dtype)


def is_causal(directory: str | os.PathLike[str]) -> bool:
    """Whether the VAE in `directory` is exactly causal (`VideoVAE.causal`), by its configuration alone.

    Raises ValueError where that cannot be read, or names a class that `load_vae` refuses.
    """
    folder = vae_folder(directory)
    name = read_config(folder).get("_class_name")
    if name is None:
        return GokuVAE.causal
    if name not in _PUBLIC:
        raise ValueError(f"{folder / CONFIG}: {reason(name, _PUBLIC)}")
    return _PUBLIC[name].causal


def _load_goku_vae(directory: Path) -> GokuVAE:
    written, state = read_folder(directory)
    config, path = directory / CONFIG, directory / WEIGHTS
    fingerprint = written.pop("fingerprint", None)
    vae = GokuVAE(_parse(written, config))
    _check_fit(state, vae.state_dict(), path)
    if not isinstance(fingerprint, str):
        raise ValueError(
            f"{config}: fingerprint = {fingerprint!r}; the one that GokuVAE.save writes is "
            f"required, for without it altered weights cannot be told"
        )
    vae.to(next(iter(state.values())).dtype)
    vae.load_state_dict(state)
    found = vae.fingerprint()
    if found != fingerprint:
        raise ValueError(
            f"{path} was altered since it was saved, or is not of the {CONFIG} beside it: its "
            f"fingerprint is {found}, {CONFIG} says {fingerprint}"
        )
    return vae.eval()


def _parse(written: Mapping[str, Any], path: Path) -> VAEConfig:
    fields = dict(written)
    kind, strides = fields.pop("_class", None), fields.pop("strides", None)
    if kind != GokuVAE.__name__:
        raise ValueError(f"{path}: _class = {kind!r}, allowed is {GokuVAE.__name__!r}")
    if strides != list(STRIDES):
        raise ValueError(f"{path}: strides (t, h, w) = {strides}, allowed are {list(STRIDES)}")
    wrong = sorted(fields.keys() ^ asdict(VAEConfig()).keys())
    if wrong:
        raise ValueError(f"{path}: fields missing or unknown: {', '.join(wrong)}")
    for name, value in fields.items():
        if type(value) is not int:
            raise ValueError(f"{path}: {name} = {value!r}, allowed are integers")
    try:
        return VAEConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    wrong = sorted(state.keys() ^ expected.keys())
    if wrong:
        raise ValueError(f"{path} does not fit {CONFIG}: missing or unknown {', '.join(wrong)}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path} does not fit {CONFIG}: {name} has shape {tuple(value.shape)}, "
                f"expected {tuple(expected[name].shape)}"
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} ({value.dtype}) holds values that are not finite")
    if not bool((state["latent_std"] > 0).all()):
        raise ValueError(f"{path}: latent_std holds values <= 0, allowed are positive ones")
    dtypes = sorted({str(value.dtype) for value in state.values()})
    if len(dtypes) != 1:
        raise ValueError(f"{path} mixes dtypes {', '.join(dtypes)}: one is allowed")
