"""Public VAEs in diffusers' folder layout: what the three wrappers have in common, and the loading.

diffusers applies no scale in `encode` and `decode`: its pipelines do, each by its own formula.
`normalise` is that formula, (z - mean) / std per channel, in fp32. A posterior is what diffusers
answers, logvar within [-30, 20].

diffusers is imported when a folder is loaded, never before.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from goku.vae.folder import CONFIG
from goku.vae.interface import STRIDES, Copies, Posterior, check_latent, check_video

VAEDtype = Literal["auto", "float32", "bfloat16"]

# Part of every fingerprint: raise it when a wrapper makes other latents of the same weights.
_VERSION = 1


class DiffusersVAE(nn.Module):
    """A VAE of diffusers behind `goku.vae.VideoVAE`, whose shapes and errors hold.

    inner: the model as diffusers built it, in the dtype in which it is to work.
    mean, std: one value per latent channel, of `normalise`.
    Without gradient throughout: a public VAE is used, not trained. A subclass says which class of
    diffusers it wraps (`name`), what of a configuration it cannot use (`check`) and how it decodes
    piece by piece.
    """

    name: ClassVar[str]
    causal = False
    # Attributes of `inner` that are not configuration, but decide how latents are cut in time.
    _cutting: ClassVar[tuple[str, ...]] = ()

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, inner: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.inner = inner
        self._fingerprint: tuple[object, str] | None = None
        self._copies = Copies()
        self.register_buffer("latent_mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("latent_std", torch.tensor(std, dtype=torch.float32))
        self.eval().requires_grad_(False)

    @classmethod
    def check(cls, config: Mapping[str, Any]) -> None:
        """Raises ValueError with the field and its value when this configuration cannot be used."""
        raise NotImplementedError

    @classmethod
    def wrap(cls, inner: Any) -> DiffusersVAE:
        """The wrapper of a model that diffusers built. normalise = z * scaling_factor; a subclass may say otherwise."""
        channels = inner.config.latent_channels
        std = [1.0 / scaling_factor(inner.config)] * channels
        return cls(inner, [0.0] * channels, std)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent position as (time, height, width)."""
        return STRIDES

    @property
    def channels(self) -> int:
        """Latent channels."""
        return len(self.latent_mean)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations; means and videos that come out of bf16 are fp32."""
        found: torch.dtype = next(self.inner.parameters()).dtype
        return found

    @torch.no_grad()
    def encode(self, video: Tensor) -> Posterior:
        """The posterior of a video, raw, in fp32."""
        check_video(video)
        with torch.autocast(video.device.type, enabled=False):
            mean, logvar = self._moments(video.to(self.dtype))
        return Posterior(mean.float(), logvar.float())

    def _moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        found = self.inner.encode(video).latent_dist
        return found.mean, found.logvar

    def decode(self, latent: Tensor) -> Tensor:
        """The video of a raw latent, in fp32."""
        return torch.cat(list(self.decode_stream(latent)), dim=2)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """`decode` in pieces (B, 3, t, H, W), in the steps in which diffusers' own `decode` works."""
        check_latent(latent, self.channels)
        pieces = self._pieces(latent.to(self.dtype))
        while True:
            # Around each step alone, not around the yield: the caller's code runs there.
            with torch.no_grad(), torch.autocast(latent.device.type, enabled=False):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece.float()

    def _pieces(self, latent: Tensor) -> Iterator[Tensor]:
        raise NotImplementedError

    def normalise(self, latent: Tensor) -> Tensor:
        """(latent - mean) / std per channel, in fp32: what the class's own pipelines compute."""
        mean, std = self._statistics(latent)
        return (latent.float() - mean) / std

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of `normalise`, in fp32."""
        mean, std = self._statistics(latent)
        return latent.float() * std + mean

    def fingerprint(self) -> str:
        """SHA-256 of class, configuration, cutting in time, weights and their dtype, as hex.

        Computed once for each dtype and cutting: the weights are not trained.
        """
        cutting = {name: getattr(self.inner, name) for name in self._cutting}
        key = (self.dtype, cutting)
        if self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = key, self._digest(cutting)
        return self._fingerprint[1]

    def _digest(self, cutting: Mapping[str, Any]) -> str:
        config = {k: v for k, v in self.inner.config.items() if not k.startswith("_")}
        facts = [_VERSION, self.name, config, cutting]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, value in sorted(self.inner.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(raw.numpy()))
        return digest.hexdigest()

    def _statistics(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        check_latent(latent, self.channels)
        shape = (1, -1, 1, 1, 1)
        mean = self._copies.of("mean", self.latent_mean, latent.device)
        std = self._copies.of("std", self.latent_std, latent.device)
        return mean.view(shape), std.view(shape)


def require(config: Mapping[str, Any], field: str, allowed: Any) -> None:
    """ValueError unless config[field], absent counting as allowed, equals `allowed`."""
    value = config.get(field, allowed)
    if value != allowed:
        raise ValueError(f"{field} = {value!r}, allowed is {allowed!r}")


def scaling_factor(config: Mapping[str, Any]) -> float:
    """config["scaling_factor"]. ValueError unless it is a positive number."""
    value = config["scaling_factor"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ValueError(f"scaling_factor = {value!r}, allowed are positive numbers")
    return float(value)


def load_diffusers_vae(
    kind: type[DiffusersVAE], folder: Path, dtype: VAEDtype = "auto"
) -> DiffusersVAE:
    """The VAE that diffusers' `save_pretrained` wrote to `folder`, on the CPU. Nothing is downloaded.

    dtype: "auto" keeps what is stored, but for fp16, which becomes fp32 (it holds every fp16 number,
    and activations of these decoders can leave fp16's range).

    Raises ImportError without diffusers, ValueError that names the folder and what is wrong: a
    configuration that cannot be used, weights missing, unknown, not finite or of several dtypes.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"{folder} holds {kind.name}, which needs diffusers: pip install 'goku[vae]'"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no *.safetensors file, which alone are read")
    model = getattr(diffusers, kind.name)
    try:
        config = dict(model.load_config(folder, local_files_only=True))
        _with_defaults(model, config)
        kind.check(config)
        chosen = _stored_dtype(folder) if dtype == "auto" else getattr(torch, dtype)
        inner, loading = model.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=chosen,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} ({kind.name}): {error}") from error
    for found, words in (("missing_keys", "lacks"), ("unexpected_keys", "holds unknown")):
        if loading[found]:  # diffusers warns of both and goes on
            names = ", ".join(sorted(loading[found])[:5])
            raise ValueError(f"{folder} {words} weights, {len(loading[found])} in all: {names}")
    for name, value in inner.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{folder}: {name} holds values that are not finite")
    return kind.wrap(inner)


def _with_defaults(model: Any, config: dict[str, Any]) -> None:
    """Fills in what config.json leaves to the class."""
    for name, parameter in inspect.signature(model.__init__).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            config.setdefault(name, parameter.default)


def _stored_dtype(folder: Path) -> torch.dtype:
    """Of the floating point weights in the folder's safetensors files; ValueError for several."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(os.fspath(path), framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
    if len(found) != 1 or not found <= known.keys():
        raise ValueError(
            f"its weights are stored as {', '.join(sorted(found))}; allowed: one of "
            f"{', '.join(known)}, or set vae.dtype to float32 or bfloat16"
        )
    return known[found.pop()]
