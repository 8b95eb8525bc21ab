"""After the recipe's training: look at every stage, judge, and write the second page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goku import config as parser
from goku.demo.catalogue import TRAINING, UNSEEN
from goku.demo.document import write_page
from goku.demo.machine import environment
from goku.demo.recipe_contents import Drawn, Given, Kill, RecipeReport, Shown, StageReport, frames
from goku.demo.recipe_page import render
from goku.demo.score import psnr
from goku.demo.training import TrainingLog
from goku.demo.watching import timed
from goku.media_files import to_uint8
from goku.metrics import read_log
from goku.parallelize import ParallelContext, parallel_context
from goku.precision import autocast_dtype
from goku.prepare import prepare_datasets, prepare_vae
from goku.recipe import Recipe, Stage, draws
from goku.sampler import Request, SampleConfig, generate_share, load_for_sampling
from goku.stages import states
from goku.vae import VideoVAE

__all__ = ["MAX_BELOW_VAE_DB", "RecipeRun", "conclude", "judge", "summary"]

MAX_BELOW_VAE_DB = 6.0
# Of an image never trained on, which a model that goes by the caption alone misses by 8 and more (docs/log.md).
MAX_BELOW_VAE_UNSEEN_DB = 7.0

# What is drawn at the end of every stage that trains such an item, at the size that the stage trains it at.
SHOWN = ("astronaut", "bunny")
SAMPLE_STEPS, SAMPLE_SEED = 40, 1001
# At this size two threads wait for each other longer than they work: the VAE took 85 s with two, 40 s with one.
THREADS = 1


@dataclass
class RecipeRun:
    """What the demo has done so far. timings: seconds by part, in order; given: the given images; drawn: the clips from
    them by kind ("plain", "held", "exported")."""

    recipe: Recipe
    out: Path
    timings: dict[str, float] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    drawn: dict[str, list[Drawn]] = field(default_factory=dict)


def conclude(run: RecipeRun, say: Callable[[str], None]) -> int:
    """Sample from every stage, judge, write recipe.html and recipe-report.jsonl; returns the exit code.

    The last line on standard output is the verdict with its numbers.
    """
    with timed(run.timings, "samples of every stage"):
        shown = _shown(run)
    stages = [_stage_report(run.recipe, stage, shown[stage.name]) for stage in run.recipe.stages]
    finished = [state.stage.name for state in states(run.recipe) if state.status == "finished"]
    events = read_log(run.recipe.out / "recipe.jsonl")
    result = judge(stages, finished, events, run.kills, run.given, run.drawn)
    report = _report(run, stages, result)
    with (run.out / "recipe-report.jsonl").open("w", encoding="utf-8") as file:
        for event in ({"event": "verdict", **result}, {"event": "timings", **run.timings}, *events):
            file.write(json.dumps(event) + "\n")
    write_page(run.out / "recipe.html", render(report))
    say(f"open {run.out / 'recipe.html'}")
    print(summary(result), flush=True)
    return 0 if result["passed"] else 1


# ---- judging


def judge(
    stages: Sequence[StageReport],
    finished: Sequence[str],
    events: Sequence[Mapping[str, Any]],
    kills: Sequence[Kill],
    given: Sequence[Given],
    drawn: Mapping[str, Sequence[Drawn]],
) -> dict[str, Any]:
    """Judge a recipe that was killed once inside a stage and once between two, and finished.

    Args:
        stages: in their order, with their logs.
        finished: names of the stages whose last checkpoint is at their last step.
        events: of OUT/recipe.jsonl.
        kills: the two, in that order.
        given: the images that were given.
        drawn: clips from them by kind: "plain", "held" (with --hold) and "exported".

    Returns:
        A JSON-able dict: `passed`; `criteria`, a list of {key, label, text, passed, value}, value as text;
        `first_frame`, per given image {name, trained, psnr, held, vae}.
    """
    inside, between = kills
    logs = {stage.name: stage.log for stage in stages}
    rows: list[dict[str, Any]] = [
        {
            "name": image.name,
            "trained": image.trained,
            "psnr": plain.psnr,
            "held": held.psnr,
            "vae": plain.vae_psnr,
        }
        for image, plain, held in zip(given, drawn["plain"], drawn["held"], strict=True)
    ]
    own = [row for row in rows if row["trained"]]
    missing = [stage.name for stage in stages if stage.name not in finished]
    criteria = [
        _criterion(
            "stages",
            "Stages finished",
            f"{len(finished)} of {len(stages)}",
            "in their order" if not missing else f"not finished: {', '.join(missing)}",
            not missing,
        ),
        _inside(logs[inside.stage], inside),
        _between([stage.name for stage in stages], events, between),
        _losses(stages),
        _criterion(
            "first_frame",
            "The first frame is the given image",
            _decibel(min(row["psnr"] - row["vae"] for row in own)),
            "; ".join(
                f"{row['name']}: {row['psnr']:.1f} dB, the VAE alone {row['vae']:.1f}"
                for row in rows
            )
            + f"; at most −{MAX_BELOW_VAE_DB:g} allowed, −{MAX_BELOW_VAE_UNSEEN_DB:g} of what was never trained on",
            all(
                row["psnr"]
                >= row["vae"] - (MAX_BELOW_VAE_DB if row["trained"] else MAX_BELOW_VAE_UNSEEN_DB)
                for row in rows
            ),
        ),
        _criterion(
            "held",
            "With --hold it is what the VAE makes of the image",
            _decibel(max((row["held"] - row["vae"] for row in rows), key=abs)),
            "; ".join(f"{row['name']}: {row['held']:.1f} and {row['vae']:.1f} dB" for row in rows),
            # As printed by `goku sample`, in tenths.
            all(row["held"] == row["vae"] for row in rows),
        ),
        _exported(drawn["plain"], drawn["exported"]),
    ]
    return {
        "passed": all(criterion["passed"] for criterion in criteria),
        "criteria": criteria,
        "first_frame": rows,
    }


def summary(result: Mapping[str, Any]) -> str:
    """The verdict in one line."""
    missed = [criterion["key"] for criterion in result["criteria"] if not criterion["passed"]]
    head = "PASS" if result["passed"] else f"FAIL ({', '.join(missed)})"
    parts = {criterion["key"]: criterion for criterion in result["criteria"]}
    told = [
        f"{parts['stages']['value']} stages finished",
        f"{parts['inside']['text']}",
        f"{parts['between']['text']}",
        *(
            f"first frame of {row['name']}{'' if row['trained'] else ' (never trained on)'} {row['psnr']:.1f} dB, "
            f"held {row['held']:.1f}, the VAE alone {row['vae']:.1f}"
            for row in result["first_frame"]
        ),
    ]
    return f"{head}: {'; '.join(told)}"


def _criterion(key: str, label: str, value: str, text: str, passed: bool) -> dict[str, Any]:
    return {"key": key, "label": label, "value": value, "text": text, "passed": passed}


def _inside(log: TrainingLog, kill: Kill) -> dict[str, Any]:
    """The stage went on from a checkpoint of its own, and the steps that it repeated gave the same bits."""
    text, passed = f"killed in {kill.stage} at step {kill.step} and not resumed", False
    if log.interruptions:
        resumed = log.interruptions[0][1]
        text = (
            f"killed in {kill.stage} at step {kill.step}, resumed at {resumed}{log.replay_text()}"
        )
        passed = resumed > 0 and log.replayed > 0 and log.replay_difference == 0.0
    return _criterion("inside", "Killed inside a stage", f"{log.replayed} steps", text, passed)


def _between(
    names: Sequence[str], events: Sequence[Mapping[str, Any]], kill: Kill
) -> dict[str, Any]:
    """The last process passed by all stages up to the killed one, and began the next from its last checkpoint."""
    following = names[names.index(kill.stage) + 1]
    order = [(event["event"], event.get("stage")) for event in events]
    last = max((i for i, found in enumerate(order) if found == ("stage_skip", names[0])), default=0)
    wanted = [("stage_skip", name) for name in names[: names.index(following)]]
    wanted.append(("stage_begin", following))
    passed = order[last : last + len(wanted)] == wanted
    text = f"killed between {kill.stage} and {following}"
    if kill.next_step:
        text += f" (it had done {kill.next_step} steps)"
    text += f", gone on with {following}" if passed else f", not gone on with {following}"
    return _criterion("between", "Killed between two stages", "1 ×", text, passed)


def _losses(stages: Sequence[StageReport]) -> dict[str, Any]:
    """Loss on fixed noise, with the averaged weights, before and after each stage."""
    pairs = [
        (stage.name, stage.log.fixed[0][1], stage.log.fixed[-1][1])
        for stage in stages
        if stage.log.fixed
    ]
    worst = min((first / last for _, first, last in pairs), default=0.0)
    text = "; ".join(f"{name} {first:.2f} → {last:.2f}" for name, first, last in pairs)
    passed = len(pairs) == len(stages) and all(last < first for _, first, last in pairs)
    return _criterion(
        "losses", "The loss falls in every stage", f"÷ {worst:.2f} at least", text, passed
    )


def _exported(plain: Sequence[Drawn], exported: Sequence[Drawn]) -> dict[str, Any]:
    same = [
        np.array_equal(frames(ours.path), frames(theirs.path))
        for ours, theirs in zip(plain, exported, strict=True)
    ]
    text = f"{sum(same)} of {len(same)} clips are the same, pixel by pixel"
    return _criterion(
        "exported",
        "The exported folder draws the same",
        f"{sum(same)} of {len(same)}",
        text,
        all(same),
    )


def _decibel(value: float) -> str:
    return f"{value:+.1f} dB".replace("-", "−")


# ---- looking


def _shown(run: RecipeRun) -> dict[str, list[Shown]]:
    """What each stage draws of the items SHOWN, those that it trains, from their captions alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with parallel_context(run.recipe.vae.train.device) as context:
            vae = prepare_vae(run.recipe.vae, context)
            return {stage.name: _stage_shown(stage, vae, context) for stage in run.recipe.stages}
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _stage_shown(stage: Stage, vae: VideoVAE, context: ParallelContext) -> list[Shown]:
    config = stage.config
    if config.model.condition == "frames":
        return []  # its clips are drawn from given images
    dataset, _, _ = prepare_datasets(config, context, vae)
    loaded = load_for_sampling(Path(config.out), context.device)
    chosen = [i for i, item in enumerate(dataset.items) if item.name.rpartition(":")[2] in SHOWN]
    requests = [
        Request(item.caption, item.height, item.width, item.frames, SAMPLE_SEED)
        for item in (dataset.items[i] for i in chosen)
    ]
    settings = SampleConfig(
        steps=SAMPLE_STEPS,
        shift=config.flow.shift,
        precision=autocast_dtype(config.train.precision, context.device),
    )
    pictures = [to_uint8(video) for _, video in generate_share(loaded, requests, settings, context)]
    found = []
    for index, picture in zip(chosen, pictures, strict=True):
        training = to_uint8(dataset.pixels(index))
        mean = dataset.read(index).mean[None].to(context.device)
        decoded = to_uint8(vae.decode(mean)[0].clamp(-1, 1).cpu())
        found.append(
            Shown(
                caption=dataset.items[index].caption,
                training=training,
                drawn=picture,
                psnr=psnr(picture, training),
                vae_psnr=psnr(decoded, training),
            )
        )
    return found


