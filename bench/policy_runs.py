"""What `bench.policies` runs: a small Goku under one policy of checkpointing and sharding."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.packs import GPU_PACKS, Pack
from bench.training import make_packs
from goku.flow import per_sample_mse
from goku.model import PRESETS, GokuTransformer, KernelConfig, ModelConfig, initial_value
from goku.parallelize import (
    BLOCKS,
    ActivationCheckpointing,
    ParallelContext,
    ParallelDims,
    ShardingConfig,
    clip,
    local,
)
from goku.precision import autocast
from goku_kernels import Packing
from goku_kernels.rectified_flow_noise import rectified_flow_noise
from goku_kernels.velocity_loss import weighted_loss
from goku_runtime.activation_checkpoint import apply_activation_checkpointing
from goku_runtime.sharding import apply_hybrid_sharding, materialise

NONE = "none"
_ATTENTION = "goku_kernels::varlen_attention"
POLICIES = {
    NONE: ActivationCheckpointing(),
    "every second block": ActivationCheckpointing(mode="every_nth", every=2),
    "operators: matrix products, attention": ActivationCheckpointing(
        mode="operators", save=(_ATTENTION, "aten::mm", "aten::addmm")
    ),
    "operators: attention": ActivationCheckpointing(mode="operators", save=(_ATTENTION,)),
    "full": ActivationCheckpointing(mode="full"),
}
SMALL_PACK = Pack("1K, mixed", ((2, 16, 16), (1, 16, 16), (1, 16, 16)))


@dataclass(frozen=True)
class Setting:
    """How the processes are arranged, and how weights are held."""

    name: str
    dims: ParallelDims
    sharding: ShardingConfig = field(default_factory=ShardingConfig)


def settings(world: int) -> list[Setting]:
    """All that are measured with so many processes."""
    if world == 1:
        return [Setting("one process", ParallelDims(1, 1, 1))]
    found = [
        Setting(f"dp_shard={world}", ParallelDims(1, world, 1)),
        Setting(
            f"dp_shard={world}, kept whole after the forward",
            ParallelDims(1, world, 1),
            ShardingConfig(reshard_after_forward=False),
        ),
        Setting(f"dp_replicate={world}", ParallelDims(world, 1, 1)),
        Setting(f"sp={world}", ParallelDims(1, 1, world)),
    ]
    if world % 2 == 0 and world > 2:
        half = world // 2
        found.append(Setting(f"dp_shard={half}, sp=2", ParallelDims(1, half, 2)))
        found.append(Setting(f"dp_replicate=2, dp_shard={half}", ParallelDims(2, half, 1)))
    return found


@dataclass(frozen=True)
class Batch:
    """One pack, or this process's shard of it: the model's arguments and the target."""

    arguments: tuple[Any, ...]
    target: Tensor
    packing: Packing
    text_lengths: tuple[int, ...]
    token_offset: int | None


@dataclass(frozen=True)
class Task:
    """The model and the packs: one for every group of processes that shares one."""

    preset: str
    config: ModelConfig
    pack: Pack
    dtype: torch.dtype  # of matrix products

    @classmethod
    def of(cls, preset: str, device: torch.device) -> Task:
        """What is measured of a preset on this device."""
        if device.type == "cuda":
            pack = next(p for p in GPU_PACKS if p.name == "16K, mixed")
            return cls(preset, PRESETS[preset], pack, torch.bfloat16)
        return cls(preset, PRESETS[preset], SMALL_PACK, torch.float32)

    def batches(self, context: ParallelContext, device: torch.device) -> list[Batch]:
        """The packs of all groups, each cut to this process's rows where groups share packs."""
        sharding = context.pack_sharding(self.config.heads)
        found = []
        for number, data in enumerate(
            make_packs(self.config, [self.pack.grids] * context.packs, device, seed=0)
        ):
            times = torch.linspace(0.1, 0.9, data.packing.batch, device=device)
            streams = torch.tensor(data.streams, device=device)
            x, target = rectified_flow_noise(
                data.latents, times, streams, data.packing.cu_seqlens, seed=number
            )
            text, text_packing, shard, offset = data.text, data.text_packing, None, None
            if sharding is not None:
                shard = sharding.shard(data.packing)
                texts = sharding.text(text.split(list(text_packing.lengths)), shard)
                text = torch.cat(texts)
                text_packing = Packing.from_lengths([len(part) for part in texts], device=device)
                x, target, offset = sharding.rows(x), sharding.rows(target), shard.token_offset
            arguments = (x, times, text, data.packing, text_packing, shard)
            found.append(Batch(arguments, target, data.packing, data.text_packing.lengths, offset))
        return found


def initial(name: str, like: Tensor) -> Tensor:
    """Goku's initial weights with every gate open: shut ones would hide mistakes in the blocks."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(like.shape, generator=generator)
    return initial_value(name, like, 0) + 0.02 * noise.to(like.dtype)


class Run:
    """One model under one policy, and its optimizer."""

    def __init__(
        self, task: Task, setting: Setting, policy: ActivationCheckpointing,
        context: ParallelContext,
    ) -> None:  # fmt: skip
        self.task, self.context = task, context
        with torch.device("meta"):
            model = GokuTransformer(task.config, KernelConfig())
        apply_activation_checkpointing(model, policy, BLOCKS)
        if context.mesh is not None:
            apply_hybrid_sharding(model, context.mesh, setting.sharding.policy(task.dtype))
        materialise(model, context.device, initial)
        self.model: nn.Module = model
        # A rate of zero: every step computes the same, and costs what any step does.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True)

    def forward(self, batch: Batch) -> Tensor:
        """The share of the loss that this process has."""
        with autocast(self.context.device, self.task.dtype):
            velocity = self.model(*batch.arguments)
        per_sample = per_sample_mse(
            velocity, batch.target, batch.packing, token_offset=batch.token_offset
        )
        weights = torch.ones_like(per_sample)
        return weighted_loss(per_sample, weights, float(self.context.packs * len(weights)))

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Loss and norm of the gradient over all processes."""
        total = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for batch in batches:
            loss = self.forward(batch)
            loss.backward()
            total += loss.detach()
        norm = float(clip(self.model, 0.0, self.context))
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.context.all_sum(total)), norm

    def step(self, batch: Batch) -> None:
        """One step of training."""
        self.forward(batch).backward()
        clip(self.model, 1.0, self.context)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident_bytes(self) -> int:
        """Weights and optimizer states that this process holds between steps."""
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        tensors = [*self.model.parameters(), *(x for x in states if isinstance(x, Tensor))]
        return sum(local(x).untyped_storage().nbytes() for x in tensors)


# ---- memory ----


def memory(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(most bytes, bytes at the end) that `work` allocated beside what there was before.

    On a GPU from the caching allocator; on a CPU every allocation as the profiler records it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = work()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before, after - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    live = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        most = max(most, live)
    return most, live
