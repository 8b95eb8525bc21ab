"""What a run draws while it trains: without its text encoder, within its packs, and whatever fails there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from goku.media_files import read_metadata
from goku.metrics import read_log
from goku.parallelize import ParallelContext
from goku.prepare import prepare_datasets, prepare_vae, prepare_validator
from goku.run_config import load_run_config
from goku.text import LazyTextEncoder, TextCache
from goku.trainer import Trainer

SCRIPT = Path(__file__).with_name("evaluation_processes.py")
ALONE = ParallelContext(0, 1, torch.device("cpu"), None)
SAMPLING = {"steps": 1, "sample_every": 1, "sample_steps": 1, "sample_captions": 5}


def _trainer(config_file: Path, *, validator: bool = False) -> Trainer:
    config = load_run_config(config_file)
    vae = prepare_vae(config, ALONE)
    training, unseen, text = prepare_datasets(config, ALONE, vae)
    drawn = prepare_validator(config, ALONE, vae, text) if validator else None
    return Trainer(config, ALONE, training, vae, text, unseen, validator=drawn)


def test_captions_come_from_the_cache_and_clips_are_cut_as_in_training(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = {"tokens_per_step": 48, "tokens_per_pack": 12, "overlong": "cut"}
    trainer = _trainer(
        write_config(tmp_path / "s", packing=packing, train=SAMPLING, data={"fps": 13})
    )

    def gone(*_: object) -> list[torch.Tensor]:
        raise AssertionError("encoded again")

    monkeypatch.setattr("goku.text.encoder.T5TextEncoder.encode", gone)
    assert trainer.run(threading.Event()) == "finished"
    assert isinstance(trainer.text, LazyTextEncoder)
    assert not trainer.text.loaded
    drawn = [e for e in read_log(trainer.out / "train.jsonl") if e["event"] == "sample"]
    assert len(drawn) == 2 * 5
    clips = sorted(trainer.out / e["path"] for e in drawn if e["path"].endswith(".mp4"))
    for path in clips:
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 13
            # 32 x 48 pixels are 6 tokens a latent frame: of the longer one two of them are trained on.
            assert len(list(container.decode(video=0))) == 5
    assert len(clips) == 4


def test_a_caption_that_is_not_to_be_had_does_not_stop_training(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(write_config(tmp_path / "s", train=SAMPLING))

    class Full(TextCache):
        def get(self, prompts: Sequence[str]) -> list[torch.Tensor]:
            raise RuntimeError("out of memory")

    monkeypatch.setattr("goku.evaluation.TextCache", Full)  # training reads by its own
    assert trainer.run(threading.Event()) == "finished"
    failed = [e for e in read_log(trainer.out / "train.jsonl") if e["event"] == "sample_failed"]
    assert [(e["step"], e["error"]) for e in failed] == [(0, "out of memory"), (1, "out of memory")]


def test_validation_knows_what_was_trained_on_and_wandb_ends_nothing(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package can be found, but not imported by the process that sends the media."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no such GLIBC')")
    monkeypatch.syspath_prepend(str(package.parent))
    sizes = [(32, 48), (64, 80)]  # of images up to 48 x 48 and clips of 32 x 48
    cases = [{"prompt": "x", "height": h, "width": w, "frames": 1} for h, w in sizes]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    validation = {
        "file": str(tmp_path / "cases.json"),
        "every": 1,
        "steps": 1,
        "media": ["wandb"],
    }
    trainer = _trainer(
        write_config(tmp_path / "s", train={"steps": 1}, validation=validation), validator=True
    )
    assert trainer.run(threading.Event()) == "finished"
    events = read_log(trainer.out / "train.jsonl")
    assert [e["step"] for e in events if e["event"] == "validation"] == [0, 0, 1, 1]
    scales = [
        read_metadata(trainer.out / e["path"]).get("position_scale")
        for e in events
        if e["event"] == "validation"
    ]
    t, h, w = trainer.limits
    assert t == 3
    assert scales == [None, [1.0, (h - 1) / 3, (w - 1) / 4]] * 2
    told = [e["error"] for e in events if e["event"] == "media_failed"]
    assert any("step 0: ImportError: no such GLIBC" in line for line in told)
    assert events[-1]["event"] == "finish"


@pytest.mark.long
@pytest.mark.slow
def test_nor_does_it_on_one_of_two_processes(
    write_config: Callable[..., Path],
    tmp_path: Path,
    run_processes: Callable[..., Any],
    free_port: Callable[[], int],
) -> None:
    config = write_config(tmp_path / "s", train=SAMPLING)
    call = ("train", {"config": str(config), "port": free_port(), "broken": 1})
    run_processes(2, SCRIPT, call, backend="none")
    events = read_log(tmp_path / "s" / "train.jsonl")
    failed = [e for e in events if e["event"] == "sample_failed"]
    assert [(e["step"], e["error"]) for e in failed] == [
        (0, "rank 1: out of memory"),
        (1, "rank 1: out of memory"),
    ]
    assert events[-1]["event"] == "finish"
