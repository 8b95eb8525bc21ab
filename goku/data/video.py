"""Video by PyAV; the rules are in `goku.data.decode`."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from goku.data.config import DataConfig
from goku.data.errors import DecodeError
from goku.data.manifest import Record
from goku.data.media import Decoded, Media, plan_record
from goku.data.transform import Geometry, apply, square_pixels

# Only these containers, only local files: a text file that FFmpeg would take for a playlist cannot
# make it open other files or the network.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264",
    "protocol_whitelist": "file",
}


def decode_video(record: Record, config: DataConfig) -> Decoded:
    """(T, H, W, 3) pixels of a clip, T = 4k+1. Raises DecodeError."""
    crops: list[npt.NDArray[np.uint8]] = []
    geometry: Geometry | None = None
    try:
        with _open_video(record.path) as container:
            stream = _video_stream(container, record.path)
            wanted = config.max_frames
            previous: VideoFrame | None = None
            for frame in _selected(record, config, stream, _frames(container, stream, record)):
                if frame is previous:
                    crops.append(crops[-1])
                else:
                    image = _upright(frame, stream, record.path)
                    if geometry is None:
                        geometry = plan_record(record, config, image.height, image.width, 1)
                    crops.append(apply(image, geometry))
                    previous = frame
                if len(crops) == wanted:
                    break
            facts = _header_facts(container, stream)
    except av.FFmpegError as error:
        raise DecodeError(record.path, f"not a readable video: {error.strerror}") from error
    if geometry is None:
        raise DecodeError(record.path, "no frame could be decoded")
    geometry = plan_record(
        record, config, geometry.source_height, geometry.source_width, len(crops)
    )
    media = Media(geometry, len(crops), *facts, exact=True)
    return Decoded(np.stack(crops[: geometry.frames]), media)


def probe_video(record: Record, config: DataConfig) -> Media:
    """As `decode_video`, from the headers and the first frame alone."""
    try:
        with _open_video(record.path) as container:
            stream = _video_stream(container, record.path)
            frame = next(_frames(container, stream, record), None)
            if frame is None:
                raise DecodeError(record.path, "no frame could be decoded")
            image = _upright(frame, stream, record.path)
            facts = _header_facts(container, stream)
    except av.FFmpegError as error:
        raise DecodeError(record.path, f"not a readable video: {error.strerror}") from error
    total, rate, _ = facts
    available = total - record.start_frame
    if record.num_frames is not None:
        if record.num_frames > available:
            raise _too_short(record, total)
        available = record.num_frames
    if available < 1:
        raise _too_short(record, total)
    if config.fps is not None and rate:
        available = int((available - 1) / rate * config.fps + 1e-6) + 1
    selected = min(available, config.max_frames)
    geometry = plan_record(record, config, image.height, image.width, selected)
    return Media(geometry, selected, *facts, exact=False)


def _open_video(path: str) -> InputContainer:
    return av.open(path, options=dict(_OPEN_OPTIONS))


def _video_stream(container: InputContainer, path: str) -> VideoStream:
    if not container.streams.video:
        raise DecodeError(path, "has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DecodeError(path, "its video codec is not known to this FFmpeg")
    # One thread a file: the workers are the parallelism, and errors come with their own frame.
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    size = Path(path).stat().st_size
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > size:
        raise DecodeError(path, f"truncated: its index needs {end} bytes, the file has {size}")
    return stream


def _frames(container: InputContainer, stream: VideoStream, record: Record) -> Iterator[VideoFrame]:
    """Every frame in display order; checks size, damage and (at the end) the declared duration."""
    size: tuple[int, int] | None = None
    last: VideoFrame | None = None
    number = 0
    decoded = container.decode(stream)
    while True:
        try:
            frame = next(decoded, None)
        except av.FFmpegError as error:
            reason = f"corrupt video: {error.strerror} (after {number} good frames)"
            raise DecodeError(record.path, reason) from error
        if frame is None:
            break
        if frame.is_corrupt:
            raise DecodeError(record.path, f"corrupt video: frame {number} is damaged")
        size = size or (frame.height, frame.width)
        if (frame.height, frame.width) != size:
            raise DecodeError(
                record.path,
                f"the frame size changes from {size[0]}x{size[1]} to "
                f"{frame.height}x{frame.width} at frame {number}",
            )
        last = frame
        number += 1
        yield frame
    declared = _declared_seconds(stream)
    if declared is None or last is None or last.pts is None or last.time_base is None:
        return
    start = (stream.start_time or 0) * (stream.time_base or Fraction(0))
    rate = stream.average_rate or Fraction(1)
    # Two frames of slack: muxers differ in whether the last frame's own duration counts.
    missing = declared - float(last.pts * last.time_base - start + 3 / rate)
    if missing > 0:
        raise DecodeError(
            record.path,
            f"truncated: {declared:.3f} s are declared, the frames end "
            f"{missing + 2 / float(rate):.3f} s earlier",
        )


def _declared_seconds(stream: VideoStream) -> float | None:
    """A Matroska track's DURATION tag: it has no complete index to check a truncated file by."""
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _selected(
    record: Record, config: DataConfig, stream: VideoStream, frames: Iterator[VideoFrame]
) -> Iterator[VideoFrame]:
    """The record's range, resampled to config.fps; DecodeError when the range is not all there."""
    last = None if record.num_frames is None else record.start_frame + record.num_frames
    if config.fps is None:
        chosen = _ranged(record, frames, last)
    else:
        chosen = _resampled(record, Fraction(config.fps), _ranged(record, frames, last))
    yield from chosen


