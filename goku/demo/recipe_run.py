"""The demo's second page from end to end: every stage of the tiny recipe on real media, killed twice, then used.

As on the first page the commands are those that anyone would type. `goku train recipe.yaml` is killed with SIGKILL
once inside a stage and once between two, and started again each time; the last stage is exported, and clips are drawn
from given images by `goku sample`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from goku import config as parser
from goku.data import decode_all, list_records
from goku.demo.catalogue import TRAINING, UNSEEN
from goku.demo.folder import clear, refuse_folders
from goku.demo.media import DemoError, collect, collect_moments
from goku.demo.recipe_contents import Drawn, Given, Kill
from goku.demo.recipe_verdict import SAMPLE_SEED, SAMPLE_STEPS, THREADS, RecipeRun, conclude
from goku.demo.watching import (
    DemoFailed,
    command,
    kill_step,
    kill_when,
    last_step,
    narrator,
    output_of,
    timed,
)
from goku.media_files import save, to_uint8
from goku.metrics import read_log
from goku.recipe import Recipe, Stage, load_recipe
from goku.stages import states

__all__ = ["CONFIG", "demo_recipe", "run_recipe_demo", "write_given"]

CONFIG = resources.files("goku.demo") / "recipe.yaml"

KILLED_INSIDE, KILLED_AFTER = "joint-480", "joint-720"
# Clips of which the first frame is given: one that was trained on, one that was not.
GIVEN = ("bunny", "fence")

# What `goku sample --image` prints of a clip.
_FIRST_FRAME = re.compile(r"first frame: (\S+) dB to the given image, the VAE alone (\S+) dB")

_FILES = ("recipe.html", "recipe-report.jsonl", "recipe.yaml", "validation.json")
_FOLDERS = ("recipe", "given", "image-to-video", "exported")


def run_recipe_demo(out: Path, *, media: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Run everything into `out`; exit code 0 when every criterion holds, 1 when one does not.

    Raises ValueError (exit code 2) when an override is wrong, the media cannot be had or `out` is a folder of something
    else; DemoFailed (exit code 1) when a command fails.
    """
    # Everything that can be wrong is found before anything of an earlier demo is removed.
    tree = demo_recipe(out, overrides)
    recipe = load_recipe(tree)
    _check(recipe)
    clear(out, _FILES, _FOLDERS)
    say = narrator()
    run = RecipeRun(recipe, out)
    with timed(run.timings, "media"):
        collect(out / "media", offline=media, log=say)
        collect_moments(out / "media", log=say)
    (out / "recipe.yaml").write_text(parser.dump(tree), encoding="utf-8")
    run.given = write_given(recipe, out)
    _train(run, say)
    i2v = Path(recipe.stages[-1].config.out)
    with timed(run.timings, "image to video, export"):
        say("finished; clips from given images, and the last stage exported")
        _draw(run, i2v, "plain")
        _draw(run, i2v, "held", "--hold")
        output_of("export", i2v, out / "exported", threads=THREADS)
        _draw(run, out / "exported", "exported")
    return conclude(run, say)


