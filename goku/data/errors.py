"""What is wrong with a dataset, or was changed on the way, said once and with names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

_MOST_LINES = 50

SKIP_BAD = "; data.skip_bad: true goes on without them"

Kind = Literal["damaged", "caption", "duplicate", "outside", "too large", "listing"]
"""What sort of fault: the media file; its caption; listed or stored twice; a link out of the dataset's folder; too many
pixels; a row of the manifest."""


@dataclass(frozen=True)
class Problem:
    """One item that cannot be used. `name` is the record's name (or manifest line), `reason` a
    sentence without the name, `kind` its sort, `source` the name of its source where there are several."""

    name: str
    reason: str
    kind: Kind = "damaged"
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Remark:
    """One item that is used, and what was found or changed: `text` is a sentence without the name."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class Dropped:
    """One sound item that the limits of the run leave out, and by which limit."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class DataError(ValueError):
    """A dataset that cannot be used as it is. `.problems` holds every bad item, in dataset order;
    the message lists the first 50 of them."""

    def __init__(self, summary: str, problems: Sequence[Problem] = ()) -> None:
        self.summary = summary
        self.problems = tuple(problems)
        lines = [summary, *(f"  {problem}" for problem in self.problems[:_MOST_LINES])]
        if len(self.problems) > _MOST_LINES:
            lines.append(f"  ... and {len(self.problems) - _MOST_LINES} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[DataError], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.summary, self.problems)


class DecodeError(ValueError):
    """One media file that cannot be decoded: `.path`, `.reason` and `.kind`."""

    def __init__(self, path: str, reason: str, kind: Kind = "damaged") -> None:
        self.path = path
        self.reason = reason
        self.kind: Kind = kind
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str, Kind]]:
        return type(self), (self.path, self.reason, self.kind)


@contextmanager
def decoding(path: str) -> Iterator[None]:
    """Around a decoder at work on the media file `path`: whatever it raises becomes a DecodeError with the type's name
    and the first line. Damage reaches places in libraries that nobody wrote an error for; no file may end a run by it.
    """
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        reason = ": ".join(part for part in (type(error).__name__, line) if part)
        raise DecodeError(path, f"cannot be decoded: {reason}") from error
