"""Given frames in the model: no effect at the start, exact packing, and refusals; RoPE's position_scale."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from goku.model import PRESETS, GokuTransformer, ModelConfig
from goku_kernels import Packing

_PLAIN = Path(__file__).with_name("plain_goku.py")
_spec = importlib.util.spec_from_file_location("plain_goku", _PLAIN)
plain_goku = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_goku)

BASE = ModelConfig(dim=48, depth=2, heads=2, text_dim=20, latent_channels=3, time_channels=16)
CONFIG = replace(BASE, condition="frames")
AXES = (8, 8, 8)  # of head width 24, by hand
GRIDS = [(1, 3, 4), (3, 2, 3), (1, 1, 1), (2, 4, 1)]
TEXT = [5, 1, 9, 2]
OWN = {f"condition_embed.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


@torch.no_grad()
def perturbed(
    config: ModelConfig, dtype: torch.dtype, but: tuple[str, ...] = ()
) -> GokuTransformer:
    """A model whose zero-initialised parts are random too, but for parameters that begin with `but`;
    a parameter's values depend on its name alone."""
    model = GokuTransformer(config).to(dtype)
    for name, parameter in model.named_parameters():
        if not (but and name.startswith(but)):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """x, t, text, packing, text_packing, condition."""
    generator = torch.Generator().manual_seed(2)
    packing, text_packing = Packing.from_grids(GRIDS), Packing.from_lengths(TEXT)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, y = draw(packing.total, CONFIG.patch_dim), draw(text_packing.total, CONFIG.text_dim)
    t = torch.rand(packing.batch, generator=generator).to(dtype)
    return x, t, y, packing, text_packing, draw(packing.total, CONFIG.condition_dim)


# ---- the module


def test_its_shape_and_names() -> None:
    assert (BASE.condition_dim, CONFIG.condition_dim) == (0, 4 * 4)  # 3 channels and the mask
    assert replace(CONFIG, patch=(2, 2, 2), latent_channels=8).condition_dim == 9 * 8
    model, base = GokuTransformer(CONFIG), GokuTransformer(BASE)
    assert set(model.state_dict()) - set(base.state_dict()) == OWN
    assert model.condition_embed.fc1.weight.shape == (48, 12 + 16)
    assert model.condition_embed.fc2.weight.shape == (48, 48)
    for name, value in base.state_dict().items():  # the base is a strict subset, with its values
        assert torch.equal(model.state_dict()[name], value)
    assert not hasattr(base, "condition_embed")
    assert all(config.condition == "none" for config in PRESETS.values())


def test_only_its_output_begins_at_zero() -> None:
    state = GokuTransformer(CONFIG).state_dict()
    assert {name for name in OWN if not state[name].any()} == OWN - {"condition_embed.fc1.weight"}
    other = GokuTransformer(CONFIG)
    other.initialise(1)
    ours, theirs = state["condition_embed.fc1.weight"], other.condition_embed.fc1.weight
    assert not torch.equal(ours, theirs)
    bound = (6 / (28 + 48)) ** 0.5
    assert 0.9 * bound < ours.abs().max() <= bound


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_forward_and_backward_are_the_bases_bit_for_bit(
    dtype: torch.dtype, autocast: bool
) -> None:
    """Whatever is given, since fc2 is zero: a base that was trained, its weights carried over."""
    model, base = perturbed(CONFIG, dtype, but=("condition_embed",)), perturbed(BASE, dtype)
    x, t, y, packing, text_packing, condition = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = model(x, t, y, packing, text_packing, None, condition)
        theirs = base(x, t, y, packing, text_packing)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    (ours * ours).sum().backward()
    (theirs * theirs).sum().backward()
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name
    # And what is given is learned from the first step on, by fc2; fc1 follows once fc2 is not zero.
    own = {name: model.get_parameter(name).grad for name in OWN}
    assert {name for name, grad in own.items() if grad.any()} == {
        "condition_embed.fc2.weight", "condition_embed.fc2.bias",
    }  # fmt: skip
    with torch.no_grad():
        model.condition_embed.fc2.weight -= 0.1 * own["condition_embed.fc2.weight"]
    model.zero_grad()
    model(x, t, y, packing, text_packing, None, condition).square().sum().backward()
    assert model.condition_embed.fc1.weight.grad.any()


def test_the_mlp_by_hand() -> None:
    model = perturbed(CONFIG, torch.float64)
    x, *_, condition = inputs()
    p = dict(model.named_parameters())
    hidden = torch.cat([x, condition], 1) @ p["condition_embed.fc1.weight"].T
    hidden = plain_goku.gelu_tanh(hidden + p["condition_embed.fc1.bias"])
    wanted = hidden @ p["condition_embed.fc2.weight"].T + p["condition_embed.fc2.bias"]
    torch.testing.assert_close(model.condition_embed(x, condition), wanted, rtol=1e-12, atol=1e-12)


