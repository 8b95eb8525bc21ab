"""The operators on a CUDA device: the CPU's results in fp64, and no waiting for the device."""

import pytest
import torch

from goku_kernels import (
    Packing,
    adaln_modulate,
    gated_residual_adaln,
    qk_norm_rope,
    varlen_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GRIDS, TEXT = [(3, 4, 5), (1, 1, 1), (0, 1, 1), (2, 7, 3)], [5, 0, 3, 17]
HEADS, D, PADDING = 4, 16, 3
DEVICE = "cuda"


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rope(device, generator, **options):
    packing = Packing.from_grids(GRIDS, device=device)
    rows = packing.total + PADDING
    q, k = (draw(generator, rows, HEADS, D) for _ in range(2))
    weights = [draw(generator, HEADS * D) for _ in range(2)]
    inputs = [x.to(device).requires_grad_() for x in (q, k, *weights)]
    options = {"axes_dim": (4, 6, 6), "grid_sizes": packing.grid_sizes} | options
    return inputs, lambda *x: qk_norm_rope(*x, cu_seqlens=packing.cu_seqlens, **options)


def rope_half(device, generator):
    return rope(device, generator, pairing="half")


def modulate(device, generator):
    packing = Packing.from_grids(GRIDS, device=device)
    x = draw(generator, packing.total + PADDING, D)
    rows = [draw(generator, packing.batch, D) for _ in range(2)]
    inputs = [x.to(device).requires_grad_() for x in (x, *rows)]
    return inputs, lambda *x: (adaln_modulate(*x, packing.cu_seqlens),)


def gated(device, generator):
    packing = Packing.from_grids(GRIDS, device=device)
    tokens = [draw(generator, packing.total + PADDING, D) for _ in range(2)]
    rows = [draw(generator, packing.batch, D) for _ in range(3)]
    inputs = [x.to(device).requires_grad_() for x in (*tokens, *rows)]
    return inputs, lambda *x: gated_residual_adaln(*x, packing.cu_seqlens, norm="rms")


def attention(device, generator):
    packing = Packing.from_grids(GRIDS, device=device)
    keys = Packing.from_lengths(TEXT, device=device)
    q = draw(generator, packing.total + PADDING, HEADS, D)
    k, v = (draw(generator, keys.total + PADDING, HEADS // 2, D) for _ in range(2))
    inputs = [x.to(device).requires_grad_() for x in (q, k, v)]
    limits = (packing.cu_seqlens, keys.cu_seqlens, packing.max_seqlen, keys.max_seqlen)
    return inputs, lambda *x: (varlen_attention(*x, *limits),)


@pytest.mark.parametrize("case", [rope, rope_half, modulate, gated, attention])
def test_equals_the_cpu_in_outputs_and_gradients(case):
    results = []
    for device in ("cpu", DEVICE):
        inputs, operator = case(device, torch.Generator().manual_seed(0))
        outs = operator(*inputs)
        generator = torch.Generator().manual_seed(1)
        loss = sum((o * draw(generator, *o.shape).to(device)).sum() for o in outs)
        grads = torch.autograd.grad(loss, inputs)
        results.append([x.detach().cpu() for x in (*outs, *grads)])
    for cpu, device in zip(*results, strict=True):
        # fp64, sums of at most some hundred terms in another order
        torch.testing.assert_close(device, cpu, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [rope, rope_half, modulate, gated])
def test_does_not_wait_for_the_device(case):
    inputs, operator = case(DEVICE, torch.Generator().manual_seed(0))
    grads = [torch.ones_like(o) for o in operator(*inputs)]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.backward(operator(*inputs), grads)
    finally:
        torch.cuda.set_sync_debug_mode(before)
