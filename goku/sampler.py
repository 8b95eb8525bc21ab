"""From prompts to pictures and clips: integrate the learned velocity from noise (t = 0) to data (t = 1) and decode.

Many requests of different sizes are integrated in one packed batch. A sample's noise depends on its seed alone, so
the result does not depend on which other requests share the pack, nor (but for rounding where processes share a
sample's tokens) on the number of processes.
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
from goku.parallelize import PackSharding, ParallelContext
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
    "decode",
    "find_checkpoint",
    "generate",
    "generate_share",
    "integrate_all",
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
    with torch.device("meta"):  # no time for initial values, which are loaded over
        model = GokuTransformer(parser.parse(ModelConfig, config["model"], where="model"))
    model.to_empty(device="cpu")
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
    sharding: PackSharding | None = None,
) -> list[Tensor]:
    """Generate every request. prompts turns strings into un-padded embeddings (len_i, dim).

    Returns one uint8 tensor (3, frames, height, width) per request, in order. progress(done, total) counts
    integration steps over all packs. With `sharding` its processes call this together, each pack's tokens are shared
    among them, and all return the same.
    """
    latents = integrate_all(
        model, vae, prompts, requests, config, device, progress=progress, sharding=sharding
    )
    return [decode(vae, latents[i]) for i in range(len(requests))]


@torch.no_grad()
def integrate_all(
    model: GokuTransformer,
    vae: VideoVAE,
    prompts: Callable[[Sequence[str]], list[Tensor]],
    requests: Sequence[Request],
    config: SampleConfig,
    device: torch.device,
    *,
    progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
    sharding: PackSharding | None = None,
) -> dict[int, Tensor]:
    """The latents (C, T, H, W) of this group's requests, by their index.

    share: (group, groups) of processes among which the packs are dealt out. All groups call the model equally often,
    as a sharded model needs: where one has no pack left, it runs an idle one. Other arguments as those of `generate`.
    """
    group, groups = share
    grids = [_grid(request, vae) for request in requests]
    lengths = [t * h * w for t, h, w in grids]
    budget = max([config.tokens_per_pack, *lengths])
    shares = partition(lengths, [float(n) for n in lengths], groups, budget)
    rounds = max(len(packs) for packs in shares)
    packs = [*shares[group], *[[]] * (rounds - len(shares[group]))]
    results: dict[int, Tensor] = {}
    done, total = 0, rounds * config.steps

    def on_step(_step: int, _t: float, _x: Tensor) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for pack in packs:
        chosen = pack or [min(range(len(requests)), key=lambda i: lengths[i])]
        texts = prompts([requests[i].prompt for i in chosen])
        empty = prompts([""])[0] if config.guidance != 1 else None
        tokens = _integrate_pack(
            model, [requests[i] for i in chosen], [grids[i] for i in chosen], texts, empty, config,
            device, on_step, sharding,
        )  # fmt: skip
        for i, part in zip(pack, tokens.split([lengths[i] for i in chosen]), strict=bool(pack)):
            results[i] = unpatchify(part.float(), grids[i], vae.channels)
    return results


@torch.no_grad()
def decode(vae: VideoVAE, latent: Tensor) -> Tensor:
    """Latent (C, T, H, W) -> uint8 (3, frames, height, width) on the host."""
    video = vae.decode(vae.denormalise(latent[None]))[0]
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _integrate_pack(
    model: GokuTransformer,
    requests: Sequence[Request],
    grids: Sequence[tuple[int, int, int]],
    texts: Sequence[Tensor],
    empty: Tensor | None,
    config: SampleConfig,
    device: torch.device,
    on_step: Callable[[int, float, Tensor], None],
    sharding: PackSharding | None,
) -> Tensor:
    packing = Packing.from_grids(grids, device=device)
    shard = None if sharding is None else sharding.shard(packing)
    prompted = [list(texts)] + ([] if empty is None else [[empty] * len(requests)])
    if sharding is not None and shard is not None:
        prompted = [sharding.text(each, shard) for each in prompted]
    conditions = [
        (torch.cat(each).to(device), Packing.from_lengths([len(x) for x in each], device=device))
        for each in prompted
    ]
    width = model.config.patch_dim
    noise = torch.cat(
        [
            normal(request.seed, 0, t * h * w * width, Purpose.SAMPLE, device=device).view(
                -1, width
            )
            for request, (t, h, w) in zip(requests, grids, strict=True)
        ]
    )

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(requests),), t, device=device)
        with autocast(device, config.precision):
            outputs = [
                model(x, times, text, packing, text_packing, shard).float()
                for text, text_packing in conditions
            ]
        return outputs[0] if len(outputs) == 1 else guided(outputs[0], outputs[1], config.guidance)

    times = time_grid(config.steps, config.shift)
    if sharding is None:
        return integrate(velocity, noise, times, config.method, on_step)
    tokens = integrate(velocity, sharding.rows(noise), times, config.method, on_step)
    return sharding.gather(tokens, packing.total)


def generate_share(
    loaded: Loaded,
    requests: Sequence[Request],
    config: SampleConfig,
    context: ParallelContext,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """This group's share of the requests (every packs-th one) as (index, video), each as soon as it is done.

    Each request is a pack of its own: the bits of a matrix product depend on the number of its rows, and a sample must
    not depend on the number of groups. No group waits for another. With context.dims.sp > 1 the processes of a group
    share its tokens, and the first of them decodes and yields. progress(done, total) counts integration steps.
    """
    mine = range(context.pack_rank, len(requests), context.packs)
    sharding = context.pack_sharding(loaded.model.config.heads)
    for number, index in enumerate(mine):

        def on_step(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(mine) * total)

        latents = integrate_all(
            loaded.model, loaded.vae, loaded.text.encode, [requests[index]], config, context.device,
            progress=on_step, sharding=sharding,
        )  # fmt: skip
        if context.leads_pack:
            yield index, decode(loaded.vae, latents[0])


def save_media(video: Tensor, stem: Path, fps: int = 12) -> Path:
    """Write uint8 (3, T, H, W) as stem.png (T = 1) or stem.mp4, atomically; returns the path."""
    return media_files.save(stem, media_files.to_uint8(video), fps=fps)
