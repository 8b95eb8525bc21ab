"""The Triton kernels in Triton's interpreter, on CPU tensors: a process of its own.

A kernel is interpreted or compiled for good when it is decorated, so these tests run apart from all
others: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter (make pytest does it).

bf16 is not run here: the interpreter of Triton 3.6 to 3.9 multiplies and adds its raw bits. It is
compiled (tests/kernels/compiled) and run on a GPU (tests/gpu).
"""

import os
from itertools import pairwise

import pytest
import torch

# Packings that every operator has to get right: (lengths of the samples, padding rows at the end).
PACKS = {
    "no tokens": ([0], 0),
    "empty samples": ([0, 3, 0, 0, 5, 0], 0),
    "one token": ([1], 0),
    "primes": ([7, 13, 1, 3], 0),
    "a giant among tiny ones": ([1, 1, 97, 1, 2], 0),
    "padding rows": ([5, 9], 4),
}


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "tests/kernels/interpreter needs TRITON_INTERPRET=1, in a process of its own"
        )
    # The interpreter keeps a thread pool of torch busy with tiny tensors otherwise.
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if "pack" in metafunc.fixturenames:
        metafunc.parametrize("pack", PACKS.values(), ids=PACKS.keys())


def flash_rule(name, got, same, exact, cu_seqlens=None, token_offset=0):
    """FlashAttention's rule: |got - exact| <= 2 * |same - exact| + rounding, in the maximum norm.

    got: what the kernel computed; same: what eager PyTorch computes from the same numbers in the
    same dtype; exact: the same in fp64. The rounding is one unit in the last place of the largest
    exact value; four in fp32, where eager's arithmetic is no coarser than its result and twice its
    luck no measure (1.8 were seen, docs/log.md, 2026-11-23). With `cu_seqlens`, rows (the first
    axis) are judged sample by sample, so that a giant cannot hide a tiny neighbour; padding rows
    must then be zero.
    """
    units = 4 if got.dtype == torch.float32 else 1
    assert got.dtype == same.dtype, f"{name}: {got.dtype}, eager gives {same.dtype}"
    assert got.shape == same.shape == exact.shape, f"{name}: {tuple(got.shape)}"
    parts = [("all rows", slice(None))]
    if cu_seqlens is not None:
        ends = [min(max(n - token_offset, 0), len(got)) for n in cu_seqlens.tolist()]
        parts = [(f"sample {i}", slice(a, b)) for i, (a, b) in enumerate(pairwise(ends))]
        assert torch.equal(got[ends[-1] :], torch.zeros_like(got[ends[-1] :])), f"{name}: padding"
    for what, rows in parts:
        g, s, e = (x[rows].double() for x in (got, same, exact))
        if g.numel() == 0:
            continue
        finite = e.isfinite()
        assert torch.equal(g.isfinite(), finite), (
            f"{name}, {what}: not finite where exact is, or so"
        )
        assert torch.equal(g[~finite], e[~finite]), f"{name}, {what}: infinities differ"
        if not finite.any():
            continue
        g, s, e = g[finite], s[finite], e[finite]
        allowed = 2 * (s - e).abs().max() + units * torch.finfo(got.dtype).eps * e.abs().max()
        error = (g - e).abs().max()
        assert error <= allowed, f"{name}, {what}: off by {error:.3e}, allowed {allowed:.3e}"


@pytest.fixture(scope="session", name="flash_rule")
def _flash_rule():
    return flash_rule
