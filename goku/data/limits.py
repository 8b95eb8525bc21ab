"""Which sound items a run's limits leave out, and in which words."""

from __future__ import annotations

from goku.data.config import DataConfig
from goku.data.latents import Plan
from goku.data.record import Record


def dropped_by_suffix(record: Record, config: DataConfig, source: str) -> str | None:
    """Why the record is left out before it is looked at (its kind has no weight in the mix), or None."""
    return _without_weight("image" if record.is_image else "video", config, source)


def dropped_by_limits(record: Record, plan: Plan, config: DataConfig, source: str) -> str | None:
    """Why an item that decodes to `plan` is left out, or None: the source's pixels (upright, before resizing), its
    frames (at config.fps, within its range), and a clip of one usable frame where images have no weight."""
    geometry = plan.geometry
    height, width = geometry.source_height, geometry.source_width
    least = config.min_image_pixels if record.is_image else config.min_video_pixels
    name = "min_image_pixels" if record.is_image else "min_video_pixels"
    if height * width < least:
        return f"{height} x {width} = {height * width:,} pixels, fewer than {name} = {least:,}"
    if not record.is_image and plan.selected_frames < config.min_frames:
        return f"{plan.selected_frames} frames, fewer than min_frames = {config.min_frames}"
    return _without_weight("image" if geometry.frames == 1 else "video", config, source)


def _without_weight(modality: str, config: DataConfig, source: str) -> str | None:
    if config.mix is None:
        return None
    weights = config.mix.get(source)
    if weights is not None and getattr(weights, modality) > 0:
        return None
    return f"mix.{source} gives {modality}s no weight"
