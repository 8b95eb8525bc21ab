"""From a media file to pixels: PyAV for video, Pillow for images.

Rules, the same for training and for the doctor:
- Video: every frame in display order from `start_frame`, at most `num_frames`. With `fps`, output
  frame k is the last source frame that begins by t0 + k / fps (t0 = the first frame's timestamp), or
  at most 7/16 of a frame later, of the source's or the output's, whichever is shorter: for clocks
  that round, and 23.976 for 24. It ends with the last source frame, by the same rule; frames repeat
  where the source is slower, which is remarked. The first 4k+1 <= max_frames are kept.
- Display rotation and non-square pixels are applied. Conversion to RGB follows the stream's own
  colour tags (libswscale; untagged means BT.601, limited range).
- Images: EXIF orientation applied; transparency composited onto white; greyscale, palette and CMYK
  converted to RGB; 16-bit greyscale divided by 257 and rounded. ICC profiles are not applied.
  A file with several pictures (animation, multi-page) is refused; a phone's MPO gives its first.
- Damage that the decoders can see is an error (H.264 is decoded with err_detect=explode, never
  concealed): a truncated file, broken entropy coding, bad PNG checksums. A flipped bit that still
  decodes, as JPEG and VP9 allow, cannot be seen.
- Words in a container that are not UTF-8 (a title in Latin-1) are no damage.
- What was changed on the way (colour model, depth, rotation, timing) is said in `Media.remarks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from goku.data.config import DataConfig
from goku.data.errors import decoding
from goku.data.images import decode_image, probe_image
from goku.data.media import Decoded, Media
from goku.data.media_source import check_file
from goku.data.record import Record
from goku.data.video import decode_video, probe_video


def decode(record: Record, config: DataConfig) -> Tensor:
    """The pixels of one record: (3, T, H, W) uint8, H and W multiples of 16, T = 4k+1.

    Raises DecodeError (a ValueError) with the path and the reason.
    """
    return as_tensor(decode_record(record, config))


def as_tensor(decoded: Decoded) -> Tensor:
    """(T, H, W, 3) pixels as a contiguous (3, T, H, W) uint8 tensor."""
    return torch.from_numpy(decoded.pixels).permute(3, 0, 1, 2).contiguous()


def decode_record(record: Record, config: DataConfig) -> Decoded:
    """As `decode`, with the pixels as an array and what was learnt about the file."""
    with decoding(record.path):
        check_file(record)
        if record.is_image:
            return decode_image(record, config)
        return decode_video(record, config)


def probe(record: Record, config: DataConfig) -> Media:
    """What `decode_record` would make of the file, from its headers and first frame only; frame
    counts and damage further in are not seen. Raises DecodeError."""
    with decoding(record.path):
        check_file(record)
        if record.is_image:
            return probe_image(record, config)
        return probe_video(record, config)
