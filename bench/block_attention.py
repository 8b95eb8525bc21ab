"""The block's attention through torch.nn.attention.varlen, for the baselines of bench/block.py.

With backend="torch" our operator keeps nothing of its forward but q, k and v, and runs it again in
the backward. A baseline that did so would look slower than PyTorch has to be.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from goku.model import GokuBlock, TokenShard
from goku.model.block import Attention
from goku_kernels import Packing, qk_norm_rope


class SavingAttention(Attention):
    """The block's attention through torch's varlen_attn, which saves its output for the backward.

    attend: varlen_attn.
    """

    attend: Callable[..., Tensor]

    @classmethod
    def replace(cls, block: GokuBlock, attend: Callable[..., Tensor]) -> None:
        """Make both attentions of `block` ones of this class."""
        for attention in (block.attn1, block.attn2):
            attention.__class__ = cls
            attention.attend = attend  # type: ignore[assignment]

    def forward(
        self, x: Tensor, context: Tensor, packing: Packing, context_packing: Packing,
        shard: TokenShard | None = None, position_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert shard is None, "the block is measured whole"
        cfg = self.config
        heads = (cfg.heads, cfg.head_dim)
        normed = cfg.qk_norm != "none"
        q, k = qk_norm_rope(
            self.q_proj(x).unflatten(-1, heads), self.k_proj(context).unflatten(-1, heads),
            self.q_norm.weight if normed else None, self.k_norm.weight if normed else None,
            cu_seqlens=packing.cu_seqlens, grid_sizes=packing.grid_sizes, axes_dim=cfg.rope_axes,
            norm=cfg.qk_norm, rotate_k=self.rotate_k, theta=cfg.rope_theta, eps=cfg.eps,
            position_scale=position_scale, backend=self.kernels.operator_backend,
        )  # fmt: skip
        v = self.v_proj(context).unflatten(-1, heads)
        places = (packing, context_packing)
        limits = (*(p.cu_seqlens for p in places), *(p.max_seqlen for p in places))
        return self.o_proj(self.attend(q, k, v, *limits).flatten(1))
