"""The sizes that a model was trained on: what a request takes from them, and what is done and said beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from goku.requests import Request, RequestDefaults
from goku.trained import Trained

__all__ = ["beyond_limits", "position_scale", "request_defaults"]


def position_scale(
    grid: tuple[int, int, int], limits: tuple[int, int, int] | None
) -> tuple[float, float, float]:
    """Factors of RoPE's positions (t, h, w) that put a grid's last position where the largest trained one was.

    1 on an axis within the limits, and where training saw a single position and so no scale; (limit - 1) / (size - 1)
    beyond. The rule is position interpolation (Chen et al., arXiv 2306.15595); using it on axes of video is ours.
    """
    if limits is None:
        return (1.0, 1.0, 1.0)
    scales = [
        (limit - 1) / (size - 1) if size > limit > 1 else 1.0
        for size, limit in zip(grid, limits, strict=True)
    ]
    return (scales[0], scales[1], scales[2])


def beyond_limits(
    request: Request,
    limits: tuple[int, int, int] | None,
    area: int | None = None,
    *,
    scaled: bool = True,
) -> str | None:
    """A line that says how a request exceeds the trained sizes and what RoPE makes of it; None when it does not.

    limits, area: as in `Trained`. The area alone is exceeded by a square where both shapes, wide and high, were trained
    on: no position is new, so none is scaled.
    """
    if limits is None:
        return None
    t, h, w = limits
    said = f"{request.height} x {request.width}, {request.frames} frames: "
    tokens = request.grid[1] * request.grid[2]
    if all(size <= most for size, most in zip(request.grid, limits, strict=True)):
        if area is None or tokens <= area:
            return None
        return f"{said}{tokens} tokens in a frame, beyond the trained {area}"
    line = f"{said}beyond the trained {16 * h} x {16 * w}, {4 * (t - 1) + 1}"
    if not scaled:
        return f"{line}; RoPE positions as they are"
    scale = position_scale(request.grid, limits)
    named = list(zip("thw", scale, request.grid, limits, strict=True))
    parts = [f"{name} {factor:.2f}" for name, factor, *_ in named if factor != 1]
    line += f"; RoPE positions scaled by {', '.join(parts)}" if parts else ""
    single = [name for name, _, size, most in named if size > most == 1]
    if single:
        line += f"; not along {', '.join(single)}, where training had one position"
    return line


def request_defaults(
    about: Trained,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    seed: int = 0,
    negative: str = "",
    given: Mapping[int, Path | Tensor] | None = None,
) -> RequestDefaults:
    """What a request to this model has where nothing says it, so that by default nothing lies beyond training.

    Without a size: the area that images, or clips, were trained in, in the shape of the given image, else in that of
    the largest trained grid; less of it where a side would be beyond that grid's, as of a portrait after training on
    landscapes alone: it keeps its shape, and no position is new. frames: of every request; None is an image, or the
    trained length where frames are given.
    """
    pixels, image_pixels, shape, length = about.pixels, about.image_pixels, (1, 1), None
    sides: tuple[int, int] | None = None
    if about.limits is not None:
        t, h, w = about.limits
        shape, length = (h, w), 4 * (t - 1) + 1
        sides = (16 * h, 16 * w)
        # Sources that were smaller than the budget were not enlarged.
        most = 256 * (h * w if about.area is None else about.area)
        pixels, image_pixels = min(pixels, most), min(image_pixels, most)
    return RequestDefaults(
        height=height,
        width=width,
        pixels=pixels,
        image_pixels=image_pixels,
        shape=shape,
        most=sides,
        frames=1 if frames is None else frames,
        given_frames=length if frames is None else None,
        seed=seed,
        negative=negative,
        given=given or {},
    )
