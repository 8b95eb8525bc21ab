"""Validation: the same files on any number of processes, refusals before training, failures that stop nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from goku.cli import main
from goku.media_files import read_metadata
from goku.metrics import RunLog, read_log
from goku.parallelize import ParallelContext
from goku.prepare import check_validation
from goku.requests import Request, RequestDefaults
from goku.run_config import load_run_config
from goku.sampler import load_for_sampling
from goku.validation import ValidationConfig, Validator, _by_steps, _rounds, read_cases

SCRIPT = Path(__file__).with_name("validation_processes.py")
CASES = [
    {"caption": "a cat", "height": 32, "width": 32, "num_frames": 1, "num_inference_steps": 2},
    {"caption": "a dog", "image_path": "first.png", "height": 32, "width": 48, "num_frames": 5},
    {"caption": "a cow", "image_path": "", "num_frames": 5, "num_inference_steps": 2, "frame_rate": 8},
    {"caption": "a hen", "image_path": None, "height": 16, "width": 64, "num_frames": 1, "seed": 99},
    {"caption": "a pig", "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2},
]  # fmt: skip


def _config(
    trained: Callable[..., Path], folder: Path, cases: Any = CASES, *, condition: str = "frames", **more: Any
) -> tuple[Path, Path]:  # fmt: skip
    """(configuration as JSON, run whose weights are drawn with)."""
    run = trained(condition=condition)
    folder.mkdir(exist_ok=True)
    pixels = np.arange(32 * 48 * 3, dtype=np.int64).reshape(32, 48, 3) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "first.png")
    (folder / "cases.json").write_text(json.dumps({"data": cases}))
    validation = {
        "file": str(folder / "cases.json"),
        "every": 1,
        "steps": 4,
        "guidance": 2.0,
    } | more
    tiny = {"stem_width": 8, "width": 8, "encoder_depth": 1, "decoder_depth": 1}
    settings = {
        "out": str(folder / "out"),
        "data": {"path": "unused", "max_frames": 5, "video_pixels": 1024},
        "vae": {"path": str(run.parent / "vae"), "model": tiny},
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32, "condition": condition},
        "flow": {"shift": 2.0},
        "packing": {"tokens_per_step": 48, "tokens_per_pack": 48},
        "train": {"precision": "float32", "device": "cpu"},
        "validation": validation,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return path, run


def _validator(config: Path, run: Path) -> tuple[Validator, Any]:
    settings = load_run_config(json.loads(config.read_text()))
    loaded = load_for_sampling(run, torch.device("cpu"))
    context = ParallelContext(0, 1, torch.device("cpu"), None)
    return Validator(settings.validation, settings, context, loaded.vae, loaded.text), loaded.model


def _draw(
    config: Path,
    run: Path,
    step: int = 7,
    limits: tuple[int, int, int] | None = None,
    area: int | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """(folder of the drawn files, events)."""
    validator, model = _validator(config, run)
    log = RunLog(validator.out / "train.jsonl", total_steps=1)
    validator.run(model, step, log, limits, area)
    validator.close(step, log)
    log.close()
    return validator.out / "validation" / f"step_{step:07d}", read_log(
        validator.out / "train.jsonl"
    )


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# --- the cases ------------------------------------------------------------------------------------


def test_cases_in_the_shared_form(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"data": CASES}))
    Image.new("RGB", (48, 32)).save(tmp_path / "first.png")
    cases = read_cases(path, RequestDefaults(pixels=1024, frames=5, seed=10))
    assert [case.seed for case in cases] == [10, 11, 12, 99, 14]
    assert [case.steps for case in cases] == [2, None, 2, None, 2]
    assert cases[1].given == {0: tmp_path / "first.png"}
    assert cases[2] == Request("a cow", 32, 32, frames=5, seed=12, steps=2, fps=8)
    for extra, words in (
        ({"video_path": "a.mp4"}, "video_path is 'a.mp4'"),
        ({"num_frame": 5}, "did you mean"),
        ({"frame_rate": 12.5}, "fps is 12.5"),
        ({"fps": 0}, "fps is 0"),
        ({"prompt": "cut \ud83d"}, "prompt .* is not valid Unicode"),
    ):
        path.write_text(
            json.dumps(
                {"data": [*CASES[:1], ({} if "prompt" in extra else {"caption": "x"}) | extra]}
            )
        )
        with pytest.raises(ValueError, match=words) as caught:
            read_cases(path, RequestDefaults())
        assert "entry 2" in str(caught.value)
    path.write_text(json.dumps({"data": [{"caption": "x", "video_path": None}]}))
    assert len(read_cases(path, RequestDefaults())) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"every": 5}, "without validation.file"),
        ({"every": -1}, "validation.every is -1"),
        ({"fps": 0}, "validation.fps is 0"),
        ({"seed": -1}, "validation.seed is -1"),
        ({"seed": 2**64}, "validation.seed is 18446744073709551616"),
        ({"media": ("wandb", "wandb")}, "validation.media is"),
        ({"media": ("disk",)}, "allowed: each of tensorboard, wandb"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"method": "rk4"}, "method is 'rk4'"),
        ({"shift": -1.0}, "shift is -1.0"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ValidationConfig(**fields)


@given(
    st.lists(st.tuples(st.sampled_from([None, 2, 9]), st.integers(1, 3)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_every_case_is_drawn_once_and_all_groups_work_equally_often(
    wanted: list[tuple[int | None, int]], groups: int
) -> None:
    cases = [Request("", 16, 16 * width, steps=steps) for steps, width in wanted]
    drawn: list[int] = []
    for steps, members in _by_steps(cases, 9):
        assert all((cases[i].steps or 9) == steps for i in members)
        shares = [_rounds(members, cases, group, groups) for group in range(groups)]
        assert {len(share) for share in shares} == {math.ceil(len(members) / groups)}
        drawn += [i for share in shares for i, idle in share if not idle]
        shortest = min(cases[i].width for i in members)
        assert all(cases[i].width == shortest for share in shares for i, idle in share if idle)
    assert sorted(drawn) == list(range(len(cases)))


# --- drawing --------------------------------------------------------------------------------------


def test_what_is_drawn_and_logged(trained_run: Callable[..., Path], tmp_path: Path) -> None:
    config, run = _config(trained_run, tmp_path, seed=20)
    folder, events = _draw(config, run)
    names = [f"{i:04d}_a_{animal}" for i, animal in enumerate(["cat", "dog", "cow", "hen", "pig"])]
    files = sorted(folder.iterdir())
    assert [path.name.rsplit("_", 1)[0] for path in files] == names
    assert [path.suffix for path in files] == [".png", ".mp4", ".mp4", ".png", ".mp4"]
    assert [(e["event"], e["step"], e["name"]) for e in events] == [
        ("validation", 7, case["caption"]) for case in CASES
    ]
    assert [tmp_path / "out" / event["path"] for event in events] == files
    shown = [read_metadata(path) for path in files]
    assert [each["seed"] for each in shown] == [20, 21, 22, 99, 24]
    assert [each["steps"] for each in shown] == [2, 4, 2, 4, 2]
    assert [each["fps"] for each in shown] == [12, 12, 8, 12, 12]
    assert {(each["shift"], each["guidance"], each["model_step"]) for each in shown} == {
        (2.0, 2.0, 7)
    }
    assert shown[1]["given"] == {"0": "first.png"}
    # Drawn again, they are the same; with another seed they are not.
    before = _digests(folder)
    assert _digests(_draw(config, run)[0]) == before
    other, _ = _config(trained_run, tmp_path / "other", seed=21)
    assert not set(_digests(_draw(other, run)[0]).values()) & (
        set(before.values()) - {before[files[3].name]}
    )


def test_a_model_without_frames_leaves_cases_with_images_out(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = _config(trained_run, tmp_path, condition="none")
    folder, events = _draw(config, run, step=0)
    assert [event["event"] for event in events] == ["validation_left_out"] + ["validation"] * 4
    assert events[0]["case"] == 1
    # Each under its place in the file and with its seed: stages that take more can be laid beside.
    drawn = sorted(path.name for path in folder.iterdir())
    assert [name[:10] for name in drawn] == ["0000_a_cat", "0002_a_cow", "0003_a_hen", "0004_a_pig"]
    seeds = [read_metadata(folder / name)["seed"] for name in drawn]
    assert seeds == [0, 2, 99, 4]
    assert "case 1 is left out: it gives an image" in capsys.readouterr().err


def test_a_case_larger_than_a_pack_is_left_out(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is another stage's: here its forward might not fit into memory. 48 tokens do."""
    sizes = [(64, 192, 1), (64, 208, 1), (32, 32, 45), (32, 32, 49)]
    cases = [
        {"caption": "x", "height": h, "width": w, "num_frames": t, "num_inference_steps": 1}
        for h, w, t in sizes
    ]
    config, run = _config(trained_run, tmp_path, cases)
    folder, events = _draw(config, run)
    told = [event for event in events if event["event"] == "validation_left_out"]
    assert [event["case"] for event in told] == [1, 3]
    assert told[1]["reason"] == (
        "32 x 32, 49 frames are 52 tokens, more than packing.tokens_per_pack = 48"
    )
    assert sorted(path.name[:4] for path in folder.iterdir()) == ["0000", "0002"]
    assert "case 1 is left out: 64 x 208" in capsys.readouterr().err


