"""Whole runs: resumed equals uninterrupted, one process equals several, and signals are obeyed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from goku.cli import main
from goku.metrics import RunLog, read_log
from goku.parallelize import parallel_context
from goku.prepare import prepare_datasets, prepare_vae
from goku.run_config import load_run_config
from goku.step_plan import StepPlanner
from goku.stopping import TrainingStopped, stop_signals
from goku.trained import check_fingerprint, read_checkpoint
from goku.trainer import Trainer
from goku.vae import load_vae
from goku_runtime import checkpoint


def _trainer(config_file: Path, *overrides: str) -> Trainer:
    config = load_run_config(config_file, overrides)
    with parallel_context("cpu") as context:
        vae = prepare_vae(config, context)
        training, unseen, text = prepare_datasets(config, context, vae)
        return Trainer(config, context, training, vae, text, unseen)


def _run(config_file: Path, *overrides: str) -> Trainer:
    trainer = _trainer(config_file, *overrides)
    assert trainer.run(threading.Event()) == "finished"
    return trainer


def _steps(out: Path) -> dict[int, dict[str, Any]]:
    """Step events by step; of a step done twice (killed, then repeated) the last."""
    return {e["step"]: e for e in read_log(out / "train.jsonl") if e["event"] == "step"}


def _tensors(state: dict[str, Any], where: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            found[f"{where}{key}"] = value
        elif isinstance(value, dict):
            found |= _tensors(value, f"{where}{key}.")
    return found


def _assert_same_state(ours: Trainer, theirs: Trainer) -> None:
    a, b = _tensors(ours.state()), _tensors(theirs.state())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("step", "position", "ema_updates", "skipped"):
        assert ours.state()["run"][name] == theirs.state()["run"][name]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """start(config): training as a process that does not outlive the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(config: Path, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "goku.cli", "train", str(config), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def whole(write_config: Callable[..., Path], tmp_path: Path) -> Trainer:
    return _run(write_config(tmp_path / "whole"))


def test_the_run_learns_and_logs_what_it_promises(whole: Trainer) -> None:
    log = read_log(whole.out / "train.jsonl")
    assert [e["event"] for e in log if e["event"] in ("start", "finish")] == ["start", "finish"]
    steps = _steps(whole.out)
    assert sorted(steps) == list(range(1, 9))
    for event in steps.values():
        assert event["loss"] > 0
        assert 0 < event["packing_efficiency"] <= 1
        assert event["tokens"] <= 48
        assert len(event["loss_by_bin"]) == 8
        assert set(event["loss_by_modality"]) == {"image", "video"}
    evaluations = {e["step"]: e["fixed_loss"] for e in log if e["event"] == "eval"}
    assert sorted(evaluations) == [0, 4, 8]
    # From a velocity of zero, eight steps bring the loss down by some per cent.
    assert evaluations[8] < 0.99 * evaluations[0]
    # Every position of the stream once and in order.
    positions = [p for step in sorted(steps) for p in range(*steps[step]["positions"])]
    assert positions == list(range(len(positions)))


def test_the_same_run_twice_is_the_same_bits(
    whole: Trainer, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    _assert_same_state(whole, _run(write_config(tmp_path / "again")))
    other = _run(write_config(tmp_path / "other"), "seed=6")
    assert not torch.equal(other.model.patch_embed.weight, whole.model.patch_embed.weight)


def test_stopped_and_resumed_is_bit_identical(
    whole: Trainer, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "stopped")
    first = _trainer(config)
    asked = threading.Event()
    step = first.train_step

    def stop_at_three(log: Any, stop: threading.Event) -> bool:
        if first.step == 2:
            asked.set()
        return step(log, stop)

    first.train_step = stop_at_three  # type: ignore[method-assign]
    assert first.run(asked) == "stopped"
    assert first.step == 3
    # The global generator is no part of the run: disturbing it must not matter.
    torch.manual_seed(12345)
    second = _run(config)
    _assert_same_state(whole, second)
    ours, theirs = _steps(second.out), _steps(whole.out)
    assert [ours[k]["loss"] for k in ours] == [theirs[k]["loss"] for k in theirs]


def test_samples_are_read_while_the_steps_before_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """All but those of the first step, and none past the last; without reading ahead the run is the same."""
    one_pack = ("train.eval_every=0", "packing.tokens_per_pack=48")  # a step
    trainer = _trainer(write_config(tmp_path / "ahead"), *one_pack)
    dataset = trainer.builder.dataset
    read, cached = dataset.read, dataset.cached
    steps: dict[str, list[int]] = {"read": [], "cached": []}

    def spied(kind: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            steps[kind].append(trainer.step)
            return function(*arguments)

        return call

    dataset.read, dataset.cached = spied("read", read), spied("cached", cached)  # type: ignore[method-assign]
    asked: list[int] = []
    begin = trainer.builder.read_ahead

    def counted(packs: Any) -> None:
        asked.append(len(packs))
        begin(packs)

    trainer.builder.read_ahead = counted  # type: ignore[method-assign]
    assert trainer.run(threading.Event()) == "finished"
    assert asked == [2, 2, 2, 2, 2, 2, 1, 0]  # those of the next two steps
    log = _steps(trainer.out)
    lengths = {step: len(range(*event["positions"])) for step, event in log.items()}
    assert set(steps["read"]) == {0}
    assert len(steps["read"]) + len(steps["cached"]) == sum(lengths.values())
    assert len(steps["read"]) == lengths[1]
    assert 0 < log[1]["read_seconds"] < log[1]["seconds"]
    late = _run(write_config(tmp_path / "late"), *one_pack, "data.read_ahead=0")
    _assert_same_state(late, trainer)


def test_steps_planned_by_a_process_are_the_same_run(
    whole: Trainer,
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step takes too long here; the process ends with the run, though it began the step behind the last."""
    monkeypatch.setattr("goku.trainer.StepPlanner", partial(StepPlanner, patience=-1.0))
    trainer = _trainer(write_config(tmp_path / "process"))
    pids: set[int] = set()
    step = trainer.train_step

    def spied(log: Any, stop: threading.Event) -> bool:
        stopping = step(log, stop)
        assert trainer.planner.process is not None
        pids.add(trainer.planner.process.pid)
        return stopping

    trainer.train_step = spied  # type: ignore[method-assign]
    assert trainer.run(threading.Event()) == "finished"
    (pid,) = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    _assert_same_state(whole, trainer)


def test_a_finished_run_started_again_does_nothing(
    whole: Trainer, write_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _tensors(whole.state())
    assert "nothing is left to do" not in capsys.readouterr().err
    again = _run(write_config(whole.out, train={"steps": 5}))
    assert again.step == 8
    said = " ".join(capsys.readouterr().err.split())
    assert f"resumed at step 8 of 5 in {whole.out}: nothing is left to do" in said
    after = _tensors(again.state())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_was_moved_with_its_vae(
    write_config: Callable[..., Path], vae_folder: Path, tmp_path: Path, goku: Any
) -> None:
    """It is found where it lies now; what resumes names it, and trains no other in its place."""
    out, moved = tmp_path / "here", tmp_path / "there"
    shutil.copytree(vae_folder, out / "vae")
    vae = {"path": str(out / "vae"), "train": {"steps": 100000}}
    config = write_config(out, vae=vae, train={"steps": 4})
    before = _run(config)
    out.rename(moved)
    about = read_checkpoint(moved)
    assert about.vae == moved / "vae"
    check_fingerprint(about, "vae", load_vae(about.vae).fingerprint())
    for options in ([], ["--dry-run"]):
        result = goku("train", config, f"out={moved}", *options)
        assert result.returncode == 2
        assert f"vae.path is {out / 'vae'}, which holds no VAE, and {moved}" in result.stderr
        assert not out.exists()
    result = goku("train", config, f"out={moved}", f"vae.path={moved / 'vae'}", "train.steps=5")
    assert result.returncode == 0, result.stderr
    assert sorted(_steps(moved)) == [1, 2, 3, 4, 5]
    assert before.step == 4
    shutil.rmtree(moved / "vae")  # with nothing beside the run either
    assert read_checkpoint(moved).vae == moved / "vae"
    assert goku("sample", moved, "--prompt", "x").returncode == 2


def test_a_missing_tensorboard_is_told_before_any_work(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("goku.media_log.find_spec", lambda name: None)
    vae = {"path": str(tmp_path / "vae"), "train": {"steps": 100000}}
    config = write_config(tmp_path / "out", vae=vae, train={"tensorboard": True})
    assert main(["train", str(config)]) == 2
    assert "train.tensorboard needs tensorboard: pip install" in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()


def test_a_resume_draws_no_weights_and_reads_no_index(
    whole: Trainer, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The checkpoint overwrites what would be drawn; and it says of how many processes it is."""
    with (
        patch("goku.parallelize.initial_value", side_effect=AssertionError("drawn")),
        patch("goku.run_checkpoints.checkpoint.describe", side_effect=AssertionError("read")),
    ):
        again = _trainer(write_config(tmp_path / "whole"))
        assert not torch.equal(again.model.patch_embed.weight, whole.model.patch_embed.weight)
        assert again.resume(RunLog(None, total_steps=0))
    _assert_same_state(again, whole)


def test_checkpoints_that_are_gone_when_they_are_needed(
    whole: Trainer, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights are drawn after all: the bits are those of any new run."""
    config = write_config(tmp_path / "gone")
    found = tmp_path / "gone" / "checkpoints" / "step_0000009"
    found.mkdir(parents=True)
    trainer = _trainer(config)
    found.rmdir()
    assert trainer.run(threading.Event()) == "finished"
    _assert_same_state(trainer, whole)


def test_killed_by_sigkill_then_resumed_is_bit_identical(
    whole: Trainer, write_config: Callable[..., Path], tmp_path: Path, goku: Any, start: Any
) -> None:
    config = write_config(tmp_path / "killed", train={"checkpoint_every": 2, "steps": 4000})
    out = tmp_path / "killed"
    process = start(config)
    # Logged once it is in its place, while training goes on.
    _wait_for(out / "train.jsonl", lambda e: e["event"] == "checkpoint" and e["step"] >= 4, process)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    # Constant schedule: the length of the run may change on resume.
    step = _latest_step(out) + 3
    result = goku("train", config, f"train.steps={step}")
    assert result.returncode == 0, result.stderr
    reference = _run(write_config(tmp_path / "reference", train={"steps": step}))
    ours, theirs = _steps(out), _steps(reference.out)
    resumed = [e["step"] for e in read_log(out / "train.jsonl") if e["event"] == "resume"]
    assert len(resumed) == 1
    assert resumed[0] >= 4
    for k in theirs:
        assert (ours[k]["loss"], ours[k]["positions"]) == (
            theirs[k]["loss"],
            theirs[k]["positions"],
        )
    loaded = _trainer(config, f"train.steps={step}")
    assert loaded.resume(RunLog(None, total_steps=0))
    _assert_same_state(loaded, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_finishes_the_step_and_exits_0(
    write_config: Callable[..., Path], tmp_path: Path, number: signal.Signals, start: Any
) -> None:
    out = tmp_path / "signalled"
    config = write_config(out, train={"steps": 100000, "checkpoint_every": 0})
    # What a scheduler wants to hear.
    code = 75 if number == signal.SIGINT else 0
    process = start(config, *(("--stopped-exit-code", "75") if code else ()))
    _wait_for(out / "train.jsonl", lambda e: e["event"] == "step" and e["step"] >= 3, process)
    process.send_signal(number)
    # As torchrun passes on what was sent to all: heard twice, it is one stop. (Twice the same at once is once.)
    process.send_signal(signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM)
    assert process.wait(timeout=60) == code
    log = read_log(out / "train.jsonl")
    last = max(e["step"] for e in log if e["event"] == "step")
    assert log[-1]["event"] == "stop"
    assert log[-1]["step"] == last == _latest_step(out)
    assert checkpoint.verify(out / "checkpoints" / f"step_{last:07d}").total_bytes > 0


def test_a_second_signal_counts_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals() as stop:
        stop.graceful = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        assert capfd.readouterr().err.count("stopping: what is under way is finished") == 1
        monkeypatch.setattr("goku.stopping.SAME_STOP", 0.0)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
        assert left.value.code == 128 + signal.SIGINT
    with stop_signals():  # what cleans up before the loop is not interrupted by the same signal
        monkeypatch.setattr("goku.stopping.SAME_STOP", 60.0)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_samples_of_all_ranks_are_logged_and_one_rank_may_fail(
    write_config: Callable[..., Path], tmp_path: Path, goku: Any
) -> None:
    out = tmp_path / "sampled"
    # At step 2 the second item's file cannot be written, by one rank alone: a folder is in its place.
    (out / "samples" / "step_0000002" / "clip1.mp4.mp4").mkdir(parents=True)
    train = {"steps": 2, "sample_every": 1, "sample_steps": 2}
    config = write_config(out, train=train)
    result = goku("train", config, processes=2)
    assert result.returncode == 0, result.stderr
    log = read_log(out / "train.jsonl")
    drawn = {(e["step"], e["name"]) for e in log if e["event"] == "sample"}
    names = {"clip0.mp4", "clip1.mp4", "image0.png", "image1.png"}
    assert {name for step, name in drawn if step == 1} == names
    assert "clip0.mp4" in {name for step, name in drawn if step == 2}
    failed = [e for e in log if e["event"] == "sample_failed"]
    assert [e["step"] for e in failed] == [2]
    assert re.match(r"rank [01]: ", failed[0]["error"])
    assert log[-1]["event"] == "finish"


def test_what_fails_on_one_rank_ends_all_with_its_message(
    write_config: Callable[..., Path], tmp_path: Path, goku: Any
) -> None:
    # Only the main rank trains the VAE, and only it finds out that nothing can be read.
    empty = tmp_path / "empty"
    empty.mkdir()
    config = write_config(
        tmp_path / "failing",
        data={"path": str(empty)},
        vae={"path": str(tmp_path / "novae"), "train": {"steps": 2}},
    )
    result = goku("train", config, processes=2)
    assert result.returncode != 0
    assert "Connection closed by peer" not in result.stderr
    assert result.stderr.count(f"{empty}") >= 2
    assert "rank 0: " in result.stderr
    assert not (tmp_path / "novae").exists()


def test_a_signal_while_the_vae_trains_leaves_nothing_behind(
    write_config: Callable[..., Path], tmp_path: Path, start: Any
) -> None:
    out, vae = tmp_path / "early", tmp_path / "early-vae"
    train = {"steps": 100000, "log_every": 1, "crop": 16, "positions": 8}
    process = start(write_config(out, vae={"path": str(vae), "train": train}))
    _wait_for(out / "vae.jsonl", lambda e: e["step"] >= 2, process)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not vae.exists()


@pytest.mark.long
def test_two_runs_do_not_share_a_folder(
    write_config: Callable[..., Path], tmp_path: Path, goku: Any, start: Any
) -> None:
    out = tmp_path / "shared"
    config = write_config(out, train={"steps": 100000, "checkpoint_every": 0})
    first = start(config)
    _wait_for(out / "train.jsonl", lambda e: e["event"] == "step", first)
    result = goku("train", config)
    assert result.returncode == 2
    assert "another run" in result.stderr
    assert first.poll() is None


def test_names_of_items_cannot_leave_the_samples_folder(
    media: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = tmp_path / "data.jsonl"
    rows = [{"path": str(media / f"image{i}.png"), "text": f"picture {i}"} for i in range(2)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(media.iterdir())
    train = {"steps": 1, "sample_every": 1, "sample_steps": 1}
    run = _run(write_config(tmp_path / "named", data={"path": str(manifest)}, train=train))
    drawn = [e for e in read_log(run.out / "train.jsonl") if e["event"] == "sample"]
    assert len({e["path"] for e in drawn}) == 4
    assert all((run.out / e["path"]).resolve().is_relative_to(run.out / "samples") for e in drawn)
    assert sorted(media.iterdir()) == before


def test_a_non_finite_step_changes_nothing_and_too_many_stop_the_run(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(
        write_config(tmp_path / "nan"), "train.max_skipped_steps=2", "train.steps=20"
    )
    honest = trainer.per_sample_loss
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(model: Any, batch: Any) -> torch.Tensor:
        if model is trainer.model and (trainer.step == 2 or trainer.step >= 6):
            seen.append({k: v.clone() for k, v in _tensors(trainer.state()).items()})
            return honest(model, batch) * float("nan")
        if trainer.step == 3 and len(seen) >= 1 and model is trainer.model:
            # The step after the poisoned one starts from exactly the state before it.
            now = _tensors(trainer.state())
            assert all(torch.equal(now[k], seen[0][k]) for k in now)
        return honest(model, batch)

    monkeypatch.setattr(trainer, "per_sample_loss", poisoned)
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        trainer.run(threading.Event())
    steps = _steps(trainer.out)
    assert [steps[k]["skipped"] for k in sorted(steps)] == [0, 0, 1, 0, 0, 0, 1, 2, 3]
    latest = checkpoint.latest(trainer.out / "checkpoints")
    assert latest is not None
    assert latest.name == "step_0000008"  # the state of step 6, which two skipped steps left alone


def test_failed_samples_do_not_stop_training(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "s", train={"steps": 2, "sample_every": 1, "sample_steps": 2})
    good = _run(config)
    drawn = [e for e in read_log(good.out / "train.jsonl") if e["event"] == "sample"]
    assert {e["step"] for e in drawn} == {0, 1, 2}
    assert all((good.out / e["path"]).stat().st_size > 0 for e in drawn)

    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goku.evaluation.save_media", full)
    bad = _run(write_config(tmp_path / "t", train={"steps": 2, "sample_every": 1}))
    assert "sample_failed" in {e["event"] for e in read_log(bad.out / "train.jsonl")}
    _assert_same_state(good, bad)


def test_a_disk_that_is_full_while_training_is_no_bad_input(
    whole: Trainer,
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Exit code 1: begun again it goes on, which of bad input nobody should try."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "step_0000004")

    config = write_config(tmp_path / "full")
    with monkeypatch.context() as patched:
        patched.setattr("goku.trainer.RunCheckpoints.save", full)
        assert main(["train", str(config)]) == 1
    assert capfd.readouterr().err.endswith("goku train: step_0000004: No space left on device\n")
    assert main(["train", str(config)]) == 0
    assert _steps(whole.out)[8]["loss"] == _steps(tmp_path / "full")[8]["loss"]


def test_profile_writes_a_trace(write_config: Callable[..., Path], tmp_path: Path) -> None:
    trainer = _trainer(write_config(tmp_path / "profiled"))
    trainer.run(threading.Event(), profile=True)
    trace = tmp_path / "profiled" / "profile" / "trace.json"
    assert "aten::" in trace.read_text()


def _wait_for(log: Path, reached: Callable[[Any], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and any(reached(e) for e in read_log(log))):
        assert process.poll() is None, f"ended by itself with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _latest_step(out: Path) -> int:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    return int(path.name.removeprefix("step_"))


# ---- samples that cannot be read while training


def _own_world(settings: dict[str, Any], tmp_path: Path, media: Path) -> dict[str, Any]:
    """The settings with media and caches that a test may damage."""
    shutil.copytree(media, tmp_path / "media")
    data = {"path": str(tmp_path / "media"), "cache": str(tmp_path / "cache")}
    return {"data": settings["data"] | data, "train": settings["train"] | {"steps": 4}}


def _events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_log(out / "train.jsonl") if e["event"] == kind]


def test_latents_that_vanish_while_training_are_made_again(
    write_config: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, media: Path
) -> None:
    """Removed and damaged: the steps have the bits of a run that lost nothing, and the log says what happened."""
    world = _own_world(settings, tmp_path, media)
    intact = _run(write_config(tmp_path / "intact", **world))
    trainer = _trainer(write_config(tmp_path / "damaged", **world))
    latents = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    assert len(latents) == 5
    latents[0].unlink()
    latents[1].write_bytes(latents[1].read_bytes()[:-40])
    assert trainer.run(threading.Event()) == "finished"
    _assert_same_state(intact, trainer)
    ours, theirs = _steps(trainer.out), _steps(intact.out)
    assert [ours[k]["loss"] for k in ours] == [theirs[k]["loss"] for k in theirs]
    repaired = _events(trainer.out, "repaired")
    assert len({event["name"] for event in repaired}) == 2
    assert _events(intact.out, "repaired") == _events(trainer.out, "lost") == []


def test_items_that_are_lost_have_no_weight_and_are_listed(
    write_config: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, media: Path
) -> None:
    """Latents and media both gone: training goes on with the others, until more than data.max_lost are."""
    world = _own_world(settings, tmp_path, media)
    trainer = _trainer(write_config(tmp_path / "lossy", **world))
    fewer = {**world, "data": world["data"] | {"max_lost": 1}}
    strict = _trainer(write_config(tmp_path / "strict", **fewer))
    shutil.rmtree(tmp_path / "cache" / "latents")
    for name in ("image0.png", "clip1.mp4"):
        (tmp_path / "media" / name).unlink()
    assert trainer.run(threading.Event()) == "finished"
    lost = {event["name"] for event in _events(trainer.out, "lost")}
    assert len(lost) == 2
    listed = [
        json.loads(line) for line in (trainer.out / "quarantine.jsonl").read_text().splitlines()
    ]
    assert {row["name"] for row in listed} == lost
    assert {row["kind"] for row in listed} == {"damaged"}
    assert all(event["loss"] > 0 for event in _steps(trainer.out).values())
    with pytest.raises(TrainingStopped, match=r"2 items lost, over data.max_lost = 1"):
        strict.run(threading.Event())
    assert [event["lost"] for event in _events(strict.out, "gave_up")] == [2]
