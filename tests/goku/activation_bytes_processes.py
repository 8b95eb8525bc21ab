"""Measures what a forward leaves for the backward pass; the tests' instrument, and a script for tests/launch.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from goku.activation_bytes import saved_bytes_per_token
from goku.model import GokuTransformer, KernelConfig, ModelConfig
from goku.parallelize import PackSharding
from goku_kernels import Packing
from goku_runtime.activation_checkpoint import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from goku_runtime.sequence_parallel import SequenceParallel


class Born(TorchDispatchMode):
    """Every storage that an operator makes, held weakly; counts those that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {weak.cdata for weak, _ in _storages((args, kwargs))}
        for weak, size in _storages(out):
            if weak.cdata not in given:  # no view of a parameter, say
                # The key is the storage's address: later ones replace those that have died.
                self.storages[weak.cdata] = weak, size
        return out

    def living(self) -> int:
        return sum(size for weak, size in self.storages.values() if not weak.expired())


def _storages(tree: Any) -> list[tuple[StorageWeakRef, int]]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [(StorageWeakRef(storage), storage.nbytes()) for storage in found]


class Plain(GokuTransformer):
    """Without the values of a new model, which nothing here depends on (and fakes do not have)."""

    def initialise(self, seed: int) -> None:
        pass


def build(
    config: ModelConfig, policy: ActivationCheckpointing, backend: str = "torch"
) -> GokuTransformer:
    model = Plain(config, KernelConfig(backend=backend))
    apply_activation_checkpointing(model, policy)
    return model


def forward(
    model: GokuTransformer, tokens: int, dtype: torch.dtype, sharding: PackSharding | None = None
) -> Tensor:
    """Velocity of one sample with 16 tokens of text; of a process's rows when the pack is shared."""
    packing, text_packing = Packing.from_grids([(1, 8, tokens // 8)]), Packing.from_lengths([16])
    x = torch.ones(tokens, model.config.patch_dim)
    shard = None
    if sharding is not None:
        shard, x = sharding.shard(packing), sharding.rows(x).clone()
    with torch.autocast(
        "cpu",
        torch.float16 if dtype == torch.float16 else torch.bfloat16,
        enabled=dtype != torch.float32,
    ):
        text = torch.ones(16, model.config.text_dim)
        given = model.config.condition_dim
        condition = torch.ones(len(x), given) if given else None
        return model(x, torch.full((1,), 0.5), text, packing, text_packing, shard, condition)


def kept_bytes(model: GokuTransformer, run: Callable[[], Tensor]) -> int:
    """Bytes that live because the graph of run's result does: parameters, which were before, are not among them."""
    with Born() as mode:
        out = run()
    graph = out.grad_fn
    del out  # the result itself is the caller's
    found = settled(mode)
    assert graph is not None
    del graph
    assert settled(mode) < 0.01 * found, "something else holds what was counted"
    return found


def settled(mode: Born) -> int:
    """What lives once it has not changed for 0.2 s.

    The thread of gloo that ran a collective drops its buffers a moment after the result is there.
    """
    if not dist.is_initialized():
        return mode.living()
    found, since = mode.living(), time.monotonic()
    while time.monotonic() < since + 0.2:
        time.sleep(0.01)
        now = mode.living()
        if now != found:
            found, since = now, time.monotonic()
    return found


def kept_per_token(
    config: ModelConfig,
    policy: ActivationCheckpointing,
    dtype: torch.dtype,
    *,
    backend: str = "torch",
    sharding: PackSharding | None = None,
) -> float:
    """The slope over tokens: text, times and copies of weights, which do not grow with them, drop out."""
    size = 1 if sharding is None else sharding.size
    model = build(config, policy, backend)
    few, many = (
        kept_bytes(model, lambda tokens=tokens: forward(model, tokens, dtype, sharding))
        for tokens in (64 * size, 192 * size)
    )
    return (many - few) / 128


def shared_pack(rank: int, world: int, heads: int) -> None:
    """Predicted and kept bytes of the process with the most heads, which is the first."""
    config = ModelConfig(dim=32 * heads, depth=2, heads=heads, text_dim=32)
    sharding = PackSharding(SequenceParallel(dist.group.WORLD, heads))
    for policy in (
        ActivationCheckpointing(),
        ActivationCheckpointing(mode="full"),
        ActivationCheckpointing(
            mode="operators", save=("goku_kernels::varlen_attention", "aten::mm")
        ),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            kept = kept_per_token(config, policy, dtype, sharding=sharding)
            predicted = saved_bytes_per_token(config, dtype.itemsize, policy, sp=world)
            if rank == 0:
                assert abs(predicted - kept) <= 0.1 * kept, (policy, dtype, predicted, kept)
                if policy.mode != "none":  # without the exchanges it would be wrong
                    assert saved_bytes_per_token(config, dtype.itemsize, policy) < 0.9 * kept
