"""A resharded checkpoint has the same contents, in the files that so many ranks would have written."""

from __future__ import annotations

import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from goku_runtime.checkpoint import CheckpointError, load, verify
from goku_runtime.checkpoint.records import skeleton
from goku_runtime.checkpoint.tools import Source, diff, reshard
from goku_runtime.checkpoint.tree import flatten

# The smallest window: records, and payloads, lie across borders.
WINDOW = 1 << 16


def check_contents(path: Path) -> None:
    verify(path)
    found = simulated.empty_like(simulated.state())
    load(found, path)
    assert simulated.same(found, simulated.state())


def rows(path: Path, name: str) -> list[tuple[str, int, int]]:
    """(file, first row, rows) of a tensor's parts."""
    places = Source.open(path).places(name)
    return [(place.file, place.box.start[0], place.box.size[0]) for place in places]


@pytest.mark.parametrize("topology", [*simulated.TOPOLOGIES, "version1"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_contents_stay(topology: str, ranks: int, saved: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = reshard(
        saved[topology], tmp_path / "c", ranks=ranks, window_bytes=WINDOW,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert written.path == tmp_path / "c"
    check_contents(tmp_path / "c")
    assert diff(saved[topology], tmp_path / "c").equal
    data = sorted(path.name for path in tmp_path.glob("c/*_0.distcp"))
    assert data == [f"__{rank}_0.distcp" for rank in range(ranks)]
    assert written.data_files == ranks
    files = [path.stat().st_size for path in tmp_path.glob("c/*") if path.name != "manifest.json"]
    assert written.nbytes == sum(files)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (sum(p.stat().st_size for p in tmp_path.glob("c/*_0.distcp")),) * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_rows_are_divided_as_torch_chunks_them(
    ranks: int, saved: dict[str, Path], tmp_path: Path
) -> None:
    reshard(saved["grid"], tmp_path / "c", ranks=ranks)
    for name, tensor in flatten(simulated.state()).tensors.items():
        if tensor.ndim and tensor.numel():
            wanted, start = [], 0
            for rank, part in enumerate(tensor.chunk(ranks)):
                wanted.append((f"__{rank}_0.distcp", start, part.shape[0]))
                start += part.shape[0]
            assert rows(tmp_path / "c", name) == wanted


def test_a_save_by_ranks_has_the_same_data_files(tmp_path: Path) -> None:
    """Byte for byte what FSDP2's ranks would have written."""
    state = {"a": simulated.full(1, 50, 3), "b": simulated.full(2, 9, dtype=torch.bfloat16)}
    simulated.save(state, tmp_path / "one")
    simulated.save(state, tmp_path / "rows", "rows")
    reshard(tmp_path / "one", tmp_path / "c", ranks=4)
    for path in tmp_path.glob("rows/__*"):
        assert (tmp_path / "c" / path.name).read_bytes() == path.read_bytes()


def test_replicas_share_the_writing(saved: dict[str, Path], tmp_path: Path) -> None:
    reshard(saved["one"], tmp_path / "c", ranks=6, dp_shard=2)
    check_contents(tmp_path / "c")
    assert [size for _, _, size in rows(tmp_path / "c", "model.big")] == [150, 150]
    sizes = [path.stat().st_size for path in tmp_path.glob("c/*_0.distcp")]
    assert len(sizes) == 6
    # The two large tensors make four parts for six ranks; the largest of the rest is half of those.
    assert sum(sizes) < 2 * 300 * 129 * 4 + 70001 + 32768
    meshes = Source.open(tmp_path / "c").writer["meshes"]  # type: ignore[index]
    assert meshes == [{"dims": [["dp_replicate", 3], ["dp_shard", 2]]}]


def test_small_tensors_can_stay_whole(saved: dict[str, Path], tmp_path: Path) -> None:
    reshard(saved["rows"], tmp_path / "c", ranks=4, whole_below=70001)
    check_contents(tmp_path / "c")
    source = Source.open(tmp_path / "c")
    parts = {name: source.parts(name) for name in source.tensors}
    assert parts == {name: len(source.places(name)) for name in source.tensors}
    assert {name for name, count in parts.items() if count > 1} == {
        "model.big", "model.bytes", "ema.big",
    }  # fmt: skip


@pytest.mark.parametrize("topology", ["columns", "version1"])
def test_stock_dcp_reads_it(topology: str, saved: dict[str, Path], tmp_path: Path) -> None:
    reshard(saved[topology], tmp_path / "c", ranks=3, window_bytes=WINDOW)
    wanted = flatten(simulated.state()).tensors
    found: dict[str, Any] = {n: torch.empty_like(t).fill_(1) for n, t in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group
        dcp.load(found, checkpoint_id=tmp_path / "c", no_dist=True)
        dcp_to_torch_save(tmp_path / "c", tmp_path / "whole.pt")
    assert simulated.same(dict(found), dict(wanted))
    nested = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert nested["step"] == 7
    assert torch.equal(nested["model"]["big"], wanted["model.big"])


def test_records_whose_payload_is_not_aligned(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain ones, with torch's alignment set to one byte: elements lie across windows' borders."""
    from torch.utils.serialization import config

    monkeypatch.setattr("goku_runtime.checkpoint.records._template", lambda dtype: None)
    skeleton.cache_clear()
    try:
        with config.patch("save.storage_alignment", 1):
            reshard(saved["rows"], tmp_path / "c", ranks=2, window_bytes=WINDOW)
        offset = Source.open(tmp_path / "c").places("model.big")[0].offset
    finally:
        skeleton.cache_clear()
    assert offset is not None
    assert offset % 4, "guards what is tested"
    check_contents(tmp_path / "c")


def test_what_is_not_allowed(saved: dict[str, Path], tmp_path: Path) -> None:
    for arguments, words in (
        ({"ranks": 0}, "ranks is 0; allowed: >= 1"),
        ({"ranks": 4, "dp_shard": 3}, "dp_shard is 3; allowed: divisors of ranks, which is 4"),
        ({"ranks": 4, "dp_shard": 0}, "dp_shard is 0"),
        ({"ranks": 1, "whole_below": -1}, "whole_below is -1"),
        ({"ranks": 1, "window_bytes": 1000}, "window_bytes is 1000"),
    ):
        with pytest.raises(ValueError, match=words):
            reshard(saved["one"], tmp_path / "c", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: places outside of the checkpoint"):
        reshard(saved["one"], saved["one"] / "c", ranks=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        reshard(saved["one"], tmp_path / "there", ranks=1)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    verify(saved["one"])


@pytest.mark.parametrize("version", [1, 2])
def test_damage_is_named_and_nothing_stays(
    version: int, saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    kind = "version1" if version == 1 else "rows"
    path = Path(shutil.copytree(saved[kind], tmp_path / "in"))
    if version == 1:
        simulated.flip(path / "__0_0.distcp", 5000)
        words = "__0_0.distcp: altered"
    else:
        file, place = simulated.place_of(path, "model.big")
        simulated.flip(file, place)
        words = "model.big"
    with pytest.raises(CheckpointError, match=words):
        reshard(path, tmp_path / "deep" / "out", ranks=2, window_bytes=WINDOW)
    done = ckpt("reshard", path, tmp_path / "deep" / "out", "--ranks", 2)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in"]


def test_the_command(saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]) -> None:
    done = ckpt("reshard", saved["rows"], tmp_path / "c", "--ranks", 2, "--whole-below", "64KiB")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{saved['rows']} -> {tmp_path / 'c'}\n{tmp_path / 'c'}: ")
    assert "2 data files in " in done.out
    check_contents(tmp_path / "c")
    done = ckpt("reshard", saved["rows"], tmp_path / "c", "--ranks", 2)
    assert done.code == 2
    assert done.err == f"goku-runtime ckpt reshard: {tmp_path / 'c'} exists already\n"


@pytest.mark.parametrize("command", ["reshard", "export"])
def test_a_full_disk_leaves_nothing(
    command: str, saved: dict[str, Path], tmp_path: Path, ckpt: Callable[..., Any]
) -> None:
    """With EFBIG, which needs no file system of its own."""
    arguments = ("--ranks", 2) if command == "reshard" else ("--prefix", "model.")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 1 << 16, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            done = ckpt(command, saved["rows"], tmp_path / "deep" / "out", *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert done.code == 2
        assert "File too large" in done.err
        assert done.err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.slow
def test_between_real_ranks(tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    """Three processes save, two load what was resharded."""
    run_ranks(3, tmp_path, "save_spread")
    reshard(tmp_path / "save_spread" / "c", tmp_path / "resharded" / "c", ranks=5)
    assert diff(tmp_path / "save_spread" / "c", tmp_path / "resharded" / "c").equal
    run_ranks(2, tmp_path, "load_spread@resharded")
