"""After the demo's training: sample with unused seeds, compare with the media, judge, and write the report."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from goku import config as parser
from goku.data import Dataset, ShuffledStream
from goku.demo.catalogue import TRAINING, UNSEEN
from goku.demo.machine import environment
from goku.demo.report import Item, Pack, Report, Sample, readme_picture, write_report
from goku.demo.score import psnr, summary, verdict
from goku.media_files import file_stem, save, to_uint8
from goku.metrics import progress_bar, read_log
from goku.packing import cut_grid, partition, sample_cost, step_positions
from goku.parallelize import ParallelContext, parallel_context
from goku.precision import autocast_dtype
from goku.prepare import prepare_datasets, prepare_vae
from goku.run_config import RunConfig
from goku.sampler import Request, SampleConfig, generate_share, load_for_sampling
from goku.vae import VideoVAE

__all__ = ["DemoRun", "conclude"]

# Far from the seeds of the samples drawn during training (0, 1, ...): nothing was tuned on these.
SAMPLE_SEEDS = (1001, 1002)
SAMPLE_STEPS = 40

Picture = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass
class DemoRun:
    """What the demo has done so far. timings: seconds by stage, in order; also: the report's links to other pages."""

    config: RunConfig
    out: Path
    timings: dict[str, float] = field(default_factory=dict)
    killed_at: int = 0
    resumed_at: int = 0
    also: tuple[tuple[str, str], ...] = ()


def conclude(run: DemoRun, say: Callable[[str], None]) -> int:
    """Sample, judge, write demo-out/report.html and report.jsonl; returns the exit code.

    The last line on standard output is the verdict with its numbers.
    """
    with parallel_context(run.config.train.device) as context:
        started = time.monotonic()
        vae = prepare_vae(run.config, context)
        dataset, _, _ = prepare_datasets(run.config, context, vae)
        training = [to_uint8(dataset.pixels(i)) for i in range(len(dataset.items))]
        reconstructions = _reconstruct(dataset, vae, context)
        samples = _sample(run, dataset, context)
        run.timings["sampling"] = time.monotonic() - started

    log = read_log(run.out / "run" / "train.jsonl")
    evaluations = [event for event in log if event["event"] == "eval"]
    losses = [event["fixed_loss"] for event in evaluations]
    owners = [owner for owner in range(len(training)) for _ in SAMPLE_SEEDS]
    result = verdict(
        [picture for row in samples for picture in row],
        owners,
        training,
        reconstructions,
        first_loss=losses[0],
        last_loss=losses[-1],
    )
    if "unseen_loss" in evaluations[0]:
        result["unseen_first"] = evaluations[0]["unseen_loss"]
        result["unseen_last"] = evaluations[-1]["unseen_loss"]
    items = _items(run, dataset, training, reconstructions, samples, result, log)
    _write(run, dataset, items, result, log)
    say(f"open {run.out / 'report.html'}")
    print(summary(result), flush=True)
    return 0 if result["passed"] else 1


def _reconstruct(dataset: Dataset, vae: VideoVAE, context: ParallelContext) -> list[Picture]:
    latents = (dataset.read(i).mean[None].to(context.device) for i in range(len(dataset.items)))
    with torch.no_grad():
        return [to_uint8(vae.decode(latent)[0].clamp(-1, 1).cpu()) for latent in latents]


def _sample(run: DemoRun, dataset: Dataset, context: ParallelContext) -> list[list[Picture]]:
    """One row of pictures per item, one picture per seed, also kept in out/samples."""
    loaded = load_for_sampling(run.out / "run", context.device)
    requests = [
        Request(item.caption, item.height, item.width, item.frames, seed)
        for item in dataset.items
        for seed in SAMPLE_SEEDS
    ]
    settings = SampleConfig(
        steps=SAMPLE_STEPS,
        shift=run.config.flow.shift,
        precision=autocast_dtype(run.config.train.precision, context.device),
    )
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("sample", total=None, info="")

        def on_step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        shares = generate_share(loaded, requests, settings, context, on_step)
        pictures = [to_uint8(video) for _, video in shares]
    rows = [pictures[i : i + len(SAMPLE_SEEDS)] for i in range(0, len(pictures), len(SAMPLE_SEEDS))]
    for item, row in zip(dataset.items, rows, strict=True):
        for seed, picture in zip(SAMPLE_SEEDS, row, strict=True):
            save(run.out / "samples" / f"{file_stem(item.name)}_seed{seed}", picture)
    return rows


