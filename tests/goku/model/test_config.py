"""ModelConfig refuses what cannot be built; the split of a head over the axes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goku.model import PRESETS, ModelConfig, split_axes


@pytest.mark.parametrize(
    ("head_dim", "axes"),
    [
        (64, (16, 24, 24)),
        (72, (24, 24, 24)),
        (128, (44, 42, 42)),
        (32, (12, 10, 10)),
        (48, (16, 16, 16)),
    ],
)
def test_split_axes(head_dim, axes):
    assert split_axes(head_dim) == axes


@given(st.integers(3, 200).map(lambda n: 2 * n))
def test_split_axes_of_any_even_width(head_dim):
    axes = split_axes(head_dim)
    assert sum(axes) == head_dim
    assert all(n >= 2 and n % 2 == 0 for n in axes)
    assert axes[1] == axes[2]


@pytest.mark.parametrize("head_dim", [4, 7, 33])
def test_split_axes_refuses(head_dim):
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}: allowed are even"):
        split_axes(head_dim)


def test_presets_are_the_papers_table():
    table = {name: (c.depth, c.dim, c.mlp_dim, c.heads, c.head_dim) for name, c in PRESETS.items()}
    assert table["goku-1b"] == (28, 1152, 4608, 16, 72)
    assert table["goku-2b"] == (28, 1792, 7168, 28, 64)
    assert table["goku-8b"] == (40, 3072, 12288, 48, 64)
    with pytest.raises(TypeError):
        PRESETS["goku-2b"] = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim is 0: allowed are integers >= 1"),
        ({"depth": True}, "depth is True"),
        ({"heads": 5}, "heads is 5: allowed are divisors of dim = 192"),
        ({"heads": 64}, "head_dim is 3"),
        ({"mlp_ratio": 0.001}, "mlp_ratio is 0.001: mlp_ratio \\* dim must be whole"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan"),
        ({"patch": (1, 2)}, "patch is"),
        ({"patch": (0, 2, 2)}, "patch is"),
        ({"axes_dim": (10, 10, 10)}, "axes_dim is .*add up to the head width 32"),
        ({"axes_dim": (10, 11, 11)}, "axes_dim is"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"eps": -1e-6}, "eps is -1e-06"),
        ({"qk_norm": "rows"}, "qk_norm is 'rows'"),
        ({"time_channels": 15}, "time_channels is 15"),
        ({"condition": "first"}, "condition is 'first': allowed are 'none', 'frames'"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


def test_derived_numbers():
    config = ModelConfig(
        dim=128, depth=1, heads=2, latent_channels=8, patch=(2, 2, 2), mlp_ratio=2.5
    )
    assert (config.head_dim, config.mlp_dim, config.patch_dim) == (64, 320, 64)
    assert config.rope_axes == (16, 24, 24)
    assert dataclasses.replace(config, axes_dim=(0, 32, 32)).rope_axes == (0, 32, 32)