def _stage_report(recipe: Recipe, stage: Stage, shown: Sequence[Shown]) -> StageReport:
    config, carry = stage.config, stage.carry
    events = read_log(Path(config.out) / "train.jsonl")
    log = TrainingLog.read(events)
    taken = [
        "average" if carry.weights == "ema" else "weights",
        *(name for name in ("ema", "optimizer", "schedule", "stream") if getattr(carry, name)),
    ]
    mix = [
        f"{name} {modality} {getattr(weights, modality):g}"
        for name, weights in (config.data.mix or {}).items()
        for modality in ("image", "video")
        if getattr(weights, modality)
    ]
    sizes = []
    if draws(config.data, "image"):
        sizes.append(f"image {_size(recipe, stage, 'image_pixels')}")
    if draws(config.data, "video"):
        sizes.append(f"video {_size(recipe, stage, 'video_pixels')} × {config.data.max_frames}")
    return StageReport(
        name=stage.name,
        start=stage.start or "",
        carry=", ".join(taken) if stage.start else "",
        mix=", ".join(mix),
        sizes=", ".join(sizes),
        steps=config.train.steps,
        shift=config.flow.shift,
        lr=config.optimizer.lr,
        tokens=sum(int(step["tokens"]) for step in log.steps),
        seconds=_seconds(events),
        log=log,
        shown=shown,
    )


