"""From prompts to pictures and clips: integrate the learned velocity from noise (t = 0) to data (t = 1) and decode.

Many requests of different sizes are integrated in one packed batch. A sample's noise depends on its seed alone, so
the result does not depend on which other requests share the pack, nor on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from goku import config as parser
from goku import media_files
from goku.flow import guided, integrate, time_grid
from goku.model import GokuTransformer, ModelConfig, unpatchify
from goku.packing import partition
from goku.parallelize import ParallelContext
from goku.precision import autocast
from goku.random import Purpose, normal
from goku.text import TextConfig, TextEncoder, load_text_encoder
from goku.vae import VideoVAE, load_vae
from goku_kernels import Packing
from goku_runtime import checkpoint

__all__ = [
    "Loaded",
    "Request",
    "SampleConfig",
    "find_checkpoint",
    "generate",
    "generate_share",
    "load_for_sampling",
    "save_media",
]


@dataclass(frozen=True)
class Request:
    """One thing to generate: height and width in pixels (multiples of 16), frames = 4k + 1 (1 is an image)."""

    prompt: str
    height: int
    width: int
    frames: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                raise ValueError(
                    f"{name} is {value}; allowed: multiples of 16 (VAE stride 8 times patch 2)"
                )
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(
                f"frames is {self.frames}; allowed: 4k + 1 (1, 5, 9, ...), 1 being an image"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: >= 0")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to integrate. guidance 1 is the conditional velocity alone; shift as in FlowConfig; tokens_per_pack bounds
    the tokens that one forward holds (requests beyond it go into further packs)."""

    steps: int = 30
    method: Literal["euler", "heun"] = "euler"
    guidance: float = 1.0
    shift: float = 1.0
    tokens_per_pack: int = 16384
    precision: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_pack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: >= 1")
        if self.method not in ("euler", "heun"):
            raise ValueError(f"method is {self.method!r}; allowed: 'euler', 'heun'")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; allowed: a finite number, 1 being none")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; allowed: a finite number > 0, 1 being none")


@dataclass(frozen=True)
class Loaded:
    """What sampling needs from a run: the averaged model, its VAE and text encoder, the training step."""

    model: GokuTransformer
    vae: VideoVAE
    text: TextEncoder
    step: int


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


def load_for_sampling(run: Path, device: torch.device) -> Loaded:
    """Load the EMA weights of a run folder's latest checkpoint (or of one checkpoint folder), verified first.

    Raises ValueError when there is no checkpoint, it is damaged, or the VAE does not fit the model.
    """
    if not run.is_dir():
        raise ValueError(
            f"{run}: no such folder; allowed: the `out` folder of a training run, or a checkpoint in it"
        )
    path = run if (run / "manifest.json").exists() else find_checkpoint(run / "checkpoints")
    if path is None:
        below = [child for child in sorted(run.iterdir()) if (child / "checkpoints").is_dir()]
        hint = f"; did you mean {below[0]}?" if below else ""
        raise ValueError(
            f"{run} holds no checkpoint; allowed: the `out` folder of a training run, or a checkpoint in it{hint}"
        )
    config = checkpoint.read_values(path)["run"]["config"]
    model = GokuTransformer(parser.parse(ModelConfig, config["model"], where="model"))
    state: dict[str, Any] = {"ema": dict(model.state_dict()), "run": None}
    checkpoint.load(state, path, partial=True)
    vae = load_vae(Path(config["vae"]["path"]))
    if vae.channels != model.config.latent_channels:
        raise ValueError(
            f"the VAE has {vae.channels} channels, the model {model.config.latent_channels}"
        )
    text = load_text_encoder(parser.parse(TextConfig, config["text"], where="text"))
    return Loaded(model.to(device).eval(), vae.to(device), text, state["run"]["step"])


def _grid(request: Request, vae: VideoVAE) -> tuple[int, int, int]:
    stride_t, stride_h, stride_w = vae.strides
    return (
        (request.frames - 1) // stride_t + 1,
        request.height // stride_h // 2,
        request.width // stride_w // 2,
    )


