"""Initialisation depends on the seed and the parameter's name, and on nothing else."""

import dataclasses
import math

import pytest
import torch

from goku.model import PRESETS, GokuTransformer

CONFIG = PRESETS["tiny-test"]


def test_the_seed_decides_and_the_global_generator_has_no_part():
    model = GokuTransformer(CONFIG)
    states = []
    for global_seed, seed in ((0, 7), (1, 7), (1, 8)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model.initialise(seed)
        assert torch.equal(state, torch.get_rng_state())
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    drawn = {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2
        and not name.endswith(".norm1.linear.weight")
        and not name.startswith("final.")
    }
    assert changed == drawn


def test_construction_ignores_the_global_generator():
    torch.manual_seed(0)
    a = GokuTransformer(CONFIG).state_dict()
    torch.manual_seed(1)
    b = GokuTransformer(CONFIG).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_more_blocks_leave_the_others_alone():
    small = GokuTransformer(CONFIG).state_dict()
    large = GokuTransformer(dataclasses.replace(CONFIG, depth=4)).state_dict()
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_materialised_from_meta_and_in_another_dtype():
    here = GokuTransformer(CONFIG)
    with torch.device("meta"):
        model = GokuTransformer(CONFIG)
    with pytest.raises(ValueError, match="on the meta device"):
        model.initialise(0)
    model.bfloat16().to_empty(device="cpu").initialise(0)
    for name, p in model.named_parameters():
        assert torch.equal(p, here.get_parameter(name).bfloat16())


def test_distribution():
    model = GokuTransformer(PRESETS["tiny"])
    weight = model.blocks[3].mlp.fc1.weight
    bound = math.sqrt(6 / (192 + 768))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # 147,456 draws
    assert torch.equal(model.blocks[0].norm2.weight, torch.ones(192))
    with pytest.raises(ValueError, match="seed is -1"):
        model.initialise(-1)
