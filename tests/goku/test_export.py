"""An exported folder stands for the run: equal bits, known to its parts' own libraries, refused if altered."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from goku.cli import main
from goku.export import export_run, load_exported, read_exported
from goku.flow import time_grid
from goku.sampler import Request, SampleConfig, generate, load_for_sampling
from goku.text import TextConfig, load_text_encoder
from goku.trained import Loaded, read_checkpoint
from goku.vae import load_vae

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
    run, out = trained_run(limits=[2, 2, 3]), tmp_path / "deep" / "out"
    told: list[tuple[int, int]] = []
    export_run(run, out, progress=lambda done, total: told.append((done, total)))
    first, second = load_for_sampling(run, CPU), load_for_sampling(out, CPU)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(_videos(first), _videos(second), strict=True))
    assert second.step == 7
    about = read_exported(out)
    assert (about.limits, about.shift, about.pixels) == ((2, 2, 3), 1.5, 1536)
    assert about.checkpoint_id == read_checkpoint(run).checkpoint_id
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
    expected = 1 - time_grid(8, 3.0)
    torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=0, atol=1e-6)


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
    from goku.vae import GokuVAE

    out = tmp_path / "out"
    run = trained_run()
    export_run(run, out)
    GokuVAE(load_vae(out / "vae").config, seed=4).save(out / "vae")
    with pytest.raises(ValueError, match="the VAE is another than the one"):
        load_exported(out, CPU)


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


def test_transformers_is_not_needed_to_name_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """goku --help names the verb without loading anything."""
    monkeypatch.setitem(sys.modules, "goku.export", None)
    with pytest.raises(SystemExit) as left:
        main(["export", "--help"])
    assert left.value.code == 0
