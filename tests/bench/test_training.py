"""The fifty steps of bench/gpu_check, fewer and smaller, and what they are judged by."""

import json

import pytest
import torch

from bench import harness, training
from goku.model import ModelConfig

CONFIG = ModelConfig(dim=48, depth=1, heads=2, text_dim=16, latent_channels=4)
CPU = torch.device("cpu")


def test_the_loss_of_a_small_model_falls_and_repeats():
    values = training.losses(CONFIG, training.SMALL_PACKS, CPU, steps=16, rate=1e-2)
    # The head is zero at the start: the loss is the variance of data minus noise, 2.
    assert abs(values[0] - 2) < 0.3
    assert training.has_fallen(values, share=0.97)
    again = training.losses(CONFIG, training.SMALL_PACKS, CPU, steps=3, rate=1e-2)
    assert values[0] == again[0]


def test_a_loss_that_stays_or_is_no_number_has_not_fallen():
    assert training.has_fallen([2.0] * 8 + [1.7, 1.7])
    assert not training.has_fallen([2.0] * 10)
    assert not training.has_fallen([2.0] * 8 + [1.7, float("nan")])
    assert not training.has_fallen([float("inf")] + [1.5] * 9)


@pytest.mark.parametrize("rate", [0.0, 1e30])
def test_the_losses_are_kept_with_where_they_come_from_also_bad_ones(rate, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PRESETS", {"goku-2b": CONFIG})
    given = ["--steps", "5", "--device", "cpu", "--out", str(tmp_path), "--rate", str(rate)]
    assert training.main(given) == 1
    (line,) = (tmp_path / training.LOSSES).read_text().splitlines()
    record = json.loads(line)
    assert (len(record["losses"]), record["fell"], record["device_type"]) == (5, False, "cpu")
    assert (record["losses"][-1] is None) == bool(rate)
    assert record["tokens"] == 2 * 4 * 4 + 4 * 6 + 4 * 4 + 3 * 5
    assert not harness.is_stale(record)
