"""Pictures and clips as files that everything shows: PNG by Pillow, H.264 MP4 by PyAV.

Media are uint8 `(T, H, W, 3)` arrays; T = 1 is a photograph and becomes PNG, T > 1 a clip, MP4.
"""

from __future__ import annotations

import hashlib
import io
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = [
    "Media",
    "check_media",
    "file_stem",
    "media_bytes",
    "mp4_bytes",
    "png_bytes",
    "save",
    "to_uint8",
]

Media = npt.NDArray[np.uint8]


def to_uint8(video: Any) -> Media:
    """A `(3, T, H, W)` video as `(T, H, W, 3)` uint8: uint8 stays, floats run from -1 to 1.

    Takes anything NumPy can view (a detached CPU tensor, an array).
    """
    x = np.asarray(video)
    if x.ndim != 4 or x.shape[0] != 3:
        raise ValueError(f"video of shape {x.shape}: must be (3, frames, height, width)")
    x = np.moveaxis(x, 0, -1)
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"video of dtype {x.dtype}: must be uint8 or floating in [-1, 1]")
    if not np.isfinite(x).all():
        raise ValueError("video holds non-finite values: it must be in [-1, 1]")
    return np.rint(np.clip(x.astype(np.float64) * 127.5 + 127.5, 0.0, 255.0)).astype(np.uint8)


def file_stem(name: str) -> str:
    """`name` (a path, an id, a prompt) as a file name that stays in its folder: letters, digits, dots, dashes.

    Names that differ only in what is replaced or cut get different stems, by a short hash.
    """
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip("._")
    return plain if plain and plain == name else f"{plain}_{digest}".lstrip("_")


def png_bytes(frame: npt.NDArray[np.uint8]) -> bytes:
    """One `(H, W, 3)` uint8 frame as PNG."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


def mp4_bytes(video: Media, *, fps: int = 10, crf: int = 16) -> bytes:
    """A `(T, H, W, 3)` uint8 clip as H.264 MP4 that browsers play (yuv420p).

    4:2:0 chroma needs even sides; an odd one repeats its last row or column.
    """
    check_media(video)
    height, width = video.shape[1:3]
    padded = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    out = io.BytesIO()
    try:
        with av.open(out, "w", format="mp4") as container:
            options = {"crf": str(crf), "preset": "medium"}
            stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
            stream.width, stream.height = padded.shape[2], padded.shape[1]
            stream.pix_fmt = "yuv420p"
            for picture in padded:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        # Some of these are no OSError, and a caller cannot be asked to know which.
        raise OSError(f"cannot encode {video.shape} as H.264: {error}") from error
    return out.getvalue()


def media_bytes(video: Media, *, fps: int = 10) -> tuple[str, bytes]:
    """(MIME type, bytes): PNG for one frame, MP4 for more."""
    check_media(video)
    if len(video) == 1:
        return "image/png", png_bytes(video[0])
    return "video/mp4", mp4_bytes(video, fps=fps)


def save(stem: Path, video: Media, *, fps: int = 10) -> Path:
    """Write `stem`.png or `stem`.mp4, whole or not at all, and return that path."""
    kind, data = media_bytes(video, fps=fps)
    path = stem.with_name(stem.name + (".png" if kind == "image/png" else ".mp4"))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(".partial-" + path.name)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_media(video: Media) -> None:
    """Raises ValueError unless `video` is uint8 (T, H, W, 3) without an empty side."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(
            f"media of shape {video.shape}, {video.dtype}: must be uint8 (frames, height, width, 3)"
        )
