"""Pictures and clips to where people watch a run: TensorBoard or Weights & Biases, by option.

Files that are written already are shown, so that whoever made them, one process can show them all. Both packages are
imported when something is shown.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import av
from PIL import Image

__all__ = ["PLACES", "Place", "Shown", "check_places", "show"]

Place = Literal["tensorboard", "wandb"]
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class Shown:
    """A PNG or MP4 under a tag that stays the same from step to step, with a line of text."""

    tag: str
    path: Path
    caption: str


def check_places(places: Sequence[Place]) -> None:
    """ImportError, naming what to install, when one of the packages is absent."""
    for place in places:
        if find_spec(place) is None:
            raise ImportError(f"media in {place} need it: pip install 'goku[{place}]'")


def show(
    places: Sequence[Place], out: Path, project: str, items: Sequence[Shown], step: int
) -> None:
    """Shows all items at `step` of the run in the folder `out`.

    TensorBoard: as images in out/tensorboard/media, clips as GIF (it has no video). W&B: in `project`, the run being
    the one of this folder (its id is kept in out/wandb_id); WANDB_MODE=offline and its other settings are W&B's own.

    Raises OSError or ValueError for a file that cannot be read, and what W&B raises as RuntimeError.
    """
    if "tensorboard" in places:
        _tensorboard(out / "tensorboard" / "media", items, step)
    if "wandb" in places:
        _wandb(out, project, items, step)


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
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 12)
        frames = [frame.to_image() for frame in container.decode(stream)]
    out = io.BytesIO()
    frames[0].save(
        out, "GIF", save_all=True, append_images=frames[1:], duration=1000 / rate, loop=0
    )
    return out.getvalue(), frames[0].height, frames[0].width


def _wandb(out: Path, project: str, items: Sequence[Shown], step: int) -> None:
    import wandb

    name = out / "wandb_id"
    if not name.is_file():
        name.write_text(secrets.token_hex(8), encoding="utf-8")
    try:
        run = wandb.init(
            project=project, name=out.name, dir=str(out), id=name.read_text(encoding="utf-8"),
            resume="allow",
        )  # fmt: skip
        try:
            run.log(
                {
                    item.tag: wandb.Image(str(item.path), caption=item.caption)
                    if item.path.suffix == ".png"
                    else wandb.Video(str(item.path), caption=item.caption, format="mp4")
                    for item in items
                },
                step=step,
            )
        finally:
            run.finish()
    except wandb.Error as error:
        raise RuntimeError(f"W&B: {error}") from error
