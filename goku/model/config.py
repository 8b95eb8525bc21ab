"""Shape of the transformer: `ModelConfig`, the presets, the split of head channels over axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# goku's split of a head's channels over the axes t, h, w for its three head widths.
_PUBLISHED_AXES = {64: (16, 24, 24), 72: (24, 24, 24), 128: (44, 42, 42)}


def split_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head given to (t, h, w): even, at least 2 each, adding up to `head_dim`.

    64, 72 and 128 follow Goku. For other widths the rule is ours: h and w get the largest even
    number
    not over a third, t the rest: 32 -> (12, 10, 10), 48 -> (16, 16, 16).

    Raises:
        ValueError: `head_dim` is odd or below 6.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}: allowed are even integers >= 6")
    if head_dim in _PUBLISHED_AXES:
        return _PUBLISHED_AXES[head_dim]
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a `GokuTransformer`, validated at construction.

    The defaults of mlp_ratio, text_dim, qk_norm and eps are Goku's (arXiv 2502.04896 and the block
    its authors published); those of patch, rope_theta and time_channels are ours, as in DiT and
    FLUX.

    Attributes:
        dim: width of the residual stream.
        depth: number of blocks.
        heads: attention heads; dim / heads is the head width, even and at least 6.
        mlp_ratio: inner width of the FFN over dim.
        text_dim: width of the text embeddings (FLAN-T5-XL: 2048).
        latent_channels: channels of the VAE's latents.
        patch: latent cells (t, h, w) that make one token.
        axes_dim: channels of a head rotated by t, h and w; None for `split_axes(head_dim)`.
        rope_theta: RoPE base.
        qk_norm: RMSNorm of queries and keys over the "full" width, each "head", or "none".
        eps: of every norm.
        time_channels: width of the sinusoidal timestep features, even.
        condition: "frames" adds the inputs of image-to-video (`FrameCondition`), which every forward
            then takes; "none" has no such parameters.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    text_dim: int = 2048
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    axes_dim: tuple[int, int, int] | None = None
    rope_theta: float = 10000.0
    qk_norm: Literal["full", "head", "none"] = "full"
    eps: float = 1e-6
    time_channels: int = 256
    condition: Literal["none", "frames"] = "none"

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "text_dim", "latent_channels", "time_channels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: allowed are integers >= 1")
        if self.dim % self.heads:
            raise ValueError(f"heads is {self.heads}: allowed are divisors of dim = {self.dim}")
        if self.time_channels % 2:
            raise ValueError(f"time_channels is {self.time_channels}: allowed are even integers")
        for name in ("mlp_ratio", "rope_theta", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}: allowed are numbers > 0")
        if not (self.mlp_ratio * self.dim).is_integer():
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio}: mlp_ratio * dim must be whole, dim is {self.dim}"
            )
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"patch is {self.patch}: allowed are 3 integers >= 1 (t, h, w)")
        if self.qk_norm not in ("full", "head", "none"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}: allowed are 'full', 'head', 'none'")
        if self.condition not in ("none", "frames"):
            raise ValueError(f"condition is {self.condition!r}: allowed are 'none', 'frames'")
        axes = split_axes(self.head_dim) if self.axes_dim is None else self.axes_dim
        if len(axes) != 3 or any(n < 0 or n % 2 for n in axes) or sum(axes) != self.head_dim:
            raise ValueError(
                f"axes_dim is {axes}: allowed are 3 even integers >= 0 that add up to the head "
                f"width {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        """Inner width of the FFN."""
        return int(self.mlp_ratio * self.dim)

    @property
    def patch_dim(self) -> int:
        """Numbers in one token of the input: latent channels times cells of a patch."""
        t, h, w = self.patch
        return self.latent_channels * t * h * w

    @property
    def condition_dim(self) -> int:
        """Numbers that a token is given: latent channels and a mask, times cells of a patch; 0 without
        a condition."""
        t, h, w = self.patch
        return (self.latent_channels + 1) * t * h * w if self.condition == "frames" else 0

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """`axes_dim`, or its default for this head width."""
        return split_axes(self.head_dim) if self.axes_dim is None else self.axes_dim


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementation of the `goku_kernels` operators a model calls; part of no weight.

    Attributes:
        backend: "auto" takes the fused Triton kernels where they can run (a CUDA device, fp16, bf16
            or fp32, a supported head width) and the eager reference elsewhere; "triton" and "torch"
            insist on one.
        deterministic: equal bits on every run, attention's backward included, which then takes seven
            matrix products where it takes five without (on sm_90); the reference and flash-attn on a
            GPU then take their slower ways too.
    """

    backend: Literal["auto", "triton", "torch"] = "auto"
    deterministic: bool = True

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "triton", "torch"):
            raise ValueError(
                f"backend is {self.backend!r}: allowed are 'auto', 'triton' and 'torch'"
            )

    @property
    def operator_backend(self) -> str | None:
        """The `backend` argument of the operators."""
        return None if self.backend == "auto" else self.backend


# The three models of Goku, table 1 ("tiny" ones are ours, for CPUs and tests).
PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "goku-1b": ModelConfig(dim=1152, depth=28, heads=16),
        "goku-2b": ModelConfig(dim=1792, depth=28, heads=28),
        "goku-8b": ModelConfig(dim=3072, depth=40, heads=48),
        "tiny": ModelConfig(dim=192, depth=6, heads=6, text_dim=128),
        "tiny-test": ModelConfig(dim=48, depth=2, heads=2, text_dim=24, latent_channels=4),
    }
)
