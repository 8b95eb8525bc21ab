"""diffusers' Wan transformer, sequence-parallel through its attention processors.

    torchrun --nproc-per-node 4 examples/diffusers_wan.py --sp 2

`parallelise` turns a WanTransformer3DModel into one whose blocks work on this rank's share of the
video's tokens. It uses what diffusers and PyTorch offer for it, and edits neither: a processor for
self-attention (`set_attn_processor`), and forward hooks that

- shard the hidden states before the first block, after the patch embedding;
- shard the rotary table, so that each row is turned by its own position;
- shard a time per token (Wan 2.2 TI2V) before it is embedded;
- gather the output projection's rows, which are far narrower than the hidden states.

Cross-attention stays as it is: every rank has the whole text, and a query row needs no other row.
The tokens need not divide: the last rank's shard is padded, and nothing attends to the padding.

The model is called as before: every rank of an sp group gives the same video and gets the whole
output. Each then has the whole loss, so that it calls backward on 1 / sp of it: what is
differentiated is the sum over ranks.

Prints every step's loss and gradient norm: the same numbers for every choice of degrees. The model is
tiny and random; `WanTransformer3DModel.from_pretrained` makes a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from command_line import parser_of, show, start
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from goku_runtime.activation_checkpoint import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from goku_runtime.mesh import (
    data_parallel_rank,
    data_parallel_size,
    sequence_parallel_group,
)
from goku_runtime.sequence_parallel import SequenceParallel
from goku_runtime.sharding import (
    ShardingPolicy,
    apply_hybrid_sharding,
    clip_gradients,
)

VIDEOS = 4  # in one optimizer step, over all data-parallel groups
# 3 frames of 6 x 10 latents and patches of 2 x 2: 45 tokens, which neither 2 nor 4 ranks divide.
SHAPE = (4, 3, 6, 10)
TEXT = (7, 16)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs of neighbours, as Wan has it: x (B, S, H, D), tables (1, S, 1, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class Shards:
    """How the tokens of one model's forward are shared out over a group.

    Args:
        group: the ranks that share a video; None or one process: all is whole.
        heads: of the model's self-attention.
    """

    def __init__(self, group: ProcessGroup | None, heads: int) -> None:
        self.group = group
        self.heads = heads
        self.tokens = 0  # N, of the forward under way
        self.cu_seqlens = torch.empty(0)
        self.rows = SequenceParallel(group, heads)
        self._of_batch: dict[int, SequenceParallel] = {}

    def begin(self, table: Tensor) -> None:
        """Take N from the rotary table (1, N, 1, D), which is made first of all."""
        self.tokens = table.shape[1]
        self.cu_seqlens = torch.tensor([0, self.tokens], dtype=torch.int32, device=table.device)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> this rank's rows, (B, S, ...)."""
        return self.rows.shard(x.transpose(0, 1)).transpose(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (B, N, ...)."""
        return self.rows.gather(x.transpose(0, 1), self.tokens).transpose(0, 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Tensor:
        """Self-attention of whole sequences; (B, S, H, D) each, this rank's rows."""
        # The samples of a dense batch are as independent of each other as heads, and of one length:
        # one exchange moves B * H heads, which also divide more evenly.
        batch = q.shape[0]
        q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))

        def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
            # (N, h, D), by whichever kernel diffusers was told to take.
            return dispatch_attention_fn(q[None], k[None], v[None], backend=backend)[0]

        if batch not in self._of_batch:
            self._of_batch[batch] = SequenceParallel(self.group, batch * self.heads)
        out = self._of_batch[batch].attention(q, k, v, self.cu_seqlens, attend, tokens=self.tokens)
        return out.unflatten(1, (batch, self.heads)).transpose(0, 1)


