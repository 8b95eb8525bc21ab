"""`goku sample`: what it asks for by itself, refuses, warns of, and does before the weights are read."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from goku import sampler, trained
from goku.cli import main
from goku.media_files import file_stem, read_metadata
from goku.model import GokuTransformer
from goku.sampler import load_for_sampling
from goku.text import LazyTextEncoder
from goku.vae import GokuVAE

CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]


def _picture(seed: int, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.moveaxis(_picture(0).numpy(), 0, -1)).save(path)
    return path


def _sample(run: Path, out: Path, *arguments: object) -> int:
    command = ["sample", run, "--prompt", "p", "--steps", "1", "--device", "cpu", "--out", out]
    return main([str(each) for each in (*command, *arguments)])


def test_an_image_makes_a_clip_as_long_as_those_of_training(
    trained_run: Callable[..., Path], tmp_path: Path, image: Path, capsys: Capture
) -> None:
    run = trained_run(condition="frames", limits=[3, 2, 3], area=6, data={"fps": 24.0})
    prompts = tmp_path / "prompts.json"
    prompts.write_text('[{"prompt": "q", "image": "a.png"}]')
    assert _sample(run, tmp_path, "--image", image) == 0
    assert _sample(run, tmp_path, "--prompts", prompts) == 0
    assert "warning" not in capsys.readouterr().err
    sizes = {"0000_p_seed0.mp4": (9, 32, 48), "0001_q_seed0.mp4": (9, 32, 48)}
    # What is given nothing is an image, in the area of images.
    sizes |= {"0000_p_seed0.png": (1, 32, 32)}
    for name, size in sizes.items():
        shown = read_metadata(tmp_path / name)
        assert (shown["frames"], shown["height"], shown["width"]) == size, name
        assert shown["fps"] == 24  # the rate that its clips had
    with av.open(str(tmp_path / "0000_p_seed0.mp4")) as container:
        assert container.streams.video[0].average_rate == 24
        assert len(list(container.decode(video=0))) == 9
    assert _sample(run, tmp_path / "said", "--image", image, "--frames", 5, "--fps", 7) == 0
    shown = read_metadata(tmp_path / "said" / "0000_p_seed0.mp4")
    assert (shown["frames"], shown["fps"]) == (5, 7)
    # Clips that kept their own rate leave 12.
    assert _sample(trained_run(condition="frames"), tmp_path / "plain") == 0
    assert read_metadata(tmp_path / "plain" / "0000_p_seed0.png")["fps"] == 12


@pytest.mark.parametrize("given", ["--last-image=IMAGE", "--given=-5:IMAGE", "--given=-1:IMAGE"])
def test_frames_counted_from_the_end(
    given: str,
    trained_run: Callable[..., Path],
    tmp_path: Path,
    image: Path,
    capsys: Capture,
) -> None:
    run = trained_run(condition="frames", limits=[2, 2, 3], area=6)
    assert (
        _sample(
            run,
            tmp_path,
            given.replace("IMAGE", str(image)),
            "--hold" if "-5" in given else "--seed=0",
        )
        == 0
    )
    printed = capsys.readouterr()
    # The first of five is told as such, however it was counted, and the last is not.
    assert ("first frame: " in printed.out) == ("-5" in given)
    assert ("training gave none so" in printed.err) == ("-5" not in given)
    assert read_metadata(tmp_path / "0000_p_seed0.mp4")["frames"] == 5


def test_what_training_did_not_have_is_warned_of_once(
    trained_run: Callable[..., Path], tmp_path: Path, image: Path, capsys: Capture
) -> None:
    weights = {"first": 0.8, "last": 0.0, "both": 0.2, "drop": 0.1, "drop_both": 0.05}
    run = trained_run(condition="frames", conditioning=weights, limits=[2, 3, 3], area=6)
    common = ["--image", image, "--frames", 5, "--count", 2]
    assert _sample(run, tmp_path, *common, "--last-image", image) == 0
    assert "warning" not in capsys.readouterr().err
    assert (
        _sample(run, tmp_path, *common, "--given", f"2:{image}", "--height", 48, "--width", 48) == 0
    )
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert warnings == [
        "warning: 48 x 48, 5 frames: 9 tokens in a frame, beyond the trained 6",
        "warning: given frames 0, 2 of 5: training gave first and last frames alone; "
        "2 stands for all of 1 to 4, one latent frame",
    ]


def test_everything_is_encoded_once_and_the_encoder_gone_before_the_weights(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The encoder of gigabytes does not lie beside the model; --count repeats neither prompts nor images."""
    told: list[Any] = []
    encoders: list[LazyTextEncoder] = []
    encode, load, encode_video = LazyTextEncoder.encode, trained.checkpoint.load, GokuVAE.encode

    def encoded(self: LazyTextEncoder, prompts: list[str]) -> list[Tensor]:
        encoders.append(self)
        told.extend(prompts)
        return encode(self, prompts)

    def image_encoded(self: GokuVAE, video: Tensor) -> Any:
        told.append(tuple(video.shape))
        return encode_video(self, video)

    def loaded(*args: Any, **kwargs: Any) -> Any:
        told.append(("weights", [each.loaded for each in encoders[-1:]]))
        return load(*args, **kwargs)

    monkeypatch.setattr(LazyTextEncoder, "encode", encoded)
    monkeypatch.setattr(GokuVAE, "encode", image_encoded)
    monkeypatch.setattr(trained.checkpoint, "load", loaded)
    run = trained_run(condition="frames")
    prompts = ["--prompt", "q", "--prompt", "p", "--negative", "n", "--count", 3]
    arguments = [*prompts, "--image", image, "--frames", 5, "--guidance", 2]
    assert _sample(run, tmp_path / "once", *arguments) == 0
    assert told == [(1, 3, 1, 32, 48), "p", "q", "n", ("weights", [False])]
    assert len(list((tmp_path / "once").iterdir())) == 9
    told.clear()
    assert _sample(run, tmp_path / "plain", "--negative", "n") == 0
    assert told == ["p", ("weights", [False])]  # no guidance, no negative prompt


