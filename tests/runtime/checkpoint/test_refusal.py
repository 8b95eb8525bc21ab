"""States that cannot be saved, and checkpoints that do not fit: named, and nothing is changed."""

from __future__ import annotations

import copy
import enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointOptions,
    GokuStorageReader,
    GokuStorageWriter,
    Retention,
    async_save,
    describe,
    latest,
    load,
    prune,
    read_values,
    save,
    set_latest,
    verify,
)

ENDLESS: dict[str, Any] = {}
ENDLESS["self"] = ENDLESS


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": object()}}, r"a\.b: a builtins\.object; must be a tensor, None, bool, int"),
        ({"a": [1, {"b": {1, 2}}]}, r"a\[1\]\.b: a builtins\.set"),
        ({"a": np.float64(1)}, r"a: a numpy\.float64"),
        ({"a": Colour.RED}, r"a: a .*Colour"),
        ({"a": b"x"}, r"a: a builtins\.bytes"),
        ({"a": torch.float32}, r"a: a torch\.dtype"),
        ({"a": [torch.ones(1)]}, r"a\[0\]: a tensor inside a list"),
        ({"a": [{"b": torch.ones(1)}]}, r"a\[0\]\.b: a tensor inside a list"),
        (
            {"a": np.float64(1)},
            r"a: a numpy\.float64; must be .* \(torch\.from_numpy\(array\), or scalar",
        ),
        ({"a": {True: 1}}, r"a: the key True is a bool; must be str or int"),
        ({(1, 2): 1}, r"state: the key \(1, 2\) is a tuple"),
        ({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}, r"a\.b\.c: two tensors"),
        ({"a": torch.ones(3, device="meta")}, r"a: a tensor on the meta device"),
        ({"a": torch.eye(3).to_sparse()}, r"a: a torch\.sparse_coo tensor; must be dense"),
        ([1], r"state: found list; must be a dict"),
        (ENDLESS, r"state: nested too deeply, or a part of itself"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        save(state, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["latest", "/", ".hidden", ".c.saving-0123456789abcdef", "two\nlines", "not UTF-8 \udcff"],
)
def test_names_that_a_checkpoint_cannot_have(tmp_path: Path, name: str) -> None:
    """`latest` would not find it; so it says before anything is written."""
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match="is not allowed"):
            save({}, directory / name, latest=True)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_is_one_that_can_be_removed(tmp_path: Path) -> None:
    longest = "\u00e9" * 113 + "s_"  # of 228 bytes
    for step in (1, 2):
        path = tmp_path / f"{longest[:-1]}{step}"
        save({}, path, latest=True, retention=Retention(1))
        save({}, path, overwrite=True)
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == [path.name]
    with pytest.raises(ValueError, match="has 229 bytes; allowed: up to 228"):
        save({}, tmp_path / f"{longest}3")


@pytest.mark.parametrize("name", ["step 4 ", "\u00e9", "a.b", "-"])
def test_odd_names_that_it_can_have(tmp_path: Path, name: str) -> None:
    save({}, tmp_path / "step 4")
    assert latest(tmp_path) == tmp_path / "step 4"
    save({}, tmp_path / name, latest=True)
    assert latest(tmp_path) == tmp_path / name
    save({}, tmp_path / "step_5")
    assert latest(tmp_path) == tmp_path / name


