"""A small model for the tests of sharding, its data, and how they are shared among ranks."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from goku_runtime.sharding import (
    ShardingPolicy,
    apply_hybrid_sharding,
    materialise,
)

ROWS, IN, DIM, OUT, STEPS = 21, 5, 12, 3, 3
SCALE = 0.3


class Modulation(nn.Module):
    """Shift and scale from the conditioning, in the parameters' dtype also under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(c.device.type, enabled=False):
            both = self.linear(F.silu(c.to(self.linear.weight.dtype)))
        return both.unbind(0) if both.ndim == 3 else tuple(h.clone() for h in both.chunk(2, -1))


class Block(nn.Module):
    """A residual block whose gain is read without calling its module; 7 rows divide by nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = Modulation(dim)
        self.norm2 = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 7)
        self.down = nn.Linear(7, dim, bias=False)
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.norm1(c)
        gain = self.norm2.weight
        self.seen = {
            "stream": x.dtype, "norm1": shift.dtype, "gain": gain.dtype, "up": self.up.weight.dtype
        }  # fmt: skip
        y = F.rms_norm(x, (x.shape[-1],)) * gain.to(x.dtype) * (1 + scale) + shift
        return x + self.down(torch.tanh(self.up(y))).to(x.dtype)


class Model(nn.Module):
    """Small, of the same shape as a diffusion transformer: conditioning, blocks, a head."""

    def __init__(self, dim: int = DIM, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(IN, dim)
        self.time_embed = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, OUT)
        self.extra = nn.Parameter(torch.zeros(2, dim))  # used by some batches alone
        self.recompute = False

    def forward(self, x: Tensor, t: Tensor, *, extra: bool = True) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            c = self.time_embed(t[:, None])
        h = self.embed(x).to(t.dtype)
        if extra:
            h = h + self.extra.to(h.dtype).sum(0)
        for block in self.blocks:
            h = checkpoint(block, h, c, use_reentrant=False) if self.recompute else block(h, c)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(h)


def initial(name: str, like: Tensor) -> Tensor:
    """A value from the name alone."""
    assert like.is_meta
    # From the name, so that a rank that skips one parameter does not change the next.
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    return SCALE * torch.randn(like.shape, dtype=torch.float64, generator=generator)


def build(dtype: torch.dtype, mesh: DeviceMesh | None, policy: ShardingPolicy) -> Model:
    with torch.device("meta"):
        model = Model().to(dtype)
    apply_hybrid_sharding(model, mesh, policy)
    materialise(model, "cpu", initial)
    return model


def plain(dtype: torch.dtype) -> Model:
    """The model of one process, without anything of goku_runtime."""
    model = Model().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.to("meta")))
    return model


def batch(dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, times, targets and weights of a global batch."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    return draw(ROWS, IN), draw(ROWS), draw(ROWS, OUT), draw(ROWS).abs()


def loss_of(model: nn.Module, data: tuple[Tensor, ...], rows: list[int]) -> Tensor:
    """Part of sum(w * mean) / sum(w) that comes from these rows; without rows, an exact 0."""
    x, t, y, w = data
    chosen = rows or [0]
    error = (model(x[chosen], t[chosen]) - y[chosen]).square().mean(-1)
    part = (error * w[chosen]).sum() / w.sum()
    return part if rows else part * 0


def uneven(parts: int) -> list[list[int]]:
    """All rows in `parts` shares of very different size, the third one empty."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    filled = [part for part in range(parts) if part != 2]
    for row in range(ROWS):
        share = filled[int((row / ROWS) ** 2 * len(filled))]
        shares[share].append(row)
    return shares


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    error = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance}"
