"""From positions in the data stream to one packed batch: latents, text, noise and times of several samples end to end.

Under sequence parallelism every process of a group builds the same pack and keeps its own rows of it.

Everything random here is a function of (seed, stream position, element): the same sample at the same position gets
the same posterior draw, noise, time and text dropout on any rank, in any pack, before and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goku.data import CachedDataset, Item
from goku.flow import FlowConfig, drop_text, sample_times
from goku.model import TokenShard, patchify
from goku.packing import PackingConfig, cut_grid
from goku.parallelize import PackSharding
from goku.random import Purpose, normal, stream_tensor
from goku.vae import VideoVAE
from goku_kernels import Packing
from goku_kernels.rectified_flow_noise import rectified_flow_noise

__all__ = ["Batch", "BatchBuilder"]


@dataclass(frozen=True)
class Batch:
    """One pack, or this process's shard of it, ready for the model.

    x: (rows, patch_dim) noised latents; target: (rows, patch_dim) velocity; t: (B,); text: (text_tokens, dim);
    packing: of the whole pack; text_packing: of text; items: the B samples in order; weights: (B,) loss weights w_i;
    shard: which rows x holds, None for all; text_lengths: of every sample, wherever its text is.
    """

    x: Tensor
    target: Tensor
    t: Tensor
    text: Tensor
    packing: Packing
    text_packing: Packing
    items: list[Item]
    weights: Tensor
    text_lengths: tuple[int, ...]
    shard: TokenShard | None = None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The model's positional arguments."""
        return self.x, self.t, self.text, self.packing, self.text_packing, self.shard


class BatchBuilder:
    """Builds packs from one cached dataset on one device.

    backend: of the noising operator; the numbers are the same on all. sharding: which rows of every pack to keep; None
    keeps them all. Raises ValueError for a sample with fewer tokens than there are shards.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        vae: VideoVAE,
        flow: FlowConfig,
        packing: PackingConfig,
        seed: int,
        device: torch.device,
        backend: str | None = None,
        sharding: PackSharding | None = None,
    ) -> None:
        self.backend = backend
        self.sharding = sharding
        self.dataset, self.vae, self.flow, self.packing = dataset, vae, flow, packing
        self.seed, self.device = seed, device
        self.grids = [
            cut_grid(item.grid, packing.tokens_per_pack, item.name, packing.overlong)
            for item in dataset.items
        ]
        self.tokens = [t * h * w for t, h, w in self.grids]
        shards = 1 if sharding is None else sharding.size
        for item, tokens in zip(dataset.items, self.tokens, strict=True):
            if tokens < shards:
                raise ValueError(
                    f"{item.name} has {tokens} tokens; allowed: parallel.sp = {shards} or more"
                )
        self._empty_text = dataset.empty_text

    def training(self, positions: Sequence[int], indices: Sequence[int]) -> Batch:
        """The pack of the items `indices`, drawn at stream `positions` (same length): training noise and times."""
        times = sample_times(self.flow, self.seed, positions, [self.tokens[i] for i in indices])
        dropped = drop_text(self.flow, self.seed, positions).tolist()
        return self._build(
            indices, positions, times, dropped, Purpose.NOISE, posterior_positions=positions
        )

    def fixed(self, indices: Sequence[int], times: Sequence[float]) -> Batch:
        """The pack of `indices` at fixed `times`, with noise keyed by the item: the same at every call and step.

        The latent is the posterior's mean and no text is dropped, so that two losses on it differ by the weights of
        the model alone.
        """
        t = torch.tensor(list(times), dtype=torch.float64)
        return self._build(
            indices, indices, t, [False] * len(indices), Purpose.EVAL, posterior_positions=None
        )

    def _build(
        self,
        indices: Sequence[int],
        keys: Sequence[int],
        times: Tensor,
        dropped: Sequence[bool],
        purpose: Purpose,
        posterior_positions: Sequence[int] | None,
    ) -> Batch:
        latents, texts = [], []
        for row, index in enumerate(indices):
            sample = self.dataset.read(index)
            latent = sample.mean
            if posterior_positions is not None:
                noise = normal(
                    self.seed, posterior_positions[row], latent.numel(), Purpose.POSTERIOR
                )
                latent = latent + torch.exp(0.5 * sample.logvar) * noise.view_as(latent)
            frames = self.grids[index][0]
            latents.append(patchify(self.vae.normalise(latent[None])[0][:, :frames]))
            texts.append(self._empty_text if dropped[row] else sample.text)
        packing = Packing.from_grids([self.grids[i] for i in indices], device=self.device)
        text_lengths = tuple(len(text) for text in texts)
        x1, shard = torch.cat(latents), None
        if self.sharding is not None:
            shard = self.sharding.shard(packing)
            texts = self.sharding.text(texts, shard)
            x1 = self.sharding.rows(x1)
        text_packing = Packing.from_lengths([len(text) for text in texts], device=self.device)
        x1 = x1.to(self.device)
        t = times.to(self.device, torch.float32)
        x, target = rectified_flow_noise(
            x1,
            t,
            stream_tensor(keys, self.device),
            packing.cu_seqlens,
            seed=self.seed,
            purpose=int(purpose),
            token_offset=0 if shard is None else shard.token_offset,
            backend=self.backend,
        )
        items = [self.dataset.items[i] for i in indices]
        return Batch(
            x=x,
            target=target,
            t=t,
            text=torch.cat(texts).to(self.device),
            packing=packing,
            text_packing=text_packing,
            items=items,
            weights=torch.tensor(
                [item.weight for item in items], dtype=torch.float64, device=self.device
            ),
            text_lengths=text_lengths,
            shard=shard,
        )
