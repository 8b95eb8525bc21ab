"""HunyuanVideo (diffusers' HunyuanVideoTransformer3DModel) with Goku's operators.

Text is padded to one length. Its padding rows are attended to by nobody, so that they reach no
output and no gradient; here they lie in segments of their own, after each sample's valid rows, and
attention needs neither a mask nor their number on the host.

Letters in shapes: B samples, S video tokens and L text tokens (padding included) of a sample,
N = S + L, H heads, D head_dim, d = H*D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from goku_kernels import adaln_modulate, gated_residual_adaln, qk_norm_rope, varlen_attention

from . import swapping as swap
from .swapping import Settings, Swap


def plan(model: Any, settings: Settings) -> list[Swap]:
    """What to exchange in a HunyuanVideoTransformer3DModel; its text refiner stays as it is.

    Raises:
        ValueError: a part of it that is not covered.
    """
    from diffusers.models import normalization as norms
    from diffusers.models.transformers import transformer_hunyuan_video as hunyuan

    _check_rope(hunyuan, model)
    swaps = [Swap(model.rope, "rope", "forward", Rope(model.rope, settings))]
    zero: type[nn.Module]
    zero_single: type[nn.Module]
    if model.config.image_condition_type == "token_replace":
        kind, zero, zero_single = (
            "HunyuanVideoTokenReplace",
            hunyuan.HunyuanVideoTokenReplaceAdaLayerNormZero,
            hunyuan.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
        )
    else:
        kind, zero, zero_single = (
            "HunyuanVideo", norms.AdaLayerNormZero, norms.AdaLayerNormZeroSingle
        )  # fmt: skip
    for i, block in enumerate(model.transformer_blocks):
        path = f"transformer_blocks.{i}"
        swap.check_class(path, block, getattr(hunyuan, f"{kind}TransformerBlock"))
        _check_adaptive(f"{path}.norm1", block.norm1, zero)
        _check_adaptive(f"{path}.norm1_context", block.norm1_context, norms.AdaLayerNormZero)
        for name in ("norm2", "norm2_context"):
            swap.check_norm(f"{path}.{name}", getattr(block, name), nn.LayerNorm, [])
        _check_attention(hunyuan, norms.RMSNorm, f"{path}.attn", block.attn, added=True)
        swaps.append(Swap(block, path, "forward", DualBlock(block)))
        swaps.append(Swap(block.attn, f"{path}.attn", "processor", Processor()))
    for i, block in enumerate(model.single_transformer_blocks):
        path = f"single_transformer_blocks.{i}"
        swap.check_class(path, block, getattr(hunyuan, f"{kind}SingleTransformerBlock"))
        _check_adaptive(f"{path}.norm", block.norm, zero_single)
        _check_attention(hunyuan, norms.RMSNorm, f"{path}.attn", block.attn, added=False)
        swaps.append(Swap(block, path, "forward", SingleBlock(block)))
        swaps.append(Swap(block.attn, f"{path}.attn", "processor", Processor()))
    return swaps


def _check_rope(hunyuan: Any, model: Any) -> None:
    swap.check_class("rope", model.rope, hunyuan.HunyuanVideoRotaryPosEmbed)
    swap.check_skipped("rope", model.rope)
    axes, head_dim = tuple(model.rope.rope_dim), model.config.attention_head_dim
    if len(axes) != 3 or any(n % 2 for n in axes) or sum(axes) != head_dim:
        raise ValueError(
            f"fuse: rope_axes_dim is {axes}: covered are 3 even numbers that add up to "
            f"attention_head_dim, {head_dim}"
        )


def _check_adaptive(path: str, module: Any, allowed: type) -> None:
    swap.check_class(path, module, allowed)
    swap.check_skipped(path, module)
    if getattr(module, "emb", None) is not None:
        raise ValueError(f"fuse: {path} embeds class labels, which is not covered")
    swap.check_norm(f"{path}.norm", module.norm, nn.LayerNorm, [])


def _check_attention(hunyuan: Any, rms: type, path: str, attn: Any, added: bool) -> None:
    swap.check_class(path, attn, hunyuan.Attention)
    swap.check_processor(f"{path}.processor", attn.processor, hunyuan.HunyuanVideoAttnProcessor2_0)
    if (attn.add_q_proj is not None) != added:
        raise ValueError(f"fuse: {path} {'lacks' if added else 'has'} projections of the text")
    pairs = [("norm_q", "norm_k")] + ([("norm_added_q", "norm_added_k")] if added else [])
    for pair in pairs:
        for name in pair:
            norm = getattr(attn, name)
            if type(norm) is not rms:
                raise ValueError(
                    f"fuse: {path}.{name} is a {type(norm).__name__}: covered is qk_norm='rms_norm'"
                )
            swap.check_norm(f"{path}.{name}", norm, rms, ["weight"])
        if getattr(attn, pair[0]).eps != getattr(attn, pair[1]).eps:
            raise ValueError(f"fuse: {path} has two eps for {' and '.join(pair)}: covered is one")


@dataclass
class Joint:
    """Rows of the joint sequences: video, valid text, then padding of every sample (B*N rows).

    Attributes:
        cu_seqlens: int32 (2B+1,), two segments a sample: what attends to each other, and padding.
        cu_samples: int32 (B+1,), the samples whole.
        positions: int32 (B*N, 3), text at the origin, where nothing turns.
        length: N.
    """

    cu_seqlens: Tensor
    cu_samples: Tensor
    positions: Tensor
    length: int


class Layout:
    """Where the samples of one forward lie in the packed rows; made once, shared by all blocks.

    It takes the place of diffusers' rotary tables (`image_rotary_emb`, `freqs_cis`).

    Attributes:
        batch, grid: B and (t, h, w).
        length: S, video tokens of a sample.
        axes_dim, theta: channels of D that turn with t, h and w, and the base of their frequencies.
        grid_sizes: int32 (B, 3), the grid of every sample.
        still: (3,), a position_scale that puts every token at the origin, where nothing turns.
    """

    def __init__(
        self,
        batch: int,
        grid: tuple[int, int, int],
        axes_dim: tuple[int, int, int],
        theta: float,
        device: torch.device,
        settings: Settings,
    ) -> None:
        self.batch, self.grid, self.axes_dim, self.theta = batch, grid, axes_dim, theta
        self.device, self.settings = device, settings
        self.length = math.prod(grid)
        self.grid_sizes = swap.equal_grids(batch, grid, device)
        self.still = torch.zeros(3, device=device)
        self._joint: Joint | None = None
        self._segments: dict[tuple[int, int | None], Tensor] = {}

    def segments(self, length: int, first: int | None = None) -> Tensor:
        """Offsets of samples of `length` rows, cut after their `first` rows if that is given."""
        if (length, first) not in self._segments:
            self._segments[length, first] = swap.equal_segments(
                self.batch, length, self.device, first
            )
        return self._segments[length, first]

    def joint(self, attention_mask: Tensor | None) -> Joint:
        """The joint rows under diffusers' mask (B, 1, 1, N) over keys: true for a sample's first.

        Counted on the device when the first block of a forward asks.
        """
        if attention_mask is None:
            raise ValueError("a fused HunyuanVideo block got attention_mask None: wanted a mask")
        if self._joint is None:
            whole = attention_mask.shape[-1]
            valid = attention_mask.view(self.batch, whole).sum(1, dtype=torch.int32)
            cu_samples = self.segments(whole)
            ends = torch.stack([cu_samples[:-1] + valid, cu_samples[1:]], dim=1).flatten()
            axes = [torch.arange(n, dtype=torch.int32, device=self.device) for n in self.grid]
            video = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
            text = video.new_zeros(whole - self.length, 3)
            positions = torch.cat([video, text]).repeat(self.batch, 1)
            self._joint = Joint(torch.cat([cu_samples[:1], ends]), cu_samples, positions, whole)
        return self._joint


class Rope(swap.FusedForward):
    """Forward of HunyuanVideoRotaryPosEmbed that makes a Layout instead of tables."""

    def __init__(self, module: Any, settings: Settings) -> None:
        super().__init__(module)
        self.settings = settings

    def __call__(self, hidden_states: Tensor) -> Layout:
        """The layout of a batch of latents (B, C, frames, height, width)."""
        swap.check_active_backend()
        rope = self.module
        batch, _, frames, height, width = hidden_states.shape
        grid = (
            frames // rope.patch_size_t, height // rope.patch_size, width // rope.patch_size
        )  # fmt: skip
        t_axis, h_axis, w_axis = rope.rope_dim
        return Layout(
            batch, grid, (t_axis, h_axis, w_axis), rope.theta, hidden_states.device, self.settings
        )


def _modulation(
    norm: Any, chunks: int, emb: Tensor, first_emb: Tensor | None
) -> tuple[Tensor, ...]:
    """Shifts, scales and gates of AdaLayerNormZero and its kin: chunks of (B, d), or of (2B, d)
    where the tokens of the first frame are modulated by an embedding of their own.
    """
    rows = norm.linear(norm.silu(emb))
    if first_emb is not None:
        first = norm.linear(norm.silu(first_emb))
        rows = torch.stack([first, rows], dim=1).flatten(0, 1)
    return rows.chunk(chunks, dim=1)


class DualBlock(swap.FusedForward):
    """Forward of HunyuanVideoTransformerBlock and HunyuanVideoTokenReplaceTransformerBlock."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, S, d) and text (B, L, d) after the block."""
        block, layout = self.module, freqs_cis
        backend = layout.settings.backend
        first = None if token_replace_emb is None else num_tokens
        # The patch embedding hands on a transposed view, which flattens without a copy at batch 1.
        streams = (hidden_states.contiguous(), encoder_hidden_states.contiguous())
        cus = (layout.segments(layout.length, first), layout.segments(streams[1].shape[1]))
        rows = (
            _modulation(block.norm1, 6, temb, token_replace_emb),
            _modulation(block.norm1_context, 6, temb, None),
        )
        normed = [
            adaln_modulate(
                x.flatten(0, 1), shift, scale, cu, eps=norm.norm.eps, backend=backend
            ).view_as(x)
            for x, (shift, scale, *_), cu, norm in zip(
                streams, rows, cus, (block.norm1, block.norm1_context), strict=True
            )
        ]
        branches = block.attn(
            hidden_states=normed[0],
            encoder_hidden_states=normed[1],
            attention_mask=attention_mask,
            image_rotary_emb=layout,
        )
        video, text = (
            self._feed_forward(x, branch, modulation, cu, norm, ff, backend)
            for x, branch, modulation, cu, norm, ff in zip(
                streams, branches, rows, cus, (block.norm2, block.norm2_context),
                (block.ff, block.ff_context), strict=True,
            )
        )  # fmt: skip
        return video, text

    def _feed_forward(
        self, x: Tensor, branch: Tensor, modulation: tuple[Tensor, ...], cu: Tensor, norm: Any,
        ff: Any, backend: str | None,
    ) -> Tensor:  # fmt: skip
        """The second half of a stream: x (B, *, d) plus gated attention, then its gated FFN."""
        _, _, gate, shift, scale, ff_gate = modulation
        y, residual = gated_residual_adaln(
            x.flatten(0, 1), branch.flatten(0, 1), gate, shift, scale, cu,
            eps=norm.eps, backend=backend,
        )  # fmt: skip
        branch = ff(y.view(x.shape)).flatten(0, 1)
        _, out = gated_residual_adaln(
            residual, branch, ff_gate, None, None, cu, norm="none", backend=backend
        )
        return out.view(x.shape)


