"""What is wrong with a dataset, said once and with names: `Problem`, `DataError`, `DecodeError`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOST_LINES = 50


@dataclass(frozen=True)
class Problem:
    """One item that cannot be used. `name` is the record's name (or manifest line), `reason` a
    sentence without the name."""

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
    """One media file that cannot be decoded: `.path` and `.reason`."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.path, self.reason)
