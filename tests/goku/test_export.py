"""An exported folder stands for the run: equal bits, known to its parts' own libraries, refused if altered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import goku.export
from goku.cli import main
from goku.conditioning import ConditioningConfig
from goku.export import _RECORD, export_run, load_exported, read_exported
from goku.flow import time_grid
from goku.media_files import read_metadata
from goku.sampler import Request, SampleConfig, generate, load_for_sampling
from goku.text import TextConfig, load_text_encoder
from goku.trained import Loaded, read_checkpoint
from goku.vae import GokuVAE, load_vae

CPU = torch.device("cpu")
REQUESTS = [Request("a cat", 32, 32, seed=1), Request("a dog", 32, 48, frames=5, seed=2)]


def _videos(loaded: Loaded) -> list[torch.Tensor]:
    config = SampleConfig(steps=2, guidance=2.0, shift=loaded.about.shift)
    return generate(loaded.model, loaded.vae, loaded.text.encode, REQUESTS, config, CPU)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 as save_pretrained writes it, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5") / "t5"
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words["</s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_what_is_loaded_is_what_was_exported(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    run, out = trained_run(limits=[2, 2, 3], area=5), tmp_path / "deep" / "out"
    told: list[tuple[int, int]] = []
    export_run(run, out, progress=lambda done, total: told.append((done, total)))
    first, second = load_for_sampling(run, CPU), load_for_sampling(out, CPU)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(_videos(first), _videos(second), strict=True))
    assert second.step == 7
    about = read_exported(out)
    assert (about.limits, about.area, about.shift, about.pixels) == ((2, 2, 3), 5, 1.5, 1536)
    # All that a run says but for where its parts lie.
    there = {"path": out, "vae": out / "vae", "vae_dtype": about.vae_dtype, "text": about.text}
    assert about == replace(read_checkpoint(run), **there)
    assert told[-1][0] == told[-1][1] > 0
    # Nothing but the folder, and nothing of where it came from but the text encoder's place.
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {
        "model_index.json", "transformer", "scheduler", "vae", "text_encoder",
    }  # fmt: skip
    for path in out.rglob("*.json"):
        assert str(run.parent) not in path.read_text(), path
    # The run may go: the folder needs nothing of it.
    moved = out.rename(tmp_path / "moved")
    assert all(
        torch.equal(a, b)
        for a, b in zip(_videos(load_exported(moved, CPU)), _videos(first), strict=True)
    )


def test_the_weights_dtype_and_shards_that_were_asked_for(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained_run()
    export_run(run, tmp_path / "model", weights="model", max_shard_size=20_000)
    assert len(list((tmp_path / "model" / "transformer").glob("*.safetensors"))) > 1
    weights = load_for_sampling(run, CPU, weights="model").model.state_dict()
    average = load_for_sampling(run, CPU).model.state_dict()
    found = load_exported(tmp_path / "model", CPU).model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not torch.equal(found["patch_embed.weight"], average["patch_embed.weight"])
    export_run(run, tmp_path / "low", dtype=torch.bfloat16)
    file = tmp_path / "low" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}
    low = load_exported(tmp_path / "low", CPU).model.state_dict()
    for name, value in average.items():
        assert torch.equal(low[name], value.bfloat16().float())  # rounded once, computed in fp32


def test_the_scheduler_is_diffusers_with_our_times(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    export_run(trained_run(shift=3.0), tmp_path / "out")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8).tolist())
    times = time_grid(8, 3.0)
    torch.testing.assert_close(scheduler.sigmas.double(), times, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * times[:-1], rtol=0, atol=1e-3)
    # With a velocity as ours, data - noise, its steps end at the data.
    generator = torch.Generator().manual_seed(0)
    noise, data = (torch.randn(7, dtype=torch.float64, generator=generator) for _ in range(2))
    x = noise
    for time in scheduler.timesteps:
        x = scheduler.step(data - noise, time, x).prev_sample
    torch.testing.assert_close(x, data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("copied", [False, True])
def test_vae_and_text_encoder_load_with_their_own_libraries(
    copied: bool, trained_run: Callable[..., Path], t5_folder: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(1)
    wan = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    wan.save_pretrained(tmp_path / "wan")
    encoder = tmp_path / "t5"
    shutil.copytree(t5_folder, encoder)
    run = trained_run(vae=tmp_path / "wan", text={"path": str(encoder), "max_tokens": 9})
    out = tmp_path / "out"
    export_run(run, out, text_encoder="copy" if copied else "reference")
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    again = AutoencoderKLWan.from_pretrained(out, subfolder="vae")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), wan.parameters(), strict=True))
    before = _videos(load_for_sampling(run, CPU))
    assert all(
        torch.equal(a, b) for a, b in zip(_videos(load_exported(out, CPU)), before, strict=True)
    )
    shutil.move(encoder, tmp_path / "elsewhere")
    if copied:
        ids = AutoTokenizer.from_pretrained(out / "tokenizer")("a cat").input_ids
        assert ids == AutoTokenizer.from_pretrained(t5_folder)("a cat").input_ids
        model = T5EncoderModel.from_pretrained(out / "text_encoder")
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
        config = TextConfig(path=str(out / "text_encoder"), max_tokens=9)
        torch.testing.assert_close(load_text_encoder(config).encode(["a cat"])[0], hidden)
        load_exported(out, CPU)
    else:
        with pytest.raises(ValueError, match=r"reference\.json names") as caught:
            load_exported(out, CPU)
        assert str(encoder) in str(caught.value)


def test_what_a_run_records_of_its_training_is_recorded(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    given = {"first": 0.5, "last": 0.0, "both": 0.5, "drop": 0.1, "drop_both": 0.0}
    run = trained_run(
        condition="frames", conditioning=given, limits=[3, 2, 3], area=6, data={"fps": 24.0},
        flow={"resolution_shift": True, "base_tokens": 64},
    )  # fmt: skip
    export_run(run, tmp_path / "out")
    for about in (read_checkpoint(run), read_exported(tmp_path / "out")):
        assert about.conditioning == ConditioningConfig(**given)
        assert (about.fps, about.base_tokens, about.image_pixels) == (24.0, 64, 1024)
        assert (about.weights, about.dtype) == ("ema", "float32")
    # A run whose shift does not grow has no base.
    assert (
        read_checkpoint(
            trained_run(flow={"resolution_shift": False, "base_tokens": 64})
        ).base_tokens
        is None
    )


def test_a_folder_of_before_says_what_it_knew(
    trained_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Its record ends where it ended then; anything else is no record of ours."""
    out, config = tmp_path / "out", tmp_path / "out" / "transformer" / "config.json"
    export_run(trained_run(limits=[1, 2, 2], area=4), out)
    content = json.loads(config.read_text())
    old = {name: content["_goku"][name] for name in _RECORD}
    config.write_text(json.dumps(content | {"_goku": old}))
    about = load_exported(out, CPU).about
    assert (about.limits, about.area, about.image_pixels, about.fps) == (
        (1, 2, 2),
        None,
        1536,
        None,
    )
    assert (about.weights, about.dtype, about.conditioning) == ("ema", "float32", None)
    config.write_text(json.dumps(content | {"_goku": old | {"else": 1}}))
    with pytest.raises(ValueError, match="_goku must hold step"):
        read_exported(out)