class SingleBlock(swap.FusedForward):
    """Forward of HunyuanVideoSingleTransformerBlock and its token-replacing kin."""

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        token_replace_emb: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, S, d) and text (B, L, d) after the block."""
        block, layout = self.module, image_rotary_emb
        backend = layout.settings.backend
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        first = None if token_replace_emb is None else num_tokens
        cu = layout.segments(x.shape[1], first)
        shift, scale, gate = _modulation(block.norm, 3, temb, token_replace_emb)
        rows = x.contiguous().flatten(0, 1)
        y = adaln_modulate(rows, shift, scale, cu, eps=block.norm.norm.eps, backend=backend)
        y = y.view_as(x)
        mlp = block.act_mlp(block.proj_mlp(y))
        attended, _ = block.attn(
            hidden_states=y, attention_mask=attention_mask, image_rotary_emb=layout
        )
        branch = block.proj_out(torch.cat([attended, mlp], dim=2)).flatten(0, 1)
        _, out = gated_residual_adaln(
            rows, branch, gate, None, None, cu, norm="none", backend=backend
        )
        video, text = out.view_as(x).split([layout.length, x.shape[1] - layout.length], dim=1)
        return video, text


class Processor(swap.FusedProcessor):
    """Attention processor of HunyuanVideo's Attention; image_rotary_emb is a Layout."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Joint attention of video and text: two streams, or one (B, N, d) that holds both."""
        layout = image_rotary_emb
        joint, settings = layout.joint(attention_mask), layout.settings
        q, k, v = (
            _rows(project(hidden_states), attn) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        single = encoder_hidden_states is None
        q, k = qk_norm_rope(
            q, k, attn.norm_q.weight, attn.norm_k.weight,
            cu_seqlens=joint.cu_samples if single else layout.segments(layout.length),
            grid_sizes=None if single else layout.grid_sizes,
            positions=joint.positions if single else None,
            axes_dim=layout.axes_dim, norm="head", theta=layout.theta, eps=attn.norm_q.eps,
            backend=settings.backend,
        )  # fmt: skip
        if encoder_hidden_states is not None:
            text = self._text(attn, encoder_hidden_states, layout)
            q, k, v = (
                torch.cat([x.unflatten(0, (layout.batch, -1)), y], dim=1).flatten(0, 1)
                for x, y in zip((q, k, v), text, strict=True)
            )
        out = varlen_attention(
            q, k, v, joint.cu_seqlens, joint.cu_seqlens, joint.length, joint.length,
            deterministic=settings.deterministic, backend=settings.attention_backend,
        ).flatten(1).view(layout.batch, joint.length, -1)  # fmt: skip
        if encoder_hidden_states is None:
            return out, None
        video, context = out.split([layout.length, joint.length - layout.length], dim=1)
        video = attn.to_out[1](attn.to_out[0](video))
        return video, attn.to_add_out(context)

    def _text(self, attn: Any, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values, of the text stream: (B, L, H, D) each."""
        length = x.shape[1]
        q, k, v = (
            _rows(project(x), attn)
            for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        q, k = qk_norm_rope(
            q, k, attn.norm_added_q.weight, attn.norm_added_k.weight,
            cu_seqlens=layout.segments(length),
            grid_sizes=swap.equal_grids(layout.batch, (1, 1, length), layout.device),
            axes_dim=layout.axes_dim, norm="head", rotate_k=False, position_scale=layout.still,
            theta=layout.theta, eps=attn.norm_added_q.eps, backend=layout.settings.backend,
        )  # fmt: skip
        q, k, v = (y.unflatten(0, (layout.batch, length)) for y in (q, k, v))
        return q, k, v


def _rows(x: Tensor, attn: Any) -> Tensor:
    """(B, L, d) -> (B*L, H, D)."""
    return x.unflatten(2, (attn.heads, -1)).flatten(0, 1)
