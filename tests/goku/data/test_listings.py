"""What is listed once: by one process for several datasets, and by the main one for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import goku.data.listings
from goku.data import DataError
from goku.data.listings import Listings, Scans

SCRIPT = Path(__file__).with_name("listing_processes.py")


@pytest.mark.parametrize("world", [2, 3])
def test_the_main_rank_lists_for_all(
    tmp_path: Path, write_dataset: Callable[[Path], Path], run_processes: Any, world: int
) -> None:
    folder = str(write_dataset(tmp_path / "media"))

    def case(name: str) -> tuple[str, dict[str, object]]:
        return name, {"folder": folder, "cache": str(tmp_path / name)}

    cases = ["from_main", case("main_rank_lists"), case("own_files"), case("own_archives")]
    run_processes(world, SCRIPT, *cases)


def test_a_listing_is_kept_until_it_is_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[tuple[str, str, bool]] = []
    real = goku.data.listings.scan

    def counted(path: str, form: Any, *, follow_links: bool) -> Any:
        listed.append((path, form, follow_links))
        return real(path, form, follow_links=follow_links)

    monkeypatch.setattr(goku.data.listings, "scan", counted)
    listings = Listings(lambda work: work())
    path = str(folder)
    # What the main process has listed alone is not listed again for all of them.
    alone = listings.alone(path, "auto", follow_links=False)
    assert listings(path, "auto", follow_links=False) is alone
    assert listings(path, "auto", follow_links=False) is alone
    listings(path, "auto", follow_links=True)
    listings(path, "sidecars", follow_links=False)
    assert listed == [(path, "auto", False), (path, "auto", True), (path, "sidecars", False)]
    (folder / "a.txt").unlink()
    assert len(listings(path, "auto", follow_links=False).records) == 4
    listings.forget()
    assert len(listings(path, "auto", follow_links=False).records) == 3
    # Why there is nothing is kept as well, and every one who asks is told.
    listed.clear()
    for scans in (Scans(), Listings(lambda work: work())):
        for _ in range(2):
            with pytest.raises(DataError, match="nowhere: no such file or folder"):
                scans(f"{path}/nowhere", "auto", follow_links=False)
    assert listed == [(f"{path}/nowhere", "auto", False)] * 2
