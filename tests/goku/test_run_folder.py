"""A run's folder: its lock, where there are locks and where there are none, and what else may lie in it."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from goku.run_config import RunConfig, load_run_config
from goku.run_folder import check_not_foreign, check_own_folders, locked


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "runs/one"
    with locked(folder):
        with pytest.raises(ValueError, match="which another run is writing to"), locked(folder):
            pass
        with locked(tmp_path / "runs/two"):
            pass
    with locked(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    entered = False
    with pytest.warns(UserWarning, match="a second run in it"), locked(tmp_path):
        entered = True
    assert entered


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refused)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_run_config({
        "out": str(tmp_path / "out"),
        "data": {"path": str(tmp_path / "media")},
        "vae": {"path": str(tmp_path / "vae"), "train": {}},
        "model": {"preset": "tiny"},
        "packing": {"tokens_per_step": 64, "tokens_per_pack": 64},
    })  # fmt: skip


def _put(folder: Path, *names: str) -> None:
    """Files, and where a name ends with a slash folders."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()


@pytest.mark.parametrize(
    "names",
    [
        (),
        (".bashrc", ".cache/"),
        ("run.yaml", "cases.json", "train.LOG", "slurm-7.out", "caption.txt", "logs/7.bin"),
        ("vae/config.json", "samples/"),
        ("checkpoints/latest", "thesis.pdf"),  # begun before such folders were refused
        ("cache/latents/", "holiday.mp4"),
    ],
)
@pytest.mark.parametrize("folder", ["out", "vae"])
def test_folders_of_this_program_are_taken(
    names: tuple[str, ...], folder: str, config: RunConfig, tmp_path: Path
) -> None:
    _put(tmp_path / folder, *names)
    check_own_folders(config)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("a.mp4", "a.txt", "b.mp4"), "a.mp4, b.mp4"),
        (("Documents/", "Music/", "Pictures/", "Videos/", "notes.txt"), "Documents, Music, Pictures, ..."),
        (("src.txt/",), "src.txt"),
        (("samples/", "checkpoints/", "weights.pt"), "weights.pt"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("folder", "field"), [("out", "out"), ("vae", "vae.path")])
def test_folders_of_others_are_refused(
    names: tuple[str, ...], shown: str, folder: str, field: str, config: RunConfig, tmp_path: Path
) -> None:
    _put(tmp_path / folder, *names)
    for check in (check_own_folders, check_not_foreign):
        with pytest.raises(ValueError, match=r"a new or an empty folder") as refused:
            check(config)
        said = f"{field} is {tmp_path / folder}, which holds other things ({shown}) and nothing of goku; allowed: "
        assert str(refused.value).startswith(said)


def test_what_the_config_names_may_lie_in_its_folder(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _put(out, "media/a.mp4", "wan/config.json", "shared/deep/")
    data = replace(config.data, path=str(out / "media"), cache=str(out / "shared/deep"))
    named = replace(config, data=data, vae=replace(config.vae, path=str(out / "wan")))
    check_not_foreign(named)
    with pytest.raises(ValueError, match=r"holds other things \(shared\)"):
        check_not_foreign(replace(named, data=replace(data, cache=None)))
    # The folder that is the data itself is no run's.
    with pytest.raises(ValueError, match=r"out is .*media, .* \(a\.mp4\)"):
        check_not_foreign(replace(named, out=str(out / "media")))


def test_what_is_only_read_may_hold_what_it_likes(config: RunConfig, tmp_path: Path) -> None:
    _put(tmp_path / "vae", "config.json", "model.bin")
    check_own_folders(config)
    (tmp_path / "vae/config.json").unlink()
    check_own_folders(replace(config, vae=replace(config.vae, train=None)))


def test_a_vae_s_folder_has_to_be_one(config: RunConfig, tmp_path: Path) -> None:
    """Said before it is trained for minutes."""
    (tmp_path / "vae").touch()
    with pytest.raises(ValueError, match=r"^vae.path is .*vae is no folder"):
        check_own_folders(config)
