"""The block's published layout: parameter names, shapes and counts."""

import pytest
import torch

from goku.model import PRESETS, GokuBlock, GokuTransformer, ModelConfig


def published_layout(d, text, ffn):
    """Names and shapes of the block that Goku's authors published."""
    layout = {"norm1.linear.weight": (6 * d, d), "norm1.linear.bias": (6 * d,)}
    for name, context in (("attn1", d), ("attn2", text)):
        for letter, width in (("q", d), ("k", context), ("v", context), ("o", d)):
            layout[f"{name}.{letter}_proj.weight"] = (d, width)
        layout[f"{name}.q_norm.weight"] = layout[f"{name}.k_norm.weight"] = (d,)
    layout |= {"norm2.weight": (d,), "norm3.weight": (d,)}
    layout |= {"mlp.fc1.weight": (ffn, d), "mlp.fc1.bias": (ffn,)}
    layout |= {"mlp.fc2.weight": (d, ffn), "mlp.fc2.bias": (d,)}
    return layout


@pytest.mark.parametrize("preset", ["tiny", "goku-1b"])
def test_a_state_dict_of_the_published_layout_loads_strictly(preset):
    config = PRESETS[preset]
    published = {
        name: torch.randn(shape)
        for name, shape in published_layout(config.dim, config.text_dim, 4 * config.dim).items()
    }
    block = GokuBlock(config)
    block.load_state_dict(published, strict=True)
    for name, value in block.state_dict().items():
        assert torch.equal(value, published[name])


@pytest.mark.parametrize(
    ("preset", "count"),
    [("goku-1b", 875_847_168), ("goku-2b", 2_004_681_728), ("goku-8b", 8_055_152_640)],
)
def test_parameters_of_all_blocks(preset, count):
    with torch.device("meta"):
        model = GokuTransformer(PRESETS[preset])
    assert sum(p.numel() for p in model.blocks.parameters()) == count


@pytest.mark.parametrize(("norm", "width"), [("head", 24), ("none", None)])
def test_other_qk_norms(norm, width):
    block = GokuBlock(ModelConfig(dim=48, depth=1, heads=2, text_dim=8, qk_norm=norm))
    names = {name for name, _ in block.named_parameters() if "q_norm" in name or "k_norm" in name}
    if width is None:
        assert not names
    else:
        assert len(names) == 4
        assert all(block.get_parameter(name).shape == (width,) for name in names)
