"""Wan 2.1 and 2.2 (diffusers' WanTransformer3DModel) with Goku's operators.

Letters in shapes: B samples, S video tokens of a sample, T = B*S rows, L keys of a sample's text or
image, H heads, D head_dim, d = H*D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from goku_kernels import adaln_modulate, gated_residual_adaln, qk_norm_rope, varlen_attention

from . import swapping as swap
from .swapping import Settings, Swap

_THETA = 10000.0  # WanTransformer3DModel gives its rotary embedding no other
_TEXT_TOKENS = 512  # WanAttnProcessor takes the last 512 rows for text, those before for the image


def plan(model: Any, settings: Settings) -> list[Swap]:
    """What to exchange in a WanTransformer3DModel.

    Raises:
        ValueError: a part of it that is not covered.
    """
    from diffusers.models.transformers import transformer_wan as wan

    _check_rope(wan, model.rope)
    swaps = [Swap(model.rope, "rope", "forward", Rope(model.rope, settings))]
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        _check_block(wan, path, block)
        swaps.append(Swap(block, path, "forward", Block(block)))
        for name in ("attn1", "attn2"):
            swaps.append(Swap(getattr(block, name), f"{path}.{name}", "processor", Processor()))
    return swaps


def _check_rope(wan: Any, rope: Any) -> None:
    swap.check_class("rope", rope, wan.WanRotaryPosEmbed)
    swap.check_skipped("rope", rope)
    tables = (rope.freqs_cos, rope.freqs_sin)
    if any(table.is_meta for table in tables):
        raise ValueError("fuse: the model is on the meta device: load its weights first")
    # The tables may have been rewritten (longer videos by another base), and base and split are not
    # kept beside them. Read once, here; never in a forward.
    angles = []
    for size in (rope.t_dim, rope.h_dim, rope.w_dim):
        exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
        positions = torch.arange(rope.max_seq_len, dtype=torch.float64)
        angles.append(torch.outer(positions, _THETA**-exponent).repeat_interleave(2, dim=1))
    angle = torch.cat(angles, dim=1)
    for name, table, want in zip(("cos", "sin"), tables, (angle.cos(), angle.sin()), strict=True):
        allowed = max(torch.finfo(table.dtype).eps, torch.finfo(torch.float32).eps)
        if table.shape != want.shape or (table.cpu().double() - want).abs().max() > allowed:
            raise ValueError(
                f"fuse: rope.freqs_{name} is not the {name} table of base {_THETA} over axes of "
                f"{(rope.t_dim, rope.h_dim, rope.w_dim)} channels, the only one covered"
            )


def _check_block(wan: Any, path: str, block: Any) -> None:
    swap.check_class(path, block, wan.WanTransformerBlock)
    swap.check_norm(f"{path}.norm1", block.norm1, wan.FP32LayerNorm, [])
    swap.check_norm(f"{path}.norm3", block.norm3, wan.FP32LayerNorm, [])
    if isinstance(block.norm2, nn.Identity):
        swap.check_skipped(f"{path}.norm2", block.norm2)
    else:
        swap.check_norm(f"{path}.norm2", block.norm2, wan.FP32LayerNorm, ["weight", "bias"])
    for name in ("attn1", "attn2"):
        attn = getattr(block, name)
        swap.check_class(f"{path}.{name}", attn, wan.WanAttention)
        swap.check_processor(f"{path}.{name}.processor", attn.processor, wan.WanAttnProcessor)
        norms = ["norm_q", "norm_k"] + ([] if attn.add_k_proj is None else ["norm_added_k"])
        for norm in norms:
            swap.check_norm(f"{path}.{name}.{norm}", getattr(attn, norm), nn.RMSNorm, ["weight"])
        if attn.norm_q.eps != attn.norm_k.eps:
            raise ValueError(
                f"fuse: {path}.{name} has eps {attn.norm_q.eps} for queries and {attn.norm_k.eps} "
                "for keys: covered is one eps"
            )


class Layout:
    """Where the samples of one forward lie in the packed rows; made once, shared by all blocks.

    It takes the place of diffusers' rotary tables (`rotary_emb`).

    Attributes:
        batch: B.
        length: S, video tokens of a sample.
        axes_dim: channels of D that turn with t, h and w.
        cu_seqlens: int32 (B+1,), offsets of the samples' video tokens.
        grid_sizes: int32 (B, 3), (t, h, w) of every sample.
        still: (3,), a position_scale that puts every token at the origin, where nothing turns.
    """

    def __init__(
        self,
        batch: int,
        grid: tuple[int, int, int],
        axes_dim: tuple[int, int, int],
        device: torch.device,
        settings: Settings,
    ) -> None:
        self.batch, self.axes_dim, self.device, self.settings = batch, axes_dim, device, settings
        self.length = math.prod(grid)
        self._segments: dict[int, Tensor] = {}
        self.cu_seqlens = self.segments(self.length)
        self.grid_sizes = swap.equal_grids(batch, grid, device)
        self.still = torch.zeros(3, device=device)

    def segments(self, length: int) -> Tensor:
        """Offsets of `length` tokens in every sample (video, text or image), int32 (B+1,)."""
        if length not in self._segments:
            self._segments[length] = swap.equal_segments(self.batch, length, self.device)
        return self._segments[length]


class Rope(swap.FusedForward):
    """Forward of WanRotaryPosEmbed that makes a Layout instead of tables."""

    def __init__(self, module: Any, settings: Settings) -> None:
        super().__init__(module)
        self.settings = settings

    def __call__(self, hidden_states: Tensor) -> Layout:
        """The layout of a batch of latents (B, C, frames, height, width)."""
        swap.check_active_backend()
        rope = self.module
        batch, _, *sizes = hidden_states.shape
        t, h, w = (n // patch for n, patch in zip(sizes, rope.patch_size, strict=True))
        if max(t, h, w) > rope.max_seq_len:
            raise ValueError(f"a grid of {(t, h, w)}: rope_max_seq_len allows {rope.max_seq_len}")
        axes = (rope.t_dim, rope.h_dim, rope.w_dim)
        return Layout(batch, (t, h, w), axes, hidden_states.device, self.settings)


class Block(swap.FusedForward):
    """Forward of WanTransformerBlock: two joints of residual, norm and modulation in one pass each.

    The last gated sum stays alone, since the next block's modulation is not known here.
    """

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Layout
    ) -> Tensor:
        """Tokens (B, S, d) after the block.

        encoder_hidden_states (B, L, d); temb (B, 6, d), or (B, S, 6, d) with a time per token.
        """
        block, layout = self.module, rotary_emb
        backend = layout.settings.backend
        x = hidden_states.contiguous().flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = getattr(block.norm2, "bias", None)
        cu: Tensor | None
        if temb.ndim == 4:
            rows = (block.scale_shift_table.unsqueeze(0) + temb.to(wide)).flatten(0, 1)
            cu = None
        else:
            rows = block.scale_shift_table + temb.to(wide)
            cu = layout.cu_seqlens
            # One bias for all samples, as rows of stride 0.
            bias = None if bias is None else bias.expand(layout.batch, -1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(1)

        y = adaln_modulate(x, shift, scale, cu, eps=block.norm1.eps, backend=backend)
        branch = block.attn1(y.view_as(hidden_states), None, None, layout).flatten(0, 1)
        if isinstance(block.norm2, nn.Identity):
            y, x = gated_residual_adaln(
                x, branch, gate, None, None, cu, norm="none", backend=backend
            )
        else:
            y, x = gated_residual_adaln(
                x, branch, gate, bias, None, cu,
                weight=block.norm2.weight, eps=block.norm2.eps, backend=backend,
            )  # fmt: skip
        branch = block.attn2(y.view_as(hidden_states), encoder_hidden_states, None, layout)
        y, x = gated_residual_adaln(
            x, branch.flatten(0, 1), None, ffn_shift, ffn_scale, cu,
            eps=block.norm3.eps, backend=backend,
        )  # fmt: skip
        branch = block.ffn(y.view_as(hidden_states)).flatten(0, 1)
        _, x = gated_residual_adaln(
            x, branch, ffn_gate, None, None, cu, norm="none", backend=backend
        )
        return x.view_as(hidden_states)


class Processor(swap.FusedProcessor):
    """Attention processor of WanAttention; rotary_emb is a Layout, for cross-attention too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Layout | None = None,
    ) -> Tensor:
        """Attention of the tokens (B, S, d) to themselves, or to encoder_hidden_states (B, L, d)."""
        if attention_mask is not None:
            raise ValueError("a fused WanAttention covers no attention_mask: allowed is None")
        if rotary_emb is None:
            raise ValueError("a fused WanAttention runs in a fused block only: rotary_emb is None")
        layout = rotary_emb
        cross = encoder_hidden_states is not None
        image = None
        if attn.add_k_proj is not None and encoder_hidden_states is not None:
            image_tokens = encoder_hidden_states.shape[1] - _TEXT_TOKENS
            image = encoder_hidden_states[:, :image_tokens]
            encoder_hidden_states = encoder_hidden_states[:, image_tokens:]
        q, k, v = (_rows(x, attn) for x in _project(attn, hidden_states, encoder_hidden_states))
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight,
            cu_seqlens=layout.cu_seqlens, grid_sizes=layout.grid_sizes, axes_dim=layout.axes_dim,
            position_scale=layout.still if cross else None, rotate_k=not cross,
            theta=_THETA, eps=attn.norm_q.eps, backend=layout.settings.backend,
        )  # fmt: skip
        keys = layout.length if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        out = _attend(q, k, v, keys, layout)
        if image is not None:
            out = out + self._image(attn, q, image, layout)
        out = out.flatten(1).view(layout.batch, layout.length, -1)
        return attn.to_out[1](attn.to_out[0](out))

    def _image(self, attn: Any, q: Tensor, image: Tensor, layout: Layout) -> Tensor:
        """Attention of the normed queries (T, H, D) to the image's tokens (B, L, d)."""
        if attn.fused_projections:
            k, v = attn.to_added_kv(image).chunk(2, dim=-1)
        else:
            k, v = attn.add_k_proj(image), attn.add_v_proj(image)
        keys = image.shape[1]
        k = qk_norm_rope(
            _rows(k, attn), None, attn.norm_added_k.weight,
            cu_seqlens=layout.segments(keys),
            grid_sizes=swap.equal_grids(layout.batch, (1, 1, keys), layout.device),
            axes_dim=layout.axes_dim, position_scale=layout.still, eps=attn.norm_added_k.eps,
            backend=layout.settings.backend,
        )  # fmt: skip
        return _attend(q, k, _rows(v, attn), keys, layout)


def _project(attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of x (B, S, d), keys and values from the context where there is one."""
    source = x if context is None else context
    if not attn.fused_projections:
        return attn.to_q(x), attn.to_k(source), attn.to_v(source)
    if not attn.is_cross_attention:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        return q, k, v
    k, v = attn.to_kv(source).chunk(2, dim=-1)
    return attn.to_q(x), k, v


def _rows(x: Tensor, attn: Any) -> Tensor:
    """(B, L, d) -> (B*L, H, D); a view of a chunk of a fused projection too."""
    return x.unflatten(2, (attn.heads, -1)).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: int, layout: Layout) -> Tensor:
    return varlen_attention(
        q, k, v, layout.cu_seqlens, layout.segments(keys), layout.length, keys,
        deterministic=layout.settings.deterministic, backend=layout.settings.attention_backend,
    )  # fmt: skip
