"""Fifty training steps on fixed random latents: a model whose loss does not fall is broken.

    python -m bench.training [--preset goku-2b] [--steps 50] [--device cuda] [--backend triton] [--out DIR]

A few samples of fixed random latents and text in two packs that alternate; noise and times are drawn
anew every step. Nobody can predict such latents, so the loss falls only if the model learns them (or
at least how noise and data mix), through every operator, forward and backward. With --out the losses are
kept, a line of training-losses.jsonl, which `bench.correctness_report` shows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import harness
from goku.flow import FlowConfig, sample_times
from goku.model import PRESETS, GokuTransformer, KernelConfig, ModelConfig
from goku_kernels import Packing
from goku_kernels.packing import Grid
from goku_kernels.rectified_flow_noise import rectified_flow_noise
from goku_kernels.velocity_loss import velocity_loss

# No benchmark's name: this is no file of rows.
LOSSES = "training-losses.jsonl"
SOURCES = (
    "kernels/goku_kernels", "goku/model", "goku/flow.py", "goku/random.py", "bench/training.py",
)  # fmt: skip

# Two packs: a clip with images, and images alone. About 4,000 tokens each.
PACKS: tuple[tuple[Grid, ...], ...] = (
    ((5, 18, 32), (1, 30, 32), (1, 16, 16)),
    ((1, 32, 32), (1, 30, 32), *[(1, 16, 16)] * 8),
)
SMALL_PACKS: tuple[tuple[Grid, ...], ...] = (((2, 4, 4), (1, 4, 6)), ((1, 4, 4), (1, 3, 5)))
TEXT_LENGTHS = (32, 7, 1, 19)  # repeated over the samples

# The loss starts at 2, the variance of data minus noise, as the head is zero. Knowing only how both
# mix, no datum, a model reaches 1.57 in the mean over times: 2 - (2t-1)^2 / (t^2 + (1-t)^2). It has
# to get at least half of the way in 50 steps.
FALLEN = 0.89


@dataclass(frozen=True)
class Pack:
    """Fixed data of one pack."""

    latents: Tensor
    text: Tensor
    packing: Packing
    text_packing: Packing
    streams: tuple[int, ...]


def make_packs(
    config: ModelConfig, packs: Sequence[Sequence[Grid]], device: torch.device, seed: int
) -> list[Pack]:
    """Random normal latents and text, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, grids in enumerate(packs):
        packing = Packing.from_grids(grids, device=device)
        lengths = [TEXT_LENGTHS[i % len(TEXT_LENGTHS)] for i in range(len(grids))]
        text_packing = Packing.from_lengths(lengths, device=device)
        latents = torch.randn(packing.total, config.patch_dim, generator=generator)
        text = torch.randn(text_packing.total, config.text_dim, generator=generator)
        streams = tuple(1000 * number + i for i in range(len(grids)))
        made.append(Pack(latents.to(device), text.to(device), packing, text_packing, streams))
    return made


def losses(
    config: ModelConfig, packs: Sequence[Sequence[Grid]], device: torch.device, *,
    steps: int = 50, rate: float = 1e-3, seed: int = 0, kernels: KernelConfig | None = None,
) -> list[float]:  # fmt: skip
    """Loss of every step of AdamW under bf16 autocast, warmed up over the first tenth.

    Args:
        kernels: of the model, and of the noise and the loss.
    """
    kernels = kernels or KernelConfig()
    with torch.device("meta"):
        model = GokuTransformer(config, kernels)
    model = model.to_empty(device=device)
    model.initialise(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    data = make_packs(config, packs, device, seed)
    found: list[Tensor] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 10))
        pack = data[step % len(data)]
        # Every step is another draw of the same samples.
        streams = [stream + 10**6 * step for stream in pack.streams]
        times = sample_times(FlowConfig(), seed, streams, pack.packing.lengths).to(device)
        x_t, target = rectified_flow_noise(
            pack.latents, times, torch.tensor(streams, device=device), pack.packing.cu_seqlens,
            seed=seed, backend=kernels.operator_backend,
        )  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(x_t, times, pack.text, pack.packing, pack.text_packing)
        weights = torch.ones(pack.packing.batch, device=device)
        loss, _ = velocity_loss(
            velocity, target, weights, pack.packing.cu_seqlens,
            weight_sum=float(pack.packing.batch), backend=kernels.operator_backend,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def has_fallen(values: Sequence[float], share: float = FALLEN) -> bool:
    """Whether the last fifth's mean is under `share` of the first loss's 2, and all are numbers."""
    tail = statistics.fmean(values[-max(1, len(values) // 5) :])
    return all(0 <= v < float("inf") for v in values) and tail <= share * 2.0


def keep(
    folder: Path, device: torch.device, preset: str, values: Sequence[float], tokens: int
) -> None:
    """Append the losses, and where they come from, to training-losses.jsonl in `folder`.

    tokens: of all packs together.
    """
    line = {
        "preset": preset, "losses": [round(v, 5) if math.isfinite(v) else None for v in values],
        "fell": has_fallen(values), "tokens": tokens, **harness.origin(SOURCES, device),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOSSES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether the loss of a Goku falls in a few steps")
    parser.add_argument("--preset", default="goku-2b", choices=list(PRESETS))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate (3e-4)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "triton"],
                        help="of the operators (auto)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of results that keeps the losses")
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error("--steps are 5 or more")
    device = torch.device(options.device)
    packs = PACKS if device.type == "cuda" else SMALL_PACKS
    values = losses(
        PRESETS[options.preset], packs, device, steps=options.steps, rate=options.rate,
        kernels=KernelConfig(backend=options.backend),
    )  # fmt: skip
    print(" ".join(f"{value:.3f}" for value in values))
    fallen = has_fallen(values)
    if options.out is not None:
        tokens = sum(t * h * w for grids in packs for t, h, w in grids)
        keep(options.out, device, options.preset, values, tokens)
    print(f"the loss {'fell' if fallen else 'DID NOT FALL'}: {values[0]:.3f} -> {values[-1]:.3f}")
    return 0 if fallen else 1


if __name__ == "__main__":
    sys.exit(main())
