from __future__ import annotations

import pickle
from typing import Any

import pytest

from goku.data import DataConfig, DataError, DecodeError, Problem


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("path", "", "path: ''"),
        ("image_pixels", 255, "image_pixels: 255 is less than 256"),
        ("video_pixels", 0, "video_pixels: 0"),
        ("max_frames", 16, "max_frames: 16 is not 4k"),
        ("max_frames", -3, "max_frames: -3"),
        ("fps", 0.0, "fps: 0.0 must be"),
        ("fps", float("inf"), "fps: inf"),
        ("workers", -1, "workers: -1"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"path": "x", field: value})


def test_errors_travel_between_processes() -> None:
    decode_error = pickle.loads(pickle.dumps(DecodeError("/a.mp4", "broken")))  # noqa: S301
    assert (decode_error.path, decode_error.reason) == ("/a.mp4", "broken")
    assert str(decode_error) == "/a.mp4: broken"
    data_error = pickle.loads(pickle.dumps(DataError("bad", [Problem("a", "b")])))  # noqa: S301
    assert data_error.problems == (Problem("a", "b"),)
    assert str(data_error) == "bad\n  a: b"
