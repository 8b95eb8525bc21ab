"""Video by PyAV; the rules are in `goku.data.decode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from goku.data.config import DataConfig
from goku.data.errors import DecodeError
from goku.data.media import (
    Decoded,
    Media,
    check_pixels,
    plan_record,
    size_remarks,
)
from goku.data.media_source import media_size, misnamed, open_media
from goku.data.record import Record
from goku.data.transform import Geometry, apply, square_pixels

# Only these containers, only local files: a text file that FFmpeg would take for a playlist cannot
# make it open other files or the network.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,h264",
    "protocol_whitelist": "file",
}
# How much before its timestamp a frame may be shown when clips are resampled, in frames of the source or the output,
# whichever are shorter. Near a half, so that clocks that round and NTSC's 23.976 for 24 drop and double nothing; not a
# half, where every second output of a rate doubled would lie between two frames, and rounding would decide.
EARLY = Fraction(7, 16)
# A title in Latin-1 or GBK, which old AVI files have, is none of the pixels' business.
_METADATA_ERRORS = "replace"


def decode_video(record: Record, config: DataConfig) -> Decoded:
    """(T, H, W, 3) pixels of a clip, T = 4k+1. Raises DecodeError."""
    crops: list[npt.NDArray[np.uint8]] = []
    geometry: Geometry | None = None
    try:
        with _open_video(record) as container:
            stream = _video_stream(container, record, config)
            wanted = config.max_frames
            previous: VideoFrame | None = None
            seen = _Seen()
            frames = seen.all(_frames(container, stream, record))
            for frame in _selected(record, config, frames):
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
            remarks = seen.remarks(config, stream.frames)
    except av.FFmpegError as error:
        raise _unreadable(record, error) from error
    if geometry is None:
        raise DecodeError(record.path, "no frame could be decoded")
    geometry = plan_record(
        record, config, geometry.source_height, geometry.source_width, len(crops)
    )
    remarks = (*remarks, *size_remarks(geometry))
    if geometry.frames == 1:
        remarks = (*remarks, f"has {len(crops)} usable frames: trained as an image")
    media = Media(geometry, len(crops), *facts, exact=True, remarks=remarks)
    return Decoded(np.stack(crops[: geometry.frames]), media)


def probe_video(record: Record, config: DataConfig) -> Media:
    """As `decode_video`, from the headers and the first frame alone."""
    try:
        with _open_video(record) as container:
            stream = _video_stream(container, record, config)
            frame = next(_frames(container, stream, record), None)
            if frame is None:
                raise DecodeError(record.path, "no frame could be decoded")
            image = _upright(frame, stream, record.path)
            facts = _header_facts(container, stream)
    except av.FFmpegError as error:
        raise _unreadable(record, error) from error
    total, rate, _ = facts
    available = total - record.start_frame
    if record.num_frames is not None:
        if record.num_frames > available and not record.at_most:
            raise _too_short(record, total)
        available = min(record.num_frames, available)
    if available < 1:
        raise _too_short(record, total)
    if config.fps is not None and rate:
        frames = config.fps / rate  # outputs a source frame
        available = int((available - 1) * frames + EARLY * min(frames, 1) + 1e-6) + 1
    if config.max_seconds is not None and (config.fps or rate):
        available = min(available, int(config.max_seconds * (config.fps or rate) + 1e-6) + 1)
    selected = min(available, config.max_frames)
    geometry = plan_record(record, config, image.height, image.width, selected)
    return Media(geometry, selected, *facts, exact=False)


@contextmanager
def _open_video(record: Record) -> Iterator[InputContainer]:
    options = dict(_OPEN_OPTIONS)
    if record.member is None:
        with av.open(record.path, options=options, metadata_errors=_METADATA_ERRORS) as container:
            yield container
        return
    with (
        open_media(record) as window,
        av.open(window, mode="r", options=options, metadata_errors=_METADATA_ERRORS) as container,
    ):
        yield container


def _unreadable(record: Record, error: av.FFmpegError) -> DecodeError:
    reason = misnamed(record, "video") or error.strerror
    return DecodeError(record.path, f"not a readable video: {reason}")


def _video_stream(container: InputContainer, record: Record, config: DataConfig) -> VideoStream:
    path = record.path
    # A song's cover is a stream of one picture.
    found = [
        each for each in container.streams.video if not each.disposition & Disposition.attached_pic
    ]
    if not found:
        raise DecodeError(path, "has no video stream")
    stream = found[0]
    if stream.codec_context is None:
        raise DecodeError(path, "its video codec is not known to this FFmpeg")
    # One thread a file: the workers are the parallelism, and errors come with their own frame.
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}
    check_pixels(record, config, stream.codec_context.height, stream.codec_context.width)
    size = media_size(record)
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
    # The last frame is shown for as long as its packet says, seconds at the end of slides; a rate is what the header
    # makes of a default duration, which remuxed files have wrong.
    shown = max((last.duration or 0) * last.time_base, 1 / rate)
    missing = declared - float(last.pts * last.time_base - start + shown)
    # Two frames of slack: muxers differ in whether the last frame's own duration counts.
    if missing > 2 / rate:
        raise DecodeError(
            record.path,
            f"truncated: {declared:.3f} s are declared, the frames end {missing:.3f} s earlier",
        )


def _declared_seconds(stream: VideoStream) -> float | None:
    """A Matroska track's DURATION tag: it has no complete index to check a truncated file by."""
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


