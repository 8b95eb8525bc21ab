"""`goku cache`: what it makes is what training would make, by any number of processes, killed or not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load

from goku.caching import CacheSummary, cache_latents, cache_text
from goku.cli import main
from goku.data import DataError, prepare
from goku.metrics import read_log
from goku.parallelize import ParallelContext
from goku.prepare import prepare_datasets, prepare_text, prepare_vae, prepare_validator
from goku.run_config import RunConfig, load_run_config
from goku.text import TextCache, load_text_encoder
from goku.vae import GokuVAE, VAEConfig, load_vae

ALONE = ParallelContext(0, 1, torch.device("cpu"), None)
TINY_VAE = {"stem_width": 8, "width": 8, "encoder_depth": 1, "decoder_depth": 1}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures, two of them with one caption."""
    folder = tmp_path_factory.mktemp("media")
    generator = np.random.default_rng(0)
    for i in range(9):
        pixels = generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {max(i, 1)}")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    GokuVAE(VAEConfig(**TINY_VAE), seed=3).save(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, media: Path, vae: Path) -> Path:
    """A run's YAML file."""
    tree = {
        "out": str(tmp_path / "run"),
        "data": {
            "path": str(media),
            "image_pixels": 1536,
            "video_pixels": 1536,
            "max_frames": 5,
            "workers": 0,
        },
        "vae": {"path": str(vae), "model": TINY_VAE},
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
        "packing": {"tokens_per_step": 48, "tokens_per_pack": 24},
        "train": {"device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_of(config: Path, *overrides: str) -> RunConfig:
    return load_run_config(config, overrides)


def files(run: Path, kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """Every cached file by its name, with its tensors."""
    found = (run / "cache" / kind).rglob("*.safetensors")
    return {path.name: load(path.read_bytes()) for path in found}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name][key]) for name, each in a.items() for key, value in each.items()
    )


def test_text_holds_every_caption_and_the_empty_prompt(config: Path) -> None:
    run = run_of(config)
    encoder = load_text_encoder(run.text)
    summary = cache_text(run, ALONE, encoder)
    # Eight captions, since two pictures share one, and the empty prompt.
    assert (summary.items, summary.made, summary.present, summary.quarantined) == (9, 9, 0, 0)
    cache = TextCache(Path(run.out) / "cache" / "text", encoder)
    prompts = ["", *(f"number {i}" for i in range(1, 9))]
    assert all(cache.path(prompt).is_file() for prompt in prompts)
    assert len(files(Path(run.out), "text")) == 9
    assert summary.bytes == sum(cache.path(prompt).stat().st_size for prompt in prompts)
    for prompt, found in zip(prompts, cache.get(prompts), strict=True):
        assert torch.equal(found, encoder.encode([prompt])[0])
    again = cache_text(run, ALONE, encoder)
    assert (again.items, again.made, again.present) == (9, 0, 9)


def test_latents_are_those_of_training(config: Path, tmp_path: Path) -> None:
    run = run_of(config)
    summary = cache_latents(run, ALONE, load_vae(run.vae.path))
    assert (summary.items, summary.made, summary.present, summary.quarantined) == (9, 9, 0, 0)
    own = run_of(config, f"out={tmp_path / 'other'}")
    prepare_datasets(own, ALONE, prepare_vae(own, ALONE))
    assert equal(files(Path(run.out), "latents"), files(tmp_path / "other", "latents"))
    again = cache_latents(run, ALONE, load_vae(run.vae.path))
    assert (again.items, again.made, again.present) == (9, 0, 9)
    assert again.bytes == summary.bytes > 9 * 2 * 16 * 4 * 6 * 4