class SequenceParallelProcessor(WanAttnProcessor):
    """Wan's attention processor for self-attention on a shard's rows."""

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self.shards = shards

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As WanAttnProcessor, for hidden_states (B, S, W) and rotary tables (1, S, 1, D).

        Raises:
            ValueError: cross-attention, a mask, fused projections or no rotary tables.
        """
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("allowed: self-attention with rotary tables and without a mask")
        if attn.fused_projections:
            raise ValueError("fused projections; allowed: model.unfuse_qkv_projections() first")
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self.shards.attention(q, k, v, self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))


def parallelise(model: WanTransformer3DModel, group: ProcessGroup | None) -> None:
    """Let the blocks of `model` work on this rank's share of the tokens; in place.

    Before activation checkpointing, sharding and torch.compile.
    """
    shards = Shards(group, model.config.num_attention_heads)

    def share_times(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = (
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_hidden_states_image",
        )
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if kwargs["timestep"].ndim == 2:  # a time per token
            kwargs["timestep"] = shards.split(kwargs["timestep"])
        return (), kwargs

    def share_tables(module: nn.Module, args: Any, tables: tuple[Tensor, Tensor]) -> Any:
        shards.begin(tables[0])
        return tuple(shards.split(table) for table in tables)

    def share_tokens(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return shards.split(args[0]), *args[1:]

    def gather_tokens(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return shards.gather(out)

    processor = SequenceParallelProcessor(shards)
    model.set_attn_processor(
        {
            name: processor if ".attn1." in name else other
            for name, other in model.attn_processors.items()
        }
    )
    model.register_forward_pre_hook(share_times, with_kwargs=True)
    model.rope.register_forward_hook(share_tables)
    model.blocks[0].register_forward_pre_hook(share_tokens)
    model.proj_out.register_forward_hook(gather_tokens)


class Videos(NamedTuple):
    """A batch of noisy videos, their times and texts, and the velocities to be learnt."""

    noisy: Tensor  # (B, *SHAPE)
    times: Tensor  # (B,)
    texts: Tensor  # (B, *TEXT)
    velocities: Tensor  # (B, *SHAPE)


def videos_of_step(step: int, mine: range) -> Videos:
    """Videos `mine` of the VIDEOS of a step; what each one is depends on step and index alone."""
    device = torch.get_default_device()
    parts = []
    for index in mine:
        generator = torch.Generator("cpu").manual_seed(VIDEOS * step + index)
        clean, noise = torch.randn(2, *SHAPE, generator=generator, device="cpu")
        text = torch.randn(TEXT, generator=generator, device="cpu")
        time = torch.rand((), generator=generator, device="cpu")
        parts.append(((1 - time) * clean + time * noise, 1000 * time, text, noise - clean))
    return Videos(*(torch.stack(column).to(device) for column in zip(*parts, strict=True)))


def build() -> WanTransformer3DModel:
    """The model, with the same weights on every rank."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=12, in_channels=SHAPE[0], out_channels=SHAPE[0],
        text_dim=TEXT[1], freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip


def train(
    model: WanTransformer3DModel, mesh: DeviceMesh, steps: int, recompute: bool = False
) -> Iterator[tuple[float, float]]:
    """Parallelise and shard the model, and yield (loss, gradient norm) of each step.

    Args:
        model: of `build`, or loaded; the same weights on every rank.
        mesh: of ParallelDims.
        steps: optimizer steps.
        recompute: compute the blocks again in the backward pass. diffusers' own
            enable_gradient_checkpointing() would repeat the exchanges.
    """
    mine = range(data_parallel_rank(mesh), VIDEOS, data_parallel_size(mesh))
    parallelise(model, sequence_parallel_group(mesh))
    policy = ActivationCheckpointing(mode="full" if recompute else "none")
    apply_activation_checkpointing(model, policy)
    apply_hybrid_sharding(model, mesh, ShardingPolicy(blocks=("blocks.*",), gradient_divisor=1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        videos = videos_of_step(step, mine)
        out = model(videos.noisy, videos.times, videos.texts).sample
        # All ranks of an sp group have the same loss here: each differentiates its part of it, 1 / sp,
        # of the mean over data-parallel groups, 1 / dp.
        share = (out - videos.velocities).square().mean() / mesh.size()
        share.backward()
        norm = clip_gradients(model.parameters(), 0.5, mesh)
        optimizer.step()
        optimizer.zero_grad()
        loss = share.detach()
        dist.all_reduce(loss)  # to be printed, nothing else
        yield loss.item(), norm.item()


def main() -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    options, dims = start(parser, VIDEOS)
    mesh = dims.build_mesh(torch.get_default_device().type)
    steps = train(build(), mesh, options.steps, options.recompute)
    show(steps)


if __name__ == "__main__":
    main()