def test_other_weights_and_dtypes_are_said(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not the fp32 average does not bear its name alone."""
    run = trained_run()
    size = ["--prompt", "p", "--height", "16", "--width", "16", "--steps", "1", "--device", "cpu"]
    found = []
    for options in ([], ["--weights", "model"], ["--dtype", "bfloat16"]):
        out = tmp_path / f"out{len(found)}"
        assert main(["export", str(run), str(out), *options]) == 0
        assert main(["sample", str(out), *size, "--out", str(out / "samples")]) == 0
        shown = read_metadata(out / "samples" / "0000_p_seed0.png")
        assert shown["checkpoint"] == read_checkpoint(run).checkpoint_id
        found.append((shown.get("weights"), shown.get("dtype")))
    assert found == [(None, None), ("model", None), (None, "bfloat16")]
    assert load_for_sampling(run, CPU, weights="model").about.weights == "model"
    with pytest.raises(ValueError, match=r"dtype is torch\.float16; allowed: torch\.float32"):
        export_run(run, tmp_path / "half", dtype=torch.float16)


def test_a_shift_that_grows_with_the_tokens_is_said_at_export(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run(shift=2.0, flow={"resolution_shift": True, "base_tokens": 4})
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "scheduler_config.json cannot say" in printed
    assert (
        "it says 2.0, that of 4 tokens, which `goku sample` multiplies by sqrt(tokens / 4)"
        in printed
    )
    assert main(["export", str(trained_run()), str(tmp_path / "plain")]) == 0
    assert "scheduler_config.json" not in capsys.readouterr().out


def test_every_file_is_on_the_device_before_the_folder_appears(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced, honest = tmp_path / "out", set(), os.fsync

    def watched(descriptor: int) -> None:
        synced.add((Path(os.readlink(f"/proc/self/fd/{descriptor}")), out.exists()))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    export_run(trained_run(), out)
    partial = tmp_path / ".partial-out"
    inside = {partial / path.relative_to(out) for path in out.rglob("*")}
    assert len([path for path in inside if path.suffix]) >= 6
    assert {(path, False) for path in (partial, *inside)} <= synced
    assert (tmp_path, True) in synced  # and then its name


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _drop(path: Path, key: str, value: Any = None) -> None:
    content = json.loads(path.read_text())
    content.pop(key)
    if value is not None:
        content[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: _damage(f / "model_index.json"), ["model_index.json", "damaged"]),
        (lambda f: _drop(f / "model_index.json", "_class_name", "WanPipeline"), ["'WanPipeline'"]),
        (lambda f: (f / "transformer/config.json").unlink(), ["config.json does not exist"]),
        (lambda f: _drop(f / "transformer/config.json", "_goku"), ["_goku must hold step"]),
        (lambda f: _drop(f / "transformer/config.json", "depth", 3), ["missing", "blocks.2."]),
        (lambda f: _drop(f / "transformer/config.json", "mlp_ratio", 2.0), ["another shape"]),
        (
            lambda f: (f / "transformer/diffusion_pytorch_model.safetensors").unlink(),
            ["diffusion_pytorch_model.safetensors does not exist"],
        ),
        (
            lambda f: _damage(f / "transformer/diffusion_pytorch_model.safetensors"),
            ["diffusion_pytorch_model.safetensors is damaged"],
        ),
        (lambda f: shutil.rmtree(f / "vae"), ["vae"]),
        (lambda f: shutil.rmtree(f / "text_encoder"), ["reference.json does not exist"]),
        (
            lambda f: _drop(f / "text_encoder/reference.json", "tiny_seed", 8),
            ["text encoder is another", "fingerprint"],
        ),
    ],
)
def test_a_folder_that_is_not_whole_or_was_changed(
    harm: Callable[[Path], object],
    words: list[str],
    trained_run: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    export_run(trained_run(), out)
    harm(out)
    with pytest.raises(ValueError) as caught:
        load_for_sampling(out, CPU)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_another_vae_is_refused(trained_run: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = trained_run()
    export_run(run, out)
    GokuVAE(load_vae(out / "vae").config, seed=4).save(out / "vae")
    with pytest.raises(ValueError, match="the VAE is another than the one") as caught:
        load_exported(out, CPU)
    assert f"{out}: " in str(caught.value)
    load_for_sampling(run, CPU)


@pytest.mark.parametrize("part", ["vae", "text"])
def test_a_run_whose_vae_or_encoder_was_replaced_is_refused(
    part: str,
    trained_run: Callable[..., Path],
    t5_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By sampling, which would show noise, and by exporting, whose folder nothing could load."""
    vae, encoder = tmp_path / "vae", tmp_path / "t5"
    tiny = load_vae(trained_run().parent / "vae").config
    GokuVAE(tiny, seed=3).save(vae)
    shutil.copytree(t5_folder, encoder)
    run = trained_run(vae=vae, text={"path": str(encoder), "max_tokens": 9})
    path = read_checkpoint(run).path
    load_for_sampling(run, CPU)
    if part == "vae":
        GokuVAE(tiny, seed=4).save(vae)
    else:
        file = encoder / "model.safetensors"
        save_file(
            {name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"}
        )
    named, place = {"vae": ("VAE", vae), "text": ("text encoder", encoder)}[part]
    words = f"{path}: the {named} is another than the one that the model was trained with: {place} has fingerprint"
    assert (
        main(["sample", str(run), "--prompt", "a", "--device", "cpu", "--out", str(tmp_path / "s")])
        == 2
    )
    assert words in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert {each.name for each in tmp_path.iterdir()} == {"vae", "t5"}


def test_nothing_stays_of_an_export_that_failed(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_run()
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists"):
        export_run(run, tmp_path / "taken")
    with pytest.raises(ValueError, match="no such folder"):
        export_run(tmp_path / "absent", tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("goku.export.shutil.copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            export_run(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_nothing_stays_of_an_export_that_got_a_signal(
    number: int,
    code: int,
    trained_run: Callable[..., Path],
    signal_at: Callable[..., list[int]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # While files are brought to the device, the last thing before the folder appears.
    synced = signal_at(goku.export, "sync", number, at=2)
    with pytest.raises(SystemExit) as left:
        main(["export", str(trained_run()), str(tmp_path / "exported")])
    assert left.value.code == code
    assert len(synced) == 2
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err


def test_the_commands(
    trained_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained_run(limits=[1, 2, 2], shift=2.0), tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    assert f"{out}: step 7 of {run}" in capsys.readouterr().out
    arguments = ["--prompt", "a cat", "--height", "32", "--width", "48", "--frames", "5"]
    arguments += ["--steps", "2", "--guidance", "1.5", "--device", "cpu", "--count", "2"]
    for name, source in (("ours", run), ("theirs", out)):
        folder = tmp_path / name
        assert main(["sample", str(source), *arguments, "--out", str(folder)]) == 0
        printed = capsys.readouterr().err
        assert (
            "32 x 48, 5 frames: beyond the trained 32 x 32, 1; RoPE positions scaled by w 0.50"
            in printed
        )
        assert "not along t, where training had one position" in printed
    files = sorted((tmp_path / "ours").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.read_bytes() == (tmp_path / "theirs" / file.name).read_bytes()
    assert main(["sample", "--show", str(files[1])]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "prompt": "a cat", "negative": "", "seed": 1, "height": 32, "width": 48, "frames": 5, "fps": 12,
        "steps": 2, "method": "euler", "guidance": 1.5, "guidance_interval": [0.0, 1.0], "shift": 2.0,
        "model_step": 7, "checkpoint": read_checkpoint(run).checkpoint_id,
        "position_scale": [1.0, 1.0, 0.5],
    }  # fmt: skip
    assert main(["sample", "--show", str(tmp_path / "absent.mp4")]) == 2
    assert "absent.mp4" in capsys.readouterr().err
    assert main(["export", str(run), str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_naming_the_verb_loads_nothing() -> None:
    """goku --help and goku export --help answer without torch, and whatever export needs."""
    code = (
        "import sys\n"
        "from goku.cli import main\n"
        "try:\n"
        "    main(['export', '--help'])\n"
        "except SystemExit as left:\n"
        "    assert left.code == 0\n"
        "print([name for name in ('torch', 'transformers', 'goku.export') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: goku export" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