def demo_recipe(out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tiny recipe with its folders in `out`, as a mapping. Raises ValueError for an override that moves a folder
    or is none."""
    places = {
        "out": out / "recipe",
        "unseen": out / "media" / "unseen",
        "vae.path": out / "recipe" / "vae",
        "sources.stills.path": out / "media" / "train",
        "sources.clips.path": out / "media" / "train",
        "sources.i2v.path": out / "media" / "i2v",
        "validation.file": out / "validation.json",
    }
    refuse_folders(overrides, list(places))
    # JSON strings are YAML strings, whatever characters the path holds.
    folders = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
    with resources.as_file(CONFIG) as source:
        return parser.load(source, [*folders, *overrides])


def _check(recipe: Recipe) -> None:
    """What the demo needs of the recipe beside its being one. Raises DemoError."""
    for stage in recipe.stages:
        train = stage.config.train
        if train.log_every != 1 or not train.eval_every:
            raise DemoError(
                f"stages.{stage.name}: train.log_every is {train.log_every} and train.eval_every {train.eval_every}; "
                "allowed: 1, and at least 1: the demo watches and judges by them"
            )
    train = recipe.stage(KILLED_INSIDE).config.train
    if not 0 < train.checkpoint_every <= train.steps - 2:
        raise DemoError(
            f"stages.{KILLED_INSIDE}: train.checkpoint_every is {train.checkpoint_every}; allowed: 1 to "
            f"train.steps - 2 = {train.steps - 2}, so that there is a checkpoint to resume from"
        )


def write_given(recipe: Recipe, out: Path) -> list[Given]:
    """The given images in out/given with the requests for them, and out/validation.json; the media must be there.

    Images are the first frames of clips as the last stage sees them: what comes out can be compared pixel by pixel.
    """
    data = recipe.stages[-1].config.data
    folder = out / "given"
    media = {medium.name: medium for medium in (*TRAINING, *UNSEEN)}
    given, requests = [], []
    for name in GIVEN:
        trained = media[name] in TRAINING
        path = out / "media" / ("train" if trained else "unseen")
        alone = replace(data, path=str(path), sources=None, mix=None, workers=0)
        records = [record for record in list_records(alone) if record.name == name]
        ((_, clip),) = decode_all(records, alone)
        _, frames, height, width = clip.shape
        image = save(folder / name, to_uint8(clip[:, :1]))
        requests.append(
            {
                "prompt": media[name].text,
                "image": image.name,
                "height": height,
                "width": width,
                "frames": frames,
                "seed": SAMPLE_SEED,
            }
        )
        given.append(Given(name=name, caption=media[name].text, trained=trained, image=image))
    lines = [json.dumps(request, ensure_ascii=False) for request in requests]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cases = [
        {"caption": TRAINING[0].text, "num_frames": 1},
        {"caption": requests[0]["prompt"], "image_path": f"given/{requests[0]['image']}"},
    ]
    (out / "validation.json").write_text(
        json.dumps({"data": cases}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return given


def _draw(run: RecipeRun, model: Path, kind: str, *options: str) -> None:
    """`goku sample` of the given images' requests into image-to-video/KIND, with the PSNRs that it prints."""
    folder = run.out / "image-to-video" / kind
    requests = run.out / "given" / "requests.jsonl"
    printed = output_of(
        "sample",
        model,
        "--prompts",
        requests,
        "--steps",
        SAMPLE_STEPS,
        "--out",
        folder,
        *options,
        threads=THREADS,
    )
    found = _FIRST_FRAME.findall(printed)
    paths = sorted(folder.glob("*.mp4"))
    if not len(paths) == len(found) == len(run.given):
        raise DemoFailed(
            f"goku sample made {len(paths)} clips in {folder} and told {len(found)} first frames, "
            f"for {len(run.given)} given images"
        )
    run.drawn[kind] = [
        Drawn(path=path, psnr=float(own), vae_psnr=float(vae))
        for path, (own, vae) in zip(paths, found, strict=True)
    ]


def _train(run: RecipeRun, say: Callable[[str], None]) -> None:
    """`goku train recipe.yaml` three times: killed inside a stage, killed between two, to the end."""
    recipe, written = run.recipe, run.out / "recipe.yaml"
    say("a small VAE, then seven stages; the training will be killed twice, on purpose")
    inside = recipe.stage(KILLED_INSIDE)
    target = kill_step(inside.config.train)
    with (
        timed(run.timings, "VAE and stages until the first kill"),
        command("train", written, threads=THREADS) as process,
    ):
        # A checkpoint counts when it is written: the log says so some steps after it was begun.
        kill_when(
            process,
            lambda: last_step(_log(inside)) >= target and _has(_log(inside), "checkpoint"),
            lambda: f"in {inside.name} at step {last_step(_log(inside))}",
        )
    run.kills.append(Kill(stage=inside.name, step=last_step(_log(inside))))
    say(
        f"killed inside {inside.name} at step {run.kills[-1].step}; starting the same command again"
    )

    before = recipe.stage(KILLED_AFTER)
    following = recipe.stages[before.index + 1]
    whole = run.out / "recipe" / "recipe.jsonl"
    with (
        timed(run.timings, "until the second kill"),
        command("train", written, threads=THREADS) as process,
    ):
        kill_when(
            process,
            lambda: _has(whole, "stage_finish", stage=before.name),
            lambda: f"in {before.name} at step {last_step(_log(before))}",
            every=0.002,  # the next stage begins within a moment
        )
    found = states(recipe)[following.index]
    if found.begun:
        raise DemoFailed(
            f"{following.name} had a checkpoint before it could be killed between the stages"
        )
    run.kills.append(
        Kill(
            stage=before.name, step=before.config.train.steps, next_step=last_step(_log(following))
        )
    )
    say(f"killed between {before.name} and {following.name}; starting the same command again")
    with timed(run.timings, "the rest"), command("train", written, threads=THREADS) as process:
        if (code := process.wait()) != 0:
            raise DemoFailed(f"the resumed training failed with exit code {code}: see above")


def _log(stage: Stage) -> Path:
    return Path(stage.config.out) / "train.jsonl"


def _has(log: Path, event: str, **fields: object) -> bool:
    """Whether the log has such an event with these values."""
    wanted = {"event": event, **fields}
    return log.exists() and any(
        all(found.get(key) == value for key, value in wanted.items()) for found in read_log(log)
    )
