"""What must exist before the first training step: a VAE, text embeddings, cached latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku.data import (
    DataConfig,
    Dataset,
    MixConfig,
    Quarantine,
    SourceConfig,
    decode_all,
    list_records,
    prepare,
    quarantine_message,
    read_records,
)
from goku.metrics import RunLog, progress_bar
from goku.packing import cut_grid
from goku.parallelize import ParallelContext
from goku.run_config import RunConfig
from goku.text import LazyTextEncoder, TextCache, TextEncoder, load_text_encoder
from goku.vae import GokuVAE, VideoVAE, load_vae, train_vae, vae_folder
from goku.validation import Validator

__all__ = ["prepare_datasets", "prepare_text", "prepare_vae", "prepare_validator"]


def prepare_vae(config: RunConfig, context: ParallelContext) -> VideoVAE:
    """Load the VAE at config.vae.path; when there is none and `vae.train` is given, train one on the data first.

    Training runs on the main rank and the others wait; what fails there is raised everywhere. Raises ValueError when
    the folder is absent without `vae.train`, or its number of latent channels is not that of `vae.model` (of an
    existing VAE nothing else matters to the run); FloatingPointError when the training diverges.
    """
    path = Path(config.vae.path)
    # Its config.json is written last: a folder without one is a training that was cut off while it wrote.
    absent = not (vae_folder(path) / "config.json").is_file()
    if absent and config.vae.train is None:
        raise ValueError(
            f"vae.path is {path}, which holds no VAE; allowed: a VAE's folder, or give vae.train to train one"
        )
    if absent:
        context.on_main(lambda: _train(config, context, path))
    vae = load_vae(path, dtype=config.vae.dtype)
    if vae.channels != config.vae.model.channels:
        raise ValueError(
            f"vae.path {path} holds a VAE with {vae.channels} latent channels, but vae.model.channels is "
            f"{config.vae.model.channels}; they must be equal"
        )
    return vae.to(context.device).eval().requires_grad_(False)


def _train(config: RunConfig, context: ParallelContext, path: Path) -> None:
    assert config.vae.train is not None
    _check_text(config, load_text_encoder(config.text))
    if config.unseen is not None:
        read_records(config.unseen)
    records = list_records(config.data)
    clips: list[Tensor] = decode_all(records, config.data)
    for record, clip in zip(records, clips, strict=not config.data.skip_bad):
        # What training would refuse is better refused before minutes of work.
        frames, height, width = clip.shape[1:]
        grid = ((frames - 1) // 4 + 1, height // 16, width // 16)
        kept = cut_grid(grid, config.packing.tokens_per_pack, record.name, config.packing.overlong)
        if math.prod(kept) < config.parallel.sp:
            raise ValueError(
                f"{record.name} has {math.prod(kept)} tokens; allowed: parallel.sp = "
                f"{config.parallel.sp} or more"
            )
    vae = GokuVAE(config.vae.model, seed=config.seed).to(context.device)
    log = RunLog(Path(config.out) / "vae.jsonl", total_steps=config.vae.train.steps, what="VAE")

    def on_step(fields: dict[str, Any]) -> None:
        step = int(fields.pop("step"))
        log.event("vae_step", step, **fields)
        log.progress(step, f"loss {fields['loss']:.4f}  reconstruction {fields['psnr']:.1f} dB")

    log.message(
        f"training the VAE on {len(clips)} items: {config.vae.train.steps} steps, kept in {path}"
    )
    try:
        train_vae(vae, clips, config.vae.train, seed=config.seed, log=on_step)
    except SystemExit:
        log.message(
            "stopped while the VAE was trained: nothing of it is kept, run again to start it over"
        )
        raise
    finally:
        log.close()
    vae.save(path)


def prepare_text(config: RunConfig, context: ParallelContext) -> LazyTextEncoder:
    """The text encoder of config.text. Raises ValueError when its width is not config.model.text_dim."""

    def load() -> LazyTextEncoder:
        # Its weights are read when a prompt is in no cache: not at all at a warm start.
        known = _cache(config) / "text" / "encoders"
        text = LazyTextEncoder(config.text, device=context.device, directory=known)
        _check_text(config, text)
        return text

    return context.together(load)


def prepare_datasets(
    config: RunConfig,
    context: ParallelContext,
    vae: VideoVAE,
    text: TextEncoder | None = None,
    quarantine: Quarantine | None = None,
) -> tuple[Dataset, Dataset | None, TextEncoder]:
    """Encode what is not cached yet, shared over the ranks; returns (training, unseen or None, text encoder).

    text: an encoder that was loaded before; None loads that of config.text. quarantine: where items that cannot be used
    are listed, by default config.out/quarantine.jsonl.
    """
    if text is None:
        text = prepare_text(config, context)
    _check_text(config, text)
    cache = _cache(config)
    texts = TextCache(cache / "text", text)
    frames = config.conditioning.frames if config.model.condition == "frames" else ()
    if quarantine is None:
        quarantine = Quarantine(Path(config.out) / "quarantine.jsonl")
    unseen, held_out = None, _unseen(config)
    training = _prepare(config.data, vae, texts, cache, context, frames, "latents", quarantine)
    if held_out is not None:
        unseen = _prepare(
            held_out, vae, texts, cache, context, frames, "unseen latents", quarantine
        )
    if isinstance(text, LazyTextEncoder):
        text.release()
    return training, unseen, text


def prepare_validator(
    config: RunConfig, context: ParallelContext, vae: VideoVAE, text: TextEncoder
) -> Validator | None:
    """What draws the cases of config.validation; None where it names no file. Raises what `Validator` raises."""
    if config.validation.file is None:
        return None
    validator = Validator(config.validation, config, context, vae, text)
    if isinstance(text, LazyTextEncoder):
        text.release()
    return validator


def _cache(config: RunConfig) -> Path:
    return Path(config.data.cache) if config.data.cache else Path(config.out) / "cache"


def _unseen(config: RunConfig) -> DataConfig | None:
    """The held-out dataset as the run's mix would take it: without the modalities that no source of it gives weight."""
    if config.unseen is None:
        return None
    alone = replace(config.data, path=config.unseen, sources=None, mix=None)
    if config.data.mix is None:
        return alone
    held = {record.is_image for record in list_records(alone)}
    weights = MixConfig(
        image=float(True in held and any(w.image for w in config.data.mix.values())),
        video=float(False in held and any(w.video for w in config.data.mix.values())),
    )
    if not (weights.image or weights.video):
        return None
    sources = {"unseen": SourceConfig(path=config.unseen)}
    return replace(alone, path=None, sources=sources, mix={"unseen": weights})


