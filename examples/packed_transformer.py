"""The model and the data of plain_loop.py and deepspeed_zero.py: a small transformer on packed samples.

It stands for a trainer's own model. What it needs for sequence parallelism is one line in `Block`.
Shapes: S rows of this rank's shard, T tokens of the pack, W width, H heads, D = W / H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goku_runtime.sequence_parallel import SequenceParallel

__all__ = ["HEADS", "PACKS", "WIDTH", "Model", "Pack", "packs_of_step"]

HEADS, WIDTH, LAYERS = 5, 40, 2
PACKS = 4  # in one optimizer step, over all data-parallel groups


class Pack(NamedTuple):
    """Samples one after the other. Lengths are known on the host: nothing waits for the device."""

    lengths: Sequence[int]
    cu_seqlens: Tensor  # (len(lengths) + 1,), int32
    inputs: Tensor  # (T, W)
    targets: Tensor  # (T, W)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def packs_of_step(step: int) -> list[Pack]:
    """The packs of one step, of unequal lengths, the same on every rank."""
    packs = []
    for index in range(PACKS):
        generator = torch.Generator("cpu").manual_seed(PACKS * step + index)
        lengths = torch.randint(2, 12, (3 + index,), generator=generator, device="cpu").tolist()
        values = torch.randn(2, sum(lengths), WIDTH, generator=generator, device="cpu")
        inputs, targets = values.to(torch.get_default_device(), torch.get_default_dtype())
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        packs.append(Pack(lengths, cu_seqlens, inputs, targets))
    return packs


def within_samples(lengths: Sequence[int]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Attention of a whole pack, (T, h, D) each, one sample at a time.

    On a GPU a kernel for packed samples takes cu_seqlens instead and needs no lengths.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        samples = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*sample) for sample in samples]
        return torch.cat(outs, dim=1).transpose(0, 1)

    return attention


class Block(nn.Module):
    """Self-attention within the samples, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # Without a bias: softmax cancels a key's, and Adam would turn its rounding into steps.
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_SW: Tensor, pack: Pack, sequence: SequenceParallel) -> Tensor:
        q_SHD, k_SHD, v_SHD = self.qkv(self.norm1(x_SW)).unflatten(1, (3, HEADS, -1)).unbind(1)
        out_SHD = sequence.attention(
            q_SHD, k_SHD, v_SHD, pack.cu_seqlens, within_samples(pack.lengths), tokens=pack.tokens
        )
        x_SW = x_SW + self.out(out_SHD.flatten(1))
        return x_SW + self.mlp(self.norm2(x_SW))


class Model(nn.Module):
    """This rank's share of a pack's summed squared error, from this rank's rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, pack: Pack, sequence: SequenceParallel) -> Tensor:
        x_SW = sequence.shard(pack.inputs)
        for block in self.blocks:
            x_SW = block(x_SW, pack, sequence)
        error_SW = self.head(x_SW) - sequence.shard(pack.targets)
        rows = pack.tokens - sequence.token_offset(pack.tokens)  # those after them are padding
        return error_SW[: max(0, rows)].square().sum()
