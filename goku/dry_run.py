"""`goku train --dry-run`: the resolved run, how large it is, and what it will need, before anything is done."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from goku import config as parser
from goku import flops
from goku.activation_bytes import (
    recomputed_bytes_per_token,
    saved_bytes_per_token,
    unpredicted_operators,
)
from goku.conditioning import drop_rates
from goku.model import GokuTransformer
from goku.parallelize import (
    BLOCKS,
    ActivationCheckpointing,
    ParallelDims,
    apply_activation_checkpointing,
    from_torchrun,
)
from goku.recipe import Recipe, Stage, draws
from goku.run_config import RunConfig
from goku.step_memory import StepMemory
from goku.vae import has_vae, is_causal, vae_folder
from goku_runtime.sharding import memory_estimate

__all__ = ["describe", "describe_recipe", "missing"]


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
    dims = _dims(config)
    # Refuses here what the run would refuse: an operator to keep that does not exist.
    apply_activation_checkpointing(model, config.activation_checkpointing, BLOCKS)
    pack = config.packing.tokens_per_pack
    tokens = config.packing.tokens_per_step
    states = _states(config, model, dims, dtype)
    kept = _activations(config, dims, dtype, device)
    again = _recomputed(config, dims, dtype, device)
    gradients = states.get("memory: gradients", 0.0)
    copies = states.get("memory: bf16 copies", 0.0)
    on_device = sum(size for name, size in states.items() if name.startswith("memory"))
    memory = StepMemory(
        lasting=on_device - gradients - copies,
        gradients=gradients,
        copies=copies,
        kept=kept[config.activation_checkpointing],
        recomputed=again,
        # Of several processes each holds a part of the gradients alone, which is small.
        several_packs=dims.world > 1 or tokens > pack,
    )
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
        ("processes", _processes(dims)),
        ("data", f"{_data(config)} (not looked at; goku doctor does)"),
        ("VAE", _vae(config)),
        ("text encoder", _text(config)),
        ("caches", _caches(config)),
        *([("text, frames dropped", _drops(config))] if config.model.condition == "frames" else []),
        ("tokens per step", f"{tokens:,} at most, in packs of {pack:,}"),
        ("FLOPs per step", f"about {work:.3e} at most (forward and backward)"),
        *((name, _bytes(size)) for name, size in states.items()),
        *(
            (
                f"memory: activations, {policy.mode}",
                _bytes(size)
                + _remark(policy)
                + (" <- this run" if policy == config.activation_checkpointing else ""),
            )
            for policy, size in kept.items()
        ),
        *([("memory: one block computed again", _bytes(again))] if again else []),
        ("memory: total per process", f"{_bytes(memory.peak)} (estimate, the most at any time)"),
    ]
    width = max(len(name) for name, _ in rows)
    return (
        parser.dump(config) + "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    )


def describe_recipe(recipe: Recipe, only: str | None = None) -> str:
    """A table of the stages and how far each is, then `describe` of the stage `only`, or of the largest.

    Raises ValueError for a stage that is none, CheckpointError where all checkpoints of a stage are damaged.
    """
    from goku.stages import states

    found = states(recipe)
    if only is None:
        packs = [stage.config.packing.tokens_per_pack for stage in recipe.stages]
        shown = recipe.stages[packs.index(max(packs))]
    else:
        shown = recipe.stage(only)
    head = (
        "stage", "from", "carry", "steps", "image pixels", "video pixels", "frames",
        "tokens/step", "tokens/pack", "sp", "shift", "lr", "status",
    )  # fmt: skip
    rows = [
        head,
        *(
            _stage_row(stage, str(state.status))
            for stage, state in zip(recipe.stages, found, strict=True)
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    table = "\n".join(line.rstrip() for line in lines)
    which = "" if only is not None else ", the one of the largest packs; --stage NAME shows another"
    return f"{table}\n\n# stage {shown.name}{which}\n{describe(shown.config)}"


def _stage_row(stage: Stage, status: str) -> tuple[str, ...]:
    config, carry = stage.config, stage.carry
    taken: list[str] = [] if carry.weights == "none" else [carry.weights]
    taken += [n for n in ("ema", "optimizer", "schedule", "stream") if getattr(carry, n)]
    return (
        stage.name,
        stage.start or "-",
        "+".join(dict.fromkeys(taken)) if stage.start else "-",
        f"{config.train.steps:,}",
        f"{config.data.image_pixels:,}" if draws(config.data, "image") else "-",
        f"{config.data.video_pixels:,}" if draws(config.data, "video") else "-",
        str(config.data.max_frames),
        f"{config.packing.tokens_per_step:,}",
        f"{config.packing.tokens_per_pack:,}",
        str(config.parallel.sp),
        f"{config.flow.shift:g}",
        f"{config.optimizer.lr:g}",
        status,
    )


def _dims(config: RunConfig) -> ParallelDims:
    """Of the processes that torchrun started; outside of it, of the fewest that the config can mean."""
    fewest = config.parallel.dp_replicate * max(1, config.parallel.dp_shard) * config.parallel.sp
    return config.parallel.resolve(from_torchrun("WORLD_SIZE", fewest))


def _processes(dims: ParallelDims) -> str:
    if dims.world == 1:
        return "1"
    return (
        f"{dims.world} = dp_replicate {dims.dp_replicate} x dp_shard {dims.dp_shard} x sp {dims.sp}; each has "
        f"1/{dims.dp_shard * dims.sp} of the states and 1/{dims.sp} of its packs' tokens"
    )


def _states(
    config: RunConfig, model: GokuTransformer, dims: ParallelDims, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of one process, activations apart; those in host memory are named so."""
    policy = config.sharding.policy(dtype, condition=config.model.condition == "frames")
    estimate = memory_estimate(model, dims, policy)
    count = sum(p.numel() for p in model.parameters())
    alone = dims.world == 1
    where = "host memory" if estimate.offloaded and not alone else "memory"
    states: dict[str, float] = {
        f"{where}: weights": estimate.parameters,
        f"{where}: gradients": estimate.gradients,
        f"{where}: AdamW moments": estimate.optimizer,
        f"{where}: EMA": estimate.parameters,
    }
    if dtype == torch.bfloat16 and (alone or policy.param_dtype is None):
        # Of the weights, which autocast keeps until the backward pass.
        states["memory: bf16 copies"] = 2 * count
    if not alone:
        lasting = 0 if estimate.offloaded else estimate.state
        states["memory: gathered weights and gradients"] = estimate.device - lasting
        if config.sharding.keep_unsharded:
            states["memory: whole gradients"] = 4 * count
    return states


