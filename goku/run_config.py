"""One run, declared in one file: which sections it has, how they are read, and which of them a resume may change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from goku import config as parser
from goku.conditioning import ConditioningConfig
from goku.data import DataConfig
from goku.flow import FlowConfig
from goku.model import PRESETS, KernelConfig, ModelConfig
from goku.optimizer import EMAConfig, OptimizerConfig
from goku.packing import PackingConfig
from goku.parallelize import ActivationCheckpointing, ParallelDims, ShardingConfig
from goku.text import TextConfig
from goku.vae import VAEConfig, VAEDtype, VAETrainConfig
from goku.validation import ValidationConfig

__all__ = [
    "RunConfig",
    "TrainConfig",
    "VAESection",
    "load_run_config",
    "model_differences",
    "resolve",
    "resume_differences",
]


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
    """path: folder of a trained VAE; when it does not exist and `train` is given, one is trained on the data first.

    It may be one of diffusers (see `goku.vae.load_vae`); of `model` then channels alone counts. dtype: of its weights
    and arithmetic, "auto" as they are stored.
    """

    path: str
    dtype: VAEDtype = "auto"
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
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
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
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def cache_folder(self) -> Path:
        """Where the latents ("latents", ...) and text embeddings ("text") of the run's data are kept."""
        return Path(self.data.cache) if self.data.cache else Path(self.out) / "cache"

    @property
    def clip_fps(self) -> int:
        """Frames a second of clips that are drawn while it trains: data.fps, or 12 where clips keep their own."""
        return max(1, round(self.data.fps or 12))

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to 2**64 - 1")
        if self.model.latent_channels != self.vae.model.channels:
            raise ValueError(
                f"model.latent_channels is {self.model.latent_channels}, but vae.model.channels is "
                f"{self.vae.model.channels}; they must be equal"
            )
        if self.model.patch != (1, 2, 2):
            raise ValueError(
                f"model.patch is {list(self.model.patch)}; allowed: [1, 2, 2], in which packing, caching and sampling "
                "count tokens (GokuTransformer itself takes any)"
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

    `model.preset: NAME` starts from that preset; the other keys of `model` replace its fields. Numbers of pixels may be
    written as HEIGHTxWIDTH (288x512). Raises ConfigError (a ValueError) that names the key, the value and what is
    allowed.
    """
    return resolve(parser.load(source, overrides))


def resolve(tree: Mapping[str, Any], where: str = "") -> RunConfig:
    """The run that the nested mapping `tree` describes, as `load_run_config` reads it from a file.

    where: dotted path of the mapping itself, for messages. Raises ConfigError.
    """
    data = dict(tree)
    model = data.get("model")
    if isinstance(model, Mapping) and "preset" in model:
        rest = {key: value for key, value in model.items() if key != "preset"}
        name = model["preset"]
        if name not in PRESETS:
            allowed = "allowed: " + ", ".join(sorted(PRESETS))
            raise parser.ConfigError(f"{where}.model.preset".lstrip("."), name, allowed)
        data["model"] = {**parser.to_dict(PRESETS[name]), **rest}
    if isinstance(data.get("data"), Mapping):
        data["data"] = {key: _pixels(key, value) for key, value in data["data"].items()}
    return parser.parse(RunConfig, data, where)


def _pixels(key: str, value: Any) -> Any:
    """The product, where a number of pixels is written as a size such as 288x512; everything else as it is."""
    if not (key.endswith("_pixels") and isinstance(value, str)):
        return value
    size = re.fullmatch(r"([0-9]+)x([0-9]+)", value)
    return value if size is None else int(size[1]) * int(size[2])


# What may differ between a checkpoint and the run that continues it: where and how fast work is done, what is
# looked at, and how long the run is (under a constant schedule). None of it changes a step's samples or arithmetic
# (kernels, parallel, sharding: nothing but the rounding), but for train.precision, which is therefore not free. That
# data.path, vae.path and text.path hold the same items, VAE and encoder is checked by fingerprints. A name stands for
# all keys below it; "*" is any one name.
_FREE = (
    "out",
    "unseen",
    "data.path",
    "data.sources.*.path",
    "data.workers",
    "data.read_ahead",
    "data.cache",
    "data.verify",
    "data.max_lost",
    "data.skip_bad",  # what it leaves out, the fingerprint has
    "vae.path",
    "vae.dtype",  # the VAE's fingerprint is compared
    "vae.train",
    "text.path",
    "kernels",
    "packing.tokens_per_pack",
    "parallel",
    "sharding",
    "activation_checkpointing",
    "train",
    "validation",
)

# Keys that came after the first checkpoints were written, each with what runs did before it: a checkpoint that lacks
# one resumes as if it said this (of a new section: all its values, as a mapping). A key that is bound and neither here
# nor in a checkpoint stops the resume.
_ADDED: dict[str, Any] = {
    "data.sources": None,
    "data.mix": None,
    "data.max_seconds": None,
    "data.min_image_pixels": 0,
    "data.min_video_pixels": 0,
    "data.min_frames": 1,
    "data.motion_caption": None,
    "data.follow_links": False,
    "data.max_source_pixels": 178_956_970,
    "model.condition": "none",
    "conditioning": {"first": 1.0, "last": 0.0, "both": 0.0, "drop": 0.1},
    "conditioning.drop_both": 0.0,
    "optimizer.schedule_offset": 0,
}


def resume_differences(saved: Mapping[str, Any], current: RunConfig) -> list[str]:
    """Lines "key: saved -> current" for every difference that makes resuming a different run; [] when compatible."""
    now = parser.to_dict(current)
    before = _with_added(saved)
    conditions = (before.get("model", {}).get("condition"), current.model.condition)
    steps = (saved.get("train", {}).get("steps"), current.train.steps)
    lines = [
        line
        for line in parser.difference(before, now)
        if not _is_free(line.split(":", 1)[0])
        # It decides nothing of a model that takes no frames.
        and not (conditions == ("none", "none") and line.startswith("conditioning."))
    ]
    if current.optimizer.schedule != "constant" and steps[0] != steps[1]:
        lines.append(
            f"train.steps: {steps[0]} -> {steps[1]} (optimizer.schedule '{current.optimizer.schedule}' uses it)"
        )
    return lines


def model_differences(saved: Mapping[str, Any], current: RunConfig) -> list[str]:
    """Lines "model.key: saved -> current" of what keeps the weights of the run `saved` from starting `current`.

    A model that learns to be given frames (model.condition: none -> frames) may start from one that was not.
    """
    now = parser.to_dict(current)
    lines = parser.difference(
        {"model": _with_added(saved).get("model", {})}, {"model": now["model"]}
    )
    return [line for line in lines if line != "model.condition: none -> frames"]


def _with_added(saved: Mapping[str, Any]) -> dict[str, Any]:
    """`saved` with the keys of `_ADDED` that it lacks, in sections that it has; `saved` itself is left alone."""
    filled = dict(saved)
    for key, value in _ADDED.items():
        *sections, name = key.split(".")
        place: Any = filled
        for section in sections:
            if not isinstance(place.get(section), Mapping):
                break
            place[section] = dict(place[section])
            place = place[section]
        else:
            place.setdefault(name, value)
    return filled


def _is_free(key: str) -> bool:
    return key != "train.precision" and any(_stands_for(name, key) for name in _FREE)


def _stands_for(name: str, key: str) -> bool:
    """Whether `key` is `name` or below it, part by part; "*" in `name` is any part."""
    wanted, parts = name.split("."), key.split(".")
    return len(parts) >= len(wanted) and all(
        want in ("*", part) for want, part in zip(wanted, parts, strict=False)
    )
