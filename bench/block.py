"""One Goku block, forward and backward: eager, compiled and fused, beside the time to expect.

The expected time adds up, at the ceilings measured in the same run, the block's matrix products,
its attention and the least traffic of everything that is bound by memory. It is what perfect
kernels one after the other would take; nothing overlaps in it and no launch costs anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bench import harness, timing
from bench.begun import ENDED, lost
from bench.block_attention import SavingAttention
from bench.block_compile import compile_whole, for_any_pack
from bench.block_expected import attention_flops as attention_flops
from bench.block_expected import attention_rate as attention_rate
from bench.block_expected import expected as expected
from bench.block_expected import memory_bytes as memory_bytes
from bench.cases import Absent, Results, draw_normal, judge, needs_triton, packing
from bench.packs import TEXT_TOKENS, Pack, packs
from bench.peers import LIBRARIES, needs_cuda
from bench.refusals import refusals
from bench.watch import GONE, Mark, reason, together, unmarked
from goku.flops import block_training_flops, named_peak
from goku.model import PRESETS, GokuBlock, KernelConfig, ModelConfig
from goku.model.initialise import initialise
from goku_kernels import Packing

OPERATOR = "block"
SOURCES = ("goku/model", "goku/flops.py", "kernels/goku_kernels", "bench/block.py",
           "bench/block_attention.py", "bench/block_compile.py", "bench/block_expected.py",
           "bench/block_traffic.py", "bench/filler.py", "bench/timing.py")  # fmt: skip


class Kind(NamedTuple):
    """How a peer runs the block.

    backend: of the operators.
    compiled: whether torch.compile takes the block.
    saves: whether torch's varlen_attn stands in for our attention, whose torch backend keeps nothing
        of its forward and runs it again in the backward.
    deterministic: whether attention's gradients have equal bits on every run, as Goku trains. Never
        the reference's, whose deterministic attention holds a matrix of all pairs of tokens.
    """

    backend: Literal["torch", "triton"]
    compiled: bool = False
    saves: bool = False
    deterministic: bool = False


COMPILED = "goku fused, torch.compile"
FIRST_COMPILED = ("goku-2b", "64K, mixed")  # its model and pack
PEERS = {
    "eager": Kind("torch"),
    "goku fused": Kind("triton", deterministic=True),
    "goku fused, dq by atomics": Kind("triton"),
    "eager, varlen_attn": Kind("torch", saves=True),
    COMPILED: Kind("triton", compiled=True, deterministic=True),
    "torch.compile, varlen_attn": Kind("torch", compiled=True, saves=True),
    "torch.compile": Kind("torch", compiled=True),
}
_SAVES = "attention is torch.nn.attention.varlen's, which keeps what its backward needs"
_REPEATS = "attention's forward is run again in its backward"
_ANY_PACK = "compiled for packs of any size"
MIXED, PLAIN = "bfloat16 autocast over float32", "bfloat16"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One block on one pack in one kind of precision."""

    preset: str
    pack: Pack
    dtype: str  # MIXED or PLAIN

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return PRESETS[self.preset]

    @property
    def text_lengths(self) -> list[int]:
        """Text tokens of every sample."""
        return [TEXT_TOKENS] * len(self.pack.grids)

    @property
    def stream_bytes(self) -> int:
        """Of a number of the residual stream."""
        return 4 if self.dtype == MIXED else 2

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward, as `goku.flops` counts training: the text has no gradient."""
        return block_training_flops(self.config, self.pack.lengths, self.text_lengths)


def settings(device_type: str) -> Iterator[Setting]:
    """What is measured on a device of this type, the most telling first: packs as Goku trains on."""
    cuda = device_type == "cuda"
    for preset in ("goku-2b", "goku-8b") if cuda else ("tiny",):
        for dtype in (MIXED, PLAIN):
            for pack in sorted(packs(device_type), key=lambda pack: "mixed" not in pack.name):
                # A 220K pack leaves no room for the eager block of the 8B model on 80 GB.
                fits = "220K" not in pack.name and (not cuda or pack.name != "16K, one clip")
                if fits and (dtype == MIXED or "mixed" in pack.name):
                    yield Setting(preset, pack, dtype)


def passes(device_type: str) -> Iterator[tuple[Setting, Sequence[str]]]:
    """Settings and the peers to measure of each, in the order in which a GPU's time is spent.

    Compiling takes most of it. So first the packs that Goku trains on without it, then FIRST_COMPILED
    once with our kernels compiled, then all settings without, with the stronger baseline compiled
    too, and with every peer; what was measured before is measured again beside the others, which
    costs little.
    """
    if device_type != "cuda":
        yield from ((setting, list(PEERS)) for setting in settings(device_type))
        return
    every = list(settings(device_type))
    plain = [name for name, kind in PEERS.items() if not kind.compiled]
    strong = [name for name, kind in PEERS.items() if kind.saves or kind.backend == "triton"]
    essential = [s for s in every if s.dtype == MIXED and "mixed" in s.pack.name]
    first = [s for s in essential if (s.preset, s.pack.name) == FIRST_COMPILED]
    yield from ((setting, plain) for setting in essential)
    yield from ((setting, [*plain, COMPILED]) for setting in first)
    yield from ((setting, plain) for setting in every if setting not in essential)
    for names in (["eager", *strong], list(PEERS)):
        yield from ((setting, names) for setting in every)


# ---- what is run ----


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of a block: x (T, d), c (B, d), text (S, text_dim), the gradient of its output.

    As in training, x and c ask for gradients and the text does not.
    """

    x: Tensor
    c: Tensor
    text: Tensor
    gradient: Tensor
    packing: Packing
    text_packing: Packing

    @classmethod
    def draw(cls, setting: Setting, device: torch.device, seed: int) -> Batch:
        """Random numbers, all of them representable in bf16."""
        generator = torch.Generator(device).manual_seed(seed)
        stored = torch.float32 if setting.dtype == MIXED else torch.bfloat16
        places = packing(setting.pack, device)
        text_places = Packing.from_lengths(setting.text_lengths, device=device)
        width, low = setting.config.dim, torch.bfloat16
        x, gradient = (
            draw_normal(generator, places.total, width, dtype=low).to(stored) for _ in range(2)
        )
        c = draw_normal(generator, places.batch, width, dtype=low).float()
        text = draw_normal(generator, text_places.total, setting.config.text_dim, dtype=low)
        return cls(x.requires_grad_(), c.requires_grad_(), text, gradient, places, text_places)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the block is given."""
        offsets = (self.packing.cu_seqlens, self.text_packing.cu_seqlens)
        return self.x, self.c, self.text, self.packing.grid_sizes, *offsets


def make_block(
    setting: Setting, device: torch.device, backend: Literal["torch", "triton"],
    deterministic: bool,
) -> GokuBlock:  # fmt: skip
    """A block with open gates: shut ones would cost the same but hide mistakes."""
    kernels = KernelConfig(backend=backend, deterministic=deterministic)
    stored = torch.float32 if setting.dtype == MIXED else torch.bfloat16
    with torch.device("meta"):
        block = GokuBlock(setting.config, kernels).to(stored)
        block.norm1.float()  # the modulation stays fp32, as the operators' mixed case has it
    block.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(_parameters(setting.preset)[name])
    return block


@functools.lru_cache(maxsize=1)
def _parameters(preset: str) -> Mapping[str, Tensor]:
    """Of every block of this size, bf16: the same numbers in every precision, drawn once (seconds)."""
    block = GokuBlock(PRESETS[preset])
    initialise(block, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        block.norm1.linear.weight.normal_(std=0.02, generator=generator)
    return {name: x.detach().bfloat16() for name, x in block.named_parameters()}


def make_peer(name: str, setting: Setting, device: torch.device) -> GokuBlock:
    """The block as `name` runs it.

    Raises:
        Absent: it cannot run here; the message says why.
    """
    kind = PEERS[name]
    if kind.backend == "triton":
        needs_triton(device)
    attend = LIBRARIES["torch varlen_attn"]() if kind.saves else None
    if attend is not None:
        needs_cuda(device)
    block = make_block(setting, device, kind.backend, kind.deterministic)
    if attend is not None:
        SavingAttention.replace(block, attend)
    if kind.compiled:
        compile_whole(block)
    return block


def forward(module: torch.nn.Module, batch: Batch, setting: Setting) -> Tensor:
    """One forward of the block."""
    kind = batch.x.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=setting.dtype == MIXED):
        return module(batch.x, batch.c, batch.text, batch.packing, batch.text_packing)


def step(module: torch.nn.Module, batch: Batch, setting: Setting) -> Tensor:
    """One forward and backward; returns the output."""
    for x in (*module.parameters(), batch.x, batch.c):
        x.grad = None
    y = forward(module, batch, setting)
    y.backward(batch.gradient)
    return y


def results(module: torch.nn.Module, batch: Batch, setting: Setting) -> Results:
    """Output and the gradients that pass through all of the block."""
    y = step(module, batch, setting)
    assert batch.x.grad is not None
    assert batch.c.grad is not None
    parameters = {
        f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None
    }
    inputs = {"gradient of x": batch.x.grad, "gradient of c": batch.c.grad}
    return {"output": y.detach(), **inputs, **parameters}


def truth(setting: Setting, batch: Batch) -> Results:
    """The eager block in fp32 on the same numbers."""
    exact = dataclasses.replace(setting, dtype=MIXED)  # fp32 parameters
    fp32 = dataclasses.replace(
        batch, x=batch.x.detach().float().requires_grad_(), text=batch.text.float(),
        gradient=batch.gradient.float(),
    )  # fmt: skip
    block = make_peer("eager", exact, batch.x.device)
    found = results(block, fp32, dataclasses.replace(setting, dtype=PLAIN))  # without autocast
    return {name: x.detach() for name, x in found.items()}


# ---- measuring ----


def measure(
    setting: Setting, names: Sequence[str], device: torch.device, ceilings: timing.Ceilings,
    *, seconds: float, records: Sequence[Mapping[str, Any]] = (), mark: Mark = unmarked,
) -> Iterator[harness.Row]:  # fmt: skip
    """Rows of one setting, one per peer in `names`.

    They end behind those of a peer that took the device's context along: their extra has ENDED.

    Args:
        records: rows measured before; the attention's rate is looked for among them.
        mark: told of the rows to write should the process end in what comes next.
    """
    device_name = harness.hardware(device)["device"]

    def row(name: str, **more: Any) -> harness.Row:
        return harness.Row(
            name=OPERATOR, case=setting.preset, pack=setting.pack.name, dtype=setting.dtype,
            shape={"dim": setting.config.dim, "heads": setting.config.heads,
                   "tokens": setting.pack.tokens, "samples": len(setting.pack.grids),
                   "text_tokens": sum(setting.text_lengths)},
            work=setting.flops, ceiling=ceilings.matmul, sources=SOURCES, peer=name,
            backend=PEERS[name].backend, direction="forward+backward", **more,
        )  # fmt: skip

    def gone(these: Sequence[str], note: str = GONE) -> list[harness.Row]:
        return [row(n, status="failed", note=note, extra={ENDED: True}) for n in these]

    batch = Batch.draw(setting, device, 0)
    lacking = "eager gave no result to judge by"
    exact: Results | None = None
    same: Results | None = None
    mark(gone(names, f"eager in fp32, the truth, {GONE}"))()
    try:
        exact = truth(setting, batch)
    except refusals() as error:
        lacking = f"no truth to judge by: {reason(error)}"[:400]
        if lost(device):
            yield from gone(names, lacking)
            return
    usable: dict[str, torch.nn.Module] = {}
    for name in ("eager", *(n for n in names if n != "eager")):
        status, note = "measured", ""
        theirs = names if name == "eager" else [name]  # by eager all are judged
        mark(gone(theirs, f"{name} {GONE}"))()
        try:
            module = make_peer(name, setting, device)
            with for_any_pack(batch.tensors()) if PEERS[name].compiled else nullcontext():
                got = {key: x.detach() for key, x in results(module, batch, setting).items()}
            timing.synchronise(device)
        except Absent as why:
            status, note = "absent", str(why)
        except refusals() as error:
            status, note = "failed", reason(error)
            if lost(device):
                yield from gone(theirs, f"{name}: {note}")
                return
        else:
            if name == "eager":  # it comes first: what plain PyTorch makes of this precision
                same = got
            if same is None or exact is None:
                status, note = "failed", lacking
            else:
                verdict = judge(got, same, exact)
                if verdict.right:
                    usable[name] = module
                    continue
                status, note = "wrong", str(verdict)
        if name in names:
            yield row(name, status=status, note=note)
    del exact, same

    peaks: dict[str, int] = {}

    def time(calls: Mapping[str, timing.Call]) -> dict[str, timing.Timing]:
        peaks.update(
            {
                name: _peak_memory(run, calls[name], batch)
                for name, run in usable.items()
                if name in calls
            }
        )
        return timing.interleaved(calls, device, seconds=seconds)

    def call(module: torch.nn.Module) -> timing.Call:
        return (lambda i: None), (lambda state: step(module, batch, setting))

    chosen = [name for name in usable if name in names]
    calls = {name: call(usable[name]) for name in chosen}
    marks = {name: mark(gone([name])) for name in chosen}
    found = together(calls, time, marks, device)
    for name, note in found.failed.items():
        yield from (
            gone([name], note) if name == found.lost else [row(name, status="failed", note=note)]
        )
    predictions = {
        flag: expected(setting, ceilings, attention_rate(setting, records, device_name, flag))
        for flag in (False, True)
    }
    for name, timed in found.found.items():
        extra: dict[str, Any] = {"tokens_per_s": setting.pack.tokens / timed.median_ms * 1e3}
        extra |= predictions[PEERS[name].deterministic]
        if device.type == "cuda":
            extra["peak_memory_bytes"] = peaks[name]
            peak = named_peak(device_name)
            if peak is not None:
                extra["mfu"] = setting.flops / (timed.median_ms * 1e-3) / peak
        kind = PEERS[name]
        notes = [_SAVES if kind.saves else _REPEATS] if kind.backend == "torch" else []
        note = "; ".join([*notes, _ANY_PACK] if kind.compiled else notes)
        yield row(name, timing=timed, extra=extra, note=note)


def _peak_memory(module: torch.nn.Module, call: timing.Call, batch: Batch) -> int:
    """Bytes allocated at most during one call of a step, over those before it; 0 on a CPU."""
    device = batch.x.device
    if device.type != "cuda":
        return 0
    for x in (*module.parameters(), batch.x, batch.c):
        x.grad = None
    prepare, run = call
    state = prepare(0)  # marks whose it is
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(state)
    return torch.cuda.max_memory_allocated(device) - before
