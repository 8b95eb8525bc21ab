"""fuse and unfuse: exchange forwards and attention processors of a diffusers model, and put the
very same objects back.

A module's forward is replaced on the instance, so that classes, parameters, state_dict keys and
registered hooks of the module stay what they are; diffusers' own hooks work in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# The lines of diffusers whose blocks were read and compared; another one may compute otherwise.
TESTED_VERSIONS = ("0.42",)
SUPPORTED = ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel")

_BACKENDS = (None, "torch", "triton")
_ATTENTION_BACKENDS = (None, "torch", "triton", "cuda", "flash")
_RECORD = "_goku_fusion"
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Which backends the fused model's operators use, and whether attention is deterministic."""

    backend: str | None = None
    attention_backend: str | None = None
    deterministic: bool = False


@dataclass
class Swap:
    """One exchange: attribute `name` of `module`; `previous` is None where the class's own served."""

    module: nn.Module
    path: str
    name: str
    new: object
    previous: object | None = None


def fuse(
    model: nn.Module,
    *,
    backend: str | None = None,
    attention_backend: str | None = None,
    deterministic: bool = False,
) -> None:
    """Let a diffusers video transformer compute its blocks with Goku's operators, in place.

    Values and gradients stay equal up to rounding. Either everything is exchanged or, on an error,
    nothing. Parameters, state_dict keys and registered hooks stay; gradient checkpointing,
    LoRA layers and fuse_qkv_projections work as before.

    Args:
        model: a WanTransformer3DModel or HunyuanVideoTransformer3DModel, weights loaded, before
            FSDP, DDP, torch.compile or diffusers' hooks (offloading, caching) wrap it.
        backend: of every operator: None (the best there is), "torch" or "triton".
        attention_backend: of attention alone, also "cuda" or "flash"; None is `backend`.
        deterministic: attention with equal bits on every run, backward included.

    Raises:
        ValueError: a model or a setting that is not covered, named in the message; already fused.
        ImportError: diffusers is not installed.
    """
    for name, value, allowed in (
        ("backend", backend, _BACKENDS),
        ("attention_backend", attention_backend, _ATTENTION_BACKENDS),
    ):
        if value not in allowed:
            raise ValueError(f"fuse: {name} is {value!r}: allowed are {list(allowed)}")
    settings = Settings(
        backend, backend if attention_backend is None else attention_backend, deterministic
    )
    if is_fused(model):
        raise ValueError(f"fuse: this {type(model).__name__} is fused already: unfuse it first")
    swaps = _plan(model, settings)
    for swap in swaps:
        if "forward" in vars(swap.module):
            raise ValueError(
                f"fuse: the forward of {swap.path} is replaced on the instance, as hooks of "
                "diffusers and accelerate do: fuse first, and add hooks afterwards"
            )
    for swap in swaps:
        swap.previous = vars(swap.module).get(swap.name)
        setattr(swap.module, swap.name, swap.new)
    vars(model)[_RECORD] = swaps


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every forward and processor that it replaced is again the object it was.

    Raises:
        ValueError: the model is not fused, or something put over a fused forward since then (a hook
            of diffusers or accelerate, a new attention processor) has to be taken off first.
    """
    if not is_fused(model):
        raise ValueError(f"unfuse: this {type(model).__name__} is not fused")
    swaps: list[Swap] = vars(model)[_RECORD]
    for swap in swaps:
        if vars(swap.module).get(swap.name) is not swap.new:
            raise ValueError(
                f"unfuse: the {swap.name} of {swap.path} was replaced after fuse(): "
                "take that off first (hooks of diffusers and accelerate do so)"
            )
    for swap in swaps:
        if swap.previous is None:
            delattr(swap.module, swap.name)
        else:
            setattr(swap.module, swap.name, swap.previous)
    del vars(model)[_RECORD]


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has been applied to this model."""
    return _RECORD in vars(model)


@contextlib.contextmanager
def fused(model: nn.Module, **settings: Any) -> Iterator[None]:
    """`fuse(model, **settings)` for the length of a with block."""
    fuse(model, **settings)
    try:
        yield
    finally:
        unfuse(model)


def _plan(model: nn.Module, settings: Settings) -> list[Swap]:
    """What to exchange in this model, whose class must be one of diffusers' own."""
    import diffusers

    name = type(model).__name__
    if name not in SUPPORTED or type(model) is not getattr(diffusers, name, None):
        raise ValueError(
            f"fuse: the model is a {type(model).__module__}.{name}: supported are diffusers' "
            f"{' and '.join(SUPPORTED)}, themselves and not wrapped"
        )
    if not diffusers.__version__.startswith(tuple(f"{line}." for line in TESTED_VERSIONS)):
        raise ValueError(
            f"fuse: diffusers is {diffusers.__version__}: supported are {list(TESTED_VERSIONS)}"
        )
    check_active_backend()
    # Here, since both of them import this file.
    from . import hunyuan_video, wan

    return (wan if name == "WanTransformer3DModel" else hunyuan_video).plan(model, settings)