@torch.no_grad()
def generate(
    model: GokuTransformer,
    vae: VideoVAE,
    prompts: Callable[[Sequence[str]], list[Tensor]],
    requests: Sequence[Request],
    config: SampleConfig,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Generate every request. prompts turns strings into un-padded embeddings (len_i, dim).

    Returns one uint8 tensor (3, frames, height, width) per request, in order. progress(done, total) counts
    integration steps over all packs.
    """
    grids = [_grid(request, vae) for request in requests]
    lengths = [t * h * w for t, h, w in grids]
    budget = max([config.tokens_per_pack, *lengths])
    packs = partition(lengths, [float(n) for n in lengths], 1, budget)[0]
    results: dict[int, Tensor] = {}
    done, total = 0, len(packs) * config.steps

    def on_step(_step: int, _t: float, _x: Tensor) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for pack in packs:
        texts = prompts([requests[i].prompt for i in pack])
        empty = prompts([""])[0] if config.guidance != 1 else None
        chosen = [requests[i] for i in pack], [grids[i] for i in pack]
        tokens = _integrate_pack(model, *chosen, texts, empty, config, device, on_step)
        for i, part in zip(pack, tokens.split([lengths[i] for i in pack]), strict=True):
            latent = unpatchify(part.float(), grids[i], vae.channels)
            video = vae.decode(vae.denormalise(latent[None]))[0]
            results[i] = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return [results[i] for i in range(len(requests))]


def _integrate_pack(
    model: GokuTransformer,
    requests: Sequence[Request],
    grids: Sequence[tuple[int, int, int]],
    texts: Sequence[Tensor],
    empty: Tensor | None,
    config: SampleConfig,
    device: torch.device,
    on_step: Callable[[int, float, Tensor], None],
) -> Tensor:
    packing = Packing.from_grids(grids, device=device)
    conditions = [
        (
            torch.cat(list(texts)).to(device),
            Packing.from_lengths([len(x) for x in texts], device=device),
        )
    ]
    if empty is not None:
        repeated = [empty] * len(requests)
        conditions.append(
            (
                torch.cat(repeated).to(device),
                Packing.from_lengths([len(empty)] * len(requests), device=device),
            )
        )
    width = model.config.patch_dim
    noise = [
        normal(request.seed, 0, t * h * w * width, Purpose.SAMPLE, device=device).view(-1, width)
        for request, (t, h, w) in zip(requests, grids, strict=True)
    ]

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(requests),), t, device=device)
        with autocast(device, config.precision):
            outputs = [
                model(x, times, text, packing, text_packing).float()
                for text, text_packing in conditions
            ]
        return outputs[0] if len(outputs) == 1 else guided(outputs[0], outputs[1], config.guidance)

    times = time_grid(config.steps, config.shift)
    return integrate(velocity, torch.cat(noise), times, config.method, on_step)


def generate_share(
    loaded: Loaded,
    requests: Sequence[Request],
    config: SampleConfig,
    context: ParallelContext,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """This rank's share of the requests (every world-th one) as (index, video), each as soon as it is done.

    Each request is a pack of its own: the bits of a matrix product depend on the number of its rows, and a sample must
    not depend on the number of processes. No rank waits for another. progress(done, total) counts integration steps.
    """
    mine = range(context.rank, len(requests), context.world)
    for number, index in enumerate(mine):

        def on_step(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(mine) * total)

        one = [requests[index]]
        model, vae, prompts = loaded.model, loaded.vae, loaded.text.encode
        yield index, generate(model, vae, prompts, one, config, context.device, on_step)[0]


def save_media(video: Tensor, stem: Path, fps: int = 12) -> Path:
    """Write uint8 (3, T, H, W) as stem.png (T = 1) or stem.mp4, atomically; returns the path."""
    return media_files.save(stem, media_files.to_uint8(video), fps=fps)