SAVED: dict[str, Any] = {
    "model": {"w": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
    "step": 3,
    "config": {"lr": 0.1, "tags": ["x"]},
    "ema": None,
}


def zeros() -> dict[str, Any]:
    return {
        "model": {"w": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)},
        "step": 0,
        "config": {"lr": 0.0, "tags": []},
        "ema": None,
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "c"
    save(SAVED, path)
    return path


def with_tensor(name: str, tensor: Any) -> dict[str, Any]:
    state = zeros()
    state["model"][name] = tensor
    return state


def without(name: str) -> dict[str, Any]:
    state = zeros()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (with_tensor("w", torch.zeros(3, 2)),
         r"model\.w: torch\.float32 \(2, 3\) was saved, torch\.float32 \(3, 2\) is wanted"),
        (with_tensor("w", torch.zeros(6)), r"\(2, 3\) was saved, torch\.float32 \(6,\) is wanted"),
        (with_tensor("b", torch.zeros(2)),
         r"model\.b: torch\.bfloat16 \(2,\) was saved, torch\.float32 \(2,\) is wanted"),
        (with_tensor("c", torch.zeros(2)), r"model\.c: missing"),
        (with_tensor("w", 3), r"model\.w: a tensor was saved, a int is wanted"),
        (with_tensor("w", {"x": 1}), r"model\.w: a tensor was saved, a dict is wanted"),
        (with_tensor("w", torch.zeros(1, 3).expand(2, 3)), r"model\.w: an expanded tensor"),
        (with_tensor("w", torch.zeros(2, 3, device="meta")), r"model\.w: .* meta device"),
        (without("step"), r"state: step: unexpected \(partial=True"),
        (without("model"), r"model\.w: unexpected; model\.b: unexpected"),
        ({**zeros(), "new": {"x": {"y": 1}}}, r"new\.x\.y: missing"),
        ({**zeros(), "step": torch.zeros(())}, r"step: a int was saved, a tensor is wanted"),
        ({**zeros(), "step": {"x": 1}}, r"step: a int was saved, a dict is wanted"),
        ({**zeros(), "config": 3}, r"config: a dict was saved, a int is wanted"),
        ({**zeros(), "config": torch.zeros(())}, r"config: a dict was saved, a tensor is wanted"),
        ({**zeros(), "ema": {"w": torch.zeros(2)}}, r"ema: a NoneType was saved, a dict is wanted"),
        ({**zeros(), "model": None}, r"model: tensors were saved, None is wanted"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_changes(
    saved: Path, state: dict[str, Any], words: str
) -> None:
    meta = any(getattr(value, "is_meta", False) for value in (state.get("model") or {}).values())
    before = None if meta else copy.deepcopy(state)
    with pytest.raises(ValueError, match=words):
        load(state, saved)
    if before is not None:
        assert same(state, before)


def test_all_misfits_are_named_at_once(saved: Path) -> None:
    state = with_tensor("w", torch.zeros(1))
    state["more"] = 1
    del state["config"]
    with pytest.raises(ValueError, match="does not fit the state") as caught:
        load(state, saved)
    for words in ("config.lr: unexpected", "config.tags: unexpected", "more: missing", "model.w:"):
        assert words in str(caught.value)


def test_the_hint_of_other_dtypes_stands_where_one_differs(saved: Path) -> None:
    """Beside another shape, or another kind, `convert` would change nothing."""
    half = torch.float16
    for state, convert, hinted in (
        (with_tensor("w", torch.zeros(3, 2)), False, False),
        ({**zeros(), "step": {"x": 1}}, False, False),
        (with_tensor("w", torch.zeros(2, 3, dtype=half)), False, True),
        (with_tensor("w", torch.zeros(6, dtype=half)), False, True),
        (with_tensor("w", torch.zeros(6, dtype=half)), True, False),  # asked for already
    ):
        with pytest.raises(ValueError, match="does not fit the state") as caught:
            load(state, saved, convert=convert)
        assert ("(convert=True accepts other dtypes)" in str(caught.value)) == hinted


def test_what_fits_is_loaded(saved: Path) -> None:
    state = zeros()
    load(state, saved)
    assert same(state, SAVED)


def test_a_part_is_loaded_when_that_is_asked_for(saved: Path) -> None:
    state = {"model": {"w": torch.zeros(2, 3)}, "config": {"lr": 0.0}}
    with pytest.raises(ValueError, match=r"model\.b: unexpected; config\.tags: unexpected"):
        load(state, saved)
    load(state, saved, partial=True)
    assert same(state, {"model": {"w": SAVED["model"]["w"]}, "config": {"lr": 0.1}})
    with pytest.raises(ValueError, match=r"state: model\.c: missing$"):
        load({"model": {"c": torch.zeros(2)}}, saved, partial=True)


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    save({"x": 1}, tmp_path / "c")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save({"x": 2}, tmp_path / "c")
    state = {"x": 0}
    load(state, tmp_path / "c")
    assert state == {"x": 1}
    save({"x": 2}, tmp_path / "c", overwrite=True)
    load(state, tmp_path / "c")
    assert state == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_only_a_checkpoint_is_ever_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    save({"x": 1}, tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    for name in ("home", "file", "link"):
        with pytest.raises(FileExistsError, match="it is no checkpoint"):
            save({"x": 2}, tmp_path / name, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"home", "file", "c", "link"}


def test_a_group_without_initialisation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="process_group: given, but"):
        save({}, tmp_path / "c", process_group=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [0, -1.0, "60", True, float("inf"), float("nan")])
def test_timeouts(timeout_s: Any) -> None:
    with pytest.raises(ValueError, match=r"timeout_s is .*; allowed: None or seconds > 0"):
        CheckpointOptions(timeout_s=timeout_s)


@pytest.mark.parametrize("path", [None, b"bytes", 3, "", "s3://bucket/run", "file:///x"])
@pytest.mark.parametrize(
    "call",
    [
        lambda path: save({}, path),
        lambda path: async_save({}, path),
        lambda path: load({}, path),
        verify,
        describe,
        read_values,
        latest,
        lambda path: latest(path, together=True),
        lambda path: prune(path, 1),
        lambda path: set_latest(path, "c"),
    ],
)
def test_paths_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, call: Any
) -> None:
    """An address is refused by those who read, too: `latest` would say that there is none."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(path|root) is .*; allowed: a directory, "):
        call(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"fsync": True}, "fast", 3])
def test_options_of_another_kind(saved: Path, tmp_path: Path, options: Any) -> None:
    calls = (
        lambda: save({}, tmp_path / "c", options=options),
        lambda: async_save({}, tmp_path / "c", options=options),
        lambda: Checkpointer(options=options),
        lambda: load(zeros(), saved, options=options),
        lambda: verify(saved, options=options),
        lambda: GokuStorageWriter(tmp_path / "c", options=options),
        lambda: GokuStorageReader(saved, options=options),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"options is .*; allowed: None or CheckpointOptions"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [[], None, torch.ones(2)])
def test_a_state_of_another_kind(saved: Path, state: Any) -> None:
    with pytest.raises(ValueError, match=r"state: found .*; must be a dict"):
        load(state, saved)
