"""Where the time of a step goes: what the device did, by the operator that asked for it.

Kernels are told apart by the operators that launched them, not by their names: half of ours are called
forward_kernel, and a library's name says nothing of who called it. On a CPU, where operators do the
work themselves, it is their own time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType

PHASE = "step: "
"""With what the names of a step's own parts begin."""

# What an operator is counted as by how the name of any operator around it begins, the first that fits.
# Its beginning, since a node of the backward is named after the operator too: within the first of a
# block's, the whole block is computed again.
_OURS = {
    "goku_kernels::varlen_attention": "attention",
    "goku_kernels::qk_norm_rope": "QK-norm and RoPE",
    "goku_kernels::gated_residual_adaln": "adaLN and residuals",
    "goku_kernels::adaln_modulate": "adaLN and residuals",
    "goku_kernels::rectified_flow_noise": "noise and loss",
    "goku_kernels::velocity_loss": "noise and loss",
    f"{PHASE}noise": "noise and loss",
    f"{PHASE}loss": "noise and loss",
    f"{PHASE}clip": "clipping",
    f"{PHASE}optimizer": "AdamW",
    f"{PHASE}ema": "EMA",
}
# And then by its own name.
_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::matmul",
    "aten::linear",
)
_OTHERS = {
    "aten::gelu": "GELU", "aten::gelu_backward": "GELU",
    "aten::copy_": "casts and copies", "aten::_to_copy": "casts and copies",
    "aten::clone": "casts and copies", "aten::cat": "casts and copies",
}  # fmt: skip
IDLE, REST = "nothing", "everything else"
CATEGORIES = (
    "attention", "matrix products", "QK-norm and RoPE", "adaLN and residuals", "GELU",
    "casts and copies", "noise and loss", "AdamW", "EMA", "clipping", REST, IDLE,
)  # fmt: skip


def category(names: Iterable[str]) -> str:
    """What an operator's work is counted as, by its own name and those of the operators around it, inmost first."""
    around = list(names)
    for begin, found in _OURS.items():
        if any(name.startswith(begin) for name in around):
            return found
    if around and around[0] in _PRODUCTS:
        return "matrix products"
    return _OTHERS.get(around[0], REST) if around else REST


def where_time_goes(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by category, in the order of CATEGORIES, those of zero left out.

    On a GPU what is left of the time between the step's begin and end is IDLE: no kernel ran. Kernels here
    run on one stream, one after the other, so their times add up.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    # Events of the host alone would not show what the profiler itself costs there; on a GPU they show the device.
    with torch.profiler.profile(activities=kinds) as profile:
        began = time.perf_counter()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            total = begin.elapsed_time(end)
        else:
            step()
            total = 1e3 * (time.perf_counter() - began)
    spent = by_category(_work(profile.events(), device.type))
    spent[IDLE] = max(0.0, total - sum(spent.values()))
    return {name: round(spent[name], 4) for name in CATEGORIES if spent.get(name)}


def by_category(work: Iterable[tuple[list[str], float]]) -> dict[str, float]:
    """Sums of (names of an operator and those around it, milliseconds)."""
    spent: dict[str, float] = {}
    for names, ms in work:
        kind = category(names)
        spent[kind] = spent.get(kind, 0.0) + ms
    return spent


def _work(events: Iterable[Any], device_type: str) -> Iterator[tuple[list[str], float]]:
    """Of every operator of the host: the names around it and the milliseconds that are its own."""
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        if device_type == "cuda":
            # A range of ours has one more "kernel" of its own name: the range once more, as the device saw it.
            own = sum(k.duration for k in event.kernels if k.name != event.name)
        else:
            own = event.self_cpu_time_total
        if own:
            yield list(_around(event)), 1e-3 * own  # the profiler counts microseconds


def _around(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def shares(where: Mapping[str, float]) -> dict[str, float]:
    """Per cent of each category."""
    total = sum(where.values())
    return {name: 100 * ms / total for name, ms in where.items()} if total else {}
