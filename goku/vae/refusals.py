"""Which VAEs of diffusers cannot be used here, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

_IMAGES = "it encodes images alone, frame by frame, without a stride in time"
_AUDIO = "it encodes sound"

_REASONS = {
    "AsymmetricAutoencoderKL": _IMAGES,
    "AutoencoderDC": "it encodes images alone, 32x32 pixels to a latent position",
    "AutoencoderKL": _IMAGES,
    "AutoencoderKLAllegro": "it has 4 latent channels, in blocks of 24 frames that overlap",
    "AutoencoderKLCosmos": "its strides (t, h, w) are 8x8x8",
    "AutoencoderKLFlux2": _IMAGES,
    "AutoencoderKLHunyuanImage": _IMAGES,
    "AutoencoderKLHunyuanImageRefiner": "it refines images, not videos",
    "AutoencoderKLHunyuanVideo15": "its strides (t, h, w) are 4x16x16, with 32 latent channels",
    "AutoencoderKLLTX2Video": "its strides (t, h, w) are 8x32x32, with 128 latent channels",
    "AutoencoderKLLTX2Audio": _AUDIO,
    "AutoencoderKLLTXVideo": "its strides (t, h, w) are 8x32x32, with 128 latent channels",
    "AutoencoderKLMagvit": "its chunks and its scaling were never checked here",
    "AutoencoderKLMochi": "its strides (t, h, w) are 6x8x8, with 12 latent channels",
    "AutoencoderKLQwenImage": "its weights are for images alone",
    "AutoencoderKLTemporalDecoder": "it encodes frame by frame, without a stride in time",
    "AutoencoderOobleck": _AUDIO,
    "AutoencoderTiny": _IMAGES,
    "ConsistencyDecoderVAE": _IMAGES,
    "VQModel": "its latents are discrete",
}


def reason(name: str, known: Iterable[str]) -> str:
    """Why a folder whose `_class_name` is `name` is refused, and what is allowed."""
    why = _REASONS.get(name, "it is not known here")
    return f"_class_name = {name!r}: {why}; allowed: GokuVAE, {', '.join(sorted(known))}"
