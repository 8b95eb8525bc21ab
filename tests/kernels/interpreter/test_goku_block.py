"""A whole Goku block on the Triton kernels, in the interpreter: fp64, torch.compile, checkpointing.

Sizes are the smallest that meet every kernel; one block is about 40 launches.
"""

import random

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import goku_kernels
from goku.model import GokuBlock, KernelConfig, ModelConfig
from goku.model.initialise import initialise
from goku_kernels import Packing

# Head width 64, Goku's: the attention kernels take 64, 72, 96 and 128 alone.
CONFIG = ModelConfig(dim=128, depth=1, heads=2, text_dim=24, mlp_ratio=1.0)
NAMES = ("x", "c", "text")


@pytest.fixture(autouse=True)
def tf32_allowed():
    """Our fp32 attention takes TF32 products or none; the interpreter's are exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def make_block(backend):
    block = GokuBlock(CONFIG, KernelConfig(backend=backend))
    initialise(block, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            # Gates are zero at the start: drawn, so that every gradient is alive.
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return block


def draw(seed, grids, lengths):
    packing, text_packing = Packing.from_grids(grids), Packing.from_lengths(lengths)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((packing.total, 128), (len(grids), 128), (text_packing.total, 24))
    tensors = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    return tensors, packing, text_packing


def results(block, call, tensors, packings, dtype=torch.float32):
    leaves = [v.detach().to(dtype).requires_grad_() for v in tensors]
    out = call(*leaves, *packings)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    wanted = [*leaves, *block.parameters()]
    names = ["out", *NAMES, *(name for name, _ in block.named_parameters())]
    return dict(zip(names, [out.detach(), *torch.autograd.grad(out, wanted, grad)], strict=True))


def test_output_and_every_gradient_against_fp64(flash_rule):
    tensors, *packings = draw(1, [(1, 2, 3), (2, 1, 2)], [3, 1])
    triton, eager = make_block("triton"), make_block("torch")
    got = results(triton, triton, tensors, packings)
    same = results(eager, eager, tensors, packings)
    eager.double()
    exact = results(eager, eager, tensors, packings, torch.float64)
    for name in exact:
        # Eager fp32 is sometimes right to the last bit by luck: three roundings more are allowed.
        error = (got[name].double() - exact[name]).abs().max()
        allowed = (
            2 * (same[name].double() - exact[name]).abs().max()
            + 4 * 2**-23 * exact[name].abs().max()
        )
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("packs", [12, pytest.param(50, marks=pytest.mark.long)])
def test_one_compiled_block_serves_all_packs(packs):
    # At least two samples: torch.compile compiles sizes of 1 apart. (Under
    # torch.fx.experimental._config.backed_size_oblivious = True it does not.)
    rng = random.Random(0)
    # All sizes of the first two packs differ: torch.compile takes equal ones for one and the same.
    first = [
        ([(1, 2, 2), (1, 3, 1)], [3, 2]),
        ([(2, 3, 2), (1, 1, 2), (1, 3, 1)], [2, 5, 3]),
    ]
    block = make_block("triton")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for i in range(packs):
        samples = rng.randint(2, 4)
        grids = [(rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 2)) for _ in range(samples)]
        lengths = [rng.randint(1, 3) for _ in range(samples)]
        if i < len(first):
            grids, lengths = first[i]
        tensors, *packings = draw(i, grids, lengths)
        if i % 10:
            compiled(*tensors, *packings)  # enough to make it compile again
            continue
        got = results(block, compiled, tensors, packings)
        want = results(block, block, tensors, packings)
        for name in want:
            assert torch.equal(got[name], want[name]), name
    assert counter.frame_count <= 2


def test_selective_checkpointing_can_name_the_operators():
    tensors, *packings = draw(2, [(1, 2, 2), (1, 1, 3)], [2, 2])
    block = make_block("triton")
    attention = torch.ops.goku_kernels.varlen_attention.default
    assert attention in goku_kernels.OPERATORS
    runs = []

    def policy(context, operator, *args, **kwargs):
        if operator in goku_kernels.OPERATORS:
            runs.append((context.is_recompute, operator))
        saved = operator is attention
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def call(*arguments):
        return checkpoint(
            block, *arguments, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip

    want = results(block, block, tensors, packings)
    got = results(block, call, tensors, packings)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    first = [op for again, op in runs if not again]
    assert {str(op) for op in first} == {
        f"goku_kernels.{name}.default"
        for name in ("adaln_modulate", "gated_residual_adaln", "qk_norm_rope", "varlen_attention")
    }


def test_autocast(flash_rule):
    tensors, *packings = draw(3, [(1, 2, 2), (1, 1, 3)], [2, 2])
    outs = []
    for backend, dtype in (("triton", None), ("torch", None), ("torch", torch.float64)):
        block = make_block(backend)
        if dtype is not None:
            block.double()
        leaves = [v.detach().to(dtype or v.dtype) for v in tensors]
        with torch.autocast("cpu", torch.float16, enabled=dtype is None):
            outs.append(block(*leaves, *packings))
    assert outs[0].dtype == torch.float32
    flash_rule("out", *outs)