def _size(recipe: Recipe, stage: Stage, key: str) -> str:
    """A number of pixels as the recipe writes it (64x112), height first."""
    written = (recipe.tree["stages"][stage.name].get("data") or {}).get(key)
    return str(getattr(stage.config.data, key) if written is None else written).replace("x", " × ")


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Time in all processes that worked on a run, between its first and last event in each."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if began is None or event["event"] in ("start", "resume"):
            total += 0.0 if began is None else last - began
            began = event["time"]
        last = event["time"]
    return total + (0.0 if began is None else last - began)


def _report(
    run: RecipeRun, stages: Sequence[StageReport], result: Mapping[str, Any]
) -> RecipeReport:
    out, recipe = run.out, run.recipe
    vae = [event for event in read_log(recipe.out / "vae.jsonl") if event["event"] == "vae_step"]
    image = run.given[0].image
    return RecipeReport(
        verdict=result,
        stages=stages,
        kills=run.kills,
        drawn=list(zip(run.given, run.drawn["plain"], run.drawn["held"], strict=True)),
        vae_psnr=[(event["step"], event["psnr"]) for event in vae],
        timings=list(run.timings.items()),
        timing_note="Each `goku` command begins by importing PyTorch, some seconds of it.",
        config=parser.dump(recipe.tree),
        environment=environment(),
        commands=(
            "goku demo --page 2",
            shlex.join(["goku", "train", str(out / "recipe.yaml")]),
            shlex.join(
                [
                    "goku",
                    "sample",
                    recipe.stages[-1].config.out,
                    "--image",
                    str(image),
                    "--frames",
                    "9",
                    "--prompt",
                    run.given[0].caption,
                ]
            ),
        ),
        files=(
            (str(out / "recipe.yaml"), "the recipe, with its folders here"),
            (str(recipe.out / "stages"), "a folder for each stage: checkpoints, log, validation"),
            (str(out / "validation.json"), "what is drawn while each stage trains"),
            (str(out / "given"), "the given images, and the requests for them"),
            (str(out / "image-to-video"), "the clips from them: plain, held, exported"),
            (str(out / "exported"), "the last stage as `goku export` writes it"),
            (str(out / "recipe-report.jsonl"), "the numbers of this page"),
        ),
        media=[
            *((medium.record(), "trained on") for medium in TRAINING),
            *((medium.record(), "held out") for medium in UNSEEN),
        ],
        also=(("report.html", "The first page: one run, images and clips together"),)
        if (out / "report.html").exists()
        else (),
    )
