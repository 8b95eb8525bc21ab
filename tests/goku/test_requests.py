"""Files of prompts: what they may say, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from goku.data.images import upright_size
from goku.given import read_image
from goku.requests import Request, RequestDefaults, read_requests

DEFAULTS = RequestDefaults(height=32, width=48, frames=5, seed=3, negative="grey")


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff a cat \r\n\n  \nzwei Kühe\n".encode())
    assert read_requests(path, DEFAULTS) == [
        Request("a cat", 32, 48, 5, 3, "grey"),
        Request("zwei Kühe", 32, 48, 5, 3, "grey"),
    ]


def test_a_line_ends_where_an_editors_does(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red\u2028car\x0bat night\nblue\x85sky", encoding="utf-8")
    prompts = [request.prompt for request in read_requests(path, DEFAULTS)]
    assert prompts == ["a red\u2028car\x0bat night", "blue\x85sky"]


ENTRIES = [
    {"prompt": "one"},
    {"caption": "two", "height": 16, "width": 64, "num_frames": 1, "seed": 9},
    {"text": "three", "num_inference_steps": 7, "negative_prompt": "blur", "image_path": ""},
    {"prompt": "", "image": "a.png", "last_image": "sub/b.png", "seed": 0, "steps": None},
]


@pytest.mark.parametrize("form", ["list", "data", "lines"])
def test_json_forms_say_the_same(form: str, tmp_path: Path) -> None:
    if form == "lines":
        text = "\n\n".join(json.dumps(entry) for entry in ENTRIES)
        path = _write(tmp_path / "prompts.JSONL", text)
    else:
        path = _write(tmp_path / "p.json", {"data": ENTRIES} if form == "data" else ENTRIES)
    assert read_requests(path, DEFAULTS) == [
        Request("one", 32, 48, 5, 3, "grey"),
        Request("two", 16, 64, 1, 9, "grey"),
        Request("three", 32, 48, 5, 3, "blur", steps=7),
        Request("", 32, 48, 5, 0, "grey", {0: tmp_path / "a.png", -1: tmp_path / "sub/b.png"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "\n \n", ["p.txt", "no prompt"]),
        ("p.json", "[]", ["p.json", "no prompt"]),
        ("p.json", '{"prompts": []}', ["p.json", "list of objects"]),
        ("p.json", '[{"prompt": "a",}]', ["p.json, line 1", "not JSON"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt', ["p.jsonl, line 2", "not JSON"]),
        ("p.json", '["a"]', ["entry 1", "'a'", "an object"]),
        ("p.json", '[{"height": 32}]', ["entry 1", "prompt"]),
        ("p.json", '[{"prompt": "a"}, {"prompt": "b", "heigth": 32}]', ["entry 2", "heigth", "height"]),
        ("p.json", '[{"prompt": "a", "caption": "b"}]', ["entry 1", "twice", "caption"]),
        ("p.json", '[{"prompt": "a", "height": 33}]', ["entry 1", "height", "33", "width"]),
        ("p.json", '[{"prompt": "a", "height": 33, "width": 32}]', ["height is 33", "16"]),
        ("p.json", '[{"prompt": "a", "num_frames": 4}]', ["frames is 4", "4k + 1"]),
        ("p.json", '[{"prompt": "a", "seed": "one"}]', ["seed", "'one'", "integer"]),
        ("p.json", '[{"prompt": "a", "steps": 0}]', ["steps is 0"]),
        ("p.json", '[{"prompt": "a", "fps": 1%s}]' % ("0" * 400), ["entry 1", "fps"]),
        ("p.json", '[{"prompt": "a", "seed": 1%s}]' % ("0" * 5000), ["not JSON", "digits"]),
        ("p.jsonl", '{"prompt": "a", "seed": 1%s}' % ("0" * 5000), ["line 1", "not JSON", "digits"]),
        ("p.json", "[" * 100_000, ["not JSON", "recursion"]),
        ("p.jsonl", "[" * 100_000, ["line 1", "not JSON", "recursion"]),
        ("p.json", '[{"prompt": "a", "seed": -1}]', ["seed is -1"]),
        ("p.json", r'[{"prompt": "a \ud83d"}]', ["entry 1", r"prompt 'a \ud83d' is not valid Unicode", "character 3"]),
        ("p.jsonl", r'{"prompt": "a", "negative": "\ud83d"}', ["line 1", r"negative '\ud83d' is not valid Unicode"]),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say(name: str, content: str, words: list[str], tmp_path: Path) -> None:
    path = _write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_requests(path, DEFAULTS)
    assert all(word in str(caught.value) for word in [name, *words]), str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"p\.txt is not UTF-8"):
        read_requests(path, DEFAULTS)
    with pytest.raises(FileNotFoundError):
        read_requests(tmp_path / "absent.txt", DEFAULTS)


def test_without_a_size_the_image_decides(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    path = _write(tmp_path / "p.json", [{"prompt": "a", "image": "wide.png"}, {"prompt": "b"}])
    defaults = RequestDefaults(pixels=96 * 144, frames=5)
    first, second = read_requests(path, defaults)
    assert (first.height, first.width) == (96, 144)
    assert (second.height, second.width) == (112, 112)  # a square in the same area
    # Its own size, though it has an image; and one side alone is half a size.
    own = defaults.request("a", height=16, width=32, given=first.given)
    assert (own.height, own.width) == (16, 32)
    with pytest.raises(ValueError, match="both or neither"):
        defaults.request("a", width=32)


@given(
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_an_image_covers_its_frame_and_is_not_bent(
    tmp_path_factory: Any, size: tuple[int, int], cells: tuple[int, int]
) -> None:
    """A horizontal and a vertical ramp: positions in the result tell what was cut and stretched."""
    (height, width), (rows, columns) = size, (16 * cells[0], 16 * cells[1])
    y, x = np.mgrid[:height, :width]
    picture = np.stack([255 * (y + 0.5) / height, 255 * (x + 0.5) / width, 0 * x], -1)
    path = tmp_path_factory.mktemp("image") / "ramp.png"
    Image.fromarray(picture.round().astype(np.uint8)).save(path)
    read = read_image(path, rows, columns)
    assert read.shape == (3, rows, columns)
    assert read.dtype == torch.uint8
    # The scale of both axes: the larger of the two ratios; the centre stays the centre.
    scale = max(rows / height, columns / width)
    for channel, count, source in ((0, rows, height), (1, columns, width)):
        line = read[channel].double().mean(1 - channel)
        middle = 255 * (0.5 + ((torch.arange(count) + 0.5) - count / 2) / (scale * source))
        inner = slice(count // 4, count - count // 4)
        # 8 bits twice, a resized side rounded to a whole pixel, a crop rounded to half of one.
        bound = 2 + 255 / (scale * source) * 1.1
        assert (line - middle)[inner].abs().max() < bound


def test_a_turned_image_is_set_upright_and_one_that_is_none_is_named(tmp_path: Path) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = read_image(tmp_path / "turned.png", 64, 32)
    assert read[:, :28].min() > 250
    assert read[:, 36:].max() < 5
    assert upright_size(str(tmp_path / "turned.png")) == (64, 32)
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"broken\.png"):
        upright_size(str(tmp_path / "broken.png"))
    with pytest.raises(ValueError, match=r"broken\.png"):
        read_image(tmp_path / "broken.png", 32, 32)
    with pytest.raises(ValueError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png", 32, 32)


def test_a_thin_image_is_not_enlarged_beyond_all_memory(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4000)).save(tmp_path / "thin.png")
    said = r"thin\.png: its 4000x4 \(height x width\) would have to become 1024000x1024 to cover 256x1024"
    with pytest.raises(ValueError, match=said):
        read_image(tmp_path / "thin.png", 256, 1024)


def test_the_size_of_an_image_is_read_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompts file each line asks for it."""
    Image.new("RGB", (640, 320)).save(tmp_path / "a.png")

    def read(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr("goku.data.images.read_rgb", read)
    defaults = RequestDefaults(frames=5, pixels=512, shape=(16, 16))
    request = defaults.request("x", given={0: tmp_path / "a.png"})
    assert (request.height, request.width) == (16, 32)


def test_a_request_names_frames_that_it_has() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    assert Request("a", 32, 32, 5, given={-5: image, 4: image}).grid == (2, 2, 2)
    for frame in (5, -6):
        with pytest.raises(ValueError, match=f"frame {frame}; allowed: -5 to 4"):
            Request("a", 32, 32, 5, given={frame: image})
