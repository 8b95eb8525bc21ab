"""A whole recipe: every stage from the one before, killed and resumed to the same bits, refused with its reasons.

Over 600 lines: all of these tests look at copies of one trained recipe, which takes most of their time.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import goku.data.listings
import goku.stages
from goku.carry import checkpoint_id
from goku.cli import main
from goku.data import DataError
from goku.metrics import read_log
from goku.parallelize import parallel_context
from goku.recipe import Recipe, load_recipe
from goku.run_folder import locked
from goku.stages import StageRefused, check_order, check_start, run_recipe, states
from goku_runtime import checkpoint

NAMES = ["t2i", "joint-288", "joint-480", "tune-t2v", "i2v"]


@pytest.fixture(scope="session")
def written(media: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The recipe as a mapping, without `out`; its caches are shared by all tests."""
    joint = {"stills": {"image": 1.0}, "clips": {"video": 2.0}}
    return {
        "seed": 5,
        "sources": {"stills": {"path": str(media)}, "clips": {"path": str(media)}},
        "unseen": str(media),
        "data": {"max_frames": 9, "workers": 0, "cache": str(tmp_path_factory.mktemp("caches"))},
        "vae": {
            "path": str(vae_folder),
            "model": {"stem_width": 8, "width": 8, "encoder_depth": 1, "decoder_depth": 1},
        },
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
        "packing": {"tokens_per_step": 48, "tokens_per_pack": 48},
        "optimizer": {"lr": 3e-3, "warmup_steps": 4},
        "ema": {"decay": 0.9},
        "conditioning": {"first": 0.8, "both": 0.2, "drop": 0.1},
        "train": {
            "steps": 4,
            "precision": "float32",
            "device": "cpu",
            "eval_every": 4,
            "eval_times": 2,
            "eval_items": 2,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
        },
        "stages": {
            "t2i": {"mix": {"stills": {"image": 1.0}}, "data": {"image_pixels": "32x32"}},
            "joint-288": {
                "mix": joint,
                "data": {"image_pixels": "16x32", "video_pixels": "16x32"},
                "flow": {"shift": 2.0},
                "carry": {"optimizer": True, "schedule": True},
            },
            "joint-480": {
                "mix": joint,
                "data": {"image_pixels": "32x48", "video_pixels": "32x32"},
                "flow": {"shift": 3.0},
                "carry": {"optimizer": True, "schedule": True},
            },
            "tune-t2v": {
                "mix": {"clips": {"video": 1.0}},
                "data": {"video_pixels": "32x32"},
                "optimizer": {"lr": 1e-3},
            },
            "i2v": {
                "from": "tune-t2v",
                "mix": {"clips": {"video": 1.0}},
                "data": {"video_pixels": "32x32"},
                "model": {"condition": "frames"},
                "carry": {"weights": "ema"},
            },
        },
    }


def _write(written: dict[str, Any], out: Path) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"out": str(out), **written}, sort_keys=False))
    return path


def _run(path: Path, *overrides: str, only: str | None = None) -> Recipe:
    recipe = load_recipe(path, overrides)
    with parallel_context("cpu") as context:
        assert run_recipe(recipe, context, threading.Event(), only=only) == "finished"
    return recipe


