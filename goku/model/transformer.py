"""The Goku transformer: packed latent tokens, times and text in, velocity out.

The blocks are Goku's (arXiv 2502.04896); its patch embedding, timestep embedding and final layer
are not published, so these are ours, after DiT (arXiv 2212.09748). Letters in shapes: T tokens and
S text tokens of B samples, d width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goku_kernels import Packing, adaln_modulate

from .block import GokuBlock, Modulation
from .condition import FrameCondition
from .config import KernelConfig, ModelConfig
from .initialise import initialise
from .shard import TokenShard


def timestep_features(t: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Sinusoids of 1000*t: cosines, then sines, of frequencies from 1 towards 1/10000 (ours).

    Args:
        t: (B,) floating, in [0, 1].
        channels: even.
        dtype: of the result; computed in promote(dtype, float32).

    Returns:
        (B, channels).
    """
    compute = torch.promote_types(dtype, torch.float32)
    half = channels // 2
    index = torch.arange(half, dtype=torch.float64, device=t.device)
    freq = torch.exp(-math.log(10000.0) * index / half).to(compute)
    angle = 1000 * t.to(compute)[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the time, then Linear, SiLU, Linear (ours)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.fc1 = nn.Linear(channels, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1] -> (B, d) in the parameters' dtype, under autocast too."""
        with torch.autocast(t.device.type, enabled=False):
            features = timestep_features(t, self.channels, self.fc1.weight.dtype)
            return self.fc2(F.silu(self.fc1(features)))


class FinalLayer(nn.Module):
    """adaLN without gate, then a Linear to the velocity (ours)."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.eps = config.eps
        self.modulation = Modulation(config.dim, rows=2)
        self.proj = nn.Linear(config.dim, config.patch_dim)

    def forward(self, x: Tensor, c: Tensor, packing: Packing, token_offset: int = 0) -> Tensor:
        """x (T, d), c (B, d) -> (T, patch_dim), in the parameters' dtype, under autocast too."""
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        y = adaln_modulate(
            x, shift, scale, packing.cu_seqlens, norm="layer", eps=self.eps,
            token_offset=token_offset, backend=self.kernels.operator_backend,
        )  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            return self.proj(y.to(self.proj.weight.dtype))


class GokuTransformer(nn.Module):
    """Velocity network of the rectified flow over a packed batch of images and clips.

    `kernels` says which implementation of the operators it calls; "auto" by default.

    Built ready to train: the constructor calls `initialise(0)` unless it builds on the meta device.
    Under autocast the residual stream, all norms, modulation and gating, the timestep embedding and
    the final layer stay in the parameters' dtype.
    """

    def __init__(self, config: ModelConfig, kernels: KernelConfig | None = None) -> None:
        super().__init__()
        kernels = kernels or KernelConfig()
        self.config = config
        self.patch_embed = nn.Linear(config.patch_dim, config.dim)
        if config.condition == "frames":
            self.condition_embed = FrameCondition(config)
        self.time_embed = TimestepEmbedding(config.time_channels, config.dim)
        self.blocks = nn.ModuleList(GokuBlock(config, kernels) for _ in range(config.depth))
        self.final = FinalLayer(config, kernels)
        if not self.patch_embed.weight.is_meta:
            self.initialise(0)

    def initialise(self, seed: int) -> None:
        """Set every parameter from `seed` alone: see `goku.model.initialise`."""
        initialise(self, seed)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        packing: Packing,
        text_packing: Packing,
        shard: TokenShard | None = None,
        condition: Tensor | None = None,
        position_scale: Tensor | None = None,
    ) -> Tensor:
        """Velocity of every token.

        Args:
            x: (T, patch_dim), noised latents of all samples as `patchify` lays them out.
            t: (B,), time of each sample in [0, 1], 0 noise and 1 data, any floating dtype.
            text: (S, text_dim), un-padded text embeddings of all samples.
            packing: of the whole pack, with grids; built on the device of x.
            text_packing: of text, B sequences. With a shard, those of samples that have no row in it
                may be empty.
            shard: which rows of the pack x holds (T is then shard.rows); None for all of them.
            condition: (T, condition_dim), `goku.conditioning.condition_latent` of all samples as
                `patchify` lays them out: always given where config.condition is "frames" (zeros for
                a sample without given frames), never otherwise. Whether a pack has given frames must
                not decide it: sharded parameters are gathered by all processes or by none.
            position_scale: (B, 3), factors of each sample's positions (t, h, w) in RoPE, for grids
                larger than those trained on; None for 1.

        Returns:
            (T, patch_dim) in the parameters' dtype.

        Raises:
            ValueError: a shape that does not fit the packings or the configuration; a condition that
                is missing or not wanted.
        """
        self._check(x, t, text, packing, text_packing, shard, condition, position_scale)
        stream = self.patch_embed.weight.dtype
        noised = x.to(stream)
        x = self.patch_embed(noised).to(stream)
        if condition is not None:
            x = x + self.condition_embed(noised, condition)
        if position_scale is not None:
            # The widest that the rotation computes in; a narrower one would round positions.
            position_scale = position_scale.to(torch.promote_types(stream, torch.float32))
        # Once here rather than in the two projections of every block.
        low = torch.is_autocast_enabled(x.device.type) and stream != torch.float64
        text = text.to(torch.get_autocast_dtype(x.device.type) if low else stream)
        c = self.time_embed(t)
        for block in self.blocks:
            x = block(x, c, text, packing, text_packing, shard, position_scale)
        return self.final(x, c, packing, 0 if shard is None else shard.token_offset)

    def _check(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        packing: Packing,
        text_packing: Packing,
        shard: TokenShard | None,
        condition: Tensor | None,
        position_scale: Tensor | None,
    ) -> None:
        if packing.grid_sizes is None:
            raise ValueError("packing has no grids: build it with Packing.from_grids")
        if text_packing.batch != packing.batch:
            raise ValueError(
                f"text_packing has {text_packing.batch} sequences: packing has {packing.batch}"
            )
        if (condition is None) == (self.config.condition == "frames"):
            raise ValueError(
                f"condition is {'missing' if condition is None else 'given'}: the model has "
                f"condition {self.config.condition!r}, allowed is a tensor with 'frames' and None "
                "with 'none'"
            )
        rows = packing.total if shard is None else shard.rows
        for name, tensor, wanted in (
            ("x", x, (rows, self.config.patch_dim)),
            ("t", t, (packing.batch,)),
            ("text", text, (text_packing.total, self.config.text_dim)),
            ("condition", condition, (rows, self.config.condition_dim)),
            ("position_scale", position_scale, (packing.batch, 3)),
        ):
            if tensor is not None and tuple(tensor.shape) != wanted:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: wanted {wanted}")
