"""The fifty steps of bench/gpu_check, fewer and smaller, and what they are judged by."""

import torch

from bench import training
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
