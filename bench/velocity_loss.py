"""velocity_loss: weighted mean of every sample's mean squared velocity error.

Tokens of 64 numbers: 16 latent channels of 2x2 cells. The gradient is that of the prediction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import Function, Inputs, Problem, draw_normal, packing
from bench.packs import Pack, packs
from bench.peers import ours
from goku.model import PRESETS
from goku_kernels.velocity_loss import velocity_loss, velocity_loss_bytes

OPERATOR = "velocity_loss"
SOURCES = (
    "kernels/goku_kernels", "bench/velocity_loss.py", "bench/cases.py", "bench/judging.py",
    "bench/batching.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip

# Of a global batch, of which the packs are a part: a number that does not change with the pack.
WEIGHT_SUM = 512.0


def function(backend: str) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        rest = (inputs.rest[name] for name in ("target", "weights", "cu_seqlens"))
        options = inputs.rest.get("options", {})
        return velocity_loss(
            *inputs.leaves, *rest, weight_sum=WEIGHT_SUM, backend=backend, **options
        )[:1]

    return run


eager = function("torch")
PEERS = ours(eager, function("triton"))


def problem(case: str, dim: int, pack: Pack, dtype: torch.dtype) -> Problem:
    """Predictions of `dim` numbers a token, and an fp32 target."""

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        rest = {
            "target": draw_normal(generator, pack.tokens, dim, dtype=torch.float32),
            "weights": 0.5 + torch.rand(len(pack.grids), generator=generator, device=device),
            "cu_seqlens": packing(pack, device).cu_seqlens,
        }
        return Inputs((draw_normal(generator, pack.tokens, dim, dtype=dtype),), rest)

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype, shape={"dim": dim}, draw=draw,
        reference=eager, unit="byte", sources=SOURCES,
        work=lambda direction: velocity_loss_bytes(
            pack.tokens, dim, itemsize=dtype.itemsize, backward=direction == "backward"
        ),
    )  # fmt: skip


def problems(device_type: str) -> Iterator[Problem]:
    for pack in packs(device_type):
        for dtype in (torch.bfloat16, torch.float32):
            yield problem("latents", PRESETS["goku-2b"].patch_dim, pack, dtype)


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for tokens of `size` numbers."""
    return problem(f"tokens of {size}", size, pack, dtype)