@pytest.fixture(scope="session")
def whole(written: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe, trained once without interruption. Read it, do not change it."""
    return _run(_write(written, tmp_path_factory.mktemp("whole") / "out"))


@pytest.fixture
def copied(whole: Recipe, written: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """(recipe file, out) of a finished recipe that a test may change."""
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    return _write(written, out), out


def _losses(out: Path) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Loss, gradient norm and learning rate by (stage, step); of a step done twice (killed, then repeated) the last."""
    return {
        (folder.name, event["step"]): (event["loss"], event["grad_norm"], event["lr"])
        for folder in (out / "stages").iterdir()
        for event in read_log(folder / "train.jsonl")
        if event["event"] == "step"
    }


def _saved(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of a checkpoint by part ("model", "ema", "optimizer") and name."""
    state: dict[str, Any] = {"model": {}, "ema": {}, "optimizer": {}}
    for full, (dtype, shape) in checkpoint.describe(path).items():
        part, name = full.split(".", 1)
        if part == "optimizer":
            parameter, moment = name.rsplit(".", 1)
            place = state["optimizer"].setdefault(parameter, {})
            place[moment] = torch.empty(shape, dtype=dtype)
        elif part in state:
            state[part][name] = torch.empty(shape, dtype=dtype)
    checkpoint.load(state, path, partial=True)
    moments = {
        f"{name}.{kind}": tensor
        for name, kinds in state["optimizer"].items()
        for kind, tensor in kinds.items()
    }
    return {**state, "optimizer": moments}


def _assert_same(ours: Path, theirs: Path) -> None:
    """Losses of every step of every stage, and every tensor of every last checkpoint, to the bit."""
    assert _losses(ours) == _losses(theirs)
    for name in NAMES:
        a, b = (checkpoint.latest(out / "stages" / name / "checkpoints") for out in (ours, theirs))
        assert a is not None
        assert b is not None
        left, right = _saved(a), _saved(b)
        assert left.keys() == right.keys()
        for part in left:
            assert left[part].keys() == right[part].keys()
            assert left[part]
            assert all(torch.equal(left[part][key], right[part][key]) for key in left[part]), name
        values = [checkpoint.read_values(path)["run"] for path in (a, b)]
        for run in values:
            run.pop("config")
            if run["start"]:
                run["start"].pop("checkpoint_id")  # a manifest may name its files in another order
        assert values[0] == values[1]


def _events(out: Path, *kinds: str) -> list[tuple[str, str]]:
    return [
        (event["event"], event["stage"])
        for event in read_log(out / "recipe.jsonl")
        if not kinds or event["event"] in kinds
    ]


def test_all_stages_run_in_order_and_each_from_the_one_before(whole: Recipe) -> None:
    assert [stage.name for stage in whole.stages] == NAMES
    expected = [(kind, name) for name in NAMES for kind in ("stage_begin", "stage_finish")]
    assert _events(whole.out) == expected
    for state in states(whole):
        stage = state.stage
        assert (state.status, state.step) == ("finished", 4)
        assert state.run["stage"] == stage.name
        if stage.start is None:
            assert state.run["start"] is None
            continue
        before = checkpoint.latest(whole.out / "stages" / stage.start / "checkpoints")
        assert before is not None
        assert state.run["start"]["stage"] == stage.start
        assert state.run["start"]["checkpoint_id"] == checkpoint_id(before)
    # The schedule went on through the joint stages: no second warm-up, and a new one after them.
    rates = {key: values[2] for key, values in _losses(whole.out).items()}
    assert [rates["t2i", step] for step in (1, 4)] == [3e-3 / 4, 3e-3]
    assert rates["joint-288", 1] == rates["joint-480", 1] == 3e-3
    assert rates["tune-t2v", 1] == 1e-3 / 4
    offsets = [state.run["schedule_offset"] for state in states(whole)]
    assert offsets == [0, 4, 8, 0, 0]
    # Sizes that any stage was trained on stay trained: the clips' three latent frames, the stills' area.
    grids = [state.run["limits"]["grid"] for state in states(whole)]
    assert grids[0][0] == 1
    assert all(grid[0] == 3 for grid in grids[1:])
    for earlier, later in itertools.pairwise(grids):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))


def test_what_a_stage_draws_is_its_mix(whole: Recipe) -> None:
    for stage in whole.stages:
        log = read_log(Path(stage.config.out) / "train.jsonl")
        steps = [e["loss_by_modality"] for e in log if e["event"] == "step"]
        drawn = {kind for step in steps for kind, loss in step.items() if loss is not None}
        wanted = {"t2i": {"image"}, "tune-t2v": {"video"}, "i2v": {"video"}}
        assert drawn == wanted.get(stage.name, {"image", "video"})


def test_a_stage_begins_with_what_it_carries(copied: tuple[Path, Path]) -> None:
    """The i2v stage takes the average of the stage before for its weights, bit for bit: a step too small for fp32
    leaves them as they were carried."""
    path, out = copied
    _drop(out, "i2v")
    _run(path, "stages.i2v.train.steps=1", "stages.i2v.optimizer.lr=1e-30", only="i2v")
    before, after = (
        _saved(checkpoint.latest(out / "stages" / name / "checkpoints"))
        for name in ("tune-t2v", "i2v")
    )
    log = read_log(out / "stages" / "i2v" / "train.jsonl")
    (carry,) = [e for e in log if e["event"] == "carry"]
    assert carry["new"]
    assert set(after["model"]) == {*before["ema"], *carry["new"]}
    assert all(name.startswith("condition_embed.") for name in carry["new"])
    for name, weight in before["ema"].items():
        assert torch.equal(after["model"][name], weight), name
    assert not all(
        torch.equal(before["ema"][name], before["model"][name]) for name in before["ema"]
    )
    assert (carry["carry_weights"], carry["from_stage"], carry["from_step"]) == (
        "ema",
        "tune-t2v",
        4,
    )
    assert carry["tensors"] == len(before["ema"])


def test_a_finished_recipe_started_again_does_nothing(copied: tuple[Path, Path]) -> None:
    path, out = copied
    before = {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()}
    _run(path)
    assert _events(out)[-len(NAMES) :] == [("stage_skip", name) for name in NAMES]
    after = {p: p.stat().st_mtime_ns for p in (out / "stages").rglob("*") if p.is_file()}
    assert before == after


def test_datasets_are_listed_once_and_checkpoints_looked_at_once_a_stage(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = copied
    shutil.rmtree(out / "stages" / NAMES[-1])
    listed: list[str] = []
    looked: list[str] = []
    scan, state = goku.data.listings.scan, goku.stages.state_of

    def counted(dataset: str, form: Any, **how: Any) -> Any:
        listed.append(dataset)
        return scan(dataset, form, **how)

    def seen(stage: Any) -> Any:
        looked.append(stage.name)
        return state(stage)

    monkeypatch.setattr(goku.data.listings, "scan", counted)
    monkeypatch.setattr(goku.stages, "state_of", seen)
    recipe = _run(path)
    # All sources and the held-out data are one folder, looked through before anything else.
    assert listed == [str(recipe.vae.unseen)]
    assert looked == [*NAMES, NAMES[-1]]  # and what the stage that was trained has come to


@pytest.mark.long
def test_one_stage_alone(whole: Recipe, written: dict[str, Any], tmp_path: Path) -> None:
    """`only` trains that stage; all of them one by one are the whole recipe."""
    path = _write(written, tmp_path / "out")
    with pytest.raises(
        StageRefused,
        match=r"joint-288 cannot start:\n  it starts from t2i, which has no checkpoint; .*--stage t2i",
    ):
        _run(path, only="joint-288")
    for name in NAMES:
        _run(path, only=name)
        assert (tmp_path / "out" / "stages" / name).is_dir()
    _assert_same(tmp_path / "out", whole.out)
    with pytest.raises(ValueError, match=r"stage is 'joint-48'; did you mean joint-480\?"):
        _run(path, only="joint-48")


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the recipe ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _killed_when(path: Path, condition: Callable[[], bool], *overrides: str) -> None:
    """Train in a process and kill it by SIGKILL as soon as the condition holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "goku.cli", "train", str(path), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        _until(condition, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def _logged(out: Path, stage: str, event: str, step: int) -> bool:
    log = out / "stages" / stage / "train.jsonl"
    return log.exists() and any((e["event"], e["step"]) == (event, step) for e in read_log(log))


@pytest.mark.slow
def test_killed_inside_a_stage_and_between_stages_is_bit_identical(
    whole: Recipe, written: dict[str, Any], tmp_path: Path
) -> None:
    """SIGKILL once in the middle of the third stage and once after its end, then on: the uninterrupted run's bits."""
    out = tmp_path / "out"
    path = _write(written, out)
    _killed_when(path, lambda: _logged(out, "joint-480", "step", 3))
    assert states(load_recipe(path))[2].status in ("fresh", "partial")

    def between() -> bool:
        log = out / "recipe.jsonl"
        return log.exists() and ("stage_finish", "joint-480") in _events(out)

    _killed_when(path, between)
    found = states(load_recipe(path))
    assert [state.status for state in found[:3]] == ["finished"] * 3
    assert found[3].status == "fresh"
    _run(path)
    _assert_same(out, whole.out)
    kinds = _events(out)
    assert ("stage_skip", "t2i") in kinds
    assert kinds[-1] == ("stage_finish", "i2v")


@pytest.mark.long
def test_a_signal_stops_the_recipe_with_a_checkpoint(
    whole: Recipe, written: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(written, tmp_path / "out")
    recipe = load_recipe(path)
    stop = threading.Event()
    from goku.trainer import Trainer

    step = Trainer.train_step

    def ask_at_three(trainer: Trainer, log: Any, asked: threading.Event) -> bool:
        if (trainer.stage, trainer.step) == ("joint-288", 2):
            stop.set()
        return step(trainer, log, asked)

    monkeypatch.setattr(Trainer, "train_step", ask_at_three)
    with parallel_context("cpu") as context:
        assert run_recipe(recipe, context, stop) == "stopped"
    monkeypatch.undo()
    found = states(recipe)
    assert [(s.status, s.step) for s in found[:3]] == [
        ("finished", 4),
        ("partial", 3),
        ("fresh", 0),
    ]
    assert _events(tmp_path / "out")[-1] == ("stage_stop", "joint-288")
    _run(path)
    _assert_same(tmp_path / "out", whole.out)


# ---- refusals


def _refusal(recipe: Recipe, name: str, fingerprints: dict[str, str] | None = None) -> str:
    with pytest.raises(StageRefused) as caught:
        check_start(recipe, recipe.stage(name), states(recipe), fingerprints)
    return str(caught.value)


def _drop(out: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(out / "stages" / name)


def _drop_latest(stage: Path) -> None:
    """A stage that has begun, then, and is not finished."""
    latest = checkpoint.latest(stage / "checkpoints")
    assert latest is not None
    shutil.rmtree(latest)


def test_a_start_that_is_not_finished_is_refused(copied: tuple[Path, Path]) -> None:
    path, out = copied
    _drop(out, "i2v", "tune-t2v")
    recipe = load_recipe(path, ["stages.joint-480.train.steps=9"])
    assert _refusal(recipe, "tune-t2v") == (
        "stage tune-t2v cannot start:\n  it starts from joint-480, which is at step 4 of 9; finish it first: "
        f"goku train {path} --stage joint-480"
    )


def test_another_model_vae_text_encoder_or_schedule_is_refused_line_by_line(
    copied: tuple[Path, Path],
) -> None:
    path, out = copied
    _drop(out, "joint-480", "tune-t2v", "i2v")
    recipe = load_recipe(
        path,
        [
            "stages.joint-480.model.depth=3",
            "stages.joint-480.model.qk_norm=head",
            "stages.joint-480.optimizer.lr=1e-3",
            "stages.joint-480.optimizer.warmup_steps=7",
        ],
    )
    head, *lines = _refusal(recipe, "joint-480", {"vae": "x", "text": "y"}).splitlines()
    source = out / "stages" / "joint-288" / "checkpoints" / "step_0000004"
    assert head == f"stage joint-480 cannot start from {source}:"
    assert [line.strip() for line in lines] == [
        "model.depth: 2 -> 3",
        "model.qk_norm: full -> head",
        "carry.schedule goes on in the same schedule, but optimizer.lr: 0.003 -> 0.001",
        "carry.schedule goes on in the same schedule, but optimizer.warmup_steps: 4 -> 7",
        f"vae.path holds another VAE than {source} was trained with",
        f"text is another encoder than {source} was trained with",
    ]


def test_carrying_the_stream_needs_equal_items_and_mix(copied: tuple[Path, Path]) -> None:
    path, out = copied
    _drop(out, "joint-480", "tune-t2v", "i2v")
    recipe = load_recipe(path, ["stages.joint-480.carry.stream=true"])
    run = states(recipe)[1].run
    assert check_start(recipe, recipe.stage("joint-480"), states(recipe), run["fingerprints"])
    changed = run["fingerprints"] | {"data": "other", "grids": "other"}
    text = _refusal(recipe, "joint-480", changed)
    assert "carry.stream: the items or the mix are others than" in text
    assert "carry.stream: packing.overlong cuts other samples than" in text
    # In a run these sizes are other latents: refused when the data are known, before the first step.
    with pytest.raises(StageRefused, match=r"carry.stream: the items or the mix are others"):
        _run(path, "stages.joint-480.carry.stream=true")
    assert not (out / "stages" / "joint-480" / "checkpoints").exists()


def test_parts_that_the_checkpoint_lacks_are_refused(copied: tuple[Path, Path]) -> None:
    path, out = copied
    _drop(out, "joint-480", "tune-t2v", "i2v")
    # The weights alone, as an older or foreign checkpoint may have them.
    source = out / "stages" / "joint-288" / "checkpoints" / "step_0000004"
    run = checkpoint.read_values(source)["run"]
    bare = out / "bare" / "step_0000004"
    checkpoint.save({"model": _saved(source)["model"], "run": run}, bare)
    recipe = load_recipe(path, [f"stages.joint-480.from={bare}"])
    lines = _refusal(recipe, "joint-480").splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "carry.ema is asked for, and the checkpoint holds no 'ema'",
        "carry.optimizer is asked for, and the checkpoint holds no 'optimizer'",
    ]
    recipe = load_recipe(path, [f"stages.joint-480.from={out}/nothing"])
    assert f"it starts from {out}/nothing, which holds no checkpoint" in _refusal(
        recipe, "joint-480"
    )


def test_a_stage_that_began_from_something_else_is_refused(copied: tuple[Path, Path]) -> None:
    path, out = copied
    # Other carry settings than it began with.
    recipe = load_recipe(path, ["stages.joint-480.carry.optimizer=false"])
    assert "it began with other settings, carry.optimizer: true -> false" in _refusal(
        recipe, "joint-480"
    )
    # Another stage to start from.
    recipe = load_recipe(path, ["stages.tune-t2v.from=joint-288"])
    assert "it began from joint-480 at step 4, and the recipe says from joint-288" in _refusal(
        recipe, "tune-t2v"
    )
    recipe = load_recipe(path, ["stages.tune-t2v.from=null"])
    assert "and the recipe says nothing" in _refusal(recipe, "tune-t2v")
    # The start was trained anew, or on: another checkpoint than the one it began from.
    manifest = out / "stages" / "joint-288" / "checkpoints" / "step_0000004" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=3))
    recipe = load_recipe(path)
    assert _refusal(recipe, "joint-480") == (
        "stage joint-480 cannot start:\n  joint-288 was trained on after joint-480 began: move "
        f"{out}/stages/joint-480 away"
    )


def test_training_an_earlier_stage_on_is_refused_while_later_ones_stand(
    copied: tuple[Path, Path],
) -> None:
    path, out = copied
    recipe = load_recipe(path, ["stages.t2i.train.steps=9"])
    with pytest.raises(StageRefused) as caught:
        check_order(recipe, states(recipe))
    assert str(caught.value).splitlines()[1:] == [
        f"  joint-288 began from t2i, which is at step 4 of 9 now: move {out}/stages/joint-288 away, or bring t2i "
        "back as it was"
    ]
    with pytest.raises(StageRefused):
        check_order(recipe, states(recipe), "t2i")
    check_order(recipe, states(recipe), "i2v")  # whose start is as it was
    _drop(out, "joint-288", "joint-480", "tune-t2v", "i2v")
    check_order(recipe, states(recipe))


def test_another_configuration_of_a_finished_stage_is_refused(copied: tuple[Path, Path]) -> None:
    path, out = copied
    recipe = load_recipe(path, ["stages.joint-480.flow.shift=7.0", "stages.t2i.train.log_every=2"])
    with pytest.raises(StageRefused) as caught:
        check_order(recipe, states(recipe))
    assert str(caught.value).splitlines()[1:] == [
        f"  joint-480 was begun with another configuration; undo, or move {out}/stages/joint-480 away:",
        "    flow.shift: 3.0 -> 7.0",
    ]


def test_the_command_says_refusals_and_trains_nothing(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = copied
    _drop(out, "joint-288")
    # This one has its checkpoints and needs no start any more.
    assert main(["train", str(path), "--stage", "joint-480"]) == 0
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "joint-480 began from joint-288, which has no checkpoint now" in error
    assert not (out / "stages" / "joint-288").exists()
    assert main(["train", str(path), "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[: len(NAMES) + 1]]
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        (name, "fresh" if name == "joint-288" else "finished") for name in NAMES
    ]
    assert main(["train", str(path), "--dry-run", "--stage", "t2i"]) == 0
    shown = capsys.readouterr().out
    assert "\n# stage t2i\n" in shown
    assert f"stills: {load_recipe(path).stages[0].config.data.sources['stills'].path}" in shown
    assert main(["train", str(path), "--stage", "joint"]) == 2
    assert "stage is 'joint'; did you mean joint-" in capsys.readouterr().err
    # A run has no stages.
    assert main(["train", str(out / "stages" / "t2i" / "config.yaml"), "--stage", "t2i"]) == 2
    assert "--stage is 't2i', but" in capsys.readouterr().err


def test_a_recipes_folder_stands_for_its_last_stage_in_ckpt(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = copied
    last = checkpoint.latest(out / "stages" / "i2v" / "checkpoints")
    assert main(["ckpt", "verify", str(out)]) == 0
    said = capsys.readouterr()
    assert str(last) in said.out
    assert said.err.startswith(f"goku ckpt: of {out} it is {last}\n")
    assert main(["ckpt", "diff", str(out), str(out / "stages" / "i2v")]) == 0
    # What is written is never another place than the one named.
    assert main(["ckpt", "export", str(out / "stages" / "i2v"), str(out)]) == 2
    assert f"{out} exists already" in capsys.readouterr().err


def test_a_stage_is_a_run_that_goes_on_without_the_recipe(copied: tuple[Path, Path]) -> None:
    """The config.yaml of a stage is an ordinary run's; its checkpoints still say what it began from."""
    _, out = copied
    stage = out / "stages" / "tune-t2v"
    _drop(out, "joint-480", "i2v")
    assert main(["train", str(stage / "config.yaml"), f"out={stage}", "train.steps=5"]) == 0
    latest = checkpoint.latest(stage / "checkpoints")
    assert latest is not None
    run = checkpoint.read_values(latest)["run"]
    assert (run["step"], run["stage"], run["start"]["stage"]) == (5, "tune-t2v", "joint-480")


def test_a_stage_that_has_yet_to_begin_is_begun_by_its_recipe_alone(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml is there before its first checkpoint, and as a run it would begin from random weights."""
    path, out = copied
    shutil.rmtree(out / "stages" / "i2v" / "checkpoints")
    config = str(out / "stages" / "i2v" / "config.yaml")
    assert main(["train", config, f"out={out / 'stages' / 'i2v'}"]) == 2
    assert "--stage i2v" in capsys.readouterr().err
    assert not (out / "stages" / "i2v" / "checkpoints").exists()
    # So it is with one that was resumed before its checkpoints went.
    stage = out / "stages" / "tune-t2v"
    _drop(out, "i2v")
    _drop_latest(stage)
    _run(path, only="tune-t2v")
    assert [
        event["step"] for event in read_log(stage / "train.jsonl") if event["event"] == "resume"
    ] == [2]
    shutil.rmtree(stage / "checkpoints")
    assert main(["train", str(stage / "config.yaml"), f"out={stage}"]) == 2
    assert "--stage tune-t2v" in capsys.readouterr().err
    # One that begins from nothing may begin anywhere.
    shutil.rmtree(out / "stages" / "t2i" / "checkpoints")
    config = str(out / "stages" / "t2i" / "config.yaml")
    assert main(["train", config, f"out={out / 'stages' / 't2i'}", "train.steps=1"]) == 0


def test_a_later_stage_without_data_is_refused_before_anything_is_trained(
    written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = copy.deepcopy(written)
    empty = tmp_path / "nothing"
    empty.mkdir()
    tree["sources"]["empty"] = {"path": str(empty)}
    tree["stages"]["i2v"]["mix"] = {"empty": {"video": 1.0}}
    path = _write(tree, tmp_path / "out")
    assert main(["train", str(path)]) == 2
    assert str(empty) in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()


@pytest.mark.parametrize("stream", [False, True], ids=["begun", "carried"])
def test_held_out_data_that_have_gone_are_missed_before_anything_is_prepared(
    copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Of a stage that has begun, or goes on in a stream, only the items to train on are already known."""
    path, out = copied
    how = ["unseen=nowhere"]
    if stream:
        _drop(out, "joint-480", "tune-t2v", "i2v")
        how += [f"stages.joint-480.data.{kind}_pixels=16x32" for kind in ("image", "video")]
        how.append("stages.joint-480.carry.stream=true")
    else:
        _drop(out, "tune-t2v", "i2v")
        _drop_latest(out / "stages" / "joint-480")

    def prepared(*_: Any) -> None:
        raise AssertionError("hours of work")

    monkeypatch.setattr("goku.stages.prepare_vae", prepared)
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        _run(path, *how, only="joint-480")


def test_two_recipes_do_not_share_a_folder(copied: tuple[Path, Path]) -> None:
    path, out = copied
    with locked(out), pytest.raises(ValueError, match="which another run is writing to"):
        _run(path)


def test_a_carried_stream_goes_on_where_it_was(copied: tuple[Path, Path]) -> None:
    """With equal data: the next positions of the same order, under the same seed."""
    path, out = copied
    _drop(out, "joint-480", "tune-t2v", "i2v")
    sizes = [f"stages.joint-480.data.{kind}_pixels=16x32" for kind in ("image", "video")]
    recipe = _run(path, *sizes, "stages.joint-480.carry.stream=true", only="joint-480")
    before, after = states(recipe)[1:3]
    assert after.stage.config.seed == before.stage.config.seed
    log = read_log(out / "stages" / "joint-480" / "train.jsonl")
    positions = [p for event in log if event["event"] == "step" for p in range(*event["positions"])]
    assert before.run["position"] > 0
    assert positions == list(range(before.run["position"], after.run["position"]))


def test_a_carried_stream_keeps_its_items(
    copied: tuple[Path, Path], media: Path, tmp_path: Path
) -> None:
    """A stage that goes on in a stream is held to the items that it was begun with, as a resume is."""
    path, out = copied
    _drop(out, "joint-480", "tune-t2v", "i2v")
    folder = shutil.copytree(media, tmp_path / "media")
    for suffix in ("png", "txt"):
        shutil.copy(folder / f"image0.{suffix}", folder / f"a-new-one.{suffix}")
        (folder / f"image2.{suffix}").unlink()  # lost
    (folder / "a-new-one.txt").write_text("new")
    (folder / "clip0.mp4").write_bytes(b"")  # its latent is there
    how = [f"stages.joint-480.data.{kind}_pixels=16x32" for kind in ("image", "video")]
    how += [f"sources.{name}.path={folder}" for name in ("stills", "clips")]
    how += ["stages.joint-480.carry.stream=true", "data.skip_bad=true"]
    # Held-out data are their own.
    how += [f"unseen={media}"]
    recipe = _run(path, *how, only="joint-480")
    before, after = states(recipe)[1:3]
    assert after.run["fingerprints"]["data"] == before.run["fingerprints"]["data"]
    log = read_log(out / "stages" / "joint-480" / "train.jsonl")
    positions = [p for event in log if event["event"] == "step" for p in range(*event["positions"])]
    assert positions == list(range(before.run["position"], after.run["position"]))
    rows = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    told = [(row["stage"], row["source"], row["name"], row["reason"]) for row in rows]
    assert told == [("joint-480", "stills", "stills:image2.png", "is no longer listed")]
    # An item that has become another is still refused, by name; the stage before is as it was.
    _drop(out, "joint-480")
    (folder / "image1.txt").write_text("another caption")
    line = "stills:image1.png: its caption was 'picture number 1', is 'another caption'"
    with pytest.raises(StageRefused, match=r"the items or the mix are others .*\n +" + line):
        _run(path, *how, only="joint-480")
    assert not (out / "stages" / "joint-480" / "checkpoints").exists()
    assert before == states(recipe)[1]


def test_a_carried_stream_is_held_over_stages_that_have_yet_to_begin(
    copied: tuple[Path, Path], written: dict[str, Any], media: Path, tmp_path: Path
) -> None:
    """joint-480 goes on in joint-288's stream and tune-t2v in joint-480's: what has gone since stops neither."""
    path, out = copied
    _drop(out, "joint-480", "tune-t2v", "i2v")
    folder = shutil.copytree(media, tmp_path / "media")
    shutil.copy(folder / "image0.png", folder / "without-a-caption.png")  # has come since
    stages = dict(written["stages"])
    del stages["i2v"]
    for name in ("joint-480", "tune-t2v"):
        stages[name] = {**stages["joint-288"], "carry": {"optimizer": True, "stream": True}}
    _write({**written, "stages": stages, "unseen": str(media)}, out)
    how = [f"sources.{name}.path={folder}" for name in ("stills", "clips")]
    recipe = _run(path, *how)
    first, second, third = states(recipe)[1:]
    assert second.run["position"] < third.run["position"]
    assert third.run["fingerprints"]["data"] == first.run["fingerprints"]["data"]
    # Without the stream a stage takes what is there, and says so before the others train.
    _drop(out, "joint-480", "tune-t2v")
    with pytest.raises(DataError, match="without-a-caption"):
        _run(path, *how, "stages.tune-t2v.carry.stream=false")
    assert not (out / "stages" / "joint-480" / "checkpoints").exists()


def test_a_vae_of_the_recipes_own_is_trained_once_on_all_sources(
    written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copy.deepcopy(written)
    recipe["data"] |= {"cache": str(tmp_path / "cache"), "min_image_pixels": 32 * 48}
    recipe["vae"] = written["vae"] | {
        "path": str(tmp_path / "vae"),
        "train": {"steps": 2, "frames": 5, "positions": 8},
    }
    path = _write(recipe, tmp_path / "out")
    steps = ["train.steps=1", "train.eval_every=0"]
    _run(path, *steps, only="t2i")
    # Two clips, and two stills of three: the smallest is taken by no stage.
    assert "training the VAE on 4 items" in capsys.readouterr().err
    made = (tmp_path / "vae" / "config.json").stat().st_mtime_ns
    log = read_log(tmp_path / "out" / "vae.jsonl")
    assert log[-1]["step"] == 2
    _run(path, *steps, only="joint-288")
    assert (tmp_path / "vae" / "config.json").stat().st_mtime_ns == made
    assert (tmp_path / "cache" / "latents").is_dir()  # one cache for all stages


def test_validation_draws_its_cases_in_the_stages_that_can(
    copied: tuple[Path, Path], media: Path
) -> None:
    """At the beginning, every so many steps and at the end; what gives an image, in the i2v stage alone."""
    path, out = copied
    _drop(out, "tune-t2v", "i2v")
    cases = [
        {"caption": "a still", "height": 16, "width": 32, "num_frames": 1},
        {"caption": "it moves", "image_path": str(media / "image0.png"), "height": 32,
         "width": 32, "num_frames": 5, "num_inference_steps": 2},
    ]  # fmt: skip
    file = out / "cases.json"
    file.write_text(json.dumps({"data": cases}))
    _run(path, f"validation.file={file}", "validation.every=3", "validation.steps=2")
    drawn = {}
    for name in ("tune-t2v", "i2v"):
        log = read_log(out / "stages" / name / "train.jsonl")
        drawn[name] = [(e["step"], e["name"]) for e in log if e["event"] == "validation"]
        for event in log:
            if event["event"] == "validation":
                assert (out / "stages" / name / event["path"]).is_file()
    assert drawn["tune-t2v"] == [(step, "a still") for step in (0, 3, 4)]
    assert drawn["i2v"] == [(s, n) for s in (0, 3, 4) for n in ("a still", "it moves")]


@pytest.mark.long
def test_stages_on_two_processes_arranged_differently_are_those_of_one(
    whole: Recipe,
    written: dict[str, Any],
    tmp_path: Path,
    goku: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """dp_shard 2, then sp 2, then dp_replicate 2, in the same two processes: the losses of one, to fp32's rounding."""
    path = _write(written, tmp_path / "out")
    arranged = ["stages.joint-480.parallel.sp=2", "stages.tune-t2v.parallel.dp_replicate=2"]
    result = goku("train", path, *arranged, processes=2)
    assert result.returncode == 0, result.stderr
    ours, theirs = _losses(tmp_path / "out"), _losses(whole.out)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        # 20 steps in fp32 whose sums are taken in another order.
        assert ours[key][:2] == pytest.approx(theirs[key][:2], rel=2e-5), key
    degrees = {}
    for name in NAMES:
        log = read_log(tmp_path / "out" / "stages" / name / "train.jsonl")
        degrees[name] = next(e["parallel"] for e in log if e["event"] == "start")
    assert degrees["joint-288"] == {"dp_replicate": 1, "dp_shard": 2, "sp": 1}
    assert degrees["joint-480"] == {"dp_replicate": 1, "dp_shard": 1, "sp": 2}
    assert degrees["tune-t2v"] == {"dp_replicate": 2, "dp_shard": 1, "sp": 1}
    result = goku("train", path, "stages.i2v.parallel.sp=3", processes=2)
    assert result.returncode != 0
    assert "stages.i2v.parallel:" in result.stderr