class _Seen:
    """What the frames of one file tell beside their pixels."""

    def __init__(self) -> None:
        self.first: VideoFrame | None = None
        self._at: Fraction | None = None
        self._shortest: Fraction | None = None
        self._longest = Fraction(0)
        self._count = self._untimed = 0
        self._ended = False

    def all(self, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
        """The same frames, looked at."""
        for frame in frames:
            self.first = self.first or frame
            self._count += 1
            self._untimed += frame.pts is None
            at = None
            if frame.pts is not None and frame.time_base is not None:
                at = frame.pts * frame.time_base
            if at is not None and self._at is not None:
                self._longest = max(self._longest, at - self._at)
                self._shortest = min(self._shortest or at - self._at, at - self._at)
            self._at = at
            yield frame
        self._ended = True

    def remarks(self, config: DataConfig, stored: int) -> tuple[str, ...]:
        """One sentence for each thing that is not as in a plain file. stored: frames as the header states them."""
        frame = self.first
        if frame is None:
            return ()
        found = []
        bits = max((part.bits for part in frame.format.components), default=8)
        if bits > 8:
            found.append(f"{bits}-bit ({frame.format.name}) converted to 8 bits")
        if len(frame.format.components) == 1:
            found.append(f"grey ({frame.format.name}) converted to RGB")
        if frame.rotation % 360:
            found.append(f"its rotation flag was applied: turned by {frame.rotation} degrees")
        tick = frame.time_base or Fraction(0)
        if frame.pts is not None and frame.pts < 0:
            found.append(f"negative timestamps: begins at {float(frame.pts * tick):.3f} s")
        if self._untimed:
            found.append(f"{self._untimed} frames without a timestamp (or a negative one)")
        if self._ended and self._count < stored:
            hidden = stored - self._count
            found.append(
                f"{hidden} of {stored} frames lie before its start (negative timestamps) and are not shown"
            )
        shortest = self._shortest
        # Containers round timestamps to their clock: 24 fps in milliseconds is 41 and 42.
        if shortest is not None and self._longest > max(shortest + 2 * tick, shortest * 21 / 20):
            spread = f"{1000 * float(shortest):.1f} to {1000 * float(self._longest):.1f} ms a frame"
            what = (
                "taken as they come" if config.fps is None else f"resampled to {config.fps:g} fps"
            )
            found.append(f"variable frame rate ({spread}), {what}")
        rate = self._rate()
        # 23.976 for 24 doubles one frame in a thousand.
        if config.fps is not None and rate is not None and rate < 0.99 * config.fps:
            found.append(
                f"has {rate:.3g} frames a second, fewer than data.fps {config.fps:g}: frames are repeated"
            )
        return tuple(found)

    def _rate(self) -> float | None:
        """Frames a second of what was seen; None where timestamps do not tell."""
        first = self.first
        if self._at is None or first is None or first.pts is None or first.time_base is None:
            return None
        seconds = self._at - first.pts * first.time_base
        return None if seconds <= 0 else float((self._count - 1) / seconds)


def _selected(
    record: Record, config: DataConfig, frames: Iterator[VideoFrame]
) -> Iterator[VideoFrame]:
    """The record's range, resampled to config.fps and cut at config.max_seconds; DecodeError when
    the range is not all there."""
    last = None if record.num_frames is None else record.start_frame + record.num_frames
    chosen = _ranged(record, frames, last)
    if config.fps is not None:
        chosen = _resampled(record, Fraction(config.fps), chosen)
    begin: Fraction | None = None
    for number, frame in enumerate(chosen):
        if config.max_seconds is not None and config.fps is not None:
            if number > config.max_seconds * config.fps + 1e-6:
                return
        elif config.max_seconds is not None:
            if frame.pts is None or frame.time_base is None:
                reason = f"frame {number} has no timestamp, which max_seconds needs"
                raise DecodeError(record.path, reason)
            at = frame.pts * frame.time_base
            begin = at if begin is None else begin
            if at - begin > config.max_seconds + frame.time_base / 2:
                return
        yield frame


def _ranged(record: Record, frames: Iterator[VideoFrame], last: int | None) -> Iterator[VideoFrame]:
    count = 0
    for frame in frames:
        if count >= record.start_frame:
            yield frame
        count += 1
        if count == last:
            return
    if (last is not None and not record.at_most) or count <= record.start_frame:
        raise _too_short(record, count)


def _resampled(record: Record, fps: Fraction, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    held: VideoFrame | None = None
    begin = held_at = Fraction(0)
    output = 0
    early = EARLY / fps
    for number, frame in enumerate(frames, start=record.start_frame):
        if frame.pts is None or frame.time_base is None:
            raise DecodeError(record.path, f"frame {number} has no timestamp, which fps needs")
        at = frame.pts * frame.time_base
        if held is None:
            begin = at
        elif at <= held_at:
            raise DecodeError(record.path, f"timestamps do not increase at frame {number}")
        else:
            early = EARLY * min(at - held_at, 1 / fps)
        while held is not None and begin + output / fps < at - early:
            yield held
            output += 1
        held, held_at = frame, at
    while held is not None and begin + output / fps <= held_at + early:
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
