"""qk_norm_rope: full-width RMSNorm of queries and keys and their 3D rotation.

Letters in shapes: T tokens, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import Function, Inputs, Peer, Problem, draw_normal, packing
from bench.packs import Pack, packs
from bench.peers import LIBRARIES, needs_cuda, ours, rms_norms, traffic
from goku.model import PRESETS, ModelConfig
from goku_kernels import qk_norm_rope, qk_norm_rope_bytes

OPERATOR = "qk_norm_rope"
SOURCES = (
    "kernels/goku_kernels", "bench/qk_norm_rope.py", "bench/cases.py", "bench/judging.py",
    "bench/batching.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip
MODELS = ("goku-2b", "goku-8b")
EPS = 1e-6


def function(backend: str) -> Function:
    """The operator on a backend, as a peer."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        rest = {name: x for name, x in inputs.rest.items() if name != "options"}
        rest |= inputs.rest.get("options", {})
        return qk_norm_rope(*inputs.leaves, eps=EPS, backend=backend, **rest)

    return run


def _operands(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    q, k, q_weight, k_weight = inputs.leaves
    return [(q.flatten(1), q_weight), (k.flatten(1), k_weight)]


def _liger_rope() -> Peer:
    """Rotation alone: pairs (i, i + D/2) of the whole head, angles from a table made beforehand."""

    def angles(x: Tensor) -> Tensor:
        tokens, size = x.shape[0], x.shape[-1]
        freq = 10000.0 ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size)
        turn = torch.arange(tokens, device=x.device, dtype=torch.float64)[:, None] * freq
        return torch.cat((turn, turn), dim=1)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        found = []
        for x in inputs.leaves[:2]:
            compute = torch.promote_types(x.dtype, torch.float32)
            turn, y = angles(x)[:, None], x.to(compute)
            a, b = y.chunk(2, dim=-1)
            turned = y * turn.cos().to(compute) + torch.cat((-b, a), -1) * turn.sin().to(compute)
            found.append(turned.to(x.dtype))
        return tuple(found)

    def make(problem: Problem, device: torch.device) -> Function:
        function = LIBRARIES["Liger rope"]()
        needs_cuda(device)
        tables: dict[int, tuple[Tensor, Tensor]] = {}

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            q, k = inputs.leaves[:2]
            if len(q) not in tables:
                turn = angles(q)[None]
                tables[len(q)] = (turn.cos().float(), turn.sin().float())
            turned = function.apply(*(x.transpose(0, 1)[None] for x in (q, k)), *tables[len(q)])
            return tuple(x[0].transpose(0, 1) for x in turned)

        return run

    # q and k read and written in either direction: the angles alone are kept for the backward
    return Peer(
        "Liger rope only (in place)", make, reference=reference, work=traffic(4, 4), in_place=True
    )


eager = function("torch")
PEERS = [*ours(eager, function("triton")), *rms_norms(_operands, EPS, count=2), _liger_rope()]


def problem(
    case: str, config: ModelConfig, pack: Pack, dtype: torch.dtype = torch.bfloat16,
    *, views: bool = False,
) -> Problem:  # fmt: skip
    """Queries and keys of one model's self-attention on one pack.

    views: they lie in buffers as wide as one of queries, keys and values together.
    """
    heads, size = config.heads, config.head_dim

    def draw(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        places = packing(pack, device)
        assert places.grid_sizes is not None
        width = 3 if views else 1
        tokens = (
            draw_normal(generator, pack.tokens, width, heads, size, dtype=dtype)[:, 0]
            for _ in range(2)
        )
        # fp32, of numbers that the tokens' dtype has too
        weights = (
            (1 + draw_normal(generator, config.dim, dtype=dtype, scale=0.1)).float()
            for _ in range(2)
        )
        rest = {"cu_seqlens": places.cu_seqlens, "grid_sizes": places.grid_sizes}
        return Inputs((*tokens, *weights), rest | {"axes_dim": config.rope_axes})

    def work(direction: str) -> float:
        return qk_norm_rope_bytes(
            pack.tokens, pack.tokens, heads=heads, head_dim=size, itemsize=dtype.itemsize,
            backward=direction == "backward",
        )  # fmt: skip

    return Problem(
        operator=OPERATOR, case=case, pack=pack, dtype=dtype,
        shape={"heads": heads, "head_dim": size}, draw=draw, reference=eager, work=work,
        unit="byte", sources=SOURCES,
    )  # fmt: skip


def problems(device_type: str) -> Iterator[Problem]:
    for model in MODELS:
        for pack in packs(device_type):
            yield problem(model, PRESETS[model], pack)
        for pack in packs(device_type):
            if pack.name in ("64K, mixed", "small, mixed"):
                yield problem(f"{model}, views of QKV", PRESETS[model], pack, views=True)


def tuning(size: int, dtype: torch.dtype, pack: Pack) -> Problem:
    """The problem that judges configurations for a width of `size`, or a head width up to 256."""
    head_dim = size if size <= 256 else 64
    heads = 24 if size <= 256 else size // head_dim
    config = ModelConfig(dim=heads * head_dim, depth=1, heads=heads)
    return problem(f"{heads} heads of {head_dim}", config, pack, dtype)
