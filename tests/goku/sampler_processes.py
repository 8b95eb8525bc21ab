"""What the processes of test_sampler.py do; run by tests/launch.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from goku.cli import main
from goku.model import GokuTransformer
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


def stop_one(rank: int, world: int, run: str, out: str, port: int) -> None:
    """All processes share the tokens of two samples; in the first step of the second the last process alone gets a
    signal, and all leave at that step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    forward, calls = GokuTransformer.forward, 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    GokuTransformer.forward = counted  # type: ignore[method-assign, assignment]
    command = ["sample", run, "--prompt", "p", "--count", "2", "--steps", "2", "--sp", str(world)]
    try:
        with pytest.raises(SystemExit) as left:
            main([*command, "--device", "cpu", "--out", out])
    finally:
        GokuTransformer.forward = forward  # type: ignore[method-assign]
    assert (left.value.code, calls) == (128 + signal.SIGTERM, 3)


CONFIG = SampleConfig(
    steps=3, method="ab2", guidance=2.0, guidance_image=1.5, hold=True, limits=(2, 2, 2)
)


def requests(first: torch.Tensor, last: torch.Tensor) -> list[Request]:
    """One with both frames given, one with none; 18 and 4 tokens, which two processes cut in the middle."""
    return [
        Request("a cat", 32, 48, frames=9, seed=2, negative="blur", given={0: first, -1: last}),
        Request("a dog", 32, 32, seed=3),
    ]
