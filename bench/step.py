"""One whole training step of a Goku on one device: noise, forward, backward, clipping, AdamW, EMA.

The same functions in the same order as the trainer's, on latents and text that lie on the device, as
a run with caches has them. The expected time adds up, at the ceilings measured in the same run, what
every block takes (`bench.block`), what the policy computes again, and the least traffic of the weights.

    python -m bench run step                       every policy that fits, in packs of 16K and 64K
    python -m bench.longest                        the longest sequence that one card trains
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from bench import block, harness, timing
from bench.begun import ENDED, lost
from bench.cases import packing
from bench.packs import TEXT_TOKENS, Pack, packs
from bench.policy_runs import NONE, POLICIES
from bench.refusals import refusals
from bench.step_profile import PHASE, where_time_goes
from bench.watch import GONE, Mark, reason, unmarked
from goku.activation_bytes import recomputed_bytes_per_token, saved_bytes_per_token
from goku.flops import named_peak, training_flops
from goku.flow import per_sample_mse
from goku.model import PRESETS, GokuTransformer, KernelConfig, ModelConfig
from goku.optimizer import EMA, EMAConfig, OptimizerConfig, build_adamw
from goku.parallelize import BLOCKS, ActivationCheckpointing, ParallelContext, clip
from goku.precision import autocast
from goku.step_memory import StepMemory
from goku_kernels import Packing
from goku_kernels.rectified_flow_noise import rectified_flow_noise
from goku_kernels.velocity_loss import weighted_loss
from goku_runtime.activation_checkpoint import apply_activation_checkpointing

OPERATOR = "step"
SOURCES = (
    "goku/model", "goku/parallelize.py", "goku/precision.py", "goku/flow.py", "goku/optimizer.py",
    "goku/flops.py", "goku/step_memory.py", "goku/activation_bytes.py", "kernels/goku_kernels",
    "runtime/goku_runtime/activation_checkpoint.py", "runtime/goku_runtime/sharding.py",
    "bench/step.py", "bench/step_profile.py", "bench/longest.py", "bench/block.py", "bench/packs.py",
    "bench/policy_runs.py", "bench/block_traffic.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip
ATOMICS = "dq by atomics"
# Loss and norm of the gradient of two ways to compute a step: bf16 products, summed over thousands of tokens.
AGREE = 1e-2
# Bytes per parameter that a step has to move beside the blocks' own work, all of it in fp32 but for the copies of
# autocast: AdamW reads weight, gradient and both moments and writes three of them; EMA reads two and writes one; the
# norm reads the gradient, which clipping reads and writes; a bf16 copy is written and its gradient read and widened.
ADAMW, AVERAGE, CLIPPING, COPY, WIDENING = 28, 12, 12, 6, 6
# What a device keeps for the driver and the libraries, and torch's allocator cannot use: at most so much was assumed.
RESERVED_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Setting:
    """A model, a pack and a policy.

    deterministic: as Goku trains by default; without it attention's backward adds dq up by atomics.
    """

    preset: str
    pack: Pack
    policy: str = NONE
    backend: str = "triton"
    deterministic: bool = True

    @property
    def name(self) -> str:
        """Of its rows' peer."""
        return self.policy if self.deterministic else f"{self.policy}; {ATOMICS}"

    @property
    def config(self) -> ModelConfig:
        return PRESETS[self.preset]

    @property
    def checkpointing(self) -> ActivationCheckpointing:
        return POLICIES[self.policy]

    @property
    def text_lengths(self) -> list[int]:
        return [TEXT_TOKENS] * len(self.pack.grids)

    @property
    def flops(self) -> float:
        """Of forward and backward, nothing recomputed."""
        return training_flops(self.config, self.pack.lengths, self.text_lengths)

    def memory(self, parameters: int) -> StepMemory:
        """What `goku train --dry-run` estimates for it."""
        fused, tokens = self.backend == "triton", self.pack.tokens
        return StepMemory(
            lasting=16 * parameters,
            gradients=4 * parameters,
            copies=2 * parameters,
            kept=tokens * saved_bytes_per_token(self.config, 2, self.checkpointing, fused=fused),
            recomputed=tokens
            * recomputed_bytes_per_token(self.config, 2, self.checkpointing, fused=fused),
            several_packs=False,
        )