# ---- checks that every architecture uses ---------------------------------------------------------


def check_class(path: str, module: object, *allowed: type) -> None:
    """Raise ValueError unless `module` is exactly of one of the classes (a subclass may differ)."""
    if type(module) not in allowed:
        raise ValueError(
            f"fuse: {path} is a {type(module).__name__}: "
            f"covered is {' or '.join(cls.__name__ for cls in allowed)}"
        )


def check_skipped(path: str, module: nn.Module) -> None:
    """Check a module whose parameters are used but which is not called any more: no hooks on it."""
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(
            f"fuse: {path} has hooks, which a fused model does not run as before: remove them first"
        )


def check_norm(path: str, module: Any, allowed: type, parameters: Sequence[str]) -> None:
    """Check a norm that an operator computes: its class, which parameters it has, no hooks."""
    check_class(path, module, allowed)
    check_skipped(path, module)
    have = [name for name in ("weight", "bias") if getattr(module, name, None) is not None]
    if have != list(parameters):
        raise ValueError(f"fuse: {path} has the parameters {have}: covered are {list(parameters)}")
    check_eps(path, module.eps)


def check_eps(path: str, eps: object) -> None:
    """Raise ValueError unless eps is a number > 0 (torch's RMSNorm allows None)."""
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"fuse: {path}.eps is {eps!r}: covered are numbers > 0")


def check_processor(path: str, processor: object, allowed: type) -> None:
    """Check an attention processor: diffusers' own with torch's attention on one device."""
    check_class(path, processor, allowed)
    chosen = getattr(processor, "_attention_backend", None)
    if chosen not in (None, "native"):
        raise ValueError(
            f"fuse: {path} uses the attention backend {str(getattr(chosen, 'value', chosen))!r}: "
            "covered is 'native'; choose Goku's by attention_backend="
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(f"fuse: {path} has context parallelism enabled, which is not covered")


def check_active_backend() -> None:
    """Raise ValueError if diffusers is told, globally or by its context manager, to use another
    attention than torch's: the fused model would silently not follow.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active = _AttentionBackendRegistry.get_active_backend()[0]
    if active != AttentionBackendName.NATIVE:
        raise ValueError(
            f"diffusers' active attention backend is {active.value!r}: a fused model covers "
            "'native'; choose Goku's by fuse(attention_backend=...)"
        )


class FusedProcessor:
    """Base of the attention processors: refuses what diffusers sets on a processor later on."""

    @property
    def _attention_backend(self) -> None:
        return None

    @_attention_backend.setter
    def _attention_backend(self, value: object) -> None:
        if value is not None:
            raise ValueError(
                f"the model is fused, its attention backend cannot become {value!r}: unfuse it, or "
                "choose by fuse(attention_backend=...)"
            )

    @property
    def _parallel_config(self) -> None:
        return None

    @_parallel_config.setter
    def _parallel_config(self, value: object) -> None:
        if value is not None:
            raise ValueError("the model is fused, which does not cover context parallelism")


@dataclass
class FusedForward:
    """Base of the forwards: the module they belong to (deepcopy and pickle keep the two together)."""

    module: Any


# ---- rows of a dense batch -----------------------------------------------------------------------


def equal_segments(
    batch: int, length: int, device: torch.device, first: int | None = None
) -> torch.Tensor:
    """cu_seqlens of a dense batch, int32 (batch+1,): every sample has `length` rows.

    With `first`, each sample is two segments, its `first` rows and the others: (2*batch+1,).
    Computed on the device from sizes the host knows, so that nothing waits for a copy.
    """
    if batch * length > 2**31 - 1:
        raise ValueError(f"{batch} x {length} tokens: at most 2^31-1 are allowed")
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    if first is None:
        return starts
    pairs = torch.stack([starts[:-1], starts[:-1] + first], dim=1).flatten()
    return torch.cat([pairs, starts[-1:]])


def equal_grids(batch: int, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """grid_sizes (batch, 3) int32 of samples of one size, likewise made on the device."""
    sizes = [torch.full((batch,), n, dtype=torch.int32, device=device) for n in grid]
    return torch.stack(sizes, dim=1)
