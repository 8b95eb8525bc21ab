"""What the training log tells the report: loss curves, the kill and the resume, throughput."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from goku.demo.plots import Mark, Series, line_chart

__all__ = ["TrainingLog", "loss_sections", "smooth", "throughput_rows"]

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """The log of one run in which every step counts once, although a killed run repeats some.

    Attributes:
        steps: the step events, by step; of a repeated step the last.
        fixed, unseen: (step, loss) of the evaluations on fixed noise.
        evaluations: the eval events, by step.
        interruptions: (last step logged before, step resumed from) of every resume.
        replayed: number of steps logged twice; `replay_difference` the largest |difference| of
            their losses, None without repeats.
    """

    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    fixed: Points
    unseen: Points
    interruptions: Sequence[tuple[int, int]]
    replayed: int
    replay_difference: float | None

    @classmethod
    def read(cls, events: Sequence[Mapping[str, Any]]) -> TrainingLog:
        """Sort the events of a log given in file order."""
        steps: dict[int, Mapping[str, Any]] = {}
        evaluations: dict[int, Mapping[str, Any]] = {}
        interruptions: list[tuple[int, int]] = []
        differences: list[float] = []
        last = 0
        for event in events:
            step = int(event.get("step") or 0)
            if event["event"] == "step":
                if step in steps:
                    differences.append(_difference(steps[step].get("loss"), event.get("loss")))
                steps[step] = event
                last = step
            elif event["event"] == "eval":
                evaluations[step] = event
            elif event["event"] == "resume":
                interruptions.append((max(last, step), step))
        ordered = [evaluations[step] for step in sorted(evaluations)]
        return cls(
            steps=[steps[step] for step in sorted(steps)],
            evaluations=ordered,
            fixed=_points(ordered, "fixed_loss"),
            unseen=_points(ordered, "unseen_loss"),
            interruptions=interruptions,
            replayed=len(differences),
            replay_difference=max(differences) if differences else None,
        )

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    def replay_text(self) -> str:
        """What the repeated steps show, as a clause to append; empty without any."""
        if self.replay_difference is None:
            return ""
        if self.replay_difference == 0.0:
            return f"; {self.replayed} repeated steps gave exactly the same losses"
        return f"; of {self.replayed} repeated steps losses differ by at most {self.replay_difference:.2g}"


def loss_sections(log: TrainingLog) -> str:
    """The loss charts: over steps, by modality, by timestep bin."""
    if not log.steps and not log.evaluations:
        return '<p class="none">Nothing was logged.</p>'
    marks = [Mark(x=died, label=f"killed at {died:,}") for died, _ in log.interruptions]
    train = _points(log.steps, "loss")
    over_time = line_chart(
        "loss",
        [
            Series(label="train", points=train, colour=0, faint=True),
            Series(label="train, smoothed", points=smooth(train), colour=0),
        ],
        x_label="step",
        y_label="loss of the step",
        marks=marks,
        log_option=True,
    )
    fixed = line_chart(
        "fixed",
        [
            Series(label="training media", points=log.fixed, colour=2, dots=True),
            Series(label="unseen media", points=log.unseen, colour=1, dots=True),
        ],
        x_label="step",
        y_label="loss on fixed noise",
        marks=marks,
        log_option=True,
    )
    modality = [(name, _parts(log.steps, name)) for name in ("image", "video")]
    by_modality = line_chart(
        "modality",
        [
            *(
                Series(label=name, points=points, colour=colour, faint=True)
                for (name, points), colour in zip(modality, (1, 0), strict=True)
            ),
            *(
                Series(label=f"{name}, smoothed", points=smooth(points), colour=colour)
                for (name, points), colour in zip(modality, (1, 0), strict=True)
            ),
        ],
        x_label="step",
        y_label="loss of the step",
        marks=marks,
        log_option=True,
    )
    resumed = ""
    if log.interruptions:
        back = ", ".join(f"{step:,}" for _, step in log.interruptions)
        resumed = (
            "<p>The dashed line marks where the training was killed by a signal. A new process "
            f"went on from the last checkpoint, step {back}{log.replay_text()}.</p>"
        )
    return (
        f'{resumed}<div class="two"><div><h3>Training</h3>{over_time}</div>'
        f"<div><h3>Fixed sample, noise and time</h3>{fixed}</div>"
        f"<div><h3>Photographs and clips</h3>{by_modality}</div>"
        f"<div><h3>By time of the flow</h3>{_by_bin(log)}</div></div>"
        '<p class="note">Loss is the mean squared error of the velocity. The fixed noise is the '
        "same at every evaluation and scored with the averaged weights; unseen media are reported, "
        "not judged: a model that memorises ten items has no reason to know others.</p>"
    )


def throughput_rows(log: TrainingLog) -> list[tuple[str, str]]:
    """(name, value) rows of the training's rates; medians over the steps."""
    if not log.steps:
        return [("steps", "none logged")]
    rows = [("steps", f"{log.last_step:,}")]
    for key, name, shape in (
        ("tokens", "tokens per step", "{:,.0f}"),
        ("seconds", "seconds per step", "{:.3f}"),
        ("tokens_per_second", "tokens per second", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
        ("packing_efficiency", "packing efficiency", "{:.1%}"),
    ):
        values = [y for _, y in _points(log.steps, key)]
        if values:
            rows.append((f"{name} (median)", shape.format(median(values))))
    tokens = sum(y for _, y in _points(log.steps, "tokens"))
    seconds = sum(y for _, y in _points(log.steps, "seconds"))
    if tokens:
        rows.append(("tokens seen", f"{tokens:,.0f}"))
    if seconds:
        rows.append(("time in steps", f"{seconds:,.0f} s"))
    return rows


def _by_bin(log: TrainingLog) -> str:
    """Loss over the time bins: on fixed noise at the first, a middle and the last evaluation, and
    failing that the mean over the first, middle and last tenth of the training steps."""
    phases: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    key = "fixed_by_bin"
    scored = [event for event in log.evaluations if any(_known(v) for v in event.get(key) or ())]
    if scored:
        for index in sorted({0, (len(scored) - 1) // 3, len(scored) - 1}):
            phases.append((f"step {scored[index]['step']:,}", [scored[index]]))
    else:
        key = "loss_by_bin"
        tenth = max(1, len(log.steps) // 10)
        middle = len(log.steps) // 2
        phases = [
            ("first tenth", log.steps[:tenth]),
            ("middle", log.steps[middle : middle + tenth]),
            ("last tenth", log.steps[-tenth:]),
        ]
    series = []
    for colour, (label, events) in zip((3, 1, 2), phases, strict=False):
        rows = [event.get(key) or () for event in events]
        bins = max((len(row) for row in rows), default=0)
        points: Points = []
        for index in range(bins):
            values = [row[index] for row in rows if index < len(row) and _known(row[index])]
            if values:
                points.append(((index + 0.5) / bins, sum(values) / len(values)))
        series.append(Series(label=label, points=points, colour=colour, dots=True))
    return line_chart(
        "bins",
        series,
        x_label="t (0 is noise, 1 is data)",
        y_label="loss on fixed noise" if scored else "loss of the step",
        log_option=True,
        x_range=(0.0, 1.0),
    )


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _difference(a: object, b: object) -> float:
    """|a - b|; 0 when neither is a finite number, inf when only one is."""
    if isinstance(a, int | float) and isinstance(b, int | float) and _known(a) and _known(b):
        return abs(a - b)
    return math.inf if _known(a) or _known(b) else 0.0


def _points(events: Sequence[Mapping[str, Any]], key: str) -> Points:
    return [(float(event["step"]), float(event[key])) for event in events if _known(event.get(key))]


def _parts(events: Sequence[Mapping[str, Any]], name: str) -> Points:
    found = [(event["step"], (event.get("loss_by_modality") or {}).get(name)) for event in events]
    return [
        (float(step), float(value)) for step, value in found if value is not None and _known(value)
    ]


def smooth(points: Points) -> Points:
    """A centred moving average over about a fortieth of the points."""
    reach = max(1, len(points) // 80)
    smooth = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - reach) : index + reach + 1]
        smooth.append((x, sum(y for _, y in near) / len(near)))
    return smooth