def settings(device_type: str) -> Iterator[Setting]:
    """What is measured on a device of this type, the quick and telling ones first."""
    if device_type != "cuda":
        yield from (Setting("tiny", packs("cpu")[1], name, "torch") for name in POLICIES)
        return
    by_name = {pack.name: pack for pack in packs("cuda")}
    for name in ("16K, mixed", "64K, mixed", "64K, one clip"):
        # What keeps most is fastest where it fits.
        for policy in POLICIES:
            yield Setting("goku-2b", by_name[name], policy)
            if policy == NONE or policy.startswith("operators"):
                yield Setting("goku-2b", by_name[name], policy, deterministic=False)


@dataclass(frozen=True)
class Batch:
    """A pack on the device: latents (T, patch_dim), text (S, text_dim), times (B,), stream numbers (B,)."""

    latents: Tensor
    text: Tensor
    times: Tensor
    streams: Tensor
    packing: Packing
    text_packing: Packing

    @classmethod
    def draw(cls, setting: Setting, device: torch.device, seed: int = 0) -> Batch:
        generator = torch.Generator(device).manual_seed(seed)
        places = packing(setting.pack, device)
        texts = Packing.from_lengths(setting.text_lengths, device=device)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        return cls(
            latents=draw(places.total, setting.config.patch_dim),
            text=draw(texts.total, setting.config.text_dim).bfloat16(),
            times=torch.rand(places.batch, generator=generator, device=device),
            streams=torch.arange(places.batch, device=device),
            packing=places,
            text_packing=texts,
        )


class Run:
    """A model, its average and its optimizer, and the step that the trainer takes with them."""

    def __init__(self, setting: Setting, device: torch.device, *, trained: bool = True) -> None:
        """trained: False leaves out the average and the optimizer, where gradients alone are asked for."""
        self.setting = setting
        self.context = ParallelContext(0, 1, device, None)
        self.kernels = KernelConfig(
            backend="torch" if setting.backend == "torch" else "triton",
            # The reference's deterministic attention on a GPU holds all pairs of tokens.
            deterministic=setting.deterministic and setting.backend != "torch",
        )
        self.model = self._model(setting.checkpointing, device)
        if trained:
            self.ema = EMA(EMAConfig(), self._model(ActivationCheckpointing(), device))
            self.optimizer = build_adamw(OptimizerConfig(), self.model)

    def _model(
        self, checkpointing: ActivationCheckpointing, device: torch.device
    ) -> GokuTransformer:
        """Random weights, always the same, drawn on the device: 2e9 of them would take a host half a minute."""
        generator = torch.Generator(device).manual_seed(0)
        with torch.device("meta"):
            model = GokuTransformer(self.setting.config, self.kernels)
        apply_activation_checkpointing(model, checkpointing, BLOCKS)
        for name, module in model.named_modules():
            for own, like in list(module._parameters.items()):
                if like is not None:
                    drawn = _initial(f"{name}.{own}", like, generator)
                    module._parameters[own] = torch.nn.Parameter(drawn)
            assert not module._buffers, f"{name} has buffers, which stay on the meta device"
        return model

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def loss(self, batch: Batch) -> Tensor:
        """The pack's mean loss."""
        backend = self.kernels.operator_backend
        with record_function(f"{PHASE}noise"):
            x, target = rectified_flow_noise(
                batch.latents, batch.times, batch.streams, batch.packing.cu_seqlens, seed=0,
                backend=backend,
            )  # fmt: skip
        with autocast(self.context.device, torch.bfloat16):
            velocity = self.model(
                x, batch.times, batch.text, batch.packing, batch.text_packing, None, None
            )
        with record_function(f"{PHASE}loss"):
            errors = per_sample_mse(velocity, target, batch.packing, backend=backend)
            return weighted_loss(errors, torch.ones_like(errors), float(batch.packing.batch))

    def gradients(self, batch: Batch) -> tuple[float, float]:
        """Loss and norm of the gradient; the weights stay as they are."""
        loss = self.loss(batch)
        loss.backward()
        norm = float(clip(self.model, 0.0, self.context))
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach()), norm

    def prepare(self) -> None:
        """Make the optimizer's moments, which the first step otherwise does."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Batch) -> None:
        """As `goku.trainer` does it, reading the norm back included: a step that is no number is skipped."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(batch).backward()
        with record_function(f"{PHASE}clip"):
            norm = clip(self.model, 1.0, self.context).item()
        assert norm == norm, "the gradient is no number"
        with record_function(f"{PHASE}optimizer"):
            self.optimizer.step()
        with record_function(f"{PHASE}ema"):
            self.ema.update(self.model)


