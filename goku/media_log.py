"""Pictures and clips to where people watch a run: TensorBoard or Weights & Biases, by option.

Files that are written already are shown, so that whoever made them, one process can show them all. What fails is told
and ends nothing: these are places to look at, and the files are on the disk.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import av
from PIL import Image

from goku.media_wandb import WandbMedia, check_wandb

__all__ = ["PLACES", "MediaLog", "Place", "Shown", "check_places"]

Place = Literal["tensorboard", "wandb"]
PLACES: tuple[Place, ...] = get_args(Place)


# What showing imports, by names that stay as they are.
_TENSORBOARD = (
    "from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata\n"
    "from torch.utils.tensorboard import FileWriter\n"
)


@dataclass(frozen=True)
class Shown:
    """A PNG or MP4 under a tag that stays the same from step to step, with a line of text."""

    tag: str
    path: Path
    caption: str


def check_places(places: Sequence[Place], *, numbers: bool = False) -> None:
    """ImportError, naming what to install, when one of the packages is absent; ValueError when W&B has no key.

    numbers: a run's numbers go to TensorBoard (train.tensorboard), too.
    """
    wanted = [(place, f"media in {place} need it") for place in places]
    if numbers:
        wanted.append(("tensorboard", "train.tensorboard needs tensorboard"))
    for place, who in wanted:
        spec = find_spec(place)
        # W&B leaves a folder of its name where it runs, which an import takes for an empty package.
        if spec is None or spec.origin is None:
            raise ImportError(f"{who}: pip install 'goku[{place}]'")
    if numbers or "tensorboard" in places:
        # An installation that does not fit its protobuf raises what it likes, and at the first step.
        done = subprocess.run(
            [sys.executable, "-c", _TENSORBOARD], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ImportError(f"tensorboard is there and cannot be imported: {said[-1]}")
    if "wandb" in places:
        check_wandb()


class MediaLog:
    """Shows media of the run in the folder `out` at `places`.

    TensorBoard: as images in out/tensorboard/media, clips as GIF (it has no video). W&B: in `project`, by a process of
    its own beside the training (`goku.media_wandb`); WANDB_MODE=offline and its other settings are W&B's own.
    """

    def __init__(self, places: Sequence[Place], out: Path, project: str) -> None:
        self._tensorboard = out / "tensorboard" / "media" if "tensorboard" in places else None
        self._wandb = WandbMedia(out, project) if "wandb" in places else None

    def show(self, items: Sequence[Shown], step: int) -> list[str]:
        """Shows all items at `step`; what has failed, in words: of W&B perhaps what was shown before."""
        failed = []
        if self._tensorboard is not None:
            try:
                _tensorboard(self._tensorboard, items, step)
            except (OSError, RuntimeError, ValueError) as error:
                failed.append(f"TensorBoard: step {step}: {error}")
        if self._wandb is not None:
            try:
                failed += self._wandb.show([(i.tag, i.path, i.caption) for i in items], step)
            except OSError as error:
                failed.append(f"W&B: step {step}: {error}")
        return failed

    def close(self, wait: float = 60.0) -> list[str]:
        """Waits so many seconds for what is being shown; what has failed, in words."""
        try:
            return [] if self._wandb is None else self._wandb.close(wait)
        except OSError as error:
            return [f"W&B: {error}"]


def _tensorboard(folder: Path, items: Sequence[Shown], step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from torch.utils.tensorboard import FileWriter

    # A file and a folder of its own: TensorBoard follows one file at a time in each.
    writer = FileWriter(str(folder))
    try:
        for item in items:
            data, height, width = _picture(item.path)
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=data
            )
            metadata = SummaryMetadata(summary_description=item.caption)
            value = Summary.Value(tag=item.tag, image=image, metadata=metadata)
            writer.add_summary(Summary(value=[value]), step)
    finally:
        writer.close()


def _picture(path: Path) -> tuple[bytes, int, int]:
    """(file that browsers show as an image, height, width) of a PNG, or of an MP4 as GIF."""
    if path.suffix == ".png":
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return data, image.height, image.width
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 12)
            frames = [frame.to_image() for frame in container.decode(stream)]
    except (av.error.FFmpegError, IndexError) as error:  # some are no OSError, some clips no video
        raise ValueError(f"{path} cannot be read as MP4: {error}") from error
    if not frames:
        raise ValueError(f"{path} cannot be read as MP4: it has no frame")
    out = io.BytesIO()
    frames[0].save(
        out, "GIF", save_all=True, append_images=frames[1:], duration=1000 / rate, loop=0
    )
    return out.getvalue(), frames[0].height, frames[0].width