class Refusing:
    """Stands for an encoder or a VAE of which nothing but its name may be asked."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.dim = getattr(real, "dim", 0)
        self.strides = getattr(real, "strides", ())
        self.channels = getattr(real, "channels", 0)
        self.causal = getattr(real, "causal", True)

    def fingerprint(self) -> str:
        return str(self.real.fingerprint())

    def encode(self, *_: object) -> Any:
        raise AssertionError("everything is cached")


def test_training_after_it_encodes_nothing(config: Path) -> None:
    assert main(["cache", "text", str(config)]) == 0
    assert main(["cache", "latents", str(config)]) == 0
    run = run_of(config)
    text, vae = Refusing(load_text_encoder(run.text)), Refusing(load_vae(run.vae.path))
    training, _, _ = prepare_datasets(run, ALONE, vae, text)
    assert len(training.items) == 9
    for index in range(9):
        training.read(index)
    assert len(training.empty_text) == 1


def test_the_last_line_is_a_summary(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what, made in (("text", 9), ("latents", 9), ("latents", 0)):
        assert main(["cache", what, str(config)]) == 0
        printed, told = capsys.readouterr()
        summary = json.loads(printed.splitlines()[-1])
        assert summary.pop("cache") == what
        assert summary.keys() == CacheSummary().__dict__.keys()
        assert (summary["items"], summary["made"]) == (9, made)
        assert summary["seconds"] > 0
        if made:
            assert "9/9" in told
            assert "items/s" in told
    # One line of a log for every call, beside what it is about.
    cache = Path(run_of(config).out) / "cache"
    for what, count in (("captions", 1), ("latents", 2)):
        events = read_log(cache / f"{what}.jsonl")
        assert [(e["event"], e["step"], e["total"]) for e in events] == [("cache", 9, 9)] * count


def test_the_unseen_dataset_is_cached_too(config: Path, tmp_path: Path, media: Path) -> None:
    unseen = tmp_path / "unseen"
    unseen.mkdir()
    Image.new("RGB", (32, 32), "red").save(unseen / "red.png")
    (unseen / "red.txt").write_text("red")
    run = run_of(config, f"unseen={unseen}")
    assert cache_text(run, ALONE, load_text_encoder(run.text)).items == 10
    assert cache_latents(run, ALONE, load_vae(run.vae.path)).items == 10


def test_the_captions_of_the_validation_are_cached_too(config: Path, tmp_path: Path) -> None:
    """Else training would read an encoder of gigabytes for these alone. A case of too many tokens needs none."""
    size = {"height": 32, "width": 32, "num_frames": 1}
    cases = [
        size | {"caption": "a case", "negative": "ugly"},
        size | {"caption": "number 1"},
        size | {"caption": "large", "num_frames": 49},
    ]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"data": cases}))
    run = run_of(config, f"validation.file={file}", "validation.every=5")
    encoder = load_text_encoder(run.text)
    assert cache_text(run, ALONE, encoder).items == 9 + 2
    _, _, text = prepare_datasets(run, ALONE, load_vae(run.vae.path), Refusing(encoder))
    validator = prepare_validator(run, ALONE, load_vae(run.vae.path), text)
    assert validator is not None
    assert set(validator.prompts) == {"a case", "ugly", "number 1", ""}
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"cases\.json holds no prompt"):
        cache_text(run, ALONE, encoder)


def test_every_caption_is_cached_as_training_reads_it(config: Path, media: Path) -> None:
    """Several captions of one item, and the motion score put to each."""
    rows = [
        {
            "path": str(media / "1.png"),
            "captions": [{"text": "short", "weight": 1}, {"text": "longer", "weight": 3}],
            "motion_score": 2.5,
        },
        {"path": str(media / "2.png"), "text": "without a score"},
    ]
    table = config.parent / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{caption} motion score: {motion:.1f}"
    run = run_of(config, f"data.path={table}", f"data.motion_caption={json.dumps(template)}")
    encoder = load_text_encoder(run.text)
    assert cache_text(run, ALONE, encoder).items == 4
    cache = TextCache(Path(run.out) / "cache" / "text", encoder)
    prompts = ["", "short motion score: 2.5", "longer motion score: 2.5", "without a score"]
    assert all(cache.path(prompt).is_file() for prompt in prompts)
    # Training finds all of them.
    training, _, _ = prepare_datasets(
        run, ALONE, prepare_vae(run, ALONE), Refusing(load_text_encoder(run.text))
    )
    for index, captions in enumerate((2, 1)):
        for caption in range(captions):
            training.read(index, caption)


def damaged(tmp_path: Path, media: Path) -> Path:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in media.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "3.png").write_bytes(b"")
    (folder / "4.txt").unlink()
    return folder


def test_bad_items_are_told_and_the_rest_is_cached(
    config: Path, tmp_path: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"data.path={damaged(tmp_path, media)}"
    run = run_of(config, where, "data.skip_bad=true")
    told = cache_latents(run, ALONE, load_vae(run.vae.path))
    assert (told.items, told.quarantined) == (7, 2)
    error = capsys.readouterr().err
    assert "3.png" in error
    assert "4.png" in error
    assert cache_text(run, ALONE, load_text_encoder(run.text)).quarantined == 1  # by the listing
    # Without skip_bad both refuse, but only once all that is good is cached.
    other = run_of(config, where, f"out={tmp_path / 'strict'}")
    with pytest.raises(DataError, match=r"3\.png"):
        cache_latents(other, ALONE, load_vae(run.vae.path))
    with pytest.raises(DataError, match=r"4\.png"):
        cache_text(other, ALONE, load_text_encoder(run.text))
    assert equal(files(tmp_path / "strict", "latents"), files(Path(run.out), "latents"))
    assert equal(files(tmp_path / "strict", "text"), files(Path(run.out), "text"))


def test_a_damaged_file_is_made_anew(config: Path) -> None:
    assert main(["cache", "text", str(config)]) == 0
    run = run_of(config)
    first = files(Path(run.out), "text")
    path = next((Path(run.out) / "cache" / "text").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="is damaged"):
        summary = cache_text(run, ALONE, load_text_encoder(run.text))
    assert (summary.made, summary.present) == (1, 8)
    assert equal(files(Path(run.out), "text"), first)


def test_damaged_latents_are_named_and_made_anew(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(config)
    vae = load_vae(run.vae.path)
    items = cache_latents(run, ALONE, vae).items
    assert "damaged" not in capsys.readouterr().err
    first = files(Path(run.out), "latents")
    path = next((Path(run.out) / "cache" / "latents").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])
    summary = cache_latents(run, ALONE, vae)
    assert (summary.made, summary.present) == (1, items - 1)
    said = re.search(r"latents: 1 damaged in the cache, made anew: (\S+)", capsys.readouterr().err)
    assert said is not None
    with safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["goku"])["name"] == said[1]
    assert equal(files(Path(run.out), "latents"), first)


def test_few_embeddings_are_in_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many captions there are, the encoder is asked for 64 at most."""
    run = run_of(config)
    encoder = load_text_encoder(run.text)
    asked: list[int] = []

    class Counting(Refusing):
        def encode(self, *prompts: Any) -> Any:
            asked.append(len(prompts[0]))
            return encoder.encode(*prompts)

    cache = TextCache(Path(run.out) / "text", Counting(encoder))
    prompts = [f"caption {i}" for i in range(200)]
    assert cache.fill(prompts + prompts) == sum(cache.path(p).stat().st_size for p in prompts)
    assert asked == [64, 64, 64, 8]
    assert cache.made == 200
    with pytest.raises(ValueError, match="sequence of strings"):
        cache.fill("one string")


