"""One item as a dataset lists it: `Record`, and what a listing as a whole says: `Scan`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from goku.data.errors import Problem

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
MEDIA_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES


@dataclass(frozen=True)
class Member:
    """A file inside an uncompressed tar: `size` bytes from `offset` on of the file `archive` (absolute path)."""

    archive: str
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Record:
    """One training item as the dataset lists it.

    Attributes:
        path: absolute path of the media file; for a member, archive/name, which is no file of its own.
        text: caption, never empty; of several, the heaviest (the first of equals).
        name: unique in the dataset; what errors and reports call the item.
        start_frame, num_frames: range of source frames in display order, before any resampling;
            None means to the end.
        weight: the sample's weight in the loss, > 0.
        captions: (caption, weight > 0) pairs, the heaviest first; empty when `text` is the only one.
        motion: the motion score, None when none is given.
        member: where the file lies when it lies in a tar.
        remarks: what is worth saying about the listing of an item that is used; no part of equality.
        at_most: num_frames is the file's length as another tool states it, an upper bound: a shorter file is no error.
    """

    path: str
    text: str
    name: str
    start_frame: int = 0
    num_frames: int | None = None
    weight: float = 1.0
    captions: tuple[tuple[str, float], ...] = ()
    motion: float | None = None
    member: Member | None = None
    remarks: tuple[str, ...] = field(default=(), compare=False)
    at_most: bool = False

    @property
    def is_image(self) -> bool:
        # As Path.suffix, in a tenth of its time: it is asked for often of every item.
        return os.path.splitext(self.path)[1].lower() in IMAGE_SUFFIXES

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every caption, the heaviest first."""
        return tuple(text for text, _ in self.captions) or (self.text,)


@dataclass(frozen=True)
class Scan:
    """`records` that can be tried, `problems` of those that cannot, `notes` on what was passed by
    (files that are neither media nor caption, media that a folder's manifest does not list), in
    dataset order. place: the dataset's absolute path; files: the tables, lists and archives that
    were read, by absolute path, and their bytes."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    place: str = ""
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def listed(self) -> int:
        return len(self.records) + len(self.problems)


def captions_of(value: object) -> tuple[tuple[str, float], ...]:
    """(caption, weight) pairs, the heaviest first, from a string, a list of strings or a list of {text, weight}.

    Raises ValueError that says what is wrong with the value.
    """
    entries = value if isinstance(value, list) else [value]
    pairs: dict[str, float] = {}
    for entry in entries:
        text, weight = entry, 1.0
        if isinstance(entry, dict):
            unknown = sorted(set(map(str, entry)) - {"text", "weight"})
            if unknown:
                raise ValueError(f"caption: unknown key {unknown[0]!r}; allowed are text, weight")
            text, weight = entry.get("text"), positive("caption weight", entry.get("weight", 1.0))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"missing caption ({text!r})")
        if text.strip() in pairs:
            raise ValueError(
                f"caption {text.strip()!r} is given twice; give it once, with a weight"
            )
        pairs[text.strip()] = weight
    if not pairs:
        raise ValueError("missing caption ([])")
    # sorted is stable: of equal weights the first stays first.
    return tuple(sorted(pairs.items(), key=lambda pair: -pair[1]))


def positive(field_name: str, value: object) -> float:
    """`value`, a number or a number's text, as a finite float above 0; ValueError naming the field."""
    number = finite(field_name, value, "a finite number above 0")
    if number <= 0:
        raise ValueError(f"{field_name}: {value!r} must be a finite number above 0")
    return number


def finite(field_name: str, value: object, needed: str = "a finite number") -> float:
    """`value`, a number or a number's text, as a finite float; ValueError naming the field."""
    number: object = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = value
    if (
        not isinstance(number, (int, float))
        or isinstance(number, bool)
        or not -1e300 < number < 1e300
        or not math.isfinite(number)
    ):
        raise ValueError(f"{field_name}: {value!r} must be {needed}")
    return float(number)


def not_unicode(text: str) -> str | None:
    """What is wrong with a text that UTF-8, and so a tokenizer, has no bytes for; None when nothing is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Python allows such a thing in a string: JSON's "\\ud83d" alone is one, and so is a byte of a file's name.
        return (
            f"is not valid Unicode: {text[error.start]!a} at character {error.start + 1} is one half of a "
            "character (such as an emoji that another tool cut in two), or a byte that is not UTF-8"
        )
    return None


def with_sound_captions(found: Scan) -> Scan:
    """Without the records of which a caption is not Unicode: each is a problem of its own. Every form's captions come
    by here, however they were written."""
    records: list[Record] = []
    problems = list(found.problems)
    for record in found.records:
        faults = [fault for text in record.prompts if (fault := not_unicode(text))]
        if faults:
            problems.append(Problem(record.name, f"its caption {faults[0]}", "caption"))
        else:
            records.append(record)
    return replace(found, records=tuple(records), problems=tuple(problems))


def unique(found: Scan) -> Scan:
    """Duplicate names: the same media listed again with another caption gets " #2" and so on; the
    same id, or the very same item, twice is an error (the later one is the problem)."""
    records: list[Record] = []
    problems = list(found.problems)
    seen: dict[str, dict[Record, None]] = {}  # a file may be listed with thousands of captions
    for record in found.records:
        same = seen.setdefault(record.name, {})
        first, key = next(iter(same), record), replace(record, name="", weight=1.0)
        if first.path != record.path:
            reason = f"duplicate id: also names {first.path}"
            problems.append(Problem(record.name, reason, "duplicate"))
        elif key in same:
            reason = "duplicate: listed twice with the same caption"
            problems.append(Problem(record.name, reason, "duplicate"))
        else:
            same[key] = None
            suffix = f" #{len(same)}" if len(same) > 1 else ""
            records.append(replace(record, name=record.name + suffix) if suffix else record)
    return replace(found, records=tuple(records), problems=tuple(problems))


def with_motion(record: Record, template: str | None) -> Record:
    """The record with `template` ("{caption} motion score: {motion:.1f}") put to every caption; one without a score
    keeps its captions and gets a remark. None as template changes nothing."""
    if template is None:
        return record
    if record.motion is None:
        remark = "has no motion score: its caption is used as it is"
        return replace(record, remarks=(*record.remarks, remark))

    def told(caption: str) -> str:
        return template.format(caption=caption, motion=record.motion)

    pairs = tuple((told(text), weight) for text, weight in record.captions)
    return replace(record, text=told(record.text), captions=pairs)


def counted(number: int, noun: str) -> str:
    """ "1 clip", "1,200 clips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """The first three names, and dots when there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