def _activations(
    config: RunConfig, dims: ParallelDims, dtype: torch.dtype, device: torch.device
) -> dict[ActivationCheckpointing, float]:
    """What each policy keeps of a full pack in one process, in bytes; the run's own is among them."""
    ours = config.activation_checkpointing
    example = ours.save or ("goku_kernels::varlen_attention",)
    policies = (
        replace(ours, mode="none"),
        replace(ours, mode="full"),
        replace(ours, mode="every_nth"),
        replace(ours, mode="operators", save=example),
    )
    tokens = math.ceil(config.packing.tokens_per_pack / dims.sp)
    element, fused = _element_bytes(dtype), _is_fused(config, device)
    return {
        policy: tokens
        * saved_bytes_per_token(config.model, element, policy, sp=dims.sp, fused=fused)
        for policy in policies
    }


def _recomputed(
    config: RunConfig, dims: ParallelDims, dtype: torch.dtype, device: torch.device
) -> float:
    """What one block of a full pack takes in one process while it is computed again, in bytes."""
    tokens = math.ceil(config.packing.tokens_per_pack / dims.sp)
    return tokens * recomputed_bytes_per_token(
        config.model, _element_bytes(dtype), config.activation_checkpointing, sp=dims.sp,
        fused=_is_fused(config, device),
    )  # fmt: skip


def _element_bytes(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 4


def _is_fused(config: RunConfig, device: torch.device) -> bool:
    backend = config.kernels.backend
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def _remark(policy: ActivationCheckpointing) -> str:
    if policy.mode == "every_nth":
        return f" (every {policy.every})"
    if policy.mode != "operators":
        return ""
    unknown = unpredicted_operators(policy)
    missing = f"; not predicted, and not counted: {', '.join(unknown)}" if unknown else ""
    return f" (keeping {', '.join(policy.save)}{missing})"


def missing(config: RunConfig) -> list[str]:
    """What a run cannot begin without and does not have, a sentence each: a VAE that can be used, where none is to be
    trained, and the text encoder's folder."""
    lacks = []
    if has_vae(config.vae.path):
        try:
            is_causal(config.vae.path)
        except ValueError as error:
            lacks.append(f"vae.path: {error}")
    elif config.vae.train is None:
        lacks.append(
            f"vae.path is {config.vae.path}, which holds no VAE; allowed: a VAE's folder, or give vae.train to "
            "train one"
        )
    if not _has_text(config):
        lacks.append(
            f"text.path is {config.text.path}, which holds no text encoder; allowed: the folder of a T5 encoder, or "
            "none for the built-in one"
        )
    return lacks


def _has_text(config: RunConfig) -> bool:
    return config.text.path is None or (Path(config.text.path) / "config.json").is_file()


def _data(config: RunConfig) -> str:
    if config.data.sources is None:
        return str(config.data.path)
    return ", ".join(f"{name}: {source.path}" for name, source in config.data.sources.items())


def _vae(config: RunConfig) -> str:
    if has_vae(config.vae.path):
        return str(vae_folder(config.vae.path))
    if config.vae.train is None:
        return f"{config.vae.path} holds none, and there is no vae.train to train one"
    return (
        f"none in {config.vae.path} yet: trained on the data first, {config.vae.train.steps} steps"
    )


def _text(config: RunConfig) -> str:
    text = config.text
    about = f"{text.dtype}, prompts of at most {text.max_tokens:,} tokens"
    if text.path is None:
        return f"the built-in one, {text.tiny_dim} wide, {about}"
    return f"{text.path}, {about}" if _has_text(config) else f"{text.path} holds none"


def _caches(config: RunConfig) -> str:
    folder = config.cache_folder
    kinds = {"latents": "latents", "text": "text embeddings"}
    there = [words for name, words in kinds.items() if (folder / name).is_dir()]
    made = "made before the first step, or ahead by goku cache"
    if not there:
        return f"none in {folder} yet: {made}"
    return f"{' and '.join(there)} in {folder}; what is not there is {made}"


def _drops(config: RunConfig) -> str:
    """Of a clip, as shares of all clips."""
    frames, text, both = drop_rates(config.conditioning, config.flow.text_drop)
    return f"text alone {text:.2%}, frames alone {frames:.2%}, both {both:.2%} of clips"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