def test_a_warm_start_reads_no_weights_of_the_encoder(config: Path) -> None:
    run = run_of(config)
    cache_text(run, ALONE, prepare_text(run, ALONE))
    text = prepare_text(run, ALONE)
    prepare(
        run.data,
        None,
        TextCache(Path(run.out) / "cache" / "text", text),
        cache_dir=Path(run.out) / "cache",
        latents=False,
    )
    text.release()
    assert not text.loaded


def test_a_wrong_width_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "text", str(config), "text.tiny_dim=16"]) == 2
    assert "text.tiny_dim = 16" in capsys.readouterr().err


def test_stage_of_a_run_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "text", str(config), "--stage", "t2i"]) == 2
    assert "is one run" in capsys.readouterr().err


@pytest.fixture
def recipe(config: Path, tmp_path: Path, media: Path) -> Path:
    tree = yaml.safe_load(config.read_text())
    del tree["data"]["path"]
    tree["sources"] = {"stills": {"path": str(media)}}
    tree["stages"] = {
        "small": {"mix": {"stills": {"image": 1}}, "data": {"image_pixels": "16x32"}},
        "large": {"mix": {"stills": {"image": 1}}, "data": {"image_pixels": "32x48"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_recipe_caches_for_all_stages_or_one(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def summary(*arguments: str) -> dict[str, Any]:
        nonlocal told
        assert main(["cache", *arguments]) == 0
        printed, told = capsys.readouterr()
        return dict(json.loads(printed.splitlines()[-1]))

    told = ""
    one = summary("latents", str(recipe), "--stage", "large")
    assert (one["items"], one["made"]) == (9, 9)
    assert "large: latents 9/9" in told
    both = summary("latents", str(recipe))
    assert "small: latents 9/9" in told
    assert "large: latents 9/9" in told
    assert (both["items"], both["made"], both["present"]) == (18, 9, 9)
    text = summary("text", str(recipe))
    assert (text["items"], text["made"]) == (18, 9)  # the stages share the prompts
    assert len(files(tmp_path / "run", "latents")) == 18
    assert main(["cache", "text", str(recipe), "--stage", "huge"]) == 2
    assert "'huge'" in capsys.readouterr().err


def test_an_item_of_several_stages_is_told_once(
    recipe: Path, config: Path, tmp_path: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its source and its name, also where a stage has several sources and the held-out data such a name."""
    bad = damaged(tmp_path, media)
    tree = yaml.safe_load(recipe.read_text())
    tree["sources"] = {"stills": {"path": str(bad)}, "more": {"path": str(bad)}}
    tree["data"]["skip_bad"] = True
    tree["unseen"] = str(bad)
    tree["stages"]["large"]["mix"]["more"] = {"image": 1}
    recipe.write_text(yaml.safe_dump(tree))
    reasons = {"text": ["4.png"], "latents": ["3.png", "4.png"]}
    for what, names in reasons.items():
        assert main(["cache", what, str(recipe)]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if ".png: " in line]
        assert sorted(line.split(".png: ")[0] + ".png" for line in lines) == sorted(
            f"  {source}: {name}" for source in ("stills", "more", "unseen") for name in names
        )
    assert main(["cache", "text", str(config), f"data.path={bad}", "data.skip_bad=true"]) == 0
    assert "1 item cannot be used:\n  4.png: missing caption" in capsys.readouterr().err


# ---- processes ----


def start(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m"]
    return subprocess.Popen(
        [*command, "goku.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_processes_fill_what_one_does(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in ("text", "latents"):
        assert main(["cache", what, str(config)]) == 0
        alone = json.loads(capsys.readouterr().out.splitlines()[-1])
        shared = start("cache", what, config, f"out={tmp_path / 'two'}", processes=2)
        printed, error = shared.communicate(timeout=240)
        assert shared.returncode == 0, error
        lines = [line for line in printed.splitlines() if line.startswith("{")]
        assert len(lines) == 1  # the main rank's alone
        summary = json.loads(lines[0])
        for name in ("items", "made", "present", "quarantined", "bytes"):
            assert summary[name] == alone[name], name
        assert equal(files(tmp_path / "run", what), files(tmp_path / "two", what))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(200):
        Image.new("RGB", (48, 32), (i % 256, i // 256, 7)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"caption {i} " + "and more " * 20)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", [pytest.param("text", marks=pytest.mark.long), "latents"])
def test_a_killed_one_goes_on(
    config: Path, many: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_of(config, f"data.path={many}", f"out={tmp_path / 'whole'}")
    make: Callable[[], object] = {
        "text": lambda: cache_text(whole, ALONE, load_text_encoder(whole.text)),
        "latents": lambda: cache_latents(whole, ALONE, load_vae(whole.vae.path)),
    }[what]
    make()
    killed = start("cache", what, config, f"data.path={many}")
    folder = tmp_path / "run" / "cache" / what
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("*.safetensors"))) < 20:
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    there = len(files(tmp_path / "run", what))
    total = len(files(tmp_path / "whole", what))
    assert 20 <= there < total
    capsys.readouterr()
    assert main(["cache", what, str(config), f"data.path={many}"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["made"], summary["present"]) == (total - there, there)
    assert equal(files(tmp_path / "run", what), files(tmp_path / "whole", what))


def test_a_public_vae_from_a_pipelines_folder(config: Path, tmp_path: Path) -> None:
    """The whole way: diffusers' folder, its dtype by config, latents that training reads back."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = diffusers.AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    theirs.save_pretrained(tmp_path / "wan" / "vae")
    overrides = [f"vae.path={tmp_path / 'wan'}", "vae.dtype=bfloat16"]
    run = run_of(config, *overrides)
    vae = prepare_vae(run, ALONE)
    assert next(vae.parameters()).dtype == torch.bfloat16
    assert cache_latents(run, ALONE, vae).items == 9
    training, _, _ = prepare_datasets(run, ALONE, vae)
    pixels = training.pixels(0).float() / 127.5 - 1
    expected = vae.encode(pixels[None]).mean[0]
    assert torch.equal(training.read(0).mean, expected)
    with pytest.raises(ValueError, match=r"16 latent channels.*channels is 8"):
        prepare_vae(
            run_of(config, *overrides, "vae.model.channels=8", "model.latent_channels=8"), ALONE
        )
