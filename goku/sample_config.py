"""How requests are integrated, and what a file of them says about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from goku.flow import METHODS, FlowConfig, Method, effective_shift
from goku.requests import Request
from goku.sizes import position_scale
from goku.trained import Weights

__all__ = ["SampleConfig", "describe"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to integrate.

    steps, method: of `goku.flow.integrate`; a request's own steps come first. guidance: scale of classifier-free
    guidance over the text, 1 being none; guidance_image: over given frames, None for the same scale;
    guidance_interval: times between which there is guidance, outside the conditional velocity alone is taken
    (Kynkaanniemi et al., arXiv 2404.07724; here t = 1 is data). shift: as in FlowConfig; base_tokens too, None where
    resolution_shift is off (`shift_of`). hold: after every step the first latent frame of a request with a given first
    frame is set onto the straight path to it, so that the result shows exactly what the VAE makes of that image; for
    VAEs whose first latent frame depends on the first frame alone.
    limits: the largest grid (t, h, w) trained on; beyond it RoPE's positions are scaled (`position_scale`).
    tokens_per_pack: bounds the tokens that one forward holds (requests beyond it go into further packs).
    """

    steps: int = 30
    method: Method = "euler"
    guidance: float = 1.0
    guidance_image: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0
    base_tokens: int | None = None
    hold: bool = False
    limits: tuple[int, int, int] | None = None
    tokens_per_pack: int = 16384
    precision: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_pack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: >= 1")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; allowed: {', '.join(map(repr, METHODS))}")
        for name in ("guidance", "guidance_image"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; allowed: a finite number, 1 being none")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval is {self.guidance_interval}; allowed: 0 <= begin < end <= 1"
            )
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; allowed: a finite number > 0, 1 being none")
        if self.base_tokens is not None and self.base_tokens < 1:
            raise ValueError(f"base_tokens is {self.base_tokens}; allowed: >= 1, None")

    @property
    def image_scale(self) -> float:
        """Scale of the guidance over given frames."""
        return self.guidance if self.guidance_image is None else self.guidance_image

    def shift_of(self, request: Request) -> float:
        """The shift of this request's times, by its tokens where the model was trained so (`effective_shift`)."""
        if self.base_tokens is None:
            return self.shift
        flow = FlowConfig(shift=self.shift, resolution_shift=True, base_tokens=self.base_tokens)
        return float(effective_shift(flow, [math.prod(request.grid)])[0])


def describe(
    request: Request,
    config: SampleConfig,
    *,
    step: int,
    fps: int,
    checkpoint: str | None = None,
    weights: Weights = "ema",
    dtype: str = "float32",
) -> dict[str, Any]:
    """How a sample is made, for the metadata of its file: nothing that depends on when, where or by how many.

    weights, dtype: of the model, said where they are not the usual ones.
    """
    said: dict[str, Any] = {
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": request.seed,
        "height": request.height,
        "width": request.width,
        "frames": request.frames,
        "fps": request.fps or fps,
        "steps": request.steps or config.steps,
        "method": config.method,
        "guidance": config.guidance,
        "guidance_interval": list(config.guidance_interval),
        "shift": config.shift_of(request),
        "model_step": step,
    }
    if checkpoint is not None:
        said["checkpoint"] = checkpoint
    if weights != "ema":
        said["weights"] = weights
    if dtype != "float32":
        said["dtype"] = dtype
    if request.given:
        said["given"] = {
            str(frame): image.name if isinstance(image, Path) else "pixels"
            for frame, image in sorted(request.given.items())
        }
        said["guidance_image"] = config.image_scale
        first = any(frame % request.frames == 0 for frame in request.given)
        said["hold"] = config.hold and first
    scale = position_scale(request.grid, config.limits)
    if scale != (1.0, 1.0, 1.0):
        said["position_scale"] = list(scale)
    return said
