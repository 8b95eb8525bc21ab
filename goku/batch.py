"""From positions in the data stream to one packed batch: latents, text, noise and times of several samples end to end.

Under sequence parallelism every process of a group knows the pack's shape, and reads and builds the samples alone that
it holds rows of: of a pack of images each a part of the files, of one long clip all of it.

Everything random here is a function of (seed, stream position, element): the same sample at the same position gets
the same posterior draw, noise, time, caption, text dropout and given frames on any rank, in any pack, before and after
a resume.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goku.conditioning import (
    ConditioningConfig,
    choose_given,
    condition_latent,
    drops_both,
    latent_index,
)
from goku.flow import FlowConfig, drop_text, sample_times
from goku.model import TokenShard, patchify
from goku.packing import Grid, PackingConfig, cut_grid
from goku.parallelize import PackSharding
from goku.random import Purpose, normal_packed, stream_tensor, uniform_each
from goku.read_ahead import ReadAhead
from goku.text import compact
from goku.vae import VideoVAE
from goku_kernels import Packing
from goku_kernels.rectified_flow_noise import rectified_flow_noise
from goku_kernels.upload import upload, upload_rows, upload_values

if TYPE_CHECKING:  # packs are built without the packages that decode media
    from goku.data import CachedSample, Dataset, Item
    from goku.lost import LostItems

__all__ = ["Batch", "BatchBuilder", "trained_grid"]


@dataclass(frozen=True)
class Batch:
    """One pack, or this process's shard of it, ready for the model.

    x: (rows, patch_dim) noised latents; target: (rows, patch_dim) velocity; t: (B,); text: (text_tokens, dim);
    packing: of the whole pack; text_packing: of text, 0 for samples without a row here; items: the B samples in order;
    weights: (B,) loss weights w_i, 0 for lost ones;
    shard: which rows x holds, None for all;
    condition: (rows, condition_dim) given frames beside x, None for a model that takes none; lost: which samples this
    process could not read, their latents being zeros, () for none.
    """

    x: Tensor
    target: Tensor
    t: Tensor
    text: Tensor
    packing: Packing
    text_packing: Packing
    items: list[Item]
    weights: Tensor
    shard: TokenShard | None = None
    condition: Tensor | None = None
    lost: tuple[bool, ...] = ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The model's positional arguments."""
        return (
            self.x, self.t, self.text, self.packing, self.text_packing, self.shard, self.condition,
        )  # fmt: skip

    @property
    def begun(self) -> tuple[list[int], list[int]]:
        """(tokens, text tokens) of the samples whose first row is here: over the shards of a pack each sample once."""
        lengths, texts = list(self.packing.lengths), list(self.text_packing.lengths)
        if self.shard is None:
            return lengths, texts
        end = self.shard.token_offset + self.shard.rows
        begins = accumulate(lengths[:-1], initial=0)
        here = [k for k, b in enumerate(begins) if self.shard.token_offset <= b < end]
        return [lengths[k] for k in here], [texts[k] for k in here]


def trained_grid(item: Item, packing: PackingConfig, shards: int, last: bool) -> Grid:
    """The (t, h, w) tokens that an item is trained with, perhaps cut. shards: processes that share a pack; last:
    whether clips may be given their last frame. Raises ValueError naming the item where it cannot be trained on."""
    grid = cut_grid(item.grid, packing.tokens_per_pack, item.name, packing.overlong)
    tokens = grid[0] * grid[1] * grid[2]
    if tokens < shards:
        raise ValueError(
            f"{item.name} has {tokens} tokens; allowed: parallel.sp = {shards} or more"
        )
    if last and 1 < grid[0] < item.grid[0]:
        raise ValueError(
            f"{item.name} is cut from {item.grid[0]} latent frames to {grid[0]}, so that its last frame cannot "
            f"be given; allowed: a smaller data.max_frames, or conditioning.last and conditioning.both 0"
        )
    return grid


