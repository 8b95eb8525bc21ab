"""The Goku block: adaLN, self-attention, cross-attention and FFN on packed tokens.

Order, precision and parameter names follow the block that the authors of Goku (arXiv 2502.04896)
published, so that its state_dict loads unchanged. Letters in shapes: T tokens and S text tokens of
B samples, H heads, D head width, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goku_kernels import (
    Packing,
    adaln_modulate,
    gated_residual_adaln,
    qk_norm_rope,
    varlen_attention,
)

from .config import KernelConfig, ModelConfig
from .shard import TokenShard


class Modulation(nn.Module):
    """Rows of shift, scale and gate for every sample: SiLU, then one Linear.

    Runs in the parameters' dtype even under autocast: it is one row per sample, and its rounding
    would reach every token.
    """

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, c: Tensor) -> Tensor:
        """c (B, d) -> (B, rows * d), for the caller to chunk."""
        with torch.autocast(c.device.type, enabled=False):
            return self.linear(F.silu(c.to(self.linear.weight.dtype)))


class Attention(nn.Module):
    """Projections and QK-norm of one attention; cross-attention where the context is text."""

    def __init__(
        self, config: ModelConfig, context_dim: int, kernels: KernelConfig, *, rotate_k: bool
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        self.rotate_k = rotate_k
        dim = config.dim
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(context_dim, dim, bias=False)
        self.v_proj = nn.Linear(context_dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        if config.qk_norm != "none":
            width = dim if config.qk_norm == "full" else config.head_dim
            self.q_norm = nn.RMSNorm(width, eps=config.eps)
            self.k_norm = nn.RMSNorm(width, eps=config.eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        packing: Packing,
        context_packing: Packing,
        shard: TokenShard | None = None,
        position_scale: Tensor | None = None,
    ) -> Tensor:
        """x (T, d) attends to context (S, context_dim) within each sample -> (T, d).

        With a shard, x is its rows, and so is the context of self-attention (rotate_k).
        position_scale (B, 3) multiplies the positions of what is rotated.
        """
        cfg = self.config
        heads = (cfg.heads, cfg.head_dim)
        normed = cfg.qk_norm != "none"
        q, k = qk_norm_rope(
            self.q_proj(x).unflatten(-1, heads),
            self.k_proj(context).unflatten(-1, heads),
            self.q_norm.weight if normed else None,
            self.k_norm.weight if normed else None,
            cu_seqlens=packing.cu_seqlens,
            grid_sizes=packing.grid_sizes,
            axes_dim=cfg.rope_axes,
            norm=cfg.qk_norm,
            rotate_k=self.rotate_k,
            theta=cfg.rope_theta,
            eps=cfg.eps,
            position_scale=position_scale,
            token_offset=0 if shard is None else shard.token_offset,
            backend=self.kernels.operator_backend,
        )
        v = self.v_proj(context).unflatten(-1, heads)

        def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, rows: Packing) -> Tensor:
            return varlen_attention(
                q,
                k,
                v,
                cu_seqlens_q,
                context_packing.cu_seqlens,
                rows.max_seqlen,
                context_packing.max_seqlen,
                deterministic=self.kernels.deterministic,
                backend=self.kernels.operator_backend,
            )

        if shard is None:
            out = attend(q, k, v, packing.cu_seqlens, packing)
        elif self.rotate_k:
            cu = packing.cu_seqlens
            out = shard.attend(q, k, v, cu, lambda q, k, v, cu: attend(q, k, v, cu, packing))
        else:
            out = attend(q, k, v, shard.packing.cu_seqlens, shard.packing)
        return self.o_proj(out.flatten(1))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, d) -> (T, d)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GokuBlock(nn.Module):
    """One transformer block; all of it acts within each sample of the packed batch.

    Only the parameters of norm2 and norm3 are used through their modules' `weight`: the operators
    fuse the norms with the residual sums before them.
    """

    def __init__(self, config: ModelConfig, kernels: KernelConfig | None = None) -> None:
        super().__init__()
        self.kernels = kernels or KernelConfig()
        self.eps = config.eps
        self.norm1 = Modulation(config.dim, rows=6)
        self.attn1 = Attention(config, config.dim, self.kernels, rotate_k=True)
        self.norm2 = nn.RMSNorm(config.dim, eps=config.eps)
        self.attn2 = Attention(config, config.text_dim, self.kernels, rotate_k=False)
        self.norm3 = nn.RMSNorm(config.dim, eps=config.eps)
        self.mlp = FeedForward(config.dim, config.mlp_dim)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        text: Tensor,
        packing: Packing,
        text_packing: Packing,
        shard: TokenShard | None = None,
        position_scale: Tensor | None = None,
    ) -> Tensor:
        """Transform the tokens of a packed batch.

        Args:
            x: (T, d), the residual stream; its dtype is kept.
            c: (B, d), conditioning of each sample (its timestep), before SiLU.
            text: (S, text_dim), un-padded text embeddings of all samples.
            packing: of the whole pack, with grids.
            text_packing: of text.
            shard: which rows of the pack x holds (T is then shard.rows); None for all of them.
            position_scale: (B, 3) fp32, factors of each sample's positions (t, h, w) in RoPE; None
                for 1.

        Returns:
            (T, d) of x's dtype.
        """
        cu = packing.cu_seqlens
        options: Any = {"eps": self.eps, "backend": self.kernels.operator_backend}
        if shard is not None:
            options["token_offset"] = shard.token_offset
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(c).chunk(
            6, dim=-1
        )
        y = adaln_modulate(x, shift_msa, scale_msa, cu, norm="layer", **options)
        branch = self.attn1(y, y, packing, packing, shard, position_scale)
        y, x = gated_residual_adaln(
            x, branch, gate_msa, None, None, cu, norm="rms", weight=self.norm2.weight, **options
        )
        branch = self.attn2(y, text, packing, text_packing, shard, position_scale)
        y, x = gated_residual_adaln(
            x,
            branch,
            None,
            shift_mlp,
            scale_mlp,
            cu,
            norm="rms",
            weight=self.norm3.weight,
            **options,
        )
        _, x = gated_residual_adaln(
            x, self.mlp(y), gate_mlp, None, None, cu, norm="none", **options
        )
        return x