def _check_text(config: RunConfig, text: TextEncoder) -> None:
    if text.dim != config.model.text_dim:
        raise ValueError(
            f"model.text_dim is {config.model.text_dim}, but the text encoder's embeddings are "
            f"{text.dim} wide; they must be equal"
        )


@torch.no_grad()
def _prepare(
    data: DataConfig,
    vae: VideoVAE,
    texts: TextCache,
    cache: Path,
    context: ParallelContext,
    frames: Sequence[int],
    label: str,
    quarantine: Quarantine,
) -> Dataset:
    console = RunLog(None, total_steps=0).console
    with progress_bar(console) as bar:
        task = bar.add_task(label, total=None, info="", visible=context.is_main)

        def on_item(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        dataset = context.together(
            lambda: prepare(
                data,
                vae,
                texts,
                cache_dir=cache,
                rank=context.rank,
                world=context.world,
                barrier=context.barrier,
                progress=on_item,
                frames=frames,
            )
        )
    problems = dataset.report.problems
    context.on_main(lambda: _set_aside(dataset, quarantine))
    if problems and context.is_main:
        message = quarantine_message(problems, dataset.report.listed, quarantine.path)
        console.print(f"{label}: {message}", highlight=False, markup=False, soft_wrap=True)
    return dataset


def _set_aside(dataset: Dataset, quarantine: Quarantine) -> None:
    quarantine.add(dataset.report.problems)
