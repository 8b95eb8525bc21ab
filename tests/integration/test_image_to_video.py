"""Image-to-video in whole runs: it starts as its base, and what is given is learned from the first step on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku.metrics import RunLog, read_log
from goku.parallelize import copy_parameters, parallel_context
from goku.prepare import prepare_datasets, prepare_vae
from goku.run_config import load_run_config
from goku.statistics import StepStatistics
from goku.trainer import Trainer

GIVEN = {"model": {"condition": "frames"}, "conditioning": {"drop": 0.25, "drop_both": 0.0}}
OWN = ("condition_embed.fc1.weight", "condition_embed.fc2.weight")


def _trainer(config_file: Path, *overrides: str) -> Trainer:
    config = load_run_config(config_file, overrides)
    with parallel_context("cpu") as context:
        vae = prepare_vae(config, context)
        training, unseen, text = prepare_datasets(config, context, vae)
        return Trainer(config, context, training, vae, text, unseen)


@torch.no_grad()
def _trained(trainer: Trainer) -> Trainer:
    """A base with every gate open, as after some training; of the parameter's name alone."""
    for name, parameter in trainer.model.named_parameters():
        if not name.startswith("condition_embed."):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    copy_parameters(trainer.model, trainer.ema.module)
    return trainer


def _log(out: Path, event: str) -> list[dict[str, Any]]:
    return [entry for entry in read_log(out / "train.jsonl") if entry["event"] == event]


def test_it_starts_as_the_base_and_learns_from_the_first_step(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    base = _trained(_trainer(write_config(tmp_path / "base", train={"steps": 2})))
    given = _trained(_trainer(write_config(tmp_path / "given", **GIVEN, train={"steps": 2})))
    with_own = set(given.model.state_dict()) - set(base.model.state_dict())
    assert with_own == {
        f"condition_embed.{a}.{b}" for a in ("fc1", "fc2") for b in ("weight", "bias")
    }

    log, stop = RunLog(None, total_steps=2), threading.Event()
    seen: list[torch.Tensor] = []
    honest = given.per_sample_loss

    def watched(model: Any, batch: Any) -> torch.Tensor:
        seen.append(batch.condition)
        return honest(model, batch)

    given.per_sample_loss = watched  # type: ignore[method-assign]
    gradients, update = [], given._update

    def looked_at(statistics: StepStatistics) -> tuple[float, float]:
        gradients.append({name: bool(given.model.get_parameter(name).grad.any()) for name in OWN})
        return update(statistics)

    given._update = looked_at  # type: ignore[method-assign]
    for _ in range(2):
        given.train_step(log, stop)
        assert all(p.grad is None for p in given.model.parameters())  # their memory is free
    assert any(condition.any() for condition in seen)  # or nothing below would mean anything
    assert gradients == [dict(zip(OWN, (False, True), strict=True)), dict.fromkeys(OWN, True)]

    # Through the whole loop and its log, from equal weights.
    given = _trained(_trainer(write_config(tmp_path / "again", **GIVEN, train={"steps": 2})))
    for trainer in (base, given):
        assert trainer.run(threading.Event()) == "finished"
    ours, theirs = _log(given.out, "step"), _log(base.out, "step")
    for key in ("loss", "loss_by_bin", "loss_by_modality", "loss_by_resolution", "positions"):
        assert ours[0][key] == theirs[0][key]
    assert ours[1]["loss"] != theirs[1]["loss"]
    # The gradients that both have are equal too, and the rest adds to the norm.
    assert ours[0]["grad_norm"] > theirs[0]["grad_norm"]
    assert _log(given.out, "eval")[0]["fixed_loss"] == _log(base.out, "eval")[0]["fixed_loss"]


def test_a_run_on_given_frames_is_resumed_bit_for_bit(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """First, last and both, with frames that the cache holds by themselves."""
    sections = {
        "model": {"condition": "frames"},
        "conditioning": {"first": 1.0, "last": 1.0, "both": 1.0, "drop": 0.2},
        "train": {"steps": 4, "checkpoint_every": 2, "eval_every": 0},
    }
    whole = _trained(_trainer(write_config(tmp_path / "whole", **sections)))
    assert whole.run(threading.Event()) == "finished"
    config = write_config(tmp_path / "parts", **sections)
    first = _trained(_trainer(config, "train.steps=2"))
    assert first.run(threading.Event()) == "finished"
    second = _trainer(config)
    assert second.run(threading.Event()) == "finished"
    assert [e["loss"] for e in _log(second.out, "step")] == [
        e["loss"] for e in _log(whole.out, "step")
    ]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    for name in OWN:
        assert whole.model.get_parameter(name).any()
    with pytest.raises(ValueError, match=r"conditioning\.drop: 0\.2 -> 0\.5"):
        _trainer(config, "conditioning.drop=0.5", "train.steps=5").run(threading.Event())
