"""The dry run: exact parameter counts, activations as autograd saves them, and nothing done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from goku import flops
from goku.activation_bytes import recomputed_bytes_per_token, saved_bytes_per_token
from goku.dry_run import describe, missing
from goku.model import PRESETS, GokuTransformer
from goku.parallelize import ActivationCheckpointing
from goku.run_config import RunConfig, load_run_config


def _config(*overrides: str, **model: Any) -> RunConfig:
    return load_run_config(
        {
            "out": "absent/run",
            "data": {"path": "absent/media"},
            "vae": {"path": "absent/vae"},
            "text": {"path": "absent/t5"},
            "model": model or {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
            "packing": {"tokens_per_step": 4096, "tokens_per_pack": 1024},
            "train": {"device": "cpu", "precision": "float32"},
        },
        overrides,
    )


def _rows(text: str) -> dict[str, str]:
    table = text[text.index("\nparameters") :].splitlines()
    rows = [re.split(r" {2,}", line, maxsplit=1) for line in table]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def _counted(unit: str) -> float:
    number, name = re.fullmatch(r"([\d.]+) (B|KiB|MiB|GiB|TiB)(?: .*)?", unit).groups()
    return float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(name)


def test_the_report_says_what_the_run_is() -> None:
    config = _config("optimizer.lr=3e-4", "text.max_tokens=40")
    text = describe(config)
    # First the resolved run, as a file that gives the same run.
    head = text[: text.index("\nparameters")]
    assert load_run_config(yaml.safe_load(head)) == config
    rows = _rows(text)
    count = sum(p.numel() for p in GokuTransformer(config.model).parameters())
    blocks = sum(p.numel() for p in GokuTransformer(config.model).blocks.parameters())
    assert rows["parameters"] == f"{count:,} ({blocks:,} in the blocks)"
    assert rows["precision"] == "float32 products, fp32 weights, on cpu"
    assert rows["tokens per step"] == "4,096 at most, in packs of 1,024"
    states = {"weights": 4, "gradients": 4, "AdamW moments": 8, "EMA": 4}
    for name, size in states.items():
        # One digit after the point is printed.
        assert _counted(rows[f"memory: {name}"]) == pytest.approx(size * count, rel=0.01)
    activations = saved_bytes_per_token(config.model, 4) * 1024
    assert rows["memory: activations, none"].endswith(" <- this run")
    assert _counted(rows["memory: activations, none"]) == pytest.approx(activations, rel=0.01)
    total = sum(states.values()) * count + activations
    assert _counted(rows["memory: total per process"]) == pytest.approx(total, rel=0.01)


def test_every_policy_is_described_and_the_configured_one_counted() -> None:
    save = '["goku_kernels::varlen_attention", "aten::sin"]'
    config = _config(
        "activation_checkpointing.mode=operators",
        f"activation_checkpointing.save={save}",
        "activation_checkpointing.every=3",
        depth=4, dim=32, heads=2, text_dim=32,
    )  # fmt: skip
    rows = _rows(describe(config))
    policies = {
        "none": ActivationCheckpointing(),
        "full": ActivationCheckpointing(mode="full"),
        "every_nth": ActivationCheckpointing(mode="every_nth", every=3),
        "operators": config.activation_checkpointing,
    }
    for mode, policy in policies.items():
        row = rows[f"memory: activations, {mode}"]
        wanted = 1024 * saved_bytes_per_token(config.model, 4, policy)
        assert _counted(row) == pytest.approx(wanted, rel=0.05)  # 1.2 MiB may be 1.15
        assert row.endswith(" <- this run") == (mode == "operators")
    assert "(every 3)" in rows["memory: activations, every_nth"]
    operators = rows["memory: activations, operators"]
    assert "(keeping goku_kernels::varlen_attention, aten::sin; not predicted" in operators
    assert "not counted: aten::sin)" in operators
    count = sum(p.numel() for p in GokuTransformer(config.model).parameters())
    kept = 1024 * saved_bytes_per_token(config.model, 4, policies["operators"])
    again = 1024 * recomputed_bytes_per_token(config.model, 4, policies["operators"])
    assert _counted(rows["memory: one block computed again"]) == pytest.approx(again, rel=0.05)
    total = 20 * count + kept + again  # several packs a step: gradients are there from the first on
    assert _counted(rows["memory: total per process"]) == pytest.approx(total, rel=0.05)


def test_one_pack_a_step_has_gradients_where_activations_were() -> None:
    overrides = ("packing.tokens_per_step=1024", "activation_checkpointing.mode=full")
    shape = {"dim": 64, "depth": 6, "heads": 2, "text_dim": 32}
    one, several = (
        _rows(describe(_config(*given, **shape))) for given in (overrides, overrides[1:])
    )
    count = sum(p.numel() for p in GokuTransformer(_config(**shape).model).parameters())
    kept, again, total = (
        _counted(one[f"memory: {name}"])
        for name in ("activations, full", "one block computed again", "total per process")
    )
    assert total == pytest.approx(16 * count + max(kept, 4 * count) + again, rel=0.02)
    more = 20 * count + kept + again
    assert _counted(several["memory: total per process"]) == pytest.approx(more, rel=0.02)
    none = _rows(describe(_config(overrides[0], **shape)))
    assert "memory: one block computed again" not in none


def test_an_operator_that_does_not_exist_is_refused() -> None:
    config = _config(
        "activation_checkpointing.mode=operators",
        'activation_checkpointing.save=["goku_kernels::attention"]',
    )
    with pytest.raises(ValueError, match="'goku_kernels::attention', which is no operator"):
        describe(config)


def test_the_triton_kernels_keep_less() -> None:
    eager, fused = (
        _rows(
            describe(_config(f"kernels.backend={backend}", dim=128, depth=2, heads=2, text_dim=32))
        )
        for backend in ("torch", "triton")
    )
    name = "memory: activations, none"
    assert _counted(fused[name]) < _counted(eager[name])
    wanted = 1024 * saved_bytes_per_token(
        _config(dim=128, depth=2, heads=2, text_dim=32).model, 4, fused=True
    )
    assert _counted(fused[name]) == pytest.approx(wanted, rel=0.01)


def test_processes_and_precision_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    overrides = ("parallel.dp_replicate=2", "parallel.sp=2")
    config = _config(*overrides, "train.precision=bfloat16", dim=64, depth=2, heads=2, text_dim=32)
    rows = _rows(describe(config))
    assert rows["processes"].startswith("8 = dp_replicate 2 x dp_shard 2 x sp 2; each has 1/4 of")
    assert rows["precision"].startswith("bfloat16 products")
    # Half of the tokens, and of the states a fourth: FSDP2 cuts rows, which 4 divides here.
    half = _counted(rows["memory: activations, none"])
    assert half == pytest.approx(512 * saved_bytes_per_token(config.model, 2, sp=2), rel=0.01)
    count = sum(p.numel() for p in GokuTransformer(config.model).parameters())
    for name, size in {"weights": 1, "gradients": 1, "AdamW moments": 2, "EMA": 1}.items():
        assert _counted(rows[f"memory: {name}"]) == pytest.approx(size * count, rel=0.01)
    # Gathered in bf16, so that autocast copies nothing: less than the whole model in fp32.
    assert "memory: bf16 copies" not in rows
    assert 0 < _counted(rows["memory: gathered weights and gradients"]) < 8 * count
    parts = [
        _counted(value)
        for name, value in rows.items()
        if name.startswith("memory:") and "activations" not in name and "total" not in name
    ]
    total = _counted(rows["memory: total per process"])
    assert total == pytest.approx(sum(parts) + half, rel=0.01)

    offloaded = _rows(describe(_config(*overrides, "sharding.cpu_offload=true")))
    assert "memory: weights" not in offloaded
    assert "host memory: weights" in offloaded


def test_processes_that_the_mesh_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config("parallel.sp=2")
    assert _rows(describe(config))["processes"].startswith("2 = dp_replicate 1 x dp_shard 1 x sp 2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="does not divide the 3 processes"):
        describe(config)
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(
        ValueError, match="WORLD_SIZE is 'x' in the environment; allowed: an integer"
    ):
        describe(config)


def test_flops_of_a_step_are_those_of_full_packs_of_one_sample() -> None:
    config = _config("text.max_tokens=40", "packing.tokens_per_step=2500")
    printed = float(re.findall(r"[\d.]+e[+-]\d+", _rows(describe(config))["FLOPs per step"])[0])
    full = flops.training_flops(config.model, [1024, 1024, 452], [40] * 3)
    assert printed == pytest.approx(full, rel=1e-3)  # four digits are printed
    # The same tokens in shorter samples need less: attention is within each.
    assert printed > flops.training_flops(config.model, [512] * 4 + [452], [24] * 5)


@pytest.mark.parametrize("name", ["goku-1b", "goku-2b", "goku-8b"])
def test_a_published_size_is_described_without_memory(name: str) -> None:
    """8B parameters in fp32 are 33 GB: the model is never there."""
    config = _config("vae.model.channels=16", preset=name)
    rows = _rows(describe(config))
    with torch.device("meta"):
        model = GokuTransformer(PRESETS[name])
    count = sum(p.numel() for p in model.parameters())
    assert rows["parameters"].startswith(f"{count:,} ")
    assert abs(count / 1e9 - float(name[5])) < 0.5
    assert _counted(rows["memory: weights"]) == pytest.approx(4 * count, rel=0.01)


def test_what_the_run_needs_is_named_and_what_is_missing(tmp_path: Path) -> None:
    vae, text, out = tmp_path / "vae", tmp_path / "t5", tmp_path / "run"
    places = (f"vae.path={vae}", f"text.path={text}", f"out={out}", "text.max_tokens=40")
    config = _config(*places)
    rows = _rows(describe(config))
    assert rows["VAE"] == f"{vae} holds none, and there is no vae.train to train one"
    assert rows["text encoder"] == f"{text} holds none"
    assert rows["caches"].startswith(f"none in {out / 'cache'} yet: made before the first step")
    no_vae, no_text = missing(config)
    assert no_vae.startswith(f"vae.path is {vae}, which holds no VAE; allowed: ")
    assert no_text.startswith(f"text.path is {text}, which holds no text encoder; allowed: ")
    # A VAE that is trained first, and the built-in encoder, need nothing.
    own = _config(f"vae.path={vae}", "vae.train={steps: 7}", "text={tiny_dim: 32}")
    assert missing(own) == []
    rows = _rows(describe(own))
    assert rows["VAE"] == f"none in {vae} yet: trained on the data first, 7 steps"
    assert rows["text encoder"].startswith("the built-in one, 32 wide, float32, prompts of at most")
    # What is there: a pipeline's folder, an encoder, one of the two caches.
    (vae / "vae").mkdir(parents=True)
    (vae / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    text.mkdir()
    assert missing(config) == [no_text]
    (text / "config.json").write_text("{}")
    (out / "cache" / "text").mkdir(parents=True)
    assert missing(config) == []
    rows = _rows(describe(config))
    assert rows["VAE"] == str(vae / "vae")
    assert rows["text encoder"] == f"{text}, float32, prompts of at most 40 tokens"
    assert rows["caches"].startswith(f"text embeddings in {out / 'cache'}; what is not there is ")
    elsewhere = _config(*places, f"data.cache={tmp_path / 'shared'}")
    assert _rows(describe(elsewhere))["caches"].startswith(f"none in {tmp_path / 'shared'} yet")
    # A class that cannot be used is as good as none.
    (vae / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLMochi"}')
    (refused,) = missing(config)
    assert refused.startswith("vae.path: ")
    assert "AutoencoderKLMochi" in refused


def test_nothing_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    describe(_config())  # media and VAE are absent
    assert not list(tmp_path.iterdir())
