"""A Hugging Face transformers model, sequence-parallel through its attention registry.

    torchrun --nproc-per-node 4 examples/transformers_model.py --sp 2

The model's code stays as it is: `attention` is registered under a name of its own, and the model is
made with attn_implementation=NAME. What the trainer does besides:

- every rank of an sp group has the same pack of samples and hands its shard of the tokens to the
  model as one row, (1, S), with the positions of exactly these tokens within their samples, since the
  model would count from 0 on every rank;
- labels are shifted to the next token before they are sharded, as the last row of a shard has its
  next token on the next rank;
- the loss is this rank's sum over the number of targets of all ranks, and gradients are summed.

Other keyword arguments of the model's forward reach the attention: the SequenceParallel, the offsets
and lengths of the samples go that way, so that nothing is global.

Prints every step's loss and gradient norm: the same numbers for every choice of degrees. The model is
a tiny random Qwen3 with grouped queries; `AutoModelForCausalLM.from_pretrained(..., attn_implementation
=NAME)` makes a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from command_line import parser_of, show, start
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen3Config

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
    microbatch,
)

NAME = "goku_ulysses"
PACKS = 4  # in one optimizer step, over all data-parallel groups
IGNORED = -100  # the label that counts for nothing
CONFIG = Qwen3Config(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_parallel: SequenceParallel,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, here causal within each sample of the pack.

    Args:
        module: the attention module.
        query, key, value: (1, heads or kv_heads, S, head_dim), positions applied.
        attention_mask: None; transformers makes no mask for attentions of unknown names.
        sequence_parallel, cu_seqlens, lengths: as given to the model's forward.
        scaling, dropout, sliding_window, others: the model's own.

    Returns:
        (1, S, heads, head_dim), and no weights.

    Raises:
        ValueError: a mask, several rows, dropout or a sliding window, which this example lacks.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, attention_mask is "
            f"{'None' if attention_mask is None else tuple(attention_mask.shape)}: "
            "one row of packed samples without a mask is allowed"
        )
    if dropout or sliding_window is not None:
        raise ValueError(
            f"dropout is {dropout}, sliding_window {sliding_window}: 0 and None allowed"
        )

    def within_samples(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        # Whole samples, some heads. Lengths come from the host: cu_seqlens.tolist() would wait for
        # the device in every layer. A kernel for packed samples takes cu_seqlens as it is.
        samples = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(
                *sample, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            for sample in samples
        ]
        return torch.cat(outs, dim=1).transpose(0, 1)

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = sequence_parallel.attention(q, k, v, cu_seqlens, within_samples, tokens=sum(lengths))
    return out[None], None


class Pack(NamedTuple):
    """Samples one after the other, whole on every rank."""

    lengths: list[int]
    tokens: Tensor  # (T,)
    positions: Tensor  # (T,), within the samples
    labels: Tensor  # (T,), the next token of the sample

    @property
    def targets(self) -> int:
        return sum(length - 1 for length in self.lengths)


def packs_of_step(step: int, vocabulary: int) -> list[Pack]:
    """The packs of one step, of unequal lengths, the same on every rank."""
    packs = []
    for index in range(PACKS):
        generator = torch.Generator("cpu").manual_seed(PACKS * step + index)
        lengths = torch.randint(2, 12, (3 + index,), generator=generator, device="cpu").tolist()
        samples = torch.randint(
            vocabulary, (sum(lengths),), generator=generator, device="cpu"
        ).split(lengths)
        labels = [F.pad(sample[1:], (0, 1), value=IGNORED) for sample in samples]
        positions = [torch.arange(n, device="cpu") for n in lengths]
        packs.append(Pack(lengths, torch.cat(samples), torch.cat(positions), torch.cat(labels)))
    return packs


def summed_loss(model: PreTrainedModel, pack: Pack, sequence: SequenceParallel) -> Tensor:
    """The cross-entropy of this rank's tokens, summed."""
    total = len(pack.tokens)
    device = next(model.parameters()).device
    cu_seqlens = torch.tensor([0, *accumulate(pack.lengths)], dtype=torch.int32, device=device)
    tokens, positions, labels = (
        sequence.shard(x.to(device)) for x in (pack.tokens, pack.positions, pack.labels)
    )
    # Padding has label 0, which is a token.
    rows = sequence.token_offset(total) + torch.arange(len(labels), device=device)
    labels = labels.masked_fill(rows >= total, IGNORED)
    logits = model(
        input_ids=tokens[None],
        position_ids=positions[None],
        use_cache=False,
        sequence_parallel=sequence,
        cu_seqlens=cu_seqlens,
        lengths=pack.lengths,
    ).logits[0]
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)


def build() -> PreTrainedModel:
    """The model, with the same weights on every rank."""
    AttentionInterface.register(NAME, attention)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, attn_implementation=NAME)


def train(
    model: PreTrainedModel, mesh: DeviceMesh, steps: int, recompute: bool = False
) -> Iterator[tuple[float, float]]:
    """Shard the model and yield (loss, gradient norm) of each step.

    Args:
        model: of `build`, or loaded; the same weights on every rank.
        mesh: of ParallelDims.
        steps: optimizer steps.
        recompute: compute the layers again in the backward pass. Hugging Face's own
            gradient_checkpointing_enable() would repeat the exchanges.
    """
    config = model.config
    sequence = SequenceParallel(
        sequence_parallel_group(mesh), config.num_attention_heads, config.num_key_value_heads
    )
    mine = range(data_parallel_rank(mesh), PACKS, data_parallel_size(mesh))
    policy = ActivationCheckpointing(mode="full" if recompute else "none")
    apply_activation_checkpointing(model, policy, blocks=("model.layers.*",))
    sharding = ShardingPolicy(blocks=("model.layers.*",), gradient_divisor=1.0)
    apply_hybrid_sharding(model, mesh, sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        packs = packs_of_step(step, config.vocab_size)
        targets = sum(pack.targets for pack in packs)  # of all ranks: every rank knows it
        loss = torch.zeros((), device=next(model.parameters()).device)
        for index in mine:
            microbatch(model, last=index == mine[-1])
            share = summed_loss(model, packs[index], sequence) / targets
            share.backward()
            loss += share.detach()
        norm = clip_gradients(model.parameters(), 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)  # to be printed, nothing else
        yield loss.item(), norm.item()


def main() -> None:
    """The command."""
    parser = parser_of(__doc__)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    options, dims = start(parser, PACKS)
    mesh = dims.build_mesh(torch.get_default_device().type)
    steps = train(build(), mesh, options.steps, options.recompute)
    show(steps)


if __name__ == "__main__":
    main()
