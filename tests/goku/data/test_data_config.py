from __future__ import annotations

import pickle
from typing import Any

import pytest

from goku.data import DataConfig, DataError, DecodeError, MixConfig, Problem, SourceConfig


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
        ("max_seconds", 0.0, "max_seconds: 0.0 must be"),
        ("max_lost", -1, "max_lost: -1"),
        ("min_image_pixels", -1, "min_image_pixels: -1"),
        ("min_video_pixels", -1, "min_video_pixels: -1"),
        ("min_frames", 0, "min_frames: 0 must be 1 to max_frames = 17"),
        ("min_frames", 18, "min_frames: 18"),
        ("max_source_pixels", 178956971, "max_source_pixels: 178956971 must be 1 to 178956970"),
        ("path", None, "path, sources: neither is given"),
        ("sources", {"a": SourceConfig(path="y")}, "path, sources: both are given"),
        ("mix", {"a": MixConfig(image=1)}, r"mix.a: is no source; .*data.sources is not given"),
        ("motion_caption", "{caption} {speed}", "motion_caption: .* cannot be filled in"),
        ("motion_caption", "{motion", "motion_caption: .* cannot be filled in"),
        ("motion_caption", "score {motion}", "must hold {caption}"),
        ("motion_caption", "{caption} \ud83d", "motion_caption: .* is not valid Unicode"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"path": "x", field: value})


def test_bad_sources_and_mixes_are_named() -> None:
    sources = {"a": SourceConfig(path="x"), "b": SourceConfig(path="y")}
    for mix, message in (
        ({"c": MixConfig(image=1)}, "mix.c: is no source; allowed: a, b"),
        ({"a": MixConfig()}, "every weight is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(sources=sources, mix=mix)
    with pytest.raises(ValueError, match="video: -1 must be a finite number of at least 0"):
        MixConfig(video=-1)
    with pytest.raises(ValueError, match="path: '' names no dataset"):
        SourceConfig(path="")
    with pytest.raises(ValueError, match="'a:b' is no name"):
        DataConfig(sources={"a:b": SourceConfig(path="x")})


def test_errors_travel_between_processes() -> None:
    error = DecodeError("/a.mp4", "broken", "too large")
    decode_error = pickle.loads(pickle.dumps(error))  # noqa: S301
    found = (decode_error.path, decode_error.reason, decode_error.kind)
    assert found == ("/a.mp4", "broken", "too large")
    assert str(decode_error) == "/a.mp4: broken"
    data_error = pickle.loads(pickle.dumps(DataError("bad", [Problem("a", "b")])))  # noqa: S301
    assert data_error.problems == (Problem("a", "b"),)
    assert str(data_error) == "bad\n  a: b"