def _initial(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Gains of one, biases of zero, everything else normal: open gates hide no mistake."""
    value = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    if like.dim() > 1:
        return value.normal_(std=0.02, generator=generator)
    return value.fill_(1.0 if name.endswith("weight") else 0.0)


# ---- what to expect ----


def expected(
    setting: Setting, parameters: int, ceilings: timing.Ceilings, attention: float | None
) -> dict[str, float | str]:
    """Milliseconds to expect of a step, in parts, and which rate was taken for the attention.

    attention: FLOP/s measured of it; None for the matrix product's.
    """
    one = block.Setting(setting.preset, setting.pack, block.MIXED)
    parts = block.expected(one, ceilings, attention)
    depth = setting.config.depth
    # A block's forward is a third of its forward and backward, of matrix products and attention alike; of its
    # memory-bound operators somewhat less, which is left out.
    again = _computed_again(setting)
    ms: dict[str, float] = {}
    for part in ("matmul", "attention", "memory"):
        ms[part] = depth * float(parts[f"expected_{part}_ms"]) * (1 + again[part] / 3)
    copies = COPY * (2 if again["matmul"] else 1)
    per_parameter = ADAMW + AVERAGE + CLIPPING + WIDENING + copies
    ms["weights"] = 1e3 * per_parameter * parameters / ceilings.copy.value
    found: dict[str, float | str] = {f"expected_{part}_ms": value for part, value in ms.items()}
    return {
        **found,
        "expected_ms": sum(ms.values()),
        "attention_rate": parts["attention_rate"],
    }


def _computed_again(setting: Setting) -> dict[str, float]:
    """The share of the blocks' forwards that the policy repeats, by kind of work."""
    policy = setting.checkpointing
    if policy.mode == "none":
        return {"matmul": 0.0, "attention": 0.0, "memory": 0.0}
    if policy.mode == "every_nth":
        share = -(-setting.config.depth // policy.every) / setting.config.depth
        return {"matmul": share, "attention": share, "memory": share}
    kept = policy.save if policy.mode == "operators" else ()
    return {
        "matmul": 0.0 if {"aten::mm", "aten::addmm"} <= set(kept) else 1.0,
        "attention": 0.0 if "goku_kernels::varlen_attention" in kept else 1.0,
        "memory": 1.0,
    }


# ---- measuring ----


Truth = tuple[float, float]  # loss, and norm of the gradient


def measure(
    setting: Setting, device: torch.device, ceilings: timing.Ceilings, *, seconds: float,
    records: Sequence[Mapping[str, Any]] = (), truths: dict[tuple[str, str], Truth] | None = None,
    mark: Mark = unmarked,
) -> harness.Row:  # fmt: skip
    """The row of one setting; its extra has ENDED where it took the device's context along.

    Loss and norm of the gradient are compared with those of the eager operators that recompute every block.

    Args:
        records: rows measured before; the attention's rate is looked for among them.
        truths: of (preset, pack), found before; what is found is added.
        mark: told of the row to write should the process end.
    """
    truths = {} if truths is None else truths
    with torch.device("meta"):
        count = sum(p.numel() for p in GokuTransformer(setting.config).parameters())
    needed, room = setting.memory(count).peak, _room(device)
    estimate = f"estimated at {needed / 2**30:.1f} GiB, of which {room / 2**30:.1f} are there"
    if needed > room:
        return row(setting, ceilings, status="absent", note=estimate)
    key = setting.preset, setting.pack.name
    mark([row(setting, ceilings, status="failed", note=GONE, extra={ENDED: True})])()
    try:
        batch = Batch.draw(setting, device)
        if key not in truths:
            plain = dataclasses.replace(setting, policy="full", backend="torch")
            truths[key] = Run(plain, device, trained=False).gradients(batch)
            release(device)
        found = _measured(setting, batch, truths[key], device, ceilings, seconds, records)
    except torch.OutOfMemoryError:
        found = row(setting, ceilings, status="absent", note=f"out of memory; {estimate}")
    except refusals() as error:
        found = row(setting, ceilings, status="failed", note=reason(error))
        if lost(device):
            return dataclasses.replace(found, extra={ENDED: True})
    release(device)  # only here has the error's traceback let go of the model
    return found


def _measured(
    setting: Setting, batch: Batch, truth: Truth, device: torch.device,
    ceilings: timing.Ceilings, seconds: float, records: Sequence[Mapping[str, Any]],
) -> harness.Row:  # fmt: skip
    """The row of one setting: right, then timed, then looked into."""
    run = Run(setting, device)
    found = run.gradients(batch)
    if not all(abs(x - y) <= AGREE * abs(y) for x, y in zip(found, truth, strict=True)):
        note = f"loss and norm are {found}, of the eager operators {truth}"
        return row(setting, ceilings, status="wrong", note=note)
    name = harness.hardware(device)["device"]
    rate = block.attention_rate(
        block.Setting(setting.preset, setting.pack, block.MIXED),
        records,
        name,
        setting.deterministic,
    )
    prediction = expected(setting, run.parameters, ceilings, rate)
    slow = float(prediction["expected_ms"]) > 1e3 * timing.SLOW_ROUND_SECONDS
    call: timing.Call = (lambda i: None), (lambda state: run.step(batch))
    timed = timing.interleaved(
        {"": call}, device, seconds=seconds, warm_up=1 if slow else 2, min_rounds=1 if slow else 3
    )[""]
    where: dict[str, float] = {}
    most = peak_bytes(
        lambda: where.update(where_time_goes(lambda: run.step(batch), device)), device
    )
    extra: dict[str, Any] = {
        "tokens_per_s": setting.pack.tokens / timed.median_ms * 1e3,
        "estimated_memory_bytes": int(setting.memory(run.parameters).peak),
        **prediction,
        "where_ms": where,
    }
    peak = named_peak(name) if device.type == "cuda" else None
    if peak is not None:
        extra["mfu"] = setting.flops / (timed.median_ms * 1e-3) / peak
    if device.type == "cuda":
        extra["peak_memory_bytes"] = most
    return row(setting, ceilings, timing=timed, extra=extra)


def row(setting: Setting, ceilings: timing.Ceilings, **more: Any) -> harness.Row:
    return harness.Row(
        name=OPERATOR, case=setting.preset, pack=setting.pack.name, dtype=block.MIXED,
        shape={"dim": setting.config.dim, "depth": setting.config.depth,
               "tokens": setting.pack.tokens, "samples": len(setting.pack.grids),
               "text_tokens": sum(setting.text_lengths)},
        work=setting.flops, ceiling=ceilings.matmul, sources=SOURCES, peer=setting.name,
        backend=setting.backend, direction="step", **more,
    )  # fmt: skip


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that is allocated on the GPU while `work` runs, what was there before included; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _room(device: torch.device) -> float:
    """Bytes that a step may take on this device."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory - RESERVED_BYTES


def release(device: torch.device) -> None:
    """Give back the memory of models that nobody holds any more.

    A recomputed block holds itself, through the bound forward that it recomputes: only the collector
    of cycles frees it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
