"""What is asked of the sampler: one `Request` each, by hand or from a file of many."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from goku import config as parser
from goku.data import images
from goku.data.record import not_unicode
from goku.data.transform import snapped_size

__all__ = ["Request", "RequestDefaults", "read_requests"]

# Names that other tools use for the same thing.
_ALIASES = {
    "caption": "prompt",
    "text": "prompt",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "negative_prompt": "negative",
    "image_path": "image",
    "frame_rate": "fps",
}


@dataclass(frozen=True)
class Request:
    """One thing to generate: height and width in pixels (multiples of 16), frames = 4k + 1 (1 is an image).

    negative: the prompt to be guided away from, by default the empty one; given: frame -> image that the frame shall
    show, a file or uint8 (3, height, width) (a negative frame counts from the end); steps: integration steps of its
    own, None for those of the `SampleConfig`; fps: of its file, None for the caller's.
    """

    prompt: str
    height: int
    width: int
    frames: int = 1
    seed: int = 0
    negative: str = ""
    given: Mapping[int, Path | Tensor] = field(default_factory=dict)
    steps: int | None = None
    fps: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            fault = not_unicode(getattr(self, name))
            if fault is not None:
                raise ValueError(f"{name} {getattr(self, name)!a} {fault}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                raise ValueError(
                    f"{name} is {value}; allowed: multiples of 16 (VAE stride 8 times patch 2)"
                )
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(
                f"frames is {self.frames}; allowed: 4k + 1 (1, 5, 9, ...), 1 being an image"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to 2**64 - 1")
        for name in ("steps", "fps"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{name} is {value}; allowed: 1 to 2**31 - 1")
        for frame in self.given:
            if not -self.frames <= frame < self.frames:
                raise ValueError(
                    f"given has frame {frame}; allowed: {-self.frames} to {self.frames - 1}"
                )

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) tokens: VAE strides 4, 8, 8 and patches of 2 x 2 latent cells."""
        return (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16


@dataclass(frozen=True, kw_only=True)
class RequestDefaults:
    """What holds where a request does not say it.

    height, width: both or neither; without them a request has the largest size of its shape within an area: `pixels`
    for clips, `image_pixels` (None: the same) for images. A request with an image has the image's shape, another one
    `shape`, height to width; no side is above that of `most`, (height, width) in pixels. given_frames: frames of a
    request that is given some, None for `frames`. seed_step: what the n-th entry of a file adds to seed, times n. Other
    fields as in `Request`.
    """

    height: int | None = None
    width: int | None = None
    pixels: int = 128 * 128
    image_pixels: int | None = None
    shape: tuple[int, int] = (1, 1)
    most: tuple[int, int] | None = None
    frames: int = 1
    given_frames: int | None = None
    seed: int = 0
    seed_step: int = 0
    negative: str = ""
    given: Mapping[int, Path | Tensor] = field(default_factory=dict)

    def request(self, prompt: str, **own: Any) -> Request:
        """A request with these values and its own, of which None counts as unsaid; ValueError as `Request`."""
        said = {name: value for name, value in own.items() if value is not None}
        height, width = said.pop("height", None), said.pop("width", None)
        if height is None and width is None:
            height, width = self.height, self.width
        if (height is None) != (width is None):
            raise ValueError(f"height is {height} and width {width}; allowed: both or neither")
        given = said.pop("given", {}) or self.given
        usual = self.frames if not given or self.given_frames is None else self.given_frames
        frames = said.setdefault("frames", usual)
        if height is None or width is None:
            height, width = self._own_size(given, frames)
        for name in ("seed", "negative"):
            said.setdefault(name, getattr(self, name))
        return Request(prompt, height, width, given=given, **said)

    def _own_size(self, given: Mapping[int, Path | Tensor], frames: int) -> tuple[int, int]:
        pixels = self.pixels
        if frames == 1 and self.image_pixels is not None:
            pixels = self.image_pixels
        height, width = self.shape
        for image in given.values():
            if isinstance(image, Path):
                height, width = images.upright_size(str(image))
            else:
                height, width = image.shape[1:]
            break
        return snapped_size(height, width, pixels, upscale=True, most=self.most)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One request as a file says it."""

    prompt: str
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seed: int | None = None
    steps: int | None = None
    negative: str | None = None
    image: str | None = None
    last_image: str | None = None
    fps: int | float | None = None
    video_path: str | None = None


def read_requests(path: Path, defaults: RequestDefaults) -> list[Request]:
    """The requests of a file, in its order.

    .txt: one prompt a line, blank lines passed over. .jsonl: an object a line; .json: a list of objects, or
    {"data": [...]}. An object has `prompt` (or caption, text) and may have height, width, frames (num_frames), seed,
    steps (num_inference_steps), negative (negative_prompt), fps (frame_rate), image (image_path) and last_image, whose
    paths count from the file's folder; null and "" leave out. The other tools' video_path is known, and refused.

    Raises ValueError that names the file and the line or entry.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        # Of an editor's line: str.splitlines would end one at U+2028 and vertical tabs, too.
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
        found = [_nth(defaults, k).request(prompt) for k, prompt in enumerate(prompts)]
    else:
        found = [
            _request(entry, f"{path}, {place}", path.parent, _nth(defaults, k))
            for k, (place, entry) in enumerate(
                _lines(path, text) if suffix == ".jsonl" else _list(path, text)
            )
        ]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def _nth(defaults: RequestDefaults, k: int) -> RequestDefaults:
    return replace(defaults, seed=defaults.seed + k * defaults.seed_step)


def _lines(path: Path, text: str) -> list[tuple[str, Any]]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entries.append((f"line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({_why(error)})") from error
    return entries


def _why(error: Exception) -> str:
    """Beside bad syntax: numbers of thousands of digits, lists of thousands of lists."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _list(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({_why(error)})") from error
    if isinstance(content, dict) and content.keys() == {"data"}:
        content = content["data"]
    if not isinstance(content, list):
        raise ValueError(f'{path}: must be a list of objects, or {{"data": [...]}}')
    return [(f"entry {number}", entry) for number, entry in enumerate(content, start=1)]


def _request(entry: Any, where: str, folder: Path, defaults: RequestDefaults) -> Request:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found {entry!r}; allowed: an object")
    named: dict[str, Any] = {}
    for key, value in entry.items():
        name = str(_ALIASES.get(key, key))
        if name in named:
            raise ValueError(f"{where}: {name} is said twice, once as {key}")
        named[name] = None if value == "" and name != "prompt" else value
    try:
        line = parser.parse(_Line, named)
        if line.video_path is not None:
            raise ValueError(
                f"video_path is {line.video_path!r}; allowed: none, since no clip can be given (an image can: image)"
            )
        if isinstance(line.fps, float) and not line.fps.is_integer():
            raise ValueError(f"fps is {line.fps}; allowed: a whole number")
        given = {
            frame: folder / image
            for frame, image in ((0, line.image), (-1, line.last_image))
            if image is not None
        }
        return defaults.request(
            line.prompt, height=line.height, width=line.width, frames=line.frames, seed=line.seed,
            steps=line.steps, negative=line.negative, given=given,
            fps=None if line.fps is None else int(line.fps),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
