"""The optimizer of a run: AdamW, the learning-rate schedule, and the exponential moving average of the weights.

The paper gives none of these values; the defaults are ours (its parent GenTron: AdamW at a constant 1e-4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["EMA", "EMAConfig", "OptimizerConfig", "build_adamw", "learning_rate"]


ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    lr: peak learning rate; warmup_steps: linear rise from lr / warmup_steps; schedule: "constant" or "cosine" (to
    final_lr_ratio * lr at the last step); schedule_offset: steps of earlier stages that the schedule counts as its own
    first ones (a recipe's `carry.schedule` sets it); weight_decay: on matrices only, never on biases, norms or
    embeddings of width 1; grad_clip: largest global L2 norm of the gradient, 0 turns clipping off.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_ratio: float = 0.1
    schedule_offset: int = 0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; allowed: > 0")
        for name in ("weight_decay", "warmup_steps", "schedule_offset", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; allowed: >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; allowed: two numbers in [0, 1)")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"optimizer.final_lr_ratio is {self.final_lr_ratio}; allowed: 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Moving average of the weights: ema <- d * ema + (1 - d) * weights, d = min(decay, (1 + n) / (10 + n)).

    The ramp over the number of updates n keeps a short run's average from being its initialisation.
    """

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; allowed: 0 <= decay < 1")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of 0-based `step` in a run of `steps`, behind which lie `config.schedule_offset` earlier ones."""
    step, steps = step + config.schedule_offset, steps + config.schedule_offset
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    floor = config.final_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_adamw(config: OptimizerConfig, model: nn.Module) -> torch.optim.AdamW:
    """torch's fused AdamW with two groups: matrices with weight decay, everything else without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _local(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class EMA(Generic[ModelT]):
    """The averaged weights, held in a second module of the same shape so that evaluation needs no swapping.

    module: that second module, which begins with the model's weights and is sharded as it is.
    """

    def __init__(self, config: EMAConfig, module: ModelT) -> None:
        self.config = config
        self.module = module.requires_grad_(False).eval()
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters: one fused pass over all tensors."""
        decay = min(self.config.decay, (1 + self.updates) / (10 + self.updates))
        # Each process averages the shards that it holds.
        average, weights = ([_local(p) for p in m.parameters()] for m in (self.module, model))
        torch._foreach_lerp_(average, weights, 1 - decay)
        self.updates += 1
