"""Where a dataset's files lead, and what a listing asks of the file system."""

from __future__ import annotations

import builtins
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from goku.data import scan
from goku.data.links import Root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with files, links of every kind, and others beside it that they lead to."""
    folder, other = tmp_path / "set", tmp_path / "other"
    for path in (folder / "deep", other / "deep"):
        path.mkdir(parents=True)
        (path / "a.png").touch()
        (path.parent / "b.png").touch()
    (folder / "to-folder").symlink_to(other / "deep")
    (folder / "to-itself").symlink_to(folder)
    for number, target in enumerate(
        ("b.png", "deep/a.png", "../other/b.png", "to-folder/a.png", "gone.png", "../gone.png")
    ):
        (folder / f"link{number}.png").symlink_to(target)
    (folder / "round.png").symlink_to("round.png")
    (tmp_path / "alias").symlink_to(folder)
    return tmp_path


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize("base", ["set", "alias", "alias/../set"])
def test_a_file_leads_where_the_system_says(tree: Path, base: str, walked: bool) -> None:
    root = Root(tree / base)
    names = {path.relative_to(tree / base).as_posix() for _, path in root.files()}
    assert {"b.png", "deep/a.png", "link0.png", "link5.png", "round.png"} <= names
    if not walked:
        root = Root(tree / base)
    names |= {"to-folder/a.png", "to-itself/b.png", "to-itself/link2.png", "nowhere/x.png"}
    names |= {"deep/../b.png", "to-folder/../b.png", "./link2.png", "../other/b.png"}
    names |= {"../alias/b.png", "../set/link3.png", "x" * 300 + ".png"}
    outside = real_outside = 0
    real_folder = os.path.realpath(tree / base)
    for name in names:
        file = tree / base / name
        real = os.path.realpath(file)
        inside = Path(real).is_relative_to(real_folder)
        named = Path(os.path.normpath(file)).is_relative_to(os.path.normpath(tree / base))
        told = root.leads_out(file)
        assert (told is not None) == (named and not inside), name
        assert told is None or told.startswith(f"link to {real} outside")
        assert root.is_outside(file) == (not named and not inside), name
        outside += told is not None
        real_outside += root.is_outside(file)
    assert outside >= 5
    assert real_outside >= 1
    assert Root(tree / base, follow_links=True).leads_out(tree / base / "link2.png") is None


class _Calls:
    """Counts what is asked of the file system by path: a trip to the server of a shared one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: Counter[str] = Counter()
        for module, name in ((os, "lstat"), (os, "stat"), (os, "scandir"), (io, "open")):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))
        monkeypatch.setattr(builtins, "open", io.open)

    def _counted(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            self.made[name] += not isinstance(arguments[0], int)
            return real(*arguments, **how)

        return call


def _dataset(folder: Path, form: str, items: int) -> Path:
    names = [f"{number:03d}" for number in range(items)]
    media = folder / "media"
    media.mkdir(parents=True)
    if form == "tar":
        with tarfile.open(folder / "x.tar", "w") as archive:
            for name in names:
                for suffix, content in ((".png", b"x" * 700), (".json", b'{"text": "t"}')):
                    member = tarfile.TarInfo(name + suffix)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        return folder / "x.tar"
    for name in names:
        (media / f"{name}.png").touch()
        if form == "sidecars":
            (media / f"{name}.txt").write_text("t")
    if form == "sidecars":
        return folder
    rows = [json.dumps({"path": f"media/{name}.png", "text": "t"}) for name in names]
    table = folder / ("metadata.jsonl" if form == "folder with a table" else "own.jsonl")
    table.write_text("\n".join(rows))
    return folder if form == "folder with a table" else table


@pytest.mark.parametrize(
    ("form", "each"),
    [
        ("folder with a table", {}),
        ("table", {"lstat": 1}),  # it may be a link
        ("sidecars", {"open": 1}),
        ("tar", {}),
    ],
)
def test_what_a_listing_asks_of_the_file_system_for_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, each: dict[str, int]
) -> None:
    made = []
    for items in (10, 60):
        dataset = _dataset(tmp_path / str(items), form, items)
        with monkeypatch.context() as patch:
            calls = _Calls(patch)
            found = scan(dataset)
        assert (len(found.records), found.problems) == (items, ())
        made.append(calls.made)
    assert made[0].total() > 0
    assert made[1] - made[0] == Counter({name: 50 * count for name, count in each.items()})
