"""`goku train --dry-run`: the resolved run, how large it is, and what it will need, before anything is done."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from goku import config as parser
from goku import flops
from goku.model import GokuTransformer
from goku.run_config import RunConfig

__all__ = ["describe", "saved_bytes_per_token"]


def saved_bytes_per_token(config: RunConfig, element_bytes: int) -> float:
    """Bytes that one token leaves saved for the backward pass, without activation checkpointing (an estimate).

    Per block, in units of dim: in the autocast dtype the inputs of the linear maps and what the attentions and the
    GELU keep, 9 + 2 mlp_ratio; in fp32 what norms, rotation, modulation and residuals keep, 21. Outside the blocks 4
    in fp32. Counts fitted to torch's saved-tensor hooks on the eager operators, which they meet to 10% (tests).
    """
    model = config.model
    per_block = (9 + 2 * model.mlp_ratio) * element_bytes + 21 * 4
    return model.dim * (model.depth * per_block + 4 * 4)


def describe(config: RunConfig) -> str:
    """The whole report as text. The model is built on the meta device: no memory is used, whatever its size."""
    from goku.precision import autocast_dtype

    with torch.device("meta"):
        model = GokuTransformer(config.model)
    count = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.blocks.parameters())
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu"
    )
    dtype = autocast_dtype(config.train.precision, device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    pack = config.packing.tokens_per_pack
    tokens = config.packing.tokens_per_step
    states = {"weights": 4, "gradients": 4, "AdamW moments": 8, "EMA": 4}
    if dtype == torch.bfloat16:
        states["bf16 copies"] = 2  # of the weights, which autocast keeps until the backward pass
    activations = saved_bytes_per_token(config, 2 if dtype == torch.bfloat16 else 4) * pack
    # Every pack one sample that fills it: the most attention that the budget allows. Text comes on top, sample by
    # sample, and is small beside it.
    packs = [pack] * (tokens // pack) + ([tokens % pack] if tokens % pack else [])
    work = flops.training_flops(config.model, packs, [config.text.max_tokens] * len(packs))
    rows = [
        ("parameters", f"{count:,} ({blocks:,} in the blocks)"),
        (
            "precision",
            f"{str(dtype).removeprefix('torch.')} products, fp32 weights, on {device.type}",
        ),
        ("processes", f"{world} (data parallel)"),
        ("data", f"{config.data.path} (not looked at; goku doctor does)"),
        ("VAE", _vae(config)),
        ("tokens per step", f"{tokens:,} at most, in packs of {pack:,}"),
        ("FLOPs per step", f"about {work:.3e} at most (forward and backward)"),
        *((f"memory: {name}", _bytes(count * size)) for name, size in states.items()),
        (
            "memory: activations",
            f"{_bytes(activations)} (estimate, one full pack, nothing recomputed)",
        ),
        (
            "memory: total per process",
            f"{_bytes(count * sum(states.values()) + activations)} (estimate)",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return (
        parser.dump(config) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    )


def _vae(config: RunConfig) -> str:
    if (Path(config.vae.path) / "config.json").is_file():
        return config.vae.path
    if config.vae.train is None:
        return f"{config.vae.path} holds none, and there is no vae.train to train one"
    return (
        f"none in {config.vae.path} yet: trained on the data first, {config.vae.train.steps} steps"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