def _ranged(record: Record, frames: Iterator[VideoFrame], last: int | None) -> Iterator[VideoFrame]:
    count = 0
    for frame in frames:
        if count >= record.start_frame:
            yield frame
        count += 1
        if count == last:
            return
    if last is not None or count <= record.start_frame:
        raise _too_short(record, count)


def _resampled(record: Record, fps: Fraction, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    held: VideoFrame | None = None
    begin = held_at = Fraction(0)
    output = 0
    slack = Fraction(0)
    for number, frame in enumerate(frames, start=record.start_frame):
        if frame.pts is None or frame.time_base is None:
            raise DecodeError(record.path, f"frame {number} has no timestamp, which fps needs")
        at = frame.pts * frame.time_base
        if held is None:
            begin, slack = at, frame.time_base / 2
        elif at <= held_at:
            raise DecodeError(record.path, f"timestamps do not increase at frame {number}")
        while held is not None and begin + output / fps + slack < at:
            yield held
            output += 1
        held, held_at = frame, at
    while held is not None and begin + output / fps <= held_at + slack:
        yield held
        output += 1


def _upright(frame: VideoFrame, stream: VideoStream, path: str) -> Image.Image:
    """RGB with square pixels, rotated as the display matrix says."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    height, width = square_pixels(image.height, image.width, aspect)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if frame.rotation % 90:
        raise DecodeError(path, f"is rotated by {frame.rotation} degrees; only 90, 180, 270 can be")
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    turn = turns.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)


def _header_facts(container: InputContainer, stream: VideoStream) -> tuple[int, float, float]:
    """(frames, frames per second, seconds) as the headers state them; 0 where they do not."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    seconds = 0.0
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif (declared := _declared_seconds(stream)) is not None:
        seconds = declared
    elif container.duration is not None:
        seconds = container.duration / av.time_base
    frames = stream.frames or round(seconds * rate)
    return frames, rate, seconds


def _too_short(record: Record, count: int) -> DecodeError:
    if record.num_frames is None:
        wanted = f"frames from {record.start_frame} on"
    else:
        wanted = f"frames {record.start_frame} to {record.start_frame + record.num_frames - 1}"
    return DecodeError(record.path, f"too short: {wanted} were asked for, the file has {count}")
