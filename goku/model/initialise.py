"""Initial parameters, the same on every device and for every parallel layout (ours, after DiT).

Goku does not state its initialisation.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

# Zero at the start, as in DiT (adaLN-Zero): self-attention and FFN add nothing and the velocity is
# zero, whatever the depth. Cross-attention is not gated and starts at work: rotated queries against
# unrotated keys are the only way in which a token learns its absolute position, and with its output
# zeroed as in PixArt ten items were learned more slowly (docs/log.md, 2026-11-21).
_ZERO = (
    "norm1.linear.weight",
    "final.modulation.linear.weight",
    "final.proj.weight",
    "condition_embed.fc2.weight",  # given frames begin without effect: image-to-video starts as the base
)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Set every parameter of a `GokuTransformer` or `GokuBlock` from (seed, parameter name) alone.

    Gates, modulation, the head and the output of `FrameCondition` are zero; other weights are
    Xavier-uniform (the timestep MLP normal with std 0.02), biases zero, norm gains one. Drawn in
    fp32 on the CPU, so neither the device, the dtype nor torch's global generator has any influence,
    and adding blocks changes no other block.

    Raises:
        ValueError: `seed` is negative, or a parameter is on the meta device.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}: allowed are integers >= 0")
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory with to_empty first")
        parameter.copy_(initial_value(name, parameter, seed))


def initial_value(name: str, parameter: Tensor, seed: int) -> Tensor:
    """What `initialise` gives the parameter `name`: fp32 on the CPU, of `parameter`'s shape (alone
    used: it may be on the meta device)."""
    if parameter.dim() == 1:
        gain = name.endswith("weight")
        return torch.full(parameter.shape, 1.0 if gain else 0.0)
    if name.endswith(_ZERO):
        return torch.zeros(parameter.shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(parameter.shape, dtype=torch.float32)
    if name.startswith("time_embed."):
        return values.normal_(std=0.02, generator=generator)
    fan_out, fan_in = parameter.shape
    bound = math.sqrt(6 / (fan_in + fan_out))
    return values.uniform_(-bound, bound, generator=generator)
