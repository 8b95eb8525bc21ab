"""From prompts to pictures and clips: integrate the learned velocity from noise (t = 0) to data (t = 1) and decode.

Many requests of different sizes are integrated in one packed batch. A sample's noise depends on its seed alone, so
the result does not depend on which other requests share the pack, nor (but for rounding where processes share a
sample's tokens) on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku import media_files
from goku.conditioning import condition_latent, guided_pair
from goku.export import exported_companions, is_exported, load_exported, read_exported
from goku.flow import guided, integrate, time_grid
from goku.given import Given, check_given, encode_given, holding
from goku.model import GokuTransformer, patchify, unpatchify
from goku.packing import partition
from goku.parallelize import PackSharding, ParallelContext
from goku.precision import autocast
from goku.random import Purpose, normal
from goku.requests import Request
from goku.sample_config import SampleConfig, describe
from goku.sizes import position_scale
from goku.trained import (
    Companions,
    Loaded,
    Trained,
    Weights,
    find_checkpoint,
    load_checkpoint,
    load_companions,
    read_checkpoint,
)
from goku.vae import VideoVAE, decode_pieces
from goku_kernels import Packing

__all__ = [
    "Loaded",
    "Request",
    "SampleConfig",
    "decode",
    "describe",
    "find_checkpoint",
    "generate",
    "generate_share",
    "integrate_all",
    "load_for_sampling",
    "load_parts",
    "load_trained",
    "read_trained",
    "save_media",
]


def load_for_sampling(run: Path, device: torch.device, *, weights: Weights = "ema") -> Loaded:
    """The model of a run's latest checkpoint, of one checkpoint, or of a folder of `goku export`, on `device`.

    weights: the average (what an exported folder holds is what it holds). Raises ValueError when there is none, it is
    damaged, or the VAE does not fit the model.
    """
    return load_trained(read_trained(run), device, weights=weights)


def read_trained(run: Path) -> Trained:
    """What `load_for_sampling` would load, without its weights. Raises ValueError."""
    return read_exported(run) if is_exported(run) else read_checkpoint(run)


def load_parts(about: Trained, device: torch.device) -> Companions:
    """The VAE and the text encoder of what `read_trained` read, before its weights. Raises ValueError."""
    return (exported_companions if is_exported(about.path) else load_companions)(about, device)


def load_trained(
    about: Trained,
    device: torch.device,
    *,
    weights: Weights = "ema",
    companions: Companions | None = None,
) -> Loaded:
    """The weights of what `read_trained` read, even if a later checkpoint was written since.

    companions: what `load_parts` loaded, if it was called.
    """
    if is_exported(about.path):
        return load_exported(about.path, device, companions=companions)
    return load_checkpoint(about, device, weights=weights, companions=companions)


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
    given: Sequence[Given] | None = None,
    imaged: bool = False,
) -> dict[int, Tensor]:
    """The latents (C, T, H, W) of this group's requests, by their index.

    share: (group, groups) of processes among which the packs are dealt out. All groups call the model equally often,
    as a sharded model needs: where one has no pack left, it runs an idle one. given: the given frames of each request,
    by default encoded here. imaged: count on given frames whether or not there are any, for groups that call this with
    other requests and must call the model equally often. Other arguments as those of `generate`.

    Raises ValueError for given frames that the model, or `hold` with this VAE, cannot use.
    """
    if given is None:
        given = [encode_given(vae, request, device) for request in requests]
    check_given(model.config, vae, given, hold=config.hold)
    imaged = imaged or any(given)
    results: dict[int, Tensor] = {}
    group, groups = share
    work: list[tuple[list[int], list[int], SampleConfig]] = []  # (mine, with idle ones, settings)
    budget = max([config.tokens_per_pack, *(_tokens(request) for request in requests)])
    times = [(request.steps or config.steps, config.shift_of(request)) for request in requests]
    for steps, shift in sorted(set(times)):
        # What a pack integrates together takes the same steps at the same times.
        members = [i for i, each in enumerate(times) if each == (steps, shift)]
        lengths = [_tokens(requests[i]) for i in members]
        shares = partition(lengths, [float(n) for n in lengths], groups, budget)
        rounds = max(len(packs) for packs in shares)
        shortest = min(members, key=lambda i: _tokens(requests[i]))
        for pack in [*shares[group], *[[]] * (rounds - len(shares[group]))]:
            mine = [members[k] for k in pack]
            own = replace(config, steps=steps, shift=shift, base_tokens=None)
            work.append((mine, mine or [shortest], own))
    done, total = 0, sum(settings.steps for _, _, settings in work)

    def on_step(_step: int, _t: float, _x: Tensor) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for mine, chosen, settings in work:
        pack_requests = [requests[i] for i in chosen]
        tokens = _integrate_pack(
            model, vae, prompts, pack_requests, [given[i] for i in chosen], imaged, settings,
            device, on_step, sharding,
        )  # fmt: skip
        parts = tokens.split([_tokens(request) for request in pack_requests])
        for i, part in zip(mine, parts, strict=bool(mine)):
            results[i] = unpatchify(part.float(), requests[i].grid, vae.channels)
    return results


@torch.no_grad()
def decode(vae: VideoVAE, latent: Tensor) -> Tensor:
    """Latent (C, T, H, W) -> uint8 (3, frames, height, width) on the host, a piece of time after another."""
    return torch.cat(list(decode_pieces(vae, latent)), dim=1)


def _tokens(request: Request) -> int:
    return math.prod(request.grid)


def _integrate_pack(
    model: GokuTransformer,
    vae: VideoVAE,
    prompts: Callable[[Sequence[str]], list[Tensor]],
    requests: Sequence[Request],
    given: Sequence[Given],
    imaged: bool,
    config: SampleConfig,
    device: torch.device,
    on_step: Callable[[int, float, Tensor], None],
    sharding: PackSharding | None,
) -> Tensor:
    """(tokens, patch_dim) at t = 1 of the requests, together in one pack."""
    grids = [request.grid for request in requests]
    packing = Packing.from_grids(grids, device=device)
    shard = None if sharding is None else sharding.shard(packing)
    width = model.config.patch_dim
    noise = torch.cat(
        [
            normal(r.seed, 0, _tokens(r) * width, Purpose.SAMPLE, device=device).view(-1, width)
            for r in requests
        ]
    )

    def rows(x: Tensor) -> Tensor:
        return x if sharding is None else sharding.rows(x)

    def prepared(strings: Sequence[str]) -> tuple[Tensor, Packing]:
        unique = list(dict.fromkeys(strings))  # most share one negative prompt
        embeddings = dict(zip(unique, prompts(unique), strict=True))
        texts = [embeddings[string] for string in strings]
        if sharding is not None and shard is not None:
            texts = sharding.text(texts, shard)
        return (
            torch.cat(texts).to(device),
            Packing.from_lengths([len(text) for text in texts], device=device),
        )

    names = _forwards(config, imaged)
    text = prepared([request.prompt for request in requests])
    other = prepared([request.negative for request in requests]) if len(names) > 1 else text
    condition, without = None, None
    if model.config.condition == "frames":
        latents = [
            condition_latent(each, (vae.channels, t, 2 * h, 2 * w))
            for each, (t, h, w) in zip(given, grids, strict=True)
        ]
        condition = rows(torch.cat([patchify(latent.to(device)) for latent in latents]))
        without = torch.zeros_like(condition)
    inputs = {
        "both": (text, condition),
        "image": (other, condition),
        "none": (other, without),
    }
    scale = _scales(grids, config.limits, device)
    low, high = config.guidance_interval

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(requests),), t, device=device)

        def forward(name: str) -> Tensor:
            (embedding, text_packing), extra = inputs[name]
            with autocast(device, config.precision):
                return model(
                    x, times, embedding, packing, text_packing, shard, extra, scale
                ).float()

        found = {name: forward(name) for name in (names if low <= t <= high else ("both",))}
        if len(found) == 1:
            return found["both"]
        if "none" not in found:  # none + 1 * (image - none) + ...
            return guided(found["both"], found["image"], config.guidance)
        if not imaged:
            return guided(found["both"], found["none"], config.guidance)
        return guided_pair(
            found["none"], found.get("image"), found["both"], config.guidance, config.image_scale
        )

    hold = None
    if config.hold and any(0 in each for each in given):
        hold = holding(given, grids, noise, vae.channels, rows)
    tokens = integrate(
        velocity, rows(noise), time_grid(config.steps, config.shift), config.method, on_step, hold,
        piece=lambda t: len(names) > 1 and low <= t <= high,
    )  # fmt: skip
    return tokens if sharding is None else sharding.gather(tokens, packing.total)


def _forwards(config: SampleConfig, imaged: bool) -> tuple[str, ...]:
    """What a guided velocity is made of: prompt and frames ("both"), frames alone ("image"), neither ("none")."""
    if not imaged:
        return ("both",) if config.guidance == 1 else ("both", "none")
    if config.guidance == config.image_scale:
        return ("both",) if config.guidance == 1 else ("both", "none")
    return ("both", "image") if config.image_scale == 1 else ("both", "image", "none")


def _scales(
    grids: Sequence[tuple[int, int, int]],
    limits: tuple[int, int, int] | None,
    device: torch.device,
) -> Tensor | None:
    """(B, 3) factors of the positions, None where all are 1: the operators then do nothing more than before."""
    scales = [position_scale(grid, limits) for grid in grids]
    if all(scale == (1.0, 1.0, 1.0) for scale in scales):
        return None
    return torch.tensor(scales, dtype=torch.float64, device=device)


def generate_share(
    loaded: Loaded,
    requests: Sequence[Request],
    config: SampleConfig,
    context: ParallelContext,
    progress: Callable[[int, int], None] | None = None,
    *,
    given: Sequence[Given] | None = None,
    prompts: Callable[[Sequence[str]], list[Tensor]] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """This group's share of the requests (every packs-th one) as (index, video), each as soon as it is done.

    Each request is a pack of its own: the bits of a matrix product depend on the number of its rows, and a sample must
    not depend on the number of groups. No group waits for another. With context.dims.sp > 1 the processes of a group
    share its tokens, and the first of them decodes and yields. progress(done, total) counts integration steps.
    given: the given frames of each request, by default encoded here; prompts: turns strings into embeddings, by default
    the loaded encoder.
    """
    prompts = loaded.text.encode if prompts is None else prompts
    mine = range(context.pack_rank, len(requests), context.packs)
    sharding = context.pack_sharding(loaded.model.config.heads)
    total = sum(requests[i].steps or config.steps for i in mine)
    before = 0
    for index in mine:

        def on_step(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        latents = integrate_all(
            loaded.model, loaded.vae, prompts, [requests[index]], config, context.device,
            progress=on_step, sharding=sharding, given=None if given is None else [given[index]],
        )  # fmt: skip
        before += requests[index].steps or config.steps
        if context.leads_pack:
            yield index, decode(loaded.vae, latents[0])


def save_media(
    video: Tensor,
    stem: Path,
    fps: int = 12,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = True,
) -> Path:
    """Write uint8 (3, T, H, W) as stem.png (T = 1) or stem.mp4, as `goku.media_files.save`; returns the path."""
    media = media_files.to_uint8(video)
    return media_files.save(stem, media, fps=fps, metadata=metadata, overwrite=overwrite)