def test_the_shift_is_that_of_training_or_the_one_that_is_said(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Of 4 tokens, where 16 have the run's shift of 2, half of it; what is said holds for every size."""
    run = trained_run(shift=2.0, flow={"resolution_shift": True, "base_tokens": 16})
    size = ["--height", 32, "--width", 32]
    for name, arguments, shift in (("run", [], 1.0), ("said", ["--shift", 3.0], 3.0)):
        assert _sample(run, tmp_path / name, *size, *arguments) == 0
        assert read_metadata(tmp_path / name / "0000_p_seed0.png")["shift"] == shift


def test_the_encoder_is_the_run_s(trained_run: Callable[..., Path]) -> None:
    """Loaded to be compared with the run's; it can be let go of, and comes back when it is needed."""
    text = load_for_sampling(trained_run(), CPU).text
    before = text.encode(["a cat"])[0]
    text.release()
    assert not text.loaded
    assert torch.equal(text.encode(["a cat"])[0], before)


def test_the_command_with_an_image(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(condition="frames")
    Image.fromarray(np.moveaxis(_picture(0, 64, 96).numpy(), 0, -1)).save(tmp_path / "a.png")
    common = [str(run), "--frames", "5", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    command = ["sample", *common, "--prompt", "p", "--image", str(tmp_path / "a.png")]
    assert main([*command, "--guidance", "2", "--guidance-image", "1.5"]) == 0
    path, line = capsys.readouterr().out.splitlines()
    # The image's own shape within the trained area of 1536 pixels.
    assert path == f"{tmp_path}/0000_p_seed0.mp4  p"
    found = re.fullmatch(r"first frame: (\S+) dB to the given image, the VAE alone (\S+) dB", line)
    assert found is not None
    assert found[1] != found[2]
    assert main([*command, "--hold", "--overwrite"]) == 0
    held = capsys.readouterr().out.splitlines()[1]
    again = re.fullmatch(r"first frame: (\S+) dB to the given image, the VAE alone (\S+) dB", held)
    assert again is not None
    assert again[1] == again[2] == found[2]
    shown = read_metadata(tmp_path / "0000_p_seed0.mp4")
    assert (shown["height"], shown["width"], shown["given"], shown["hold"]) == (
        32, 48, {"0": "a.png"}, True,
    )  # fmt: skip
    given = ["--given", f"0:{tmp_path / 'a.png'}", "--last-image", str(tmp_path / "a.png")]
    assert main(["sample", *common, "--prompt", "q", *given]) == 0
    assert read_metadata(tmp_path / "0000_q_seed0.mp4")["given"] == {"-1": "a.png", "0": "a.png"}


@pytest.mark.parametrize(
    ("condition", "arguments", "words"),
    [
        ("none", ["--image", "IMAGE"], ["was trained without frames (model.condition none)"]),
        ("frames", ["--image", "absent.png"], ["absent.png"]),
        ("frames", ["--given", "first.png"], ["--given is 'first.png'", "FRAME:FILE"]),
        ("frames", ["--given=--5:IMAGE"], ["--given is '--5:", "FRAME:FILE"]),
        ("frames", ["--fps", "2147483648"], ["--fps is 2147483648; allowed: 1 to 2**31 - 1"]),
        ("frames", ["--given", "9:IMAGE"], ["frame 9", "-5 to 4"]),
        ("frames", ["--width", "32"], ["both or neither"]),
        ("frames", ["--motion", "5"], ["--motion", "no motion score"]),
        ("frames", ["--guidance-interval", "1", "0"], ["guidance_interval is (1.0, 0.0)"]),
        ("frames", ["--count", "0"], ["--count is 0"]),
        ("frames", ["--sp", "100000"], ["--sp is 100000"]),
        ("frames", ["--hold"], ["--hold is given, but no first frame"]),
        ("frames", ["--hold", "--last-image", "IMAGE"], ["--hold is given, but no first frame"]),
        ("frames", ["--guidance-image", "2"], ["--guidance-image is given, but no image"]),
        (
            "frames",
            ["--image", "IMAGE", "--frames", "1"],
            ["frames is 1 with an image given for frame 0"],
        ),
    ],
)
def test_calls_that_cannot_work(
    condition: str,
    arguments: list[str],
    words: list[str],
    trained_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = tmp_path / "image.png"
    Image.fromarray(np.moveaxis(_picture(0).numpy(), 0, -1)).save(image)
    arguments = [argument.replace("IMAGE", str(image)) for argument in arguments]
    command = ["sample", str(trained_run(condition=condition)), "--prompt", "p", "--frames", "5"]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr()
    assert all(word in printed.err for word in words), printed.err
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_is_said(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--frames", "1", "--height", "16", "--width", "16", "--steps", "1", "--device", "cpu"]
    command = ["sample", str(trained_run()), "--prompt", "p", *size, "--out", str(tmp_path)]
    options = ["--negative", "ugly", "--guidance-interval", "0.1", "0.8"]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().err
    assert "warning: a negative prompt has no effect without guidance" in said
    assert "warning: --guidance-interval has no effect without guidance" in said
    assert main([*command, *options, "--guidance", "2"]) == 0
    assert "no effect" not in capsys.readouterr().err


def test_a_sample_that_is_not_finite_is_an_error_and_no_file(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(trained_run()), "--prompt", "p", "--frames", "5", "--device", "cpu"]
    size = ["--height", "16", "--width", "16", "--steps", "3", "--guidance", "1e38"]
    assert main([*command, *size, "--out", str(tmp_path / "out")]) == 1
    assert "goku sample: the decoded sample is not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_recipe_s_folder_means_its_last_stage_with_a_checkpoint(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = tmp_path / "out" / "stages"
    # In the recipe's order, which is not that of the names.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("stages: {z: {}, b: {}, a: {}, last: {}}\n")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_for_sampling(tmp_path / "out", CPU)
    for name, shift in (("z", 1.0), ("a", 3.0), ("b", 2.0)):
        shutil.copytree(trained_run(shift=shift), stages / name)
    (stages / "last" / "checkpoints").mkdir(parents=True)
    command = ["sample", str(tmp_path / "out"), "--prompt", "p", "--steps", "1", "--device", "cpu"]
    assert main([*command, "--height", "16", "--width", "16", "--out", str(tmp_path)]) == 0
    chosen = stages / "a" / "checkpoints" / "step_0000007"
    assert f"{tmp_path / 'out'}: sampling from {chosen}" in capsys.readouterr().err
    assert read_metadata(tmp_path / "0000_p_seed0.png")["shift"] == 3.0
    assert main([*command[:1], str(stages / "b"), *command[2:], "--out", str(tmp_path)]) == 0
    assert "sampling from" not in capsys.readouterr().err


def test_a_motion_score_is_appended_as_in_training(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    template = "{caption} motion score: {motion:.1f}"
    size = ["--height", "16", "--width", "16", "--steps", "1", "--device", "cpu", "--overwrite"]
    for data in (
        {"motion_caption": template},
        {"motion_caption": None, "sources": {"a": {}, "b": {"motion_caption": template}}},
    ):
        run = trained_run(data=data)
        command = ["sample", str(run), "--prompt", "a cat", *size, "--out", str(tmp_path)]
        assert main([*command, "--motion", "5"]) == 0
        shown = read_metadata(tmp_path / f"0000_{file_stem('a cat')}_seed0.png")
        assert shown["prompt"] == "a cat motion score: 5.0"
        assert main(command) == 0
        shown = read_metadata(tmp_path / f"0000_{file_stem('a cat')}_seed0.png")
        assert shown["prompt"] == "a cat"


def test_what_is_there_is_kept_unless_it_is_to_be_replaced(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    run, out = trained_run(), tmp_path / "out"
    size = ["--height", 32, "--width", 32]
    assert _sample(run, out, *size) == 0
    first = (out / "0000_p_seed0.png").read_bytes()
    capsys.readouterr()
    assert _sample(run, out, *size, "--steps", 2) == 0
    assert capsys.readouterr().out == f"{out / '0000_p_seed0_2.png'}  p\n"
    assert (out / "0000_p_seed0.png").read_bytes() == first
    assert read_metadata(out / "0000_p_seed0_2.png")["steps"] == 2
    assert _sample(run, out, *size, "--steps", 3, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000_p_seed0.png", "0000_p_seed0_2.png"]
    assert read_metadata(out / "0000_p_seed0.png")["steps"] == 3


def test_a_signal_ends_it_at_the_next_step(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    signal_at: Callable[..., list[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the first step of the second of three: the first stays, nothing of the others is there."""
    run, out = trained_run(), tmp_path / "out"
    steps = signal_at(GokuTransformer, "forward", signal.SIGINT, at=3)
    with pytest.raises(SystemExit) as left:
        _sample(run, out, "--count", 3, "--steps", 2)
    assert left.value.code == 130
    assert len(steps) == 3
    assert [path.name for path in out.iterdir()] == ["0000_p_seed0.png"]
    assert read_metadata(out / "0000_p_seed0.png")["steps"] == 2
    acknowledged, said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert acknowledged.startswith("goku sample: stopping at the next sampling step; ")
    assert said == ("goku sample: stopped: 1 of 3 samples written; not 0000_p_seed1, 0000_p_seed2")


def test_a_signal_before_the_steps_and_behind_the_last(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    signal_at: Callable[..., list[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, out = trained_run(), tmp_path / "out"
    for owner, name, said in (
        (trained.checkpoint, "load", "0 of 1 sample written; not 0000_p_seed0"),
        (sampler, "decode", "1 of 1 sample written"),
    ):
        assert not out.exists()
        signal_at(owner, name, signal.SIGTERM, at=1)
        with pytest.raises(SystemExit) as left:
            _sample(run, out)
        assert left.value.code == 143
        assert capfd.readouterr().err.splitlines()[-1] == f"goku sample: stopped: {said}"
    assert [path.name for path in out.iterdir()] == ["0000_p_seed0.png"]


@pytest.mark.slow
def test_processes_that_share_a_sample_are_stopped_together(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    run_processes: Callable[..., str],
    free_port: Callable[[], int],
) -> None:
    out = tmp_path / "out"
    arguments: dict[str, object] = {
        "run": str(trained_run()), "out": str(out), "port": free_port()
    }  # fmt: skip
    script = Path(__file__).with_name("sampler_processes.py")
    printed = run_processes(2, script, ("stop_one", arguments), backend="none")
    assert "goku sample: stopped: 1 of 2 samples written; not 0000_p_seed1" in printed
    assert printed.count("stopped: ") == 1
    assert [path.name for path in out.iterdir()] == ["0000_p_seed0.png"]


def test_a_prompt_that_is_no_unicode_is_refused(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    """A byte of the command line that is not UTF-8 comes as a lone surrogate; nothing could embed it."""
    run, out = trained_run(), tmp_path / "out"
    prompts = tmp_path / "prompts.json"
    prompts.write_text(r'[{"prompt": "cut \ud83d"}]')
    for arguments, said in (
        (["--prompt", "caf\udce9"], r"prompt 'caf\udce9' is not valid Unicode"),
        (["--negative", "caf\udce9"], r"negative 'caf\udce9' is not valid Unicode"),
        (["--prompts", prompts], rf"{prompts}, entry 1: prompt 'cut \ud83d' is not valid Unicode"),
    ):
        assert _sample(run, out, *arguments) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_what_cannot_be_meant_is_refused_before_the_weights(
    trained_run: Callable[..., Path],
    tmp_path: Path,
    image: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained_run(
        condition="frames", limits=[3, 2, 3], area=6,
        data={"fps": 24.0, "motion_caption": "{caption} motion {motion}"},
    )  # fmt: skip

    def unread(*_: object, **__: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(trained, "load_checkpoint", unread)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, arguments, words in (
        ("x", ["--given", f"4:{image}", "--given", "4:b.png"], f"frame 4 is given twice: {image} and b.png"),
        ("x", ["--given", "0:b.png", "--image", image], f"frame 0 is given twice: b.png and {image}"),
        ("x", ["--given=-1:b.png", "--last-image", image], "frame -1 is given twice"),
        ("x", ["--motion", "nan"], "--motion is nan; allowed: finite numbers"),
        ("file", [], f"{tmp_path}/file is no folder"),
        ("file/below/it", [], f"{tmp_path}/file is no folder"),
        ("dangling", [], f"{tmp_path}/dangling is no folder"),
    ):  # fmt: skip
        assert _sample(run, tmp_path / out, *arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_another_trainer_is_refused_in_a_line(
    tmp_path: Path, capsys: Capture
) -> None:
    from goku_runtime import checkpoint

    path = tmp_path / "theirs" / "checkpoints" / "step_1"
    checkpoint.save({"model": {"w": torch.zeros(2)}, "step": 1}, path)
    for run in (tmp_path / "theirs", path):
        assert _sample(run, tmp_path / "x") == 2
        assert main(["export", str(run), str(tmp_path / "exported")]) == 2
        said = capsys.readouterr().err
        assert said.count("is a checkpoint without run.step; allowed: those that `goku train` writes") == 2  # fmt: skip
    assert not (tmp_path / "exported").exists()
