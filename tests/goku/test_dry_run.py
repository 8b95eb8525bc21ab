"""The dry run: exact parameter counts, activations as autograd saves them, and nothing done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from goku import flops
from goku.config import dump
from goku.dry_run import describe, saved_bytes_per_token
from goku.model import PRESETS, GokuTransformer, ModelConfig
from goku.run_config import RunConfig, load_run_config
from goku_kernels import Packing


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
    activations = saved_bytes_per_token(config, 4) * 1024
    assert _counted(rows["memory: activations"]) == pytest.approx(activations, rel=0.01)
    total = sum(states.values()) * count + activations
    assert _counted(rows["memory: total per process"]) == pytest.approx(total, rel=0.01)


def test_processes_and_precision_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    rows = _rows(describe(_config("train.precision=bfloat16")))
    assert rows["processes"] == "4 (data parallel)"
    assert rows["precision"].startswith("bfloat16 products")
    half = _counted(rows["memory: activations"])
    assert half == pytest.approx(saved_bytes_per_token(_config(), 2) * 1024, rel=0.01)


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


def test_nothing_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    describe(_config())  # media and VAE are absent
    assert not list(tmp_path.iterdir())


# --- activations ----------------------------------------------------------------------------------


def _saved_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that autograd saves in one forward, parameters left out."""
    model = GokuTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():  # no zero gates
            parameter.add_(0.01)
    packing = Packing.from_grids([(1, 8, tokens // 8)])
    text = Packing.from_lengths([16])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # or an address could be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    low = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype if low else torch.bfloat16, enabled=low),
    ):
        out = model(
            torch.ones(tokens, config.patch_dim),
            torch.full((1,), 0.5),
            torch.ones(16, config.text_dim),
            packing,
            text,
        )
    assert out.grad_fn is not None
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 32, "depth": 2, "heads": 2},
        {"dim": 256, "depth": 2, "heads": 4},
        {"dim": 256, "depth": 5, "heads": 4},
        {"dim": 128, "depth": 2, "heads": 2, "mlp_ratio": 2.0},
    ],
)
def test_saved_bytes_per_token(shape: dict[str, Any], dtype: torch.dtype) -> None:
    """Against the hooks: the slope over tokens, so that text, times and copies of weights, which
    do not grow with the tokens, drop out. Rotation tables and what is narrower than the model (its
    input and output) are left out of the estimate: within 10%."""
    config = _config(**shape, text_dim=32)
    few, many = (_saved_bytes(config.model, tokens, dtype) for tokens in (64, 192))
    measured = (many - few) / 128
    estimate = saved_bytes_per_token(config, dtype.itemsize)
    assert estimate == pytest.approx(measured, rel=0.10)


def test_an_estimate_for_2b_is_of_the_known_order() -> None:
    """28 blocks of 1792: some MB a token in bf16, which is why long packs recompute."""
    config = load_run_config(yaml.safe_load(dump(_config(preset="goku-2b"))))
    low, full = saved_bytes_per_token(config, 2), saved_bytes_per_token(config, 4)
    assert 4e6 < low < 8e6
    assert 1.2 < full / low < 1.8
