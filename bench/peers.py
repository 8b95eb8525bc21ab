"""Other people's kernels, where they are installed: imported when asked for, never by name alone.

What cannot be imported is absent, with the error that said so. A peer that computes only a part of
an operator has the part in its name and is judged by that part.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Absent, Function, Inputs, Peer, Problem, needs_triton
from goku_kernels.peers import detect_apex

# What an installed but unusable package raises when it is imported: a missing part (ImportError),
# a library that cannot be loaded (OSError), a neighbour of another version (AttributeError), no GPU
# (RuntimeError).
_UNUSABLE = (ImportError, OSError, AttributeError, RuntimeError)


def load(module: str, name: str) -> Any:
    """`module.name`.

    Raises:
        Absent: it cannot be imported; the message is the import's error.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except _UNUSABLE as error:
        raise Absent(f"{module}.{name}: {type(error).__name__}: {error}") from error


def needs_cuda(device: torch.device) -> None:
    """Raise Absent unless `device` is a CUDA device."""
    if device.type != "cuda":
        raise Absent(f"it needs a CUDA device, this is {device.type}")


def _apex_norm() -> Any:
    apex = detect_apex()
    if apex.kind != "nvidia":
        raise Absent(str(apex))
    return load("apex.normalization", "FusedRMSNorm")


# Name and how it is found: `python -m bench peers` lists these.
LIBRARIES: dict[str, Callable[[], Any]] = {
    "torch varlen_attn": lambda: load("torch.nn.attention.varlen", "varlen_attn"),
    "cuDNN SDPA": lambda: load("torch.nn.attention", "SDPBackend").CUDNN_ATTENTION,
    "FlexAttention": lambda: load("torch.nn.attention.flex_attention", "flex_attention"),
    "flash-attn 2": lambda: load("flash_attn", "flash_attn_varlen_func"),
    "flash-attn 3": lambda: load("flash_attn_interface", "flash_attn_varlen_func"),
    "flash-attn 4": lambda: load("flash_attn.cute", "flash_attn_varlen_func"),
    "Liger RMSNorm": lambda: load("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"),
    "Liger rope": lambda: load("liger_kernel.ops.rope", "LigerRopeFunction"),
    "QuACK RMSNorm": lambda: load("quack.rmsnorm", "rmsnorm"),
    "apex FusedRMSNorm": _apex_norm,
    "TransformerEngine": lambda: load("transformer_engine.pytorch", "DotProductAttention"),
}


# What brings them, by the first word of the name; torch's own come with torch.
_BROUGHT_BY = {
    "flash-attn 2": "pip install flash-attn",
    "flash-attn 3": "the folder hopper/ of flash-attention's repository",
    "flash-attn 4": "pip install flash-attn-4",
    "Liger": "pip install liger-kernel",
    "QuACK": "pip install quack-kernels",
    "apex": "NVIDIA's repository; the package index has another apex",
    "TransformerEngine": "pip install transformer-engine[pytorch]",
}


def status() -> Iterator[tuple[str, str]]:
    """Every library and "present" or why it is absent and what brings it."""
    for name, find in LIBRARIES.items():
        try:
            find()
        except Absent as reason:
            brought = [how for start, how in _BROUGHT_BY.items() if name.startswith(start)]
            yield name, f"absent: {reason}" + "".join(f" ({how})" for how in brought)
        else:
            yield name, "present"


# ---- the norm alone, which is all that these libraries have of our memory-bound operators ----

Operands = Callable[[Inputs], list[tuple[Tensor, Tensor]]]
Norm = Callable[[Tensor, Tensor, float], Tensor]
Work = Callable[[Problem, str], float]


def traffic(forward: int, backward: int) -> Work:
    """Least bytes of a part that reads and writes so many (T, d) tensors of the tokens' dtype."""

    def work(problem: Problem, direction: str) -> float:
        shape = problem.shape
        width = shape["dim"] if "dim" in shape else shape["heads"] * shape["head_dim"]
        passes = backward if direction == "backward" else forward
        return passes * problem.pack.tokens * width * problem.dtype.itemsize

    return work


