"""adaln_modulate: LayerNorm of the tokens, shifted and scaled by their sample's row.

As in a Goku block: no gain, shift and scale are two of the six views of one Linear's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import Function, Inputs, Problem, draw_normal, packing
from bench.packs import Pack, packs
from bench.peers import ours, rms_norms, sample_by_sample
from goku.model import PRESETS
from goku_kernels import adaln_modulate, adaln_modulate_bytes

OPERATOR = "adaln_modulate"
SOURCES = (
    "kernels/goku_kernels", "bench/adaln_modulate.py", "bench/cases.py", "bench/judging.py",
    "bench/batching.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip
MODELS = ("goku-2b", "goku-8b")
EPS = 1e-6
NAMES = ("shift", "scale", "weight")  # of the leaves after x


def function(backend: str) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        x, *others = inputs.leaves
        given = dict(zip(inputs.rest.get("names", NAMES), others, strict=False))
        return (
            adaln_modulate(
                x, given.get("shift"), given.get("scale"), inputs.rest["cu_seqlens"],
                weight=given.get("weight"), eps=EPS, backend=backend,
                **inputs.rest.get("options", {}),
            ),
        )  # fmt: skip

    return run


def _operands(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    return [(inputs.leaves[0], inputs.rest["gain"])]


eager = function("torch")
PEERS = [
    *ours(eager, function("triton")),
    sample_by_sample(eager, tokens=1, rows=2),
    *rms_norms(_operands, EPS),
]


def problem(
    case: str, dim: int, pack: Pack, dtype: torch.dtype = torch.bfloat16,
    *, weight: bool = False, **options: Any,
) -> Problem:  # fmt: skip
    """Tokens of width `dim` with fp32 modulation.

    weight: a gain too. options: of the operator, such as norm="rms".
    """

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = draw_normal(generator, pack.tokens, dim, dtype=dtype)
        rows = draw_normal(generator, len(pack.grids), 6 * dim, dtype=torch.float32)
        gain = 1 + draw_normal(generator, dim, dtype=dtype, scale=0.1)
        rest = {"cu_seqlens": packing(pack, device).cu_seqlens, "gain": gain, "options": options}
        gains = (gain.float(),) if weight else ()
        return Inputs((x, *rows.chunk(6, dim=1)[:2], *gains), rest)

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype, shape={"dim": dim}, draw=draw,
        reference=eager, unit="byte", sources=SOURCES,
        work=lambda direction: adaln_modulate_bytes(
            pack.tokens, dim, itemsize=dtype.itemsize, backward=direction == "backward"
        ),
    )  # fmt: skip


def problems(device_type: str) -> Iterator[Problem]:
    for model in MODELS:
        for pack in packs(device_type):
            yield problem(model, PRESETS[model].dim, pack)
            if "mixed" in pack.name:  # as under autocast, where the residual stream is fp32
                yield problem(model, PRESETS[model].dim, pack, torch.float32)


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for a width of `size`."""
    return problem(f"width {size}", size, pack, dtype)
