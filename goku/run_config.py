"""One run, declared in one file: which sections it has, how they are read, and which of them a resume may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from goku import config as parser
from goku.data import DataConfig
from goku.flow import FlowConfig
from goku.model import PRESETS, KernelConfig, ModelConfig
from goku.optimizer import EMAConfig, OptimizerConfig
from goku.packing import PackingConfig
from goku.parallelize import ActivationCheckpointing, ParallelDims, ShardingConfig
from goku.text import TextConfig
from goku.vae import VAEConfig, VAETrainConfig

__all__ = ["RunConfig", "TrainConfig", "VAESection", "load_run_config", "resume_differences"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. All `*_every` are in steps, 0 turns the thing off.

    steps: optimizer steps of the whole run; precision: "auto" takes bf16 autocast where the hardware multiplies bf16,
    float32 elsewhere; eval_items, eval_times: how many items and how many fixed times per item make the fixed-noise
    loss; sample_captions: how many training captions are drawn at each sampling; sample_steps: Euler steps;
    max_skipped_steps: a step whose gradient norm is not finite is skipped (weights, EMA and optimizer untouched,
    counted in the log); after this many in a row the run stops with exit code 1, the last checkpoint intact;
    checkpoint_mode: "async" waits until the state was copied in memory and writes during the next steps, "overlap"
    copies during the next forward and backward and waits before the optimizer's step, "sync" waits for the disk;
    keep_checkpoints, keep_checkpoints_every: the newest so many stay, and those of every n-th step (0: none).
    """

    steps: int = 1000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = 1
    eval_every: int = 0
    eval_items: int = 16
    eval_times: int = 4
    sample_every: int = 0
    sample_captions: int = 4
    sample_steps: int = 20
    checkpoint_every: int = 500
    checkpoint_mode: Literal["async", "overlap", "sync"] = "async"
    keep_checkpoints: int = 2
    keep_checkpoints_every: int = 0
    max_skipped_steps: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "log_every",
            "eval_items",
            "eval_times",
            "sample_steps",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; allowed: >= 1")
        for name in (
            "eval_every",
            "sample_every",
            "sample_captions",
            "checkpoint_every",
            "keep_checkpoints_every",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; allowed: >= 0")


@dataclass(frozen=True, kw_only=True)
class VAESection:
    """path: folder of a trained VAE; when it does not exist and `train` is given, one is trained on the data first."""

    path: str
    model: VAEConfig = field(default_factory=VAEConfig)
    train: VAETrainConfig | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. out: the run's folder; unseen: a held-out dataset, for its loss alone."""

    out: str
    seed: int = 0
    data: DataConfig
    unseen: str | None = None
    vae: VAESection
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig
    kernels: KernelConfig = field(default_factory=KernelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    packing: PackingConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallel: ParallelDims = field(default_factory=ParallelDims)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    activation_checkpointing: ActivationCheckpointing = field(
        default_factory=ActivationCheckpointing
    )
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to 2**64 - 1")
        if self.model.latent_channels != self.vae.model.channels:
            raise ValueError(
                f"model.latent_channels is {self.model.latent_channels}, but vae.model.channels is "
                f"{self.vae.model.channels}; they must be equal"
            )
        if self.parallel.sp > self.packing.tokens_per_pack:
            raise ValueError(
                f"parallel.sp is {self.parallel.sp}, more than packing.tokens_per_pack = "
                f"{self.packing.tokens_per_pack}; allowed: processes that each get a token of every pack"
            )
        if self.text.path is None and self.text.tiny_dim != self.model.text_dim:
            raise ValueError(
                f"model.text_dim is {self.model.text_dim}, but the embedded text encoder is text.tiny_dim = "
                f"{self.text.tiny_dim} wide; make them equal, or set text.path to an encoder's folder"
            )


def load_run_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> RunConfig:
    """Read a run's YAML file (or mapping) with dotted `overrides` ("optimizer.lr=3e-4").

    `model.preset: NAME` starts from that preset; the other keys of `model` replace its fields. Raises ConfigError
    (a ValueError) that names the key, the value and what is allowed.
    """
    data = parser.load(source, overrides)
    model = data.get("model")
    if isinstance(model, dict) and "preset" in model:
        name = model.pop("preset")
        if name not in PRESETS:
            allowed = "allowed: " + ", ".join(sorted(PRESETS))
            raise parser.ConfigError("model.preset", name, allowed)
        data["model"] = {**parser.to_dict(PRESETS[name]), **model}
    return parser.parse(RunConfig, data)


# What may differ between a checkpoint and the run that continues it: where and how fast work is done, what is
# looked at, and how long the run is (under a constant schedule). None of it changes a step's samples or arithmetic
# (kernels, parallel, sharding: nothing but the rounding), but for train.precision, which is therefore not free. That
# data.path holds the same items is checked by the dataset's fingerprint.
_FREE = (
    "out",
    "unseen",
    "data.path",
    "data.workers",
    "data.cache",
    "vae.path",
    "vae.train",
    "kernels",
    "packing.tokens_per_pack",
    "parallel",
    "sharding",
    "activation_checkpointing",
    "train",
)


def resume_differences(saved: Mapping[str, Any], current: RunConfig) -> list[str]:
    """Lines "key: saved -> current" for every difference that makes resuming a different run; [] when compatible."""
    now = parser.to_dict(current)
    steps = (saved.get("train", {}).get("steps"), current.train.steps)
    lines = [line for line in parser.difference(saved, now) if not _is_free(line.split(":", 1)[0])]
    if current.optimizer.schedule != "constant" and steps[0] != steps[1]:
        lines.append(
            f"train.steps: {steps[0]} -> {steps[1]} (optimizer.schedule '{current.optimizer.schedule}' uses it)"
        )
    return lines


def _is_free(key: str) -> bool:
    return key != "train.precision" and any(
        key == name or key.startswith(name + ".") for name in _FREE
    )
