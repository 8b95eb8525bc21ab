"""The run log: events survive a kill, a torn line does not spoil what follows."""

import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from goku import metrics
from goku.metrics import RunLog, read_log


def test_events_are_on_disk_before_close(tmp_path):
    path = tmp_path / "deep" / "train.jsonl"
    log = RunLog(path, total_steps=3)
    log.event("step", 1, loss=0.5, loss_by_bin=[None, 1.0])
    first = read_log(path)
    assert first[0]["event"] == "step"
    assert first[0]["loss"] == 0.5
    assert first[0]["loss_by_bin"] == [None, 1.0]
    log.close()


def test_a_torn_last_line_is_dropped_and_never_glued(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"event": "step", "step": 1}) + '\n{"event": "st')
    assert [e["step"] for e in read_log(path)] == [1]
    log = RunLog(path, total_steps=3)
    log.event("resume", 1)
    log.close()
    assert [e["event"] for e in read_log(path)] == ["step", "resume"]


@given(
    st.lists(st.text("ab", max_size=9), max_size=6), st.text("ab", max_size=30), st.integers(1, 12)
)
def test_the_end_is_looked_for_in_blocks(lines, torn, block):
    """Against the whole file at once: a log of gigabytes is not to be read to find its last line."""
    whole = "".join(f"{line}\n" for line in lines)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(metrics, "_BLOCK", block):
        path = Path(folder, "train.jsonl")
        path.write_text(whole + torn)
        RunLog(path, total_steps=3).close()
        assert path.read_text() == whole


def test_damage_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"event": "a"\n{"event": "b", "step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_log(path)


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(None, total_steps=3)
    log.event("step", 1, loss=0.5)
    log.progress(1, "")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_without_a_terminal_say_the_time_left(tmp_path, monkeypatch, capsys):
    """By the steps since the first one shown: a resumed run begins in the middle, and the first step warms up."""
    now = 1000.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    log = RunLog(tmp_path / "t.jsonl", total_steps=3000)
    for step, seconds in ((1000, 0.0), (1100, 100.0), (1101, 1.0), (3000, 400.0)):
        now += seconds
        log.progress(step, "loss 1")
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "train 1000/3000  loss 1",
        "train 1100/3000  0:31:40 left  loss 1",
        "train 3000/3000  loss 1",
    ]


def test_a_bar_knows_the_time_left_of_steps_that_take_minutes():
    now = 0.0
    console = Console(file=io.StringIO(), force_terminal=True)
    bar = metrics.progress_bar(console)
    bar.get_time = lambda: now
    task = bar.add_task("train", total=10, info="")
    for step in (1, 2, 3):
        now += 90.0
        bar.update(task, completed=step)
    assert bar.tasks[0].time_remaining == 7 * 90


def test_a_bar_without_a_terminal_is_a_line_now_and_then():
    now = 0.0
    text = io.StringIO()
    bar = metrics.progress_bar(Console(file=text))
    bar.get_time = lambda: now
    with bar:
        task = bar.add_task("sample", total=None, info="")
        other = bar.add_task("of the others", total=4, info="", visible=False)
        for step in range(1, 11):
            now += 8.0
            bar.update(other, completed=4)
            bar.update(task, completed=step, total=10)
            if step == 9:
                bar.update(task, info="[the last]")
    # Nothing in the first 20 s, of short work nothing at all.
    assert text.getvalue().splitlines() == [
        "sample 4/10  0:00:48 left",
        "sample 7/10  0:00:24 left",
        "sample 10/10  [the last]",
    ]


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path / "t.jsonl", total_steps=1, tensorboard=tmp_path / "tb")
    log.event("step", 7, loss=0.25, positions=[1, 2])
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    scalar = accumulator.Scalars("step/loss")[0]
    assert (scalar.step, scalar.value) == (7, 0.25)
