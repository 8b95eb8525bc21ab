"""What the processes of test_conditioning_processes.py do; run by tests/launch.py."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from goku.batch import BatchBuilder
from goku.conditioning import ConditioningConfig
from goku.flow import FlowConfig
from goku.model import GokuTransformer, KernelConfig, ModelConfig
from goku.packing import PackingConfig
from goku.parallelize import (
    ActivationCheckpointing,
    PackSharding,
    ParallelContext,
    ShardingConfig,
    build_model,
    local,
    parallel_context,
)
from goku.random import Purpose, normal
from goku.vae import GokuVAE, VAEConfig
from goku_kernels import Packing
from goku_runtime.mesh import ParallelDims
from goku_runtime.sequence_parallel import SequenceParallel

GRIDS = [(3, 2, 3), (1, 2, 3), (2, 2, 2), (1, 1, 1)]  # 18 + 6 + 8 + 1 = 33 tokens: 17 and 16
TEXT = [3, 1, 2, 5]
CONFIG = ModelConfig(dim=24, depth=2, heads=2, text_dim=12, latent_channels=2, condition="frames")
SCALE = torch.tensor([[0.5, 0.75, 1.0], [1.0, 0.3, 0.2], [0.8, 1.0, 1.0], [1.0, 1.0, 1.0]])


def _draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    flat = normal(seed, 0, math.prod(shape), Purpose.SAMPLE, dtype=torch.float64)
    return flat.view(shape).to(dtype)


@torch.no_grad()
def _opened(model: GokuTransformer) -> GokuTransformer:
    """Every zero replaced by noise, of the parameter's name alone: sharded or not, the same model."""
    for name, parameter in model.named_parameters():
        noise = 0.3 * _draw(sum(name.encode()), *parameter.shape, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        local(parameter).add_(local(noise))
    return model


def _inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    """x, t, text, packing, text_packing, condition of the whole pack."""
    packing, text_packing = Packing.from_grids(GRIDS), Packing.from_lengths(TEXT)
    x, text = _draw(1, 33, CONFIG.patch_dim, dtype=dtype), _draw(2, 11, 12, dtype=dtype)
    t = torch.tensor([0.1, 0.5, 0.7, 0.9], dtype=dtype)
    return x, t, text, packing, text_packing, _draw(3, 33, CONFIG.condition_dim, dtype=dtype)


def _join(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def a_shared_pack(rank: int, world: int) -> None:
    """Velocity and every gradient of a pack shared by two are those of one process."""
    x, t, text, packing, text_packing, condition = _inputs(torch.float64)
    model = _opened(GokuTransformer(CONFIG).double())
    whole = model(x, t, text, packing, text_packing, None, condition, SCALE)
    weights = _draw(4, *whole.shape, dtype=torch.float64)
    (whole * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(wanted) == len(list(model.parameters()))
    model.zero_grad()

    sharding = PackSharding(SequenceParallel(dist.group.WORLD, CONFIG.heads))
    shard = sharding.shard(packing)
    texts = sharding.text(text.split(TEXT), shard)
    mine = model(
        sharding.rows(x), t, torch.cat(texts), packing, Packing.from_lengths([len(s) for s in texts]),
        shard, sharding.rows(condition), SCALE,
    )  # fmt: skip
    tight = {"rtol": 1e-10, "atol": 1e-11}  # fp64, sums in another order
    torch.testing.assert_close(sharding.gather(mine, 33).detach(), whole.detach(), **tight)
    (mine * sharding.rows(weights)).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(gradient)
        torch.testing.assert_close(
            gradient, wanted[name], **tight, msg=lambda m, n=name: f"{n}: {m}"
        )


def a_shared_batch(rank: int, world: int) -> None:
    """Each process's condition is its rows of the one that a process alone builds."""
    grids = [*GRIDS[:3], (1, 1, 3)]  # 35 tokens: 18 and 17, then a row of padding
    items = [
        SimpleNamespace(name=f"item{i}", grid=grid, weight=1.0, choose_caption=lambda uniform: 0)
        for i, grid in enumerate(grids)
    ]
    samples = [
        SimpleNamespace(
            mean=_draw(i, 2, t, 2 * h, 2 * w), logvar=torch.zeros(2, t, 2 * h, 2 * w),
            text=torch.ones(1 + i, 12), frames={-1: _draw(50 + i, 2, 1, 2 * h, 2 * w)},
        )
        for i, (t, h, w) in enumerate(grids)
    ]  # fmt: skip
    dataset: Any = SimpleNamespace(
        items=items,
        read=lambda index, caption: samples[index],
        reading=nullcontext,
        empty_text=torch.zeros(1, 12),
    )
    vae = GokuVAE(VAEConfig(channels=2, stem_width=8, width=8, encoder_depth=1, decoder_depth=1))
    packing = PackingConfig(tokens_per_step=40, tokens_per_pack=40)
    conditioning = ConditioningConfig(both=1.0, drop=0.0, drop_both=0.0)
    sharding = PackSharding(SequenceParallel(dist.group.WORLD, CONFIG.heads))
    alone, shared = (
        BatchBuilder(
            dataset, vae, FlowConfig(), packing, 3, torch.device("cpu"), sharding=sharing,
            conditioning=conditioning,
        )
        for sharing in (None, sharding)
    )  # fmt: skip
    for make in ("training", "fixed"):
        arguments = (range(4), range(4)) if make == "training" else (range(4), [0.5] * 4)
        whole, mine = getattr(alone, make)(*arguments), getattr(shared, make)(*arguments)
        assert whole.condition.any(dim=1).sum() == 18 + 8  # the clips' tokens
        wanted = torch.cat([whole.condition, torch.zeros(1, CONFIG.condition_dim)])
        assert torch.equal(mine.condition, wanted[18 * rank : 18 * rank + 18])
        assert mine.condition.shape[0] == mine.shard.rows == mine.x.shape[0]


def a_sharded_model(rank: int, world: int, port: int) -> None:
    """FSDP2: output and gradients of one process, and given frames stay fp32 under bf16 parameters."""
    _join(rank, world, port)
    plain = _opened(GokuTransformer(CONFIG))
    arguments = _inputs(torch.float32)
    x, t, text, packing, text_packing, condition = arguments
    wanted = plain(x, t, text, packing, text_packing, None, condition)
    (wanted.square().sum() * world).backward()
    with parallel_context("cpu", 1, ParallelDims(dp_shard=world)) as context:
        model = _opened(_build(context, ShardingConfig(param_dtype="float32"), torch.float32))
        out = model(x, t, text, packing, text_packing, None, condition)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        out.square().sum().backward()  # summed over the processes, which all have the same pack
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor()
            theirs = plain.get_parameter(name).grad
            scale = theirs.abs().max().item()
            assert scale > 0, name
            assert (gradient - theirs).abs().max().item() <= 1e-5 * scale, name

        low = _opened(_build(context, ShardingConfig(), torch.bfloat16))
        used: dict[str, torch.dtype] = {}
        for name in ("condition_embed.fc1", "condition_embed.fc2", "blocks.0.attn1.q_proj"):
            low.get_submodule(name).register_forward_pre_hook(
                lambda m, _inputs, name=name: used.__setitem__(name, m.weight.dtype)
            )
        with torch.autocast("cpu", torch.bfloat16):
            out = low(x, t, text, packing, text_packing, None, condition)
        assert used == {
            "condition_embed.fc1": torch.float32,
            "condition_embed.fc2": torch.float32,
            "blocks.0.attn1.q_proj": torch.bfloat16,
        }
        # bf16 rounds to 2^-9; some twenty roundings in a row, of random sign, stay under ten of them.
        error = (out - wanted).norm() / wanted.norm()
        assert 0 < error < 10 * 2**-9
        out.square().sum().backward()
        assert low.condition_embed.fc1.weight.grad.dtype == torch.float32

        # A model that takes no frames is sharded as before.
        base = _build(context, ShardingConfig(), torch.bfloat16, replace(CONFIG, condition="none"))
        with torch.autocast("cpu", torch.bfloat16):
            base(x, t, text, packing, text_packing).sum().backward()


def _build(
    context: ParallelContext,
    sharding: ShardingConfig,
    dtype: torch.dtype,
    config: ModelConfig = CONFIG,
) -> GokuTransformer:
    plain = ActivationCheckpointing()
    return build_model(config, KernelConfig(), context, sharding, plain, dtype, seed=0)
