"""gated_residual_adaln: a gated branch joins the residual stream, which is normed and modulated.

Measured with everything on: gate, RMSNorm with a gain, shift and scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Function, Inputs, Peer, Problem, draw_normal, packing
from bench.packs import Pack, packs
from bench.peers import (
    LIBRARIES,
    load,
    needs_cuda,
    ours,
    rms_norms,
    sample_by_sample,
    traffic,
)  # fmt: skip
from goku.model import PRESETS
from goku_kernels import gated_residual_adaln, gated_residual_adaln_bytes

OPERATOR = "gated_residual_adaln"
SOURCES = (
    "kernels/goku_kernels", "bench/gated_residual_adaln.py", "bench/cases.py", "bench/judging.py",
    "bench/batching.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip
MODELS = ("goku-2b", "goku-8b")
EPS = 1e-6
NAMES = ("gate", "shift", "scale", "weight")  # of the leaves after the two of tokens


def function(backend: str) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        residual, branch, *others = inputs.leaves
        given = dict(zip(inputs.rest.get("names", NAMES), others, strict=True))
        return gated_residual_adaln(
            residual, branch, given.get("gate"), given.get("shift"), given.get("scale"),
            inputs.rest["cu_seqlens"], weight=given.get("weight"), eps=EPS, backend=backend,
            **({"norm": "rms"} | inputs.rest.get("options", {})),
        )  # fmt: skip

    return run


def _operands(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    return [(inputs.leaves[0], inputs.leaves[5])]


def _sum_and_norm(inputs: Inputs) -> tuple[Tensor, ...]:
    """(RMSNorm of the sum, the sum): what libraries fuse of this operator."""
    residual, branch, *_, weight = inputs.leaves
    compute = torch.promote_types(residual.dtype, torch.float32)
    total = residual.to(compute) + branch.to(compute)
    # Some of them want the gain in the tokens' dtype, and round its gradient to it.
    y = F.rms_norm(total, total.shape[-1:], weight.to(residual.dtype).to(compute), EPS)
    return y.to(residual.dtype), total.to(residual.dtype)


def _liger_sum(problem: Problem, device: torch.device) -> Function:
    function = load("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    needs_cuda(device)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        residual, branch, *_, weight = inputs.leaves
        return function.apply(branch, residual, weight.to(branch.dtype), EPS, 0.0, "llama", False)

    return run


def _quack_sum(problem: Problem, device: torch.device) -> Function:
    function = LIBRARIES["QuACK RMSNorm"]()
    needs_cuda(device)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        residual, branch, *_, weight = inputs.leaves
        return function(branch, weight, residual=residual, prenorm=True, eps=EPS)

    return run


eager = function("torch")
# Two inputs read and two outputs written; the sum and two gradients read, and one gradient written
# that is that of both inputs.
SUM_AND_NORM = traffic(4, 4)
PEERS = [
    *ours(eager, function("triton")),
    sample_by_sample(eager, tokens=2, rows=3),
    Peer("Liger sum and RMSNorm only", _liger_sum, reference=_sum_and_norm, work=SUM_AND_NORM),
    Peer("QuACK sum and RMSNorm only", _quack_sum, reference=_sum_and_norm, work=SUM_AND_NORM),
    *rms_norms(_operands, EPS),
]


def problem(
    case: str, dim: int, pack: Pack, dtype: torch.dtype = torch.bfloat16,
    *, branch_dtype: torch.dtype | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """Tokens of width `dim` with fp32 modulation and gain.

    branch_dtype: of the branch where it is not the residual's. options: of the operator.
    """

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        tokens = [
            draw_normal(generator, pack.tokens, dim, dtype=kind)
            for kind in (dtype, branch_dtype or dtype)
        ]
        rows = draw_normal(generator, len(pack.grids), 6 * dim, dtype=torch.float32)
        weight = (1 + draw_normal(generator, dim, dtype=torch.float32, scale=0.1)).to(dtype).float()
        gate, shift, scale = rows.chunk(6, dim=1)[2:5]
        rest = {"cu_seqlens": packing(pack, device).cu_seqlens, "options": options}
        return Inputs((*tokens, gate, shift, scale, weight), rest)

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype, shape={"dim": dim}, draw=draw,
        reference=eager, unit="byte", sources=SOURCES,
        work=lambda direction: gated_residual_adaln_bytes(
            pack.tokens, dim, itemsize=dtype.itemsize, backward=direction == "backward"
        ),
    )  # fmt: skip


def problems(device_type: str) -> Iterator[Problem]:
    for model in MODELS:
        for pack in packs(device_type):
            yield problem(model, PRESETS[model].dim, pack)


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for a width of `size`."""
    return problem(f"width {size}", size, pack, dtype)