def _items(
    run: DemoRun,
    dataset: Dataset,
    training: Sequence[Picture],
    reconstructions: Sequence[Picture],
    samples: Sequence[Sequence[Picture]],
    result: dict[str, Any],
    log: Sequence[dict[str, Any]],
) -> list[Item]:
    media = {medium.name: medium for medium in TRAINING}
    judged = iter(result["per_sample"])
    items = []
    for i, item in enumerate(dataset.items):
        rows = []
        for seed, picture in zip(SAMPLE_SEEDS, samples[i], strict=True):
            row = next(judged)
            nearest = dataset.items[row["nearest"]].name
            rows.append(Sample(seed=seed, picture=picture, psnr=row["psnr"], nearest=nearest))
        evolution = {
            event["step"]: run.out / "run" / event["path"]
            for event in log
            if event["event"] == "sample" and event["name"] == item.name
        }
        medium = media.get(item.name)
        items.append(
            Item(
                name=item.name,
                caption=item.caption,
                modality=item.modality,
                grid=item.grid,
                training=training[i],
                reconstruction=reconstructions[i],
                reconstruction_psnr=psnr(reconstructions[i], training[i]),
                samples=rows,
                evolution=sorted(evolution.items()),
                licence=medium.licence if medium else "",
                attribution=medium.attribution if medium else "",
                url=medium.url if medium else "",
                shareable=medium.shareable if medium else False,
            )
        )
    return items


def _write(
    run: DemoRun,
    dataset: Dataset,
    items: list[Item],
    result: dict[str, Any],
    log: list[dict[str, Any]],
) -> None:
    out = run.out
    with (out / "report.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps({"event": "verdict", **result}) + "\n")
        file.write(json.dumps({"event": "timings", **run.timings}) + "\n")
        for event in log:
            file.write(json.dumps(event) + "\n")
    report = Report(
        verdict=result,
        items=items,
        log=log,
        packs=_packs(run.config, dataset),
        timings=list(run.timings.items()),
        timing_note="Installing the packages is not included.",
        config=parser.dump(run.config),
        environment=environment(),
        commands=("make demo", *_commands(run)),
        unseen=[medium.record() for medium in UNSEEN],
        files=(
            (str(out / "run"), "checkpoints, log (train.jsonl) and samples of the run"),
            (str(out / "vae"), "the VAE that was trained first"),
            (str(out / "samples"), "the generated pictures and clips"),
            (str(out / "report.jsonl"), "the numbers of this page"),
        ),
        also=run.also,
    )
    write_report(out / "report.html", report)
    if any(item.shareable for item in items):
        (out / "picture.png").write_bytes(readme_picture(items))


def _packs(config: RunConfig, dataset: Dataset) -> list[Pack]:
    """The packs of the first step, as the trainer made them."""
    stream, items, packing = (
        ShuffledStream(len(dataset.items), config.seed),
        dataset.items,
        config.packing,
    )
    budget = packing.tokens_per_pack
    tokens = []
    for item in items:
        t, h, w = cut_grid(item.grid, budget, item.name, packing.overlong)
        tokens.append(t * h * w)
    positions = step_positions(0, lambda p: tokens[stream.item(p)], packing.tokens_per_step)
    chosen = [stream.item(p) for p in positions]
    lengths = [tokens[i] for i in chosen]
    packs = partition(lengths, [sample_cost(n, config.model.dim) for n in lengths], 1, budget)[0]
    return [
        Pack(
            label=f"step 1, pack {number}",
            names=[items[chosen[k]].name for k in pack],
            capacity=budget,
        )
        for number, pack in enumerate(packs, start=1)
    ]


def _commands(run: DemoRun) -> list[str]:
    item = run.config.out
    return [
        shlex.join(["goku", "train", str(run.out / "demo.yaml")]),
        shlex.join(
            [
                "goku",
                "sample",
                item,
                "--prompt",
                TRAINING[0].text,
                "--height",
                "160",
                "--width",
                "160",
            ]
        ),
    ]
