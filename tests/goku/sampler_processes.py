"""What the processes of test_sampler.py do; run by tests/launch.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from goku.parallelize import ParallelDims, parallel_context
from goku.sampler import Request, SampleConfig, integrate_all, load_for_sampling


def share_tokens(rank: int, world: int, run: str, images: str, out: str, port: int) -> None:
    """All processes share the tokens of a pack with given frames; rank 0 writes the latents to `out`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, last = torch.load(images, weights_only=True)
    with parallel_context("cpu", timeout_minutes=1, dims=ParallelDims(sp=world)) as context:
        loaded = load_for_sampling(Path(run), context.device)
        latents = integrate_all(
            loaded.model, loaded.vae, loaded.text.encode, requests(first, last), CONFIG,
            context.device, sharding=context.pack_sharding(loaded.model.config.heads),
        )  # fmt: skip
        if rank == 0:
            torch.save([latents[i] for i in sorted(latents)], out)


CONFIG = SampleConfig(
    steps=3, method="ab2", guidance=2.0, guidance_image=1.5, hold=True, limits=(2, 2, 2)
)


def requests(first: torch.Tensor, last: torch.Tensor) -> list[Request]:
    """One with both frames given, one with none; 18 and 4 tokens, which two processes cut in the middle."""
    return [
        Request("a cat", 32, 48, frames=9, seed=2, negative="blur", given={0: first, -1: last}),
        Request("a dog", 32, 32, seed=3),
    ]