class BatchBuilder:
    """Builds packs from one cached dataset on one device.

    backend: of the noising operator; the numbers are the same on all. sharding: which rows of every pack to keep; None
    keeps them all. conditioning: which frames clips are given, for a model that takes them; None for one that does not.
    lost: what a sample that cannot be read becomes; None: the error is raised, by whoever holds it. The host waits for
    no device; on a GPU posterior noise is drawn there, since 64K tokens' takes a core of the host 0.2 s.
    Raises ValueError for a sample with fewer tokens than there are shards, and for a clip that packing.overlong cuts
    where conditioning gives last frames: the cut clip's own last frame is nowhere cached.
    """

    def __init__(
        self,
        dataset: Dataset,
        vae: VideoVAE,
        flow: FlowConfig,
        packing: PackingConfig,
        seed: int,
        device: torch.device,
        backend: str | None = None,
        sharding: PackSharding | None = None,
        conditioning: ConditioningConfig | None = None,
        lost: LostItems | None = None,
    ) -> None:
        self.lost = lost
        self.backend = backend
        self.sharding = sharding
        self.conditioning = conditioning
        self.dataset, self.vae, self.flow, self.packing = dataset, vae, flow, packing
        self.seed, self.device = seed, device
        shards = 1 if sharding is None else sharding.size
        last = conditioning is not None and -1 in conditioning.frames
        self.grids = [trained_grid(item, packing, shards, last) for item in dataset.items]
        self.tokens = [t * h * w for t, h, w in self.grids]
        self._empty_text = compact(dataset.empty_text)
        self._ahead = ReadAhead(dataset)
        self.read_seconds = 0.0
        """How long packs have waited for their samples: what `read_ahead` did not hide."""

    def training(self, positions: Sequence[int], indices: Sequence[int]) -> Batch:
        """The pack of the items `indices`, drawn at stream `positions` (same length): training noise and times."""
        times = sample_times(self.flow, self.seed, positions, [self.tokens[i] for i in indices])
        dropped = drop_text(self.flow, self.seed, positions).tolist()
        given = None
        if self.conditioning is not None:
            frames = [self._frames(i) for i in indices]
            given = choose_given(self.conditioning, self.seed, positions, frames)
            both = drops_both(self.conditioning, self.seed, positions, frames)
            dropped = [a or b for a, b in zip(dropped, both, strict=True)]
        captions = self._captions(positions, indices)
        texts = [None if drop else c for c, drop in zip(captions, dropped, strict=True)]
        return self._build(
            indices, positions, times, captions, texts, Purpose.NOISE, given, positions
        )

    def read_ahead(self, packs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Begin to read the samples of the packs (positions, indices) that `training` will be asked for next.

        Of packs that were named before, those that are not among them are given up. What cannot be read, `training`
        reads again.
        """
        self._ahead.ask(
            [
                self._wanted(indices, self._captions(positions, indices), self._held(indices))
                for positions, indices in packs
            ]
        )

    def close(self) -> None:
        """Give up what is read ahead."""
        self._ahead.close()

    def _captions(self, positions: Sequence[int], indices: Sequence[int]) -> list[int]:
        """Number of the caption that each is trained with, unless its text is dropped."""
        picked = uniform_each(self.seed, positions, Purpose.CAPTION).tolist()
        items = self.dataset.items
        return [items[i].choose_caption(u) for i, u in zip(indices, picked, strict=True)]

    def fixed(self, indices: Sequence[int], times: Sequence[float]) -> Batch:
        """The pack of `indices` at fixed `times`, with noise keyed by the item: the same at every call and step.

        The latent is the posterior's mean, the text the heaviest caption, never dropped, and every clip is given what
        clips are given most often, so that two losses on it differ by the weights of the model alone.
        """
        t = torch.tensor(list(times), dtype=torch.float64)
        given = None
        if self.conditioning is not None:
            usual = self.conditioning.usual
            given = [usual if self._frames(i) > 1 else () for i in indices]
        heaviest = [0] * len(indices)
        return self._build(indices, indices, t, heaviest, heaviest, Purpose.EVAL, given, None)

    def _held(self, indices: Sequence[int]) -> list[int]:
        """Which samples of the pack (0 .. len(indices) - 1) this process has rows of."""
        lengths = [self.tokens[i] for i in indices]
        if self.sharding is not None:
            lengths = self.sharding.lengths(lengths)
        return [k for k, rows in enumerate(lengths) if rows]

    @staticmethod
    def _wanted(
        indices: Sequence[int], captions: Sequence[int], held: Sequence[int]
    ) -> list[tuple[int, int]]:
        """(item, number of its caption) of the held samples."""
        return [(indices[k], captions[k]) for k in held]

    def _frames(self, index: int) -> int:
        """Pixel frames of an item as it is trained on, perhaps cut."""
        return 4 * (self.grids[index][0] - 1) + 1

    def _build(
        self,
        indices: Sequence[int],
        keys: Sequence[int],
        times: Tensor,
        captions: Sequence[int],
        texts: Sequence[int | None],
        purpose: Purpose,
        given: Sequence[tuple[int, ...]] | None,
        posterior_positions: Sequence[int] | None,
    ) -> Batch:
        held = self._held(indices)
        wanted = self._wanted(indices, captions, held)
        samples, missing = self._read(wanted, ahead=posterior_positions is not None)
        lost = [False] * len(indices)
        embeddings = [self._empty_text[:0]] * len(indices)
        # A process at the end of a short pack may hold no sample at all.
        nothing = torch.zeros(self.vae.channels, 1, 2, 2, device=self.device)
        latents = [patchify(nothing)[:0]]
        conditions = (
            [] if given is None else [self._conditions({}, (self.vae.channels, 1, 2, 2))[:0]]
        )
        drawn = self._latents(
            samples, None if posterior_positions is None else [posterior_positions[k] for k in held]
        )
        for k, sample, latent, gone in zip(held, samples, drawn, missing, strict=True):
            frames = self.grids[indices[k]][0]
            latents.append(patchify(self.vae.normalise(latent[None])[0][:, :frames]))
            if given is not None:
                conditions.append(self._condition(indices[k], sample, given[k]))
            embeddings[k] = self._empty_text if texts[k] is None else sample.text
            lost[k] = gone
        packing = Packing.from_grids([self.grids[i] for i in indices], device=self.device)
        text_packing = Packing.from_lengths([len(e) for e in embeddings], device=self.device)
        x1, shard = torch.cat(latents), None
        condition = torch.cat(conditions) if conditions else None
        if self.sharding is not None:
            shard = self.sharding.shard(packing)
            x1 = self.sharding.own(x1, packing)
            # A copy: it lives as long as the pack, and would keep the others' rows.
            condition = None if condition is None else self.sharding.own(condition, packing).clone()
        t = upload(times.to(torch.float32), self.device)
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
            text=self._text(embeddings),
            packing=packing,
            text_packing=text_packing,
            items=items,
            weights=self._weights(items, lost),
            shard=shard,
            lost=tuple(lost) if any(lost) else (),
            condition=condition,
        )

    def _weights(self, items: Sequence[Item], lost: Sequence[bool]) -> Tensor:
        """(B,) loss weights, 0 for what any process that shares the pack has lost.

        A sample attends to itself alone, so that nothing of one without weight reaches a gradient, whatever the shards
        hold of it. The exchange stays on the device: the host waits for nothing.
        """
        weights = upload_values([item.weight for item in items], torch.float64, self.device)
        if not any(lost) and (self.sharding is None or self.lost is None):
            return weights
        gone = upload_values(lost, torch.int32, self.device)
        if self.sharding is not None and self.lost is not None:
            gone = self.sharding.any(gone)
        return weights * (1 - gone)

    def _read(
        self, wanted: list[tuple[int, int]], ahead: bool
    ) -> tuple[list[CachedSample], list[bool]]:
        """The samples of (item, caption), and which of them are lost. ahead: what was read ahead is for them."""
        began = time.perf_counter()
        with self.dataset.reading():
            found = self._ahead.take(wanted) if ahead else [None] * len(wanted)
            read = [
                self._read_one(index, caption, sample)
                for (index, caption), sample in zip(wanted, found, strict=True)
            ]
        self.read_seconds += time.perf_counter() - began
        return [sample for sample, _ in read], [not whole for _, whole in read]

    def _read_one(
        self, index: int, caption: int, ahead: CachedSample | None
    ) -> tuple[CachedSample, bool]:
        """The sample, and whether it is what was cached."""
        if self.lost is not None:
            return self.lost.read(self.dataset, index, self.vae, self._empty_text, caption, ahead)
        return ahead or self.dataset.read(index, caption), True

    def _latents(
        self, samples: Sequence[CachedSample], positions: Sequence[int] | None
    ) -> list[Tensor]:
        """(C, T, H, W) of each on the device: a draw of its posterior, or with positions None the mean."""
        if not samples:
            return []
        sizes = [sample.mean.numel() for sample in samples]
        drawn = upload_rows([sample.mean.reshape(-1) for sample in samples], self.device)
        if positions is not None:
            logvar = upload_rows([sample.logvar.reshape(-1) for sample in samples], self.device)
            noise = normal_packed(
                self.seed, positions, sizes, Purpose.POSTERIOR, device=self.device
            )
            drawn = drawn + torch.exp(0.5 * logvar) * noise
        parts = drawn.split(sizes)
        return [part.view(s.mean.shape) for part, s in zip(parts, samples, strict=True)]

    def _condition(self, index: int, sample: CachedSample, given: tuple[int, ...]) -> Tensor:
        """(tokens, condition_dim) of an item that is given these pixel frames.

        Their latents are posterior means without noise, of each frame encoded alone, as an image is when sampling.
        """
        grid, frames = self.grids[index], self._frames(index)
        latents = {
            latent_index(frame, frames): self._frame_latent(index, sample, frame) for frame in given
        }
        channels, _, height, width = sample.mean.shape
        return self._conditions(latents, (channels, grid[0], height, width))

    def _conditions(
        self, latents: Mapping[int, Tensor], shape: tuple[int, int, int, int]
    ) -> Tensor:
        """(tokens, condition_dim) of a latent of this shape (C, T, H, W), of which these frames are given."""
        return patchify(condition_latent(latents, shape, self.device))

    def _text(self, embeddings: Sequence[Tensor]) -> Tensor:
        """(text_tokens, dim) fp32 on the device. Captions are cached in bf16 where that holds them exactly, and as such
        they take half of the host's memory and of the way."""
        if any(embedding.dtype != torch.bfloat16 for embedding in embeddings):
            embeddings = [embedding.float() for embedding in embeddings]
        return upload_rows(embeddings, self.device).float()

    def _frame_latent(self, index: int, sample: CachedSample, frame: int) -> Tensor:
        """Normalised (C, 1, H, W) of one pixel frame, alone, on the device."""
        cached = sample.frames.get(frame)
        if cached is None and frame == 0 and self.vae.causal:
            cached = sample.mean[:, :1]  # what the frame alone is encoded to
        if cached is None:
            raise ValueError(
                f"{self.dataset.items[index].name}: its frame {frame} was not encoded alone, which this VAE needs; "
                f"allowed: a dataset that was prepared with frames=({frame},) or more"
            )
        return self.vae.normalise(upload(cached, self.device)[None])[0]
