"""rectified_flow_noise: Philox noise of every sample, the point on the path and the velocity.

Tokens of 64 numbers: 16 latent channels of 2x2 cells. No gradient, so forward alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import Function, Inputs, Problem, draw_normal, packing
from bench.packs import Pack, packs
from bench.peers import ours
from goku.model import PRESETS
from goku_kernels.rectified_flow_noise import rectified_flow_noise, rectified_flow_noise_bytes

OPERATOR = "rectified_flow_noise"
SOURCES = (
    "kernels/goku_kernels", "bench/rectified_flow_noise.py", "bench/cases.py", "bench/judging.py",
    "bench/batching.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip


def function(backend: str) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        rest = (inputs.rest[name] for name in ("t", "stream_index", "cu_seqlens"))
        options = inputs.rest.get("options", {})
        return rectified_flow_noise(
            *inputs.leaves, *rest, seed=2**40 + 1, backend=backend, **options
        )

    return run


eager = function("torch")
PEERS = ours(eager, function("triton"))


def problem(case: str, dim: int, pack: Pack, dtype: torch.dtype) -> Problem:
    """Latents of `dim` numbers a token."""

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        samples = len(pack.grids)
        rest = {
            "t": torch.rand(samples, generator=generator, device=device),
            "stream_index": torch.randint(2**62, (samples,), generator=generator, device=device),
            "cu_seqlens": packing(pack, device).cu_seqlens,
        }
        return Inputs((draw_normal(generator, pack.tokens, dim, dtype=dtype),), rest)

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype, shape={"dim": dim}, draw=draw,
        reference=eager, unit="byte", sources=SOURCES, directions=("forward",),
        work=lambda direction: rectified_flow_noise_bytes(
            pack.tokens, dim, itemsize=dtype.itemsize
        ),
    )  # fmt: skip


def problems(device_type: str) -> Iterator[Problem]:
    for pack in packs(device_type):
        for dtype in (torch.bfloat16, torch.float32):
            yield problem("latents", PRESETS["goku-2b"].patch_dim, pack, dtype)


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for tokens of `size` numbers."""
    return problem(f"tokens of {size}", size, pack, dtype)