def test_cases_beyond_the_trained_sizes_are_scaled_as_by_sample(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = _config(trained_run, tmp_path, CASES[:1] + CASES[2:])
    before = _digests(_draw(config, run)[0])
    assert "beyond" not in capsys.readouterr().err
    folder, _ = _draw(config, run, limits=(2, 2, 2), area=4)
    told = capsys.readouterr().err.splitlines()
    # The cow's and the cat's sizes are within; the others are said once each.
    assert [line for line in told if "beyond the trained" in line] == [
        "validation: 16 x 64, 1 frames: beyond the trained 32 x 32, 5; RoPE positions scaled by w 0.33",
        "validation: 32 x 32, 9 frames: beyond the trained 32 x 32, 5; RoPE positions scaled by t 0.50",
    ]
    after = _digests(folder)
    scales = [read_metadata(path).get("position_scale") for path in sorted(folder.iterdir())]
    assert scales == [None, None, [1.0, 1.0, pytest.approx(1 / 3)], [0.5, 1.0, 1.0]]
    assert [before[name] == after[name] for name in sorted(before)] == [True, True, False, False]
    _draw(config, run, limits=(3, 2, 4), area=3)
    told = capsys.readouterr().err.splitlines()
    assert "validation: 32 x 32, 1 frames: 4 tokens in a frame, beyond the trained 3" in told


def test_sizes_and_rates_that_a_case_does_not_say_are_the_runs(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    cases = [{"caption": "x", "num_frames": 1}, {"caption": "y"}]
    config, run = _config(trained_run, tmp_path, cases)
    tree = json.loads(config.read_text())
    tree["data"] |= {"image_pixels": 64 * 64, "fps": 23.976}
    config.write_text(json.dumps(tree))
    picture, clip = _validator(config, run)[0].cases
    assert (picture.height, picture.width) == (64, 64)
    assert (clip.height, clip.width, clip.frames) == (32, 32, 5)
    assert _validator(config, run)[0].fps == 24
    tree["validation"]["fps"] = 8
    config.write_text(json.dumps(tree))
    assert _validator(config, run)[0].fps == 8


def test_the_times_are_shifted_by_resolution_where_they_were_in_training(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    config, run = _config(trained_run, tmp_path, [CASES[0], CASES[4]])
    tree = json.loads(config.read_text())
    tree["flow"] |= {"resolution_shift": True, "base_tokens": 4}
    config.write_text(json.dumps(tree))
    folder, _ = _draw(config, run)
    shifts = [read_metadata(path)["shift"] for path in sorted(folder.iterdir())]
    assert shifts == [2.0, pytest.approx(2.0 * 3**0.5)]  # 4 and 12 tokens
    tree["validation"]["shift"] = 5.0
    config.write_text(json.dumps(tree))
    folder, _ = _draw(config, run)
    assert {read_metadata(path)["shift"] for path in folder.iterdir()} == {5.0}


def test_a_disk_that_is_full_stops_nothing(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = _config(trained_run, tmp_path, CASES[:1] + CASES[2:3])
    calls: list[Path] = []

    def full(video: Any, stem: Path, *rest: Any) -> Path:
        calls.append(stem)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goku.validation.save_media", full)
    _, events = _draw(config, run)
    assert [event["event"] for event in events] == ["validation_failed"] * 2
    assert "case 0, rank 0: [Errno 28]" in events[0]["error"]
    assert len(calls) == 2


def test_prompts_are_encoded_once(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is started again needs no encoder for its cases."""
    config, run = _config(trained_run, tmp_path, CASES[:1])
    folder, _ = _draw(config, run)
    before = _digests(folder)

    def gone(*_: object) -> list[torch.Tensor]:
        raise AssertionError("encoded again")

    monkeypatch.setattr("goku.text.encoder.T5TextEncoder.encode", gone)
    assert _digests(_draw(config, run)[0]) == before


def test_what_is_wrong_is_said_before_anything_is_encoded(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`goku train` looks before it prepares: neither a VAE nor an encoder is there."""
    context = ParallelContext(0, 1, torch.device("cpu"), None)

    def look(cases: Any, **more: Any) -> None:
        config, _ = _config(trained_run, tmp_path, cases, **more)
        check_validation([load_run_config(json.loads(config.read_text()))], context)

    absent = {"caption": "a", "image_path": "absent.png", "height": 32, "width": 32}
    with pytest.raises(ValueError, match=r"cases\.json: case 1: .*absent\.png"):
        look([CASES[0], absent])
    given = {"caption": "a", "image": "first.png", "height": 32, "width": 32}
    with pytest.raises(ValueError, match=r"case 0: frames is 1, with an image given"):
        look([given | {"num_frames": 1}])
    with pytest.raises(ValueError, match=f"seed is {2**64}"):
        look([CASES[0] | {"seed": 2**64}])
    with pytest.raises(
        ValueError, match=r"validation\.file is .*none\.json, which cannot be read .*allowed"
    ):
        look(CASES, file=str(tmp_path / "none.json"))
    look([CASES[0], absent], every=0)
    look([CASES[0], absent], condition="none")
    monkeypatch.setattr("goku.media_log.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"goku\[wandb\]"):
        look(CASES, media=["wandb"])
    look(CASES, media=["wandb"], every=0)


@pytest.mark.parametrize("command", ["train", "recipe"])
def test_training_looks_at_it_first(
    command: str,
    trained_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = {"caption": "a", "image_path": "absent.png", "height": 32, "width": 32}
    config, _ = _config(trained_run, tmp_path, [case])
    tree = json.loads(config.read_text())
    tree["data"]["path"] = str(tmp_path / "no such dataset")
    if command == "recipe":
        del tree["data"]["path"]
        tree["sources"] = {"own": {"path": str(tmp_path / "no such dataset")}}
        tree["stages"] = {
            "first": {"mix": {"own": {"image": 1}}, "validation": {"every": 0}},
            "second": {"mix": {"own": {"image": 1}}},
        }
    config.write_text(json.dumps(tree))
    assert main(["train", str(config)]) == 2
    assert "cases.json: case 0: " in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long)])
def test_processes_draw_the_same_bytes(
    world: int,
    trained_run: Callable[..., Path],
    tmp_path: Path,
    run_processes: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    """3 cases of 2 steps, 2 of 3 steps: neither divides by 2 and by 3; weights sharded."""
    cases = [{"num_inference_steps": 3} | case for case in CASES]
    config, run = _config(trained_run, tmp_path / "alone", cases, guidance_image=1.5)
    folder, _ = _draw(config, run)
    config, _ = _config(trained_run, tmp_path / "several", cases, guidance_image=1.5)
    call = ("validate", {"config": str(config), "run": str(run), "port": free_port()})
    run_processes(world, SCRIPT, call, backend="none")
    out = tmp_path / "several" / "out"
    assert _digests(out / "validation" / "step_0000007") == _digests(folder)
    events = read_log(out / "train.jsonl")
    assert [event["name"] for event in events] == [case["caption"] for case in cases]


@pytest.mark.slow
def test_one_rank_that_cannot_write_does_not_hang_the_others(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    run_processes: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    """Three cases; rank 1, whose folder is none, has the second."""
    cases = [case | {"num_inference_steps": 2} for case in CASES[2:]]
    config, run = _config(trained_run, tmp_path, cases)
    arguments = {"config": str(config), "run": str(run), "port": free_port(), "broken": 1}
    run_processes(2, SCRIPT, ("validate", arguments), backend="none")
    events = read_log(tmp_path / "out" / "train.jsonl")
    assert [event["event"] for event in events] == ["validation"] * 2 + ["validation_failed"]
    assert "case 1, rank 1" in events[2]["error"]


@pytest.mark.long
@pytest.mark.slow
def test_one_case_on_three_ranks(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    run_processes: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    config, run = _config(trained_run, tmp_path, CASES[:1])
    call = ("validate", {"config": str(config), "run": str(run), "port": free_port()})
    run_processes(3, SCRIPT, call, backend="none")
    assert len(list((tmp_path / "out" / "validation" / "step_0000007").iterdir())) == 1


# --- where it is shown ----------------------------------------------------------------------------


def test_tensorboard_shows_pictures_and_clips(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, run = _config(trained_run, tmp_path, CASES[2:4], media=["tensorboard"])
    folder, _ = _draw(config, run)
    _draw(config, run, step=9)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "media"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["validation/0000", "validation/0001"]
    clip, picture = (events.Images(f"validation/{i:04d}") for i in range(2))
    assert [image.step for image in clip] == [7, 9]
    assert (clip[0].height, clip[0].width) == (32, 32)
    assert clip[0].encoded_image_string[:6] == b"GIF89a"
    import io

    with Image.open(io.BytesIO(clip[0].encoded_image_string)) as gif:
        assert gif.n_frames == 5  # type: ignore[attr-defined]
        assert gif.info["duration"] == 120  # GIF counts in hundredths: 1 / 8 s, rounded down
    shown = sorted(folder.iterdir())
    assert picture[0].encoded_image_string == shown[1].read_bytes()


def test_what_wandb_fails_at_is_told_and_ends_nothing(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is there, but cannot be imported."""
    broken = tmp_path / "broken" / "wandb"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no GLIBC of its own')")
    monkeypatch.syspath_prepend(str(broken.parent))
    config, run = _config(trained_run, tmp_path, CASES[:1], media=["wandb", "tensorboard"])
    _, events = _draw(config, run)
    assert [event["event"] for event in events] == ["validation", "media_failed"]
    assert "W&B: step 7: ImportError: no GLIBC of its own" in events[1]["error"]


def test_a_file_that_tensorboard_cannot_be_shown_is_told(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(video: Any, stem: Path, *rest: Any) -> Path:
        path = stem.with_suffix(".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no film")
        return path

    monkeypatch.setattr("goku.validation.save_media", damaged)
    config, run = _config(trained_run, tmp_path, CASES[2:3], media=["tensorboard"])
    _, events = _draw(config, run)
    assert [event["event"] for event in events] == ["validation", "media_failed"]
    assert "cannot be read as MP4" in events[1]["error"]
