"""The Goku block on a CUDA device: bf16 against fp32 by FlashAttention's rule, fp32 against fp64.

The rule: what we compute in bf16 may be at most twice as far from the fp32 result as plain PyTorch
    code
in bf16, plus one rounding of the largest value.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from goku.model import PRESETS, GokuBlock, GokuTransformer
from goku.model.initialise import initialise
from goku_kernels import Packing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_PATH = Path(__file__).parents[1] / "goku" / "model" / "plain_goku.py"
_spec = importlib.util.spec_from_file_location("plain_goku", _PATH)
plain_goku = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_goku)

DEVICE = "cuda"
GRIDS, TEXT = [(5, 9, 16), (1, 15, 27), (1, 1, 1), (2, 8, 8)], [64, 7, 1, 128]
ROUNDING = 2.0**-8  # of bf16: one unit in the last place of a number up to twice the largest


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make(config, dtype=torch.float32):
    """A block with random gates, and its inputs: bf16 numbers, so that every run has the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE, dtype)

    block = GokuBlock(config)
    initialise(block, 0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.startswith("norm1") or name == "attn2.o_proj.weight":
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.bfloat16())
    block.to(DEVICE, dtype)
    packing = Packing.from_grids(GRIDS, device=DEVICE)
    inputs = [
        draw(packing.total, config.dim), draw(len(GRIDS), config.dim), draw(sum(TEXT), config.text_dim)
    ]  # fmt: skip
    return block, [x.requires_grad_() for x in inputs], draw(packing.total, config.dim)


def results(out, block, inputs, gradient):
    """Output and every gradient by name, in fp64."""
    parameters = dict(block.named_parameters())
    names = ["x", "c", "text", *parameters]
    grads = torch.autograd.grad(out, [*inputs, *parameters.values()], gradient.to(out.dtype))
    return {"output": out.detach().double()} | {
        name: grad.double() for name, grad in zip(names, grads, strict=True)
    }


def ours(config, dtype, autocast=False):
    block, inputs, gradient = make(config, dtype)
    packing = Packing.from_grids(GRIDS, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = block(*inputs, packing, Packing.from_lengths(TEXT, device=DEVICE))
    return results(out, block, inputs, gradient)


def plain(config, dtype):
    """The block sample by sample in plain PyTorch, everything in `dtype`."""
    block, inputs, gradient = make(config, dtype)
    x, c, text = inputs
    p = dict(block.named_parameters())
    lengths = [t * h * w for t, h, w in GRIDS]
    out = []
    for xi, ci, ti, grid in zip(x.split(lengths), c, text.split(TEXT), GRIDS, strict=True):
        matrices = plain_goku.rope_matrices(grid, config.rope_axes).to(DEVICE, dtype)
        out.append(plain_goku.block(p, "", xi, ci, ti, config.heads, matrices))
    return results(torch.cat(out), block, inputs, gradient)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("preset", ["tiny", "goku-2b"])
def test_bf16_is_no_further_from_fp32_than_twice_plain_bf16(preset, autocast):
    config = PRESETS[preset]
    exact = plain(config, torch.float32)
    same_dtype = plain(config, torch.bfloat16)
    got = ours(config, torch.float32 if autocast else torch.bfloat16, autocast)
    for name, want in exact.items():
        floor = ROUNDING * want.abs().max()
        allowed = 2 * (same_dtype[name] - want).abs().max() + floor
        assert (got[name] - want).abs().max() <= allowed, name


@pytest.mark.parametrize("preset", ["tiny", "goku-2b"])
def test_fp32_is_near_fp64(preset):
    config = PRESETS[preset]
    exact, got = plain(config, torch.float64), ours(config, torch.float32)
    for name, want in exact.items():
        # fp32 rounds to 6e-8; sums over up to 7,168 channels and 1,254 tokens lose two digits
        assert (got[name] - want).norm() <= 1e-5 * want.norm(), name


def test_changing_one_sample_changes_no_bit_of_another():
    config = dataclasses.replace(PRESETS["tiny"], depth=2)
    model = GokuTransformer(config).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(DEVICE)
    packing = Packing.from_grids(GRIDS, device=DEVICE)
    text_packing = Packing.from_lengths(TEXT, device=DEVICE)
    x = torch.randn(packing.total, config.patch_dim, generator=generator).to(DEVICE)
    t = torch.rand(packing.batch, generator=generator).to(DEVICE)
    text = torch.randn(text_packing.total, config.text_dim, generator=generator).to(DEVICE)
    other = x.clone()
    other.split(packing.lengths)[1].mul_(0.5)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        before, after = (model(y, t, text, packing, text_packing) for y in (x, other))
    parts = zip(before.split(packing.lengths), after.split(packing.lengths), strict=True)
    assert [torch.equal(a, b) for a, b in parts] == [True, False, True, True]
