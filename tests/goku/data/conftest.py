"""Media made on the spot, and stand-ins for the VAE and the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from goku.data import DataConfig
from goku.packing import partition


def moving_gradient(frames: int, height: int, width: int) -> np.ndarray:
    """(T, H, W, 3) uint8: a gradient that slides, so that no two frames or axes are alike."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    red = (2 * x + 5 * t) % 256
    green = (3 * y + 7 * t) % 256
    blue = (x + y + 11 * t) % 256
    return np.stack([red, green, blue], -1).astype(np.uint8)


@pytest.fixture(scope="session")
def gradient() -> Callable[[int, int, int], np.ndarray]:
    return moving_gradient


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """write_video(path, frames (T, H, W, 3), fps=24, times=None (s, in 1/clock), rotation=0, aspect=None, ...)."""

    def write(
        path: Path,
        frames: np.ndarray,
        *,
        fps: int = 24,
        times: Sequence[Fraction] | None = None,
        codec: str = "libx264",
        rotation: int = 0,
        aspect: Fraction | None = None,
        faststart: bool = False,
        clock: int = 1200,
    ) -> Path:
        options = {"movflags": "faststart"} if faststart else {}
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream(codec, rate=fps)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # Under load several threads of x264 give other bytes now and then, and damage then hits another place.
            stream.codec_context.thread_count = 1
            if rotation:
                stream.set_display_rotation(rotation)
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if times is not None:
                stream.codec_context.time_base = Fraction(1, clock)
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if times is not None:
                    frame.time_base = Fraction(1, clock)
                    frame.pts = int(times[index] * clock)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def raw_frames() -> Callable[[Path], np.ndarray]:
    """Every frame of a file as (T, H, W, 3) uint8, with nothing else applied: the reference."""

    def read(path: Path) -> np.ndarray:
        with av.open(str(path)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

    return read


class FakeVAE:
    """Means over 4x8x8 blocks (first frame alone), 4 channels. Counts what it encodes."""

    strides: tuple[int, int, int] = (4, 8, 8)
    channels = 4

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.encoded: list[tuple[int, ...]] = []

    def encode(self, video: torch.Tensor) -> Any:
        assert video.dtype == torch.float32
        assert -1 <= float(video.min()) <= float(video.max()) <= 1
        assert not torch.is_grad_enabled()
        self.encoded.append(tuple(video.shape))
        clip = torch.cat([video[:, :, :1].expand(-1, -1, 4, -1, -1), video[:, :, 1:]], 2)
        mean = torch.nn.functional.avg_pool3d(clip, self.strides)
        mean = torch.cat([mean, mean.sum(1, keepdim=True)], 1)
        return SimpleNamespace(mean=mean, logvar=mean - 6)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def normalise(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    def denormalise(self, latent: torch.Tensor) -> torch.Tensor:
        return latent

    def fingerprint(self) -> str:
        return self.name


class FakeText:
    """Embeds a prompt as its bytes (and an end), 8 wide. Counts what it encodes."""

    dim = 8

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        self.encoded.extend(prompts)
        return [
            torch.tensor([*prompt.encode(), 0], dtype=torch.float32)[:, None].repeat(1, 8)
            for prompt in prompts
        ]

    def fingerprint(self) -> str:
        return "fake-text"


@pytest.fixture
def vae() -> FakeVAE:
    return FakeVAE()


@pytest.fixture
def text() -> FakeText:
    return FakeText()


@pytest.fixture(scope="session")
def write_dataset(write_video: Callable[..., Path]) -> Callable[[Path], Path]:
    """A sound folder: two pictures, two clips (25 frames of 96x128, 7 frames of 64x64)."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        picture = moving_gradient(1, 80, 120)[0]
        Image.fromarray(picture).save(folder / "a.png")
        Image.fromarray(255 - picture[:60, :60]).save(folder / "b.jpg", quality=95)
        write_video(folder / "c.mp4", moving_gradient(25, 96, 128))
        write_video(folder / "d.mkv", moving_gradient(7, 64, 64))
        for stem in "abcd":
            (folder / f"{stem}.txt").write_text(f"this is {stem}\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture
def folder(tmp_path: Path, write_dataset: Callable[[Path], Path]) -> Path:
    return write_dataset(tmp_path / "media")


@pytest.fixture
def plain(folder: Path) -> DataConfig:
    return DataConfig(
        path=str(folder), image_pixels=64 * 96, video_pixels=48 * 64, max_frames=17, workers=0
    )


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[float]]]:
    """(lengths, costs) of every step that the doctor lays out into packs."""
    seen: list[tuple[list[int], list[float]]] = []

    def recorded(lengths: list[int], costs: list[float], *rest: Any) -> Any:
        seen.append((lengths, costs))
        return partition(lengths, costs, *rest)

    monkeypatch.setattr("goku.data.layout.partition", recorded)
    return seen