def test_packed_equals_one_by_one_in_output_and_every_gradient() -> None:
    """Against the plain model of one sample, whose embedded tokens get the MLP's rows added."""
    model = perturbed(CONFIG, torch.float64)
    x, t, y, packing, text_packing, condition = inputs()
    leaves = [x.requires_grad_(), y.requires_grad_(), condition.requires_grad_()]
    names = ["x", "text", "condition", *(name for name, _ in model.named_parameters())]
    wrt = [*leaves, *model.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    out = model(x, t, y, packing, text_packing, condition=condition)
    grads = torch.autograd.grad((out * weights).sum(), wrt)

    p = dict(model.named_parameters())
    parts = []
    for xi, ti, yi, ci, grid in zip(
        x.split(packing.lengths), t, y.split(TEXT), condition.split(packing.lengths), GRIDS,
        strict=True,
    ):  # fmt: skip
        hidden = torch.cat([xi, ci], 1) @ p["condition_embed.fc1.weight"].T
        hidden = plain_goku.gelu_tanh(hidden + p["condition_embed.fc1.bias"])
        added = hidden @ p["condition_embed.fc2.weight"].T + p["condition_embed.fc2.bias"]
        # The plain model embeds by itself: widened inputs [x, added] against [W, 1] add it there.
        wide = p | {
            "patch_embed.weight": torch.cat(
                [p["patch_embed.weight"], torch.eye(48, dtype=torch.float64)], dim=1
            )
        }
        parts.append(
            plain_goku.transformer(wide, CONFIG, torch.cat([xi, added], 1), ti, yi, grid, AXES)
        )
    wanted = torch.cat(parts)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), wrt)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    for name, grad, want in zip(names, grads, wanted_grads, strict=True):
        scale = want.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        assert (grad - want).abs().max().item() <= 1e-10 * max(1, scale), name


def test_one_samples_condition_reaches_no_other() -> None:
    model = perturbed(CONFIG, torch.float32)
    x, t, y, packing, text_packing, condition = inputs(torch.float32)
    other = condition.clone()
    other.split(packing.lengths)[1].zero_()
    before, after = (
        model(x, t, y, packing, text_packing, condition=c).split(packing.lengths)
        for c in (condition, other)
    )
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip


def test_it_stays_in_fp32_under_autocast() -> None:
    model = perturbed(CONFIG, torch.float32)
    x, t, y, packing, text_packing, condition = inputs(torch.float32)
    seen = []
    model.condition_embed.register_forward_hook(lambda _m, _i, out: seen.append(out))
    exact = model.condition_embed(x, condition)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, y, packing, text_packing, condition=condition.bfloat16().float())
        model(x, t, y, packing, text_packing, condition=condition)
    assert torch.equal(seen[-1], exact)
    assert seen[-1].dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "condition", "message"),
    [
        (CONFIG, None, "condition is missing: the model has condition 'frames'"),
        (BASE, torch.zeros(39, 16), "condition is given: the model has condition 'none'"),
        (CONFIG, torch.zeros(39, 12), r"condition has shape \(39, 12\): wanted \(39, 16\)"),
        (CONFIG, torch.zeros(38, 16), r"condition has shape \(38, 16\): wanted \(39, 16\)"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(
    config: ModelConfig, condition: Tensor | None, message: str
) -> None:
    x, t, y, packing, text_packing, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        GokuTransformer(config)(x, t, y, packing, text_packing, condition=condition)


def test_other_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="condition is 'first': allowed are 'none', 'frames'"):
        replace(BASE, condition="first")


# ---- position_scale

SCALE = torch.tensor(
    [[1.0, 1.0, 1.0], [0.5, 0.3, 0.75], [1.0, 0.2, 1.0], [0.125, 1.0, 2.0]], dtype=torch.float64
)


def scaled_rope(grid: tuple[int, ...], axes: tuple[int, ...], scale: list[float]) -> Tensor:
    """plain_goku.rope_matrices at positions times `scale`."""
    rows = []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, 3).tolist():
        angles = torch.cat(
            [
                p * s * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
                for p, s, d in zip(place, scale, axes, strict=True)
            ]
        )
        rows.append(
            torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).view(-1, 2, 2)
        )
    return torch.stack(rows)


def test_scaled_positions_against_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of self-attention and queries of cross-attention; text is never rotated."""
    model = perturbed(BASE, torch.float64)
    x, t, y, packing, text_packing, _ = inputs()
    out = model(x, t, y, packing, text_packing, position_scale=SCALE)
    p = dict(model.named_parameters())
    parts = []
    samples = zip(x.split(packing.lengths), t, y.split(TEXT), GRIDS, SCALE.tolist(), strict=True)
    for xi, ti, yi, grid, scale in samples:
        monkeypatch.setattr(plain_goku, "rope_matrices", partial(scaled_rope, scale=scale))
        parts.append(plain_goku.transformer(p, BASE, xi, ti, yi, grid, AXES))
    torch.testing.assert_close(out, torch.cat(parts), rtol=1e-10, atol=1e-10)
    plain = model(x, t, y, packing, text_packing)
    same = [
        torch.allclose(a, b, rtol=1e-10, atol=1e-10)
        for a, b in zip(out.split(packing.lengths), plain.split(packing.lengths), strict=True)
    ]
    # The third is a single token, at the origin whatever the scale.
    assert same == [True, False, True, False]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_scale_of_one_is_the_bits_without_it(autocast: bool) -> None:
    model = perturbed(CONFIG, torch.float32)
    x, t, y, packing, text_packing, condition = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, ones, doubles = (
            model(x, t, y, packing, text_packing, None, condition, scale)
            for scale in (None, torch.ones(4, 3), torch.ones(4, 3, dtype=torch.float64))
        )
    assert torch.equal(plain, ones)
    assert torch.equal(plain, doubles)


def test_a_scale_of_another_shape_is_refused() -> None:
    x, t, y, packing, text_packing, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"position_scale has shape \(3,\): wanted \(4, 3\)"):
        GokuTransformer(BASE)(x, t, y, packing, text_packing, position_scale=torch.ones(3))
