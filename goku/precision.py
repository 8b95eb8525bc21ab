"""Which dtype matrix products run in, on which hardware."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast", "autocast_dtype"]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: "auto" is bf16 where the hardware multiplies it (sm_80+, AVX512-BF16, AMX)."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if capable else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to `dtype` on `device`; nothing at all for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
