"""What decoding gives for every record of several data sections, each file looked at once: `Survey`.

What training makes of a file is decoding, which takes long, and then arithmetic on the size and the number of frames
that were found. Sections that differ in the arithmetic alone (pixel budgets, limits, mix, captions) share one decoding.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from goku.data.config import DataConfig
from goku.data.dataset import Outcome
from goku.data.decode import decode_record, probe
from goku.data.errors import DataError, DecodeError, Dropped, Problem
from goku.data.filler import Entry
from goku.data.latents import FileIdentity, plan_of
from goku.data.limits import dropped_by_limits
from goku.data.listings import Scans
from goku.data.media import Media, plan_record, size_remarks
from goku.data.media_source import check_file, media_size, open_media, stored_in
from goku.data.record import Record
from goku.data.sources import Source, sources_of
from goku.data.transform import SNAP, Geometry
from goku.workers import Lost, ordered_map

_BLOCK = 1 << 20

Place = tuple[str, int]
"""Where the bytes of a media file begin: the file on disk, and the offset in it (-1: it is the file)."""


@dataclass(frozen=True)
class Setting:
    """What of a data section decides, beside the pixel budget, what decoding finds in a file or refuses."""

    fps: float | None
    max_seconds: float | None
    max_frames: int
    upscale: bool
    max_source_pixels: int

    @classmethod
    def of(cls, record: Record, config: DataConfig) -> Setting:
        """That of a record; what concerns clips alone does not part images."""
        if record.is_image:
            return cls(None, None, 1, config.upscale, config.max_source_pixels)
        return cls(
            config.fps,
            config.max_seconds,
            config.max_frames,
            config.upscale,
            config.max_source_pixels,
        )

    def config(self) -> DataConfig:
        """A data section with the setting and the smallest budget: every file is decoded, little is resized."""
        return DataConfig(
            path=".",
            image_pixels=SNAP * SNAP,
            video_pixels=SNAP * SNAP,
            fps=self.fps,
            max_seconds=self.max_seconds,
            max_frames=self.max_frames,
            upscale=self.upscale,
            max_source_pixels=self.max_source_pixels,
        )


Key = tuple[str, Place, int, int | None, bool, Setting]


@dataclass(frozen=True)
class _Job:
    """One look at one file. hashed: whether its content must be known, since another file has its size."""

    record: Record
    setting: Setting
    hashed: bool
    quick: bool


@dataclass(frozen=True)
class _Look:
    """What was found; sha256: "" where it was not asked for."""

    found: Media | DecodeError
    sha256: str = ""


class Survey:
    """Scans the datasets of `configs` once and looks at each file that any of them would decode.

    quick: read headers only, and take files for different ones wherever they are not the same file. workers: decoding
    processes, by default the most that a section asks for. progress: called as progress(done, total) after every file.
    scans: what was scanned before. Writes nothing. A dataset that cannot be scanned raises its DataError when its
    `sources` are asked for.
    """

    def __init__(
        self,
        configs: Sequence[DataConfig],
        *,
        quick: bool = False,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        scans: Scans | None = None,
    ) -> None:
        self.quick = quick
        self._scans = Scans() if scans is None else scans
        wanted: dict[Key, Record] = {}
        for config in configs:
            try:
                sources = self.sources(config)
            except DataError:
                continue
            for source in sources:
                for record in source.records:
                    wanted.setdefault(_key(record, config), record)
        self._sizes = _sizes(wanted.values())
        often = Counter(self._sizes.values())
        hashed: set[Place] = set()
        jobs = []
        for key, record in wanted.items():
            place = _place(record)
            again = place in hashed or often[self._sizes.get(place, -1)] < 2
            jobs.append(_Job(record, key[-1], not (quick or again), quick))
            hashed.add(place)
        most = max((config.workers for config in configs), default=0)
        results = ordered_map(_look, jobs, name=_name, workers=most if workers is None else workers)
        self._found: dict[Key, Media | DecodeError | Lost] = {}
        self._sha256: dict[Place, str] = {}
        with closing(results):
            each = zip(wanted, jobs, results, strict=True)
            for done, (key, job, result) in enumerate(each, start=1):
                self._found[key] = result if isinstance(result, Lost) else result.found
                if not isinstance(result, Lost) and result.sha256:
                    self._sha256[_place(job.record)] = result.sha256
                if progress is not None:
                    progress(done, len(jobs))

    def sources(self, config: DataConfig) -> list[Source]:
        """As `sources_of`, from what was scanned before. Raises DataError."""
        return sources_of(config, self._scans)

    def outcomes(self, source: Source) -> list[Outcome]:
        """What `prepare` would make of every record of the source, in order; the entries have no latent key."""
        config = source.config
        # Sizes repeat, and finding the best multiples of 16 takes longer than all else here.
        geometries: dict[tuple[int, int, int, bool], Geometry] = {}
        outcomes: list[Outcome] = []
        for record in source.records:
            found = self._found[_key(record, config)]
            if isinstance(found, DecodeError):
                outcomes.append(Problem(record.name, found.reason, found.kind))
                continue
            if isinstance(found, Lost):
                outcomes.append(Problem(record.name, found.reason))
                continue
            size = found.geometry.source_height, found.geometry.source_width
            at = (*size, found.selected_frames, record.is_image)
            if at not in geometries:
                geometries[at] = plan_record(record, config, *size, found.selected_frames)
            plan = plan_of(_resized(found, geometries[at]))
            reason = dropped_by_limits(record, plan, config, source.name)
            if reason is not None:
                outcomes.append(Dropped(record.name, reason))
            else:
                outcomes.append(Entry(record, plan, "", self._identity(record)))
        return outcomes

    def _identity(self, record: Record) -> FileIdentity:
        """Equal for files of equal content, as far as they were compared."""
        place = _place(record)
        alone = f"{place[0]}:{place[1]}" if self.quick else ""
        # Of a size that no other file has, the size says it all.
        return FileIdentity(self._sizes[place], self._sha256.get(place, alone))


def _place(record: Record) -> Place:
    return stored_in(record), record.member.offset if record.member else -1


def _key(record: Record, config: DataConfig) -> Key:
    return (
        record.path,
        _place(record),
        record.start_frame,
        record.num_frames,
        record.at_most,
        Setting.of(record, config),
    )


def _name(job: _Job) -> str:
    return job.record.name


def _sizes(records: Iterable[Record]) -> dict[Place, int]:
    """Bytes of every media file that is there."""
    sizes: dict[Place, int] = {}
    for record in records:
        place = _place(record)
        if place not in sizes:
            try:
                sizes[place] = media_size(record)
            except OSError:
                continue  # looking at it will say why
    return sizes


def _look(job: _Job) -> _Look:
    """In a worker. Errors are found in the order in which `prepare` finds them."""
    record, config = job.record, job.setting.config()
    sha256 = ""
    try:
        if job.quick:
            return _Look(probe(record, config))
        check_file(record)
        with open_media(record) as file:
            if job.hashed:
                digest = hashlib.sha256()
                while block := file.read(_BLOCK):
                    digest.update(block)
                sha256 = digest.hexdigest()
        return _Look(decode_record(record, config).media, sha256)
    except DecodeError as error:
        return _Look(error, sha256)
    except OSError as error:  # while its content was hashed
        return _Look(DecodeError(record.path, f"cannot be read: {error.strerror}"), sha256)


def _resized(media: Media, geometry: Geometry) -> Media:
    """What decoding would have given at the pixel budget of `geometry`: its remarks on sizes with it."""
    changed = dict(zip(size_remarks(media.geometry), size_remarks(geometry), strict=True))
    remarks = tuple(changed.get(remark, remark) for remark in media.remarks)
    return replace(media, geometry=geometry, remarks=remarks)


__all__ = ["Setting", "Survey"]