def rms_norms(operands: Operands, eps: float, count: int = 1) -> list[Peer]:
    """Peers that RMS-normalise rows with a gain and do no more.

    Args:
        operands: inputs -> (rows (T, d), gain (d,)) of each norm in the operator.
        eps: of the norm.
        count: how many norms.
    """

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        found = []
        for x, weight in operands(inputs):
            compute = torch.promote_types(x.dtype, torch.float32)
            # Some of them want the gain in x's dtype, and round its gradient to it.
            gain = weight.to(x.dtype).to(compute)
            y = F.rms_norm(x.to(compute), x.shape[-1:], gain, eps)
            found.append(y.to(x.dtype))
        return tuple(found)

    def peer(name: str, make_norm: Callable[[], Norm]) -> Peer:
        def make(problem: Problem, device: torch.device) -> Function:
            norm = make_norm()
            needs_cuda(device)
            return lambda inputs: tuple(norm(x, w, eps) for x, w in operands(inputs))

        # x read and y written; x and dy read and dx written
        return Peer(f"{name} only", make, reference=reference, work=traffic(2 * count, 3 * count))

    return [
        peer("Liger RMSNorm", _liger),
        peer("QuACK RMSNorm", _quack),
        peer("apex FusedRMSNorm", _apex),
        peer("TransformerEngine RMSNorm", _transformer_engine),
    ]


def _liger() -> Norm:
    function = LIBRARIES["Liger RMSNorm"]()
    # offset 0, rounding as Llama's, and not in place: that would overwrite the gradient it is given
    return lambda x, w, eps: function.apply(x, w.to(x.dtype), eps, 0.0, "llama", False)


def _quack() -> Norm:
    function = LIBRARIES["QuACK RMSNorm"]()
    return lambda x, w, eps: function(x, w, eps=eps)


def _apex() -> Norm:
    LIBRARIES["apex FusedRMSNorm"]()
    function = load("apex.normalization.fused_layer_norm", "fused_rms_norm_affine")
    return lambda x, w, eps: function(x, w.to(x.dtype), x.shape[-1:], eps)


def _transformer_engine() -> Norm:
    module = load("transformer_engine.pytorch", "RMSNorm")
    norms: dict[int, Any] = {}

    def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        if width not in norms:
            norms[width] = module(width, eps=eps, params_dtype=x.dtype, device=x.device)
        # The gain of the inputs instead of the module's own, so that its gradient is the one asked.
        return torch.func.functional_call(norms[width], {"weight": w.to(x.dtype)}, (x,))

    return norm


# ---- ours ----


def ours(eager: Function, fused: Function, *, compiled: bool = True) -> list[Peer]:
    """Our reference, torch.compile of it, and the Triton kernels.

    Args:
        eager: the operator in plain PyTorch.
        fused: the same with backend="triton".
        compiled: whether torch.compile has something to fuse.
    """

    def make_eager(problem: Problem, device: torch.device) -> Function:
        return eager

    def make_compiled(problem: Problem, device: torch.device) -> Function:
        compiled_function = torch.compile(lambda leaves, rest: eager(Inputs(leaves, rest)))

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            for x in (*inputs.leaves, *inputs.rest.values()):
                # Tokens and samples change from pack to pack; the width, all that a gain has, not.
                if isinstance(x, Tensor) and (x.dim() > 1 or not x.is_floating_point()):
                    torch._dynamo.maybe_mark_dynamic(x, 0)
            return compiled_function(inputs.leaves, dict(inputs.rest))

        return run

    def make_fused(problem: Problem, device: torch.device) -> Function:
        needs_triton(device)
        return fused

    peers = [Peer("eager", make_eager, backend="torch")]
    if compiled:
        peers.append(Peer("torch.compile", make_compiled, backend="torch"))
    return [*peers, Peer("goku triton", make_fused, backend="triton")]


def sample_by_sample(eager: Function, tokens: int, rows: int) -> Peer:
    """torch.compile of modulation with one row for all tokens, called for every sample.

    Its modulation's gradient is a sum over the sample's tokens, where the reference's is an
    index_add of every token onto the sample's row.

    Args:
        eager: the operator, shared (d,) modulation included.
        tokens: how many of the leaves, the first ones, have a row for every token.
        rows: how many of those that follow have one for every sample.
    """

    def make(problem: Problem, device: torch.device) -> Function:
        one = torch.compile(lambda leaves, rest: eager(Inputs(leaves, rest)))
        lengths = list(problem.pack.lengths)

        def run(inputs: Inputs) -> tuple[Tensor, ...]:
            many, others = inputs.leaves[:tokens], inputs.leaves[tokens + rows :]
            split = (*(x.split(lengths) for x in many),
                     *(x.unbind() for x in inputs.leaves[tokens : tokens + rows]))  # fmt: skip
            rest = {"cu_seqlens": None, "options": inputs.rest.get("options", {})}
            found = []
            for sample in zip(*split, strict=True):
                for x in sample[:tokens]:
                    torch._dynamo.maybe_mark_dynamic(x, 0)
                found.append(one((*sample, *others), rest))
            return tuple(torch.cat(x) for x in zip(*found, strict=True))

        return run

    return Peer("torch.compile, sample by sample", make, backend="torch")
