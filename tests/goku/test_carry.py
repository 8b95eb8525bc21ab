"""Carrying over: each part of a checkpoint by itself, into models with new parameters, and nothing else touched."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from goku.carry import Start, carry_over, checkpoint_id
from goku.metrics import RunLog, read_log
from goku.model import GokuTransformer, ModelConfig
from goku.optimizer import EMA, EMAConfig, OptimizerConfig, build_adamw
from goku.recipe import CarryConfig
from goku.trainer import Trainer
from goku_runtime import checkpoint

SMALL = ModelConfig(dim=16, depth=1, heads=2, text_dim=8, latent_channels=4)
GIVEN = ModelConfig(dim=16, depth=1, heads=2, text_dim=8, latent_channels=4, condition="frames")


def _trainer(config: ModelConfig, seed: int) -> Any:
    """As much of a trainer as is carried into: state() is the real one."""
    torch.manual_seed(seed)
    model, average = GokuTransformer(config), GokuTransformer(config)
    for module in (model, average):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    trainer = SimpleNamespace(
        model=model,
        ema=EMA(EMAConfig(decay=0.9), average),
        optimizer=build_adamw(OptimizerConfig(), model),
        context=SimpleNamespace(world=1, host_group=None, row=lambda x: x[None]),
        device=torch.device("cpu"),
        step=0,
        position=0,
        skipped=0,
        stage=None,
        start_record=None,
        limits=(1, 2, 3),
        area=6,
        fingerprints={},
        config=SimpleNamespace(optimizer=OptimizerConfig(), train=SimpleNamespace(steps=1)),
        _saved_config=lambda: {"model": {}},
    )
    trainer.state = lambda: Trainer.state(trainer)
    trainer.widen_limits = lambda run: Trainer.widen_limits(trainer, run)
    return trainer


@pytest.fixture
def source(tmp_path: Path) -> tuple[Any, Path]:
    """A trainer with moments, an average of its own and a position, and its checkpoint."""
    trainer = _trainer(SMALL, 1)
    for _ in range(3):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        trainer.optimizer.step()
    trainer.step, trainer.position, trainer.ema.updates = 3, 17, 5
    trainer.stage, trainer.limits, trainer.area = "before", (4, 4, 3), 8
    path = tmp_path / "step_0000003"
    checkpoint.save(trainer.state(), path)
    return trainer, path


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def _moments(trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {kind: value.clone() for kind, value in entry.items()}
        for name, entry in trainer.state()["optimizer"].items()
    }


def _carry(path: Path, trainer: Any, carry: CarryConfig, log: Path) -> dict[str, Any]:
    start = Start(path, checkpoint_id(path), "before", 3, carry)
    with_log = RunLog(log, total_steps=1)
    carry_over(trainer, start, with_log)
    with_log.close()
    (event,) = read_log(log)
    return event


@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize(
    ("ema", "optimizer", "stream"), list(itertools.product((False, True), repeat=3))
)
@pytest.mark.parametrize("config", [SMALL, GIVEN], ids=["equal", "new module"])
def test_each_part_is_carried_when_asked_and_only_then(
    config: ModelConfig,
    weights: str,
    ema: bool,
    optimizer: bool,
    stream: bool,
    source: tuple[Any, Path],
    tmp_path: Path,
) -> None:
    before, path = source
    trainer = _trainer(config, 2)
    initial = _tensors(trainer.model)
    asked: Any = {"weights": weights, "ema": ema, "optimizer": optimizer, "stream": stream}
    event = _carry(path, trainer, CarryConfig(**asked), tmp_path / "log.jsonl")

    old = {"model": _tensors(before.model), "ema": _tensors(before.ema.module)}
    new = initial.keys() - old["model"].keys()
    assert bool(new) == (config is GIVEN)
    assert all(name.startswith("condition_embed.") for name in new)
    model, average = _tensors(trainer.model), _tensors(trainer.ema.module)
    for name, tensor in model.items():
        expected = initial[name] if name in new else old[weights][name]
        assert torch.equal(tensor, expected), name
        # The average: its own where it is carried, the weights else; of what is new always the weights.
        carried = old["ema"][name] if ema and name not in new else expected
        assert torch.equal(average[name], carried), name
    assert trainer.ema.updates == (5 if ema else 0)
    theirs = _moments(before)
    for name, entry in _moments(trainer).items():
        for kind, value in entry.items():
            kept = optimizer and name not in new
            assert torch.equal(value, theirs[name][kind] if kept else torch.zeros_like(value))
    assert any(entry["exp_avg"].abs().sum() > 0 for entry in theirs.values())
    assert trainer.position == (17 if stream else 0)
    assert trainer.step == trainer.skipped == 0
    assert (trainer.limits, trainer.area) == ((4, 4, 3), 8)
    assert (event["event"], event["step"], event["from_step"]) == ("carry", 0, 3)
    assert event["from_stage"] == "before"
    assert event["new"] == sorted(new)
    assert event["tensors"] == len(old["model"])
    assert {key: event[f"carry_{key}"] for key in asked} == asked


def test_what_was_carried_trains_on(source: tuple[Any, Path], tmp_path: Path) -> None:
    """One more step of AdamW after carrying everything equals that step where it was saved."""
    before, path = source
    trainer = _trainer(SMALL, 2)
    _carry(path, trainer, CarryConfig(optimizer=True), tmp_path / "log.jsonl")
    generator = torch.Generator().manual_seed(9)
    pairs = zip(before.model.parameters(), trainer.model.parameters(), strict=True)
    for theirs, ours in pairs:
        theirs.grad = torch.randn(theirs.shape, generator=generator)
        ours.grad = theirs.grad.clone()
    before.optimizer.step()
    trainer.optimizer.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.model.parameters(), trainer.model.parameters(), strict=True)
    )


def test_a_checkpoint_from_before_recipes_is_a_start(
    source: tuple[Any, Path], tmp_path: Path
) -> None:
    """It has neither a stage nor limits."""
    before, _ = source
    state = before.state()
    for key in ("stage", "start", "limits", "schedule_offset"):
        del state["run"][key]
    path = tmp_path / "old"
    checkpoint.save(state, path)
    trainer = _trainer(SMALL, 2)
    _carry(path, trainer, CarryConfig(), tmp_path / "log.jsonl")
    assert (trainer.limits, trainer.area) == ((1, 2, 3), 6)
    # Nor, when it has limits, the area of a frame, which can have been all that they span.
    trainer.widen_limits({"limits": {"grid": [1, 5, 3]}})
    assert (trainer.limits, trainer.area) == ((1, 5, 3), 15)
    trainer.widen_limits({"limits": {"grid": [1, 5, 9], "area": 20}})
    assert (trainer.limits, trainer.area) == ((1, 5, 9), 20)
    ours, theirs = _tensors(trainer.model), _tensors(before.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_is_known_by_its_content(source: tuple[Any, Path], tmp_path: Path) -> None:
    before, path = source
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    assert checkpoint_id(path) == digest
    with torch.no_grad():
        next(before.model.parameters()).add_(1.0)
    checkpoint.save(before.state(), tmp_path / "other")
    assert checkpoint_id(tmp_path / "other") != digest
    with pytest.raises(OSError, match=r"manifest\.json"):
        checkpoint_id(tmp_path)


def test_a_record_is_plain_values(tmp_path: Path) -> None:
    start = Start(tmp_path, "abc", "t2i", 12, CarryConfig(optimizer=True))
    assert json.loads(json.dumps(start.record())) == {
        "stage": "t2i",
        "step": 12,
        "checkpoint_id": "abc",
        "carry": {
            "weights": "model",
            "ema": True,
            "optimizer": True,
            "schedule": False,
            "stream": False,
        },
    }


def test_a_damaged_checkpoint_is_refused(source: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = source
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    with pytest.raises(ValueError, match=largest.name):
        _carry(path, _trainer(SMALL, 2), CarryConfig(optimizer=True), tmp_path / "log.jsonl")
