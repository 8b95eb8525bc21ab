"""Schedule and moving average against their formulas in plain Python."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goku.optimizer import EMA, EMAConfig, OptimizerConfig, build_adamw, learning_rate


def test_warmup_rises_linearly_and_reaches_the_peak():
    config = OptimizerConfig(lr=1e-3, warmup_steps=4)
    rates = [learning_rate(config, step, 100) for step in range(6)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3], rel=1e-12)


def test_cosine_ends_at_the_floor():
    config = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="cosine", final_lr_ratio=0.1)
    assert learning_rate(config, 10, 110) == pytest.approx(2.0)
    assert learning_rate(config, 60, 110) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    assert learning_rate(config, 500, 110) == pytest.approx(0.2)


@given(step=st.integers(0, 300), steps=st.integers(1, 300), warmup=st.integers(0, 50))
def test_rate_is_positive_and_never_above_the_peak(step, steps, warmup):
    config = OptimizerConfig(lr=0.5, warmup_steps=warmup, schedule="cosine", final_lr_ratio=0.01)
    rate = learning_rate(config, step, steps)
    assert 0 < rate <= 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("warmup_steps", -1),
        ("schedule_offset", -1),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_offset_goes_on_where_an_earlier_run_ended(schedule):
    """Stages of 30, 20 and 50 steps with the schedule carried: the rates of one run of as many steps each time."""
    for offset, steps in ((30, 20), (50, 50)):
        whole = OptimizerConfig(lr=2e-4, warmup_steps=40, schedule=schedule)
        later = OptimizerConfig(lr=2e-4, warmup_steps=40, schedule=schedule, schedule_offset=offset)
        for step in range(steps):
            ours = learning_rate(later, step, steps)
            assert ours == learning_rate(whole, offset + step, offset + steps)
        # No second warm-up: behind the first one nothing is below it.
        assert learning_rate(later, 0, steps) > learning_rate(whole, 0, steps)


def test_adamw_decays_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = build_adamw(OptimizerConfig(weight_decay=0.3), model)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


def test_ema_follows_its_formula_step_by_step():
    model = torch.nn.Linear(2, 1, bias=False).double()
    expected = model.weight.detach().clone()
    ema = EMA(EMAConfig(decay=0.9), copy.deepcopy(model))
    for n in range(200):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[math.sin(n), math.cos(n)]]))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        ema.update(model)
    # fp64, 200 lerps: rounding alone
    torch.testing.assert_close(ema.module.weight, expected, rtol=0, atol=1e-14)
    assert ema.updates == 200
    assert not ema.module.weight.requires_grad
