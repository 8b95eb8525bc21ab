"""The Goku block on a CUDA device: bf16 against fp32 by FlashAttention's rule, fp32 against fp64.

The rule: what we compute in bf16 may be at most twice as far from the fp32 result as plain PyTorch
code in bf16, plus one rounding of the largest value. tests/bench runs the same functions on a CPU.
"""

import dataclasses
import functools
import importlib.util
import random
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from goku.model import PRESETS, GokuBlock, GokuTransformer, KernelConfig
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
BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def exact_fp32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def kernels(backend):
    """Deterministic only where that needs no matrix of all pairs of tokens."""
    return KernelConfig(backend=backend, deterministic=backend == "triton")


def make(config, device, dtype=torch.float32, backend="torch"):
    """A block with random gates, and its inputs: bf16 numbers, so that every run has the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().to(device, dtype)

    with torch.device("meta"):
        block = GokuBlock(config, kernels(backend)).to(dtype)
    block.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(parameters(config)[name])
    packing = Packing.from_grids(GRIDS, device=device)
    inputs = [
        draw(packing.total, config.dim), draw(len(GRIDS), config.dim), draw(sum(TEXT), config.text_dim)
    ]  # fmt: skip
    return block, [x.requires_grad_() for x in inputs], draw(packing.total, config.dim)


@functools.lru_cache(maxsize=1)
def parameters(config):
    """The block's, bf16, by name: drawing Goku-2B's takes two seconds."""
    generator = torch.Generator().manual_seed(1)
    block = GokuBlock(config)
    initialise(block, 0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.startswith("norm1") or name == "attn2.o_proj.weight":
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return {name: x.detach().bfloat16() for name, x in block.named_parameters()}


def results(out, block, inputs, gradient):
    """Output and every gradient by name, in fp64."""
    parameters = dict(block.named_parameters())
    names = ["x", "c", "text", *parameters]
    grads = torch.autograd.grad(out, [*inputs, *parameters.values()], gradient.to(out.dtype))
    return {"output": out.detach().double()} | {
        name: grad.double() for name, grad in zip(names, grads, strict=True)
    }


def ours(config, device, dtype, backend, autocast=False):
    block, inputs, gradient = make(config, device, dtype, backend)
    packing = Packing.from_grids(GRIDS, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = block(*inputs, packing, Packing.from_lengths(TEXT, device=device))
    return results(out, block, inputs, gradient)


def plain(config, device, dtype):
    """The block sample by sample in plain PyTorch, everything in `dtype`."""
    block, inputs, gradient = make(config, device, dtype)
    x, c, text = inputs
    p = dict(block.named_parameters())
    lengths = [t * h * w for t, h, w in GRIDS]
    out = []
    for xi, ci, ti, grid in zip(x.split(lengths), c, text.split(TEXT), GRIDS, strict=True):
        matrices = plain_goku.rope_matrices(grid, config.rope_axes).to(device, dtype)
        out.append(plain_goku.block(p, "", xi, ci, ti, config.heads, matrices))
    return results(torch.cat(out), block, inputs, gradient)


def bf16_is_near_fp32(config, device, backend, autocast):
    exact = plain(config, device, torch.float32)
    same_dtype = plain(config, device, torch.bfloat16)
    got = ours(config, device, torch.float32 if autocast else torch.bfloat16, backend, autocast)
    for name, want in exact.items():
        floor = ROUNDING * want.abs().max()
        allowed = 2 * (same_dtype[name] - want).abs().max() + floor
        assert (got[name] - want).abs().max() <= allowed, name


def fp32_is_near_fp64(config, device, backend):
    exact = plain(config, device, torch.float64)
    same = plain(config, device, torch.float32)
    # The fused attention of a GPU multiplies fp32 as three products of TF32, which loses more.
    with sdpa_kernel(SDPBackend.MATH):
        got = ours(config, device, torch.float32, backend)
    for name, want in exact.items():
        # Twice what plain PyTorch loses in fp32: some gradients, those of the QK-norms' gains first,
        # are sums that cancel to a thousandth of their terms, and lose as many digits in any order.
        # The floor is 16 roundings, for those where plain PyTorch happens to lose nothing.
        allowed = 2 * (same[name] - want).norm() + 16 * 2.0**-24 * want.norm()
        error = (got[name] - want).norm()
        assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"


def one_sample_changes_no_other(config, device, backend):
    model = GokuTransformer(config, kernels(backend)).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(device)
    packing = Packing.from_grids(GRIDS, device=device)
    text_packing = Packing.from_lengths(TEXT, device=device)
    x = torch.randn(packing.total, config.patch_dim, generator=generator).to(device)
    t = torch.rand(packing.batch, generator=generator).to(device)
    text = torch.randn(text_packing.total, config.text_dim, generator=generator).to(device)
    other = x.clone()
    other.split(packing.lengths)[1].mul_(0.5)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        before, after = (model(y, t, text, packing, text_packing) for y in (x, other))
    parts = zip(before.split(packing.lengths), after.split(packing.lengths), strict=True)
    assert [torch.equal(a, b) for a, b in parts] == [True, False, True, True]


def packs(count):
    """Packs of many sizes: (grids, text lengths) of 2 to 9 samples."""
    draw = random.Random(0)
    for _ in range(count):
        samples = draw.randint(2, 9)
        grids = [
            (draw.randint(1, 5), draw.randint(1, 12), draw.randint(1, 12)) for _ in range(samples)
        ]
        yield grids, [draw.randint(1, 40) for _ in range(samples)]


def compiled_serves_packs(config, device, backend, count, *, fullgraph, compiler="inductor"):
    """One compiled block, forward and backward, on `count` packs; returns how often it compiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    block, _, _ = make(config, device, backend=backend)
    compiled = torch.compile(block, backend=counter, fullgraph=fullgraph)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    for grids, lengths in packs(count):
        packing = Packing.from_grids(grids, device=device)
        text_packing = Packing.from_lengths(lengths, device=device)
        x = draw(packing.total, config.dim).requires_grad_()
        c, text = draw(packing.batch, config.dim), draw(text_packing.total, config.text_dim)
        outs, grads = [], []
        for module in (compiled, block):
            with torch.autocast(device, torch.bfloat16):
                out = module(x, c, text, packing, text_packing)
            outs.append(out.detach())
            grads.append(torch.autograd.grad(out.square().mean(), x)[0])
        for got, want in (outs, grads):
            # bf16 products; what is fused is rounded less often
            assert (got - want).norm() <= 2e-2 * want.norm()
    return counter.frame_count


# ---- on a GPU ----


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["tiny", "goku-2b"])
def test_bf16_is_no_further_from_fp32_than_twice_plain_bf16(preset, autocast, backend):
    bf16_is_near_fp32(fitting(preset, backend), DEVICE, backend, autocast)


@pytest.mark.parametrize("preset", ["tiny", "goku-2b"])
def test_fp32_is_near_fp64(preset):
    fp32_is_near_fp64(PRESETS[preset], DEVICE, "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_changing_one_sample_changes_no_bit_of_another(backend):
    config = dataclasses.replace(fitting("tiny", backend), depth=2)
    one_sample_changes_no_other(config, DEVICE, backend)


def test_one_compiled_block_serves_50_packs():
    config = dataclasses.replace(PRESETS["goku-2b"], dim=512, heads=8)
    count = compiled_serves_packs(config, DEVICE, "triton", 50, fullgraph=True)
    assert count <= 2, f"compiled {count} times"


def fitting(preset, backend):
    """The preset, with heads that the fused attention takes (it refuses 32 channels)."""
    config = PRESETS[preset]
    if backend == "triton" and config.head_dim < 64:
        return dataclasses.replace(config, heads=config.dim // 64)
    return config
