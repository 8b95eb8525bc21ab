"""Pictures and clips as files that everything shows: PNG by Pillow, H.264 MP4 by PyAV.

Media are uint8 `(T, H, W, 3)` arrays; T = 1 is a photograph and becomes PNG, T > 1 a clip, MP4. Both can say how they
were made: metadata is one JSON object, in PNG under the iTXt keyword "goku", in MP4 as `comment`, with the prompt as
`title`. It is the caller's duty to put nothing in it that changes from run to run: equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import uuid
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, PngImagePlugin

__all__ = [
    "Media",
    "check_media",
    "file_stem",
    "media_bytes",
    "mp4_bytes",
    "png_bytes",
    "read_metadata",
    "save",
    "to_uint8",
]

Media = npt.NDArray[np.uint8]

_KEYWORD = "goku"  # of PNG's text chunk
_ENCODER_THREADS = 4  # the stream depends on how many there are: never on the machine


def _encoder_parameters() -> dict[str, str]:
    """What keeps x264 from giving other bytes from one process to the next.

    Its AVX-512 code (of the rate control's macroblock tree) does: of the same frames, 48 to 192 pixels wide, 1 to 4 in
    10 processes wrote another stream (PyAV 18.1, FFmpeg 8.1.2). With AVX2 alone, which every processor with AVX-512
    has, all are equal, and equal to those of processors without AVX-512.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {"x264-params": "asm=avx2"} if re.search(r"\bavx512f\b", flags) else {}


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


def png_bytes(frame: npt.NDArray[np.uint8], *, metadata: Mapping[str, Any] | None = None) -> bytes:
    """One `(H, W, 3)` uint8 frame as PNG. metadata: what JSON can hold; ValueError for what it cannot."""
    out = io.BytesIO()
    info = None
    if metadata is not None:
        info = PngImagePlugin.PngInfo()
        info.add_itxt(_KEYWORD, _json(metadata))
    Image.fromarray(frame).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def mp4_bytes(
    video: Media, *, fps: int = 10, crf: int = 16, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """A `(T, H, W, 3)` uint8 clip as H.264 MP4 that browsers play (yuv420p).

    4:2:0 chroma needs even sides; an odd one repeats its last row or column. metadata: as in `png_bytes`.
    """
    check_media(video)
    if not 1 <= fps < 2**31:
        raise ValueError(f"fps is {fps}; allowed: 1 to 2**31 - 1")
    height, width = video.shape[1:3]
    padded = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    out = io.BytesIO()
    try:
        with av.open(out, "w", format="mp4") as container:
            if metadata is not None:
                container.metadata["comment"] = _json(metadata)
                # Players show it. It is a C string of UTF-8, which not every Python string can be.
                title = str(metadata.get("prompt", "")).replace("\0", " ")
                container.metadata["title"] = title.encode("utf-8", "replace").decode("utf-8")
            options = {"crf": str(crf), "preset": "medium", **_encoder_parameters()}
            stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
            stream.width, stream.height = padded.shape[2], padded.shape[1]
            stream.pix_fmt = "yuv420p"
            # What the conversion from RGB is. Without them players take HD for BT.709, and the colours shift.
            stream.codec_context.colorspace = Colorspace.ITU601
            stream.codec_context.color_range = ColorRange.MPEG
            stream.codec_context.color_primaries = ColorPrimaries.BT709
            stream.codec_context.color_trc = ColorTrc.BT709
            stream.codec_context.thread_count = _ENCODER_THREADS
            stream.codec_context.thread_type = "FRAME"  # slices would cost bytes
            for picture in padded:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        # Some of these are no OSError, and a caller cannot be asked to know which.
        raise OSError(f"cannot encode {video.shape} as H.264: {error}") from error
    return out.getvalue()


def media_bytes(
    video: Media, *, fps: int = 10, metadata: Mapping[str, Any] | None = None
) -> tuple[str, bytes]:
    """(MIME type, bytes): PNG for one frame, MP4 for more."""
    check_media(video)
    if len(video) == 1:
        return "image/png", png_bytes(video[0], metadata=metadata)
    return "video/mp4", mp4_bytes(video, fps=fps, metadata=metadata)


def save(
    stem: Path,
    video: Media,
    *,
    fps: int = 10,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write `stem`.png or `stem`.mp4, whole or not at all, and return that path.

    metadata: how it was made, for `read_metadata`; ValueError for what JSON cannot hold. overwrite: False keeps a file
    that is there, whoever writes it at the same time, and puts _2, _3, ... behind the stem; a kill just then may leave
    that name with an empty file.
    """
    kind, data = media_bytes(video, fps=fps, metadata=metadata)
    path = stem.with_name(stem.name + (".png" if kind == "image/png" else ".mp4"))
    path.parent.mkdir(parents=True, exist_ok=True)
    # One that replaces has the name to itself, and what a kill left of it; others may come for the same name.
    partial = path.with_name(f".partial-{path.name if overwrite else uuid.uuid4().hex}")
    try:
        partial.write_bytes(data)
        if overwrite:
            partial.replace(path)
        else:
            path = _put_beside(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _put_beside(partial: Path, path: Path) -> Path:
    """Renames to `path` or to the first free of its names with a number, and returns that."""
    free = path
    for number in itertools.count(2):
        try:
            free.touch(exist_ok=False)  # the name is ours: not every file system has links
            break
        except FileExistsError:
            free = path.with_stem(f"{path.stem}_{number}")
    try:
        partial.replace(free)
    except OSError:
        free.unlink()
        raise
    return free


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save` was told about the file at `path`.

    Raises ValueError for a file that is no PNG or MP4 or holds no such metadata, OSError where it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(8)
    try:
        if head == b"\x89PNG\r\n\x1a\n":
            with Image.open(path) as image:
                text = image.info.get(_KEYWORD)
        else:
            with av.open(str(path)) as container:
                text = container.metadata.get("comment")
    except (OSError, ValueError, SyntaxError, av.error.FFmpegError) as error:
        raise ValueError(f"{path} cannot be read as PNG or MP4: {error}") from error
    found = None
    if isinstance(text, str):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None  # another program's comment
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not say how it was made; files of `goku sample` do")
    return found


def _json(metadata: Mapping[str, Any]) -> str:
    # ASCII: no control character, and none that a container would cut or refuse. Without NaN, which is not JSON.
    return json.dumps(dict(metadata), ensure_ascii=True, allow_nan=False, sort_keys=True)


def check_media(video: Media) -> None:
    """Raises ValueError unless `video` is uint8 (T, H, W, 3) without an empty side."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(
            f"media of shape {video.shape}, {video.dtype}: must be uint8 (frames, height, width, 3)"
        )
