"""Any saved topology into any other, bit for bit: by `load`, and by stock DCP from the same folder.

Most ranks here are threads of this process: each has its own `Checkpointer` and its own parts of DTensors, cut
by `torch.chunk`, and they meet where ranks would meet. Several real processes are in `reshard_processes.py`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointOptions,
    checkpointer,
    layout,
    load,
    loading,
    stored,
    verify,
)
from goku_runtime.checkpoint.manifest import Manifest
from goku_runtime.checkpoint.plan import Box
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.stored import Stored

SCRIPT = Path(__file__).with_name("reshard_processes.py")
MOST = 8
T = TypeVar("T")
Run = Callable[..., str]


# ---- ranks that are threads ----


class Meeting:
    """Where threads exchange what ranks would send each other."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=60)
        self.values: list[Any] = [None] * count


class ThreadRanks(Ranks):
    """The ranks of a meeting; collectives other than `gather` and what is built of it are not used."""

    here = threading.local()

    def __init__(self, group: object = None) -> None:
        self.group, self.distributed = None, False
        self.rank, self.meeting = self.here.rank, self.here.meeting
        self.count = self.meeting.count

    def gather(self, value: T) -> list[T]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.barrier.wait()
        return values

    def _largest(self, *numbers: int) -> list[int]:
        return [max(each) for each in zip(*self.gather(numbers), strict=True)]


def on_ranks(count: int, step: Callable[[int], T]) -> list[T]:
    """Runs a step on every rank at the same time; raises the first error that is no consequence."""
    meeting = Meeting(count)

    def run(rank: int) -> T:
        ThreadRanks.here.rank, ThreadRanks.here.meeting = rank, meeting
        try:
            return step(rank)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        ends = [pool.submit(run, rank) for rank in range(count)]
    for end in ends:
        with suppress(threading.BrokenBarrierError):
            end.result()
    return [end.result() for end in ends]


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """A world of eight in name, so that meshes can be made; and ranks that are threads."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=MOST)
    with pytest.MonkeyPatch.context() as patch:
        for module in (checkpointer, loading):
            patch.setattr(module, "Ranks", ThreadRanks)
        for module in (layout, loading, stored):
            patch.setattr(module, "global_rank", lambda: ThreadRanks.here.rank)
        yield
    dist.destroy_process_group()


# ---- topologies ----


class Topology(NamedTuple):
    """A mesh, and for each tensor how it lies there; None: no DTensor."""

    shape: tuple[int, ...]
    placements: tuple[tuple[Placement, ...] | None, ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.shape)


def local_part(
    whole: Tensor, rank: int, shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> Tensor:
    """What torch gives a rank: `chunk` after `chunk`, in the order of the mesh's dimensions."""
    place = torch.unravel_index(torch.tensor(rank), shape)
    for at, size, placement in zip(place, shape, placements, strict=True):
        if isinstance(placement, Replicate):
            continue
        axis = placement.dim
        pieces = [whole]
        if isinstance(placement, _StridedShard):
            pieces = list(whole.chunk(placement.split_factor, axis))
        mine = [piece.chunk(size, axis)[int(at) :][:1] for piece in pieces]
        parts = [part for found in mine for part in found]
        whole = torch.cat(parts, axis) if parts else whole.narrow(axis, 0, 0)
    return whole.clone()


def spread(wholes: list[Tensor], topology: Topology, rank: int) -> dict[str, Tensor]:
    """One rank's state: tensor n under the name tn."""
    mesh = DeviceMesh("cpu", torch.arange(topology.ranks).reshape(topology.shape))
    state: dict[str, Tensor] = {}
    for number, (whole, placements) in enumerate(zip(wholes, topology.placements, strict=True)):
        if placements is None:
            state[f"t{number}"] = whole.clone()
        else:
            state[f"t{number}"] = DTensor.from_local(
                local_part(whole, rank, topology.shape, placements), mesh, placements,
                run_check=False, shape=whole.shape, stride=whole.stride(),
            )  # fmt: skip
    return state


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Random bits: NaNs and signed zeros among them. Some have fewer rows than there are ranks."""
    found = []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 13), min_size=1, max_size=3))
        if draw(st.integers(0, 9)) == 0:
            shape[0] = draw(st.sampled_from([0, 4000]))
        dtype = draw(st.sampled_from(DTYPES))
        size = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        found.append(raw.view(dtype).reshape(shape))
    return found


@st.composite
def topologies(draw: st.DrawFn, wholes: list[Tensor]) -> Topology:
    sizes: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        sizes.append(draw(st.integers(1, MOST // math.prod(sizes))))
    shape = tuple(sizes)
    every: list[tuple[Placement, ...] | None] = []
    for whole in wholes:
        choices: list[Placement] = [Replicate(), Shard(0), Shard(0)]
        choices += [Shard(axis) for axis in range(1, whole.ndim)]
        placements = tuple(draw(st.sampled_from(choices)) for _ in shape)
        last = len(shape) - 1
        # FSDP2 over tensor parallelism: the rows of a tensor-parallel part are divided.
        strided = last > 0 and whole.shape[0] % math.prod(shape) == 0 and whole.numel() > 0
        if strided and draw(st.integers(0, 3)) == 0:
            others = tuple(Replicate() for _ in shape[2:])
            first = _StridedShard(0, split_factor=shape[-1])
            placements = (*others, first, Shard(0))
        every.append(None if draw(st.integers(0, 7)) == 0 else placements)
    return Topology(shape, tuple(every))


class Case(NamedTuple):
    wholes: list[Tensor]
    saved: Topology
    wanted: Topology


@st.composite
def cases(draw: st.DrawFn) -> Case:
    wholes = draw(tensors())
    return Case(wholes, draw(topologies(wholes)), draw(topologies(wholes)))


# ---- the matrix ----

QUICK = CheckpointOptions(fsync=False)


def save_on(case: Case, path: Path) -> None:
    def step(rank: int) -> None:
        with Checkpointer(options=QUICK) as saving:
            state: dict[str, Any] = {"model": spread(case.wholes, case.saved, rank), "step": 7}
            saving.save(state, path)

    on_ranks(case.saved.ranks, step)


def zeros(case: Case, rank: int) -> dict[str, Tensor]:
    state = spread([torch.zeros_like(each) for each in case.wholes], case.wanted, rank)
    for tensor in state.values():
        local(tensor).fill_(1)
    return state


def check_rank(case: Case, rank: int, state: dict[str, Tensor]) -> None:
    wanted = spread(case.wholes, case.wanted, rank)
    for name, tensor in state.items():
        assert bits(local(tensor)) == bits(local(wanted[name])), (name, rank)


def check_load(case: Case, path: Path) -> None:
    def step(rank: int) -> None:
        state = {"model": zeros(case, rank), "step": 0}
        load(state, path)
        assert state["step"] == 7
        check_rank(case, rank, state["model"])

    on_ranks(case.wanted.ranks, step)


def check_stock(case: Case, path: Path) -> None:
    wholes = {f"t{n}": torch.ones_like(whole) for n, whole in enumerate(case.wholes)}
    dcp.load({"model": wholes}, checkpoint_id=path, no_dist=True)
    for number, whole in enumerate(case.wholes):
        assert bits(wholes[f"t{number}"]) == bits(whole), number


def check_matrix(case: Case, path: Path) -> None:
    save_on(case, path)
    verify(path)
    check_load(case, path)
    check_stock(case, path)


STOCK = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MATRIX = settings(
    max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@STOCK
@MATRIX
@given(case=cases())
def test_any_topology_into_any_other(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_matrix(case, tmp_path_factory.mktemp("c") / "c")


@STOCK
@pytest.mark.long
@pytest.mark.slow
@settings(MATRIX, max_examples=250)
@given(case=cases())
def test_many_topologies(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_matrix(case, tmp_path_factory.mktemp("c") / "c")


R, S0, S1 = Replicate(), Shard(0), Shard(1)
# dp_replicate x dp_shard x sp, where weights are divided by dp_shard and sp flattened into one.
GOKU = [(8,), (1, 8), (2, 4), (4, 2), (2, 3), (1, 3), (1, 1)]


@STOCK
@pytest.mark.parametrize("saved", GOKU)
def test_meshes_of_goku(tmp_path: Path, saved: tuple[int, ...]) -> None:
    """Rows that no number of ranks divides, fewer rows than ranks, and one row."""
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(rows, 7, generator=generator) for rows in (53, 5, 1)]

    def on(shape: tuple[int, ...]) -> Topology:
        placements = (R,) * (len(shape) - 1) + (S0,)
        return Topology(shape, (placements,) * len(wholes))

    save_on(Case(wholes, on(saved), on(saved)), tmp_path / "c")
    for wanted in GOKU:
        check_load(Case(wholes, on(saved), on(wanted)), tmp_path / "c")
    check_stock(Case(wholes, on(saved), on(saved)), tmp_path / "c")


@MATRIX
@given(case=cases(), data=st.data())
def test_partly_and_converted(
    case: Case, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Some tensors, some of them in another dtype: what `Tensor.to` makes of them."""
    path = tmp_path_factory.mktemp("c") / "c"
    save_on(case, path)
    names = [f"t{number}" for number in range(len(case.wholes))]
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1), label="names")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float16]), label="dtype")

    def step(rank: int) -> None:
        expected = spread([whole.to(dtype) for whole in case.wholes], case.wanted, rank)
        state = {name: torch.zeros_like(expected[name]) for name in wanted}
        load({"model": state}, path, partial=True, convert=True)
        for name, tensor in state.items():
            assert bits(local(tensor)) == bits(local(expected[name])), (name, rank)

    on_ranks(case.wanted.ranks, step)
    with pytest.raises(ValueError, match="was saved"):
        on_ranks(1, lambda rank: load(
            {"model": {wanted[0]: case.wholes[int(wanted[0][1:])].to(torch.complex64)}},
            path, partial=True,
        ))  # fmt: skip


def test_a_rank_that_is_told_a_wrong_place_is_found(tmp_path: Path) -> None:
    """That the matrix can fail: parts of two ranks are exchanged on saving."""
    case = Case([torch.arange(12.0)], Topology((2,), ((S0,),)), Topology((1,), ((R,),)))

    def step(rank: int) -> None:
        with Checkpointer(options=QUICK) as saving:
            state = {"model": spread(case.wholes, case.saved, 1 - rank), "step": 7}
            saving.save(state, tmp_path / "c")

    on_ranks(2, step)
    with pytest.raises(AssertionError, match="t0"):
        check_load(case, tmp_path / "c")


# ---- what is read ----


def read_box(path: Path, box: Box, whole: Tensor) -> Stored:
    opened = Stored(path, Manifest.read(path))
    target = torch.empty(box.size, dtype=whole.dtype)
    with CheckpointOptions().engine() as engine:
        opened.read(engine, [("w", box, target)])
    part = whole
    for axis, (start, size) in enumerate(zip(*box, strict=True)):
        part = part.narrow(axis, start, size)
    assert torch.equal(target, part)
    return opened


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """48 MiB, written by three ranks whose shares are not those of the readers."""
    path = tmp_path_factory.mktemp("large") / "c"
    whole = torch.arange(12 << 20, dtype=torch.float32).reshape(4096, 3072)

    def step(rank: int) -> None:
        with Checkpointer(options=QUICK) as saving:
            rows = spread([whole], Topology((3,), ((S0,),)), rank)
            saving.save({"w": rows["t0"]}, path)

    on_ranks(3, step)
    return path, whole


def test_an_eighth_of_the_rows(large: tuple[Path, Tensor]) -> None:
    path, whole = large
    for rank in range(8):
        found = read_box(path, Box((512 * rank, 0), (512, 3072)), whole)
        assert found.bytes_wanted == whole.nbytes // 8
        assert found.bytes_read <= 1.05 * whole.nbytes / 8, rank


@pytest.mark.parametrize(
    "box",
    [
        Box((0, 0), (4096, 384)),
        Box((0, 1000), (4096, 1)),
        Box((700, 100), (2000, 700)),
        Box((0, 0), (1, 1)),
        Box((1365, 0), (3, 3072)),
        Box((0, 0), (4096, 3072)),
    ],
    ids=str,
)
def test_other_splits_read_the_chunks_that_they_touch(large: tuple[Path, Tensor], box: Box) -> None:
    """Counted here byte by byte, from where the index says that parts lie."""
    path, whole = large
    found = read_box(path, box, whole)
    chunk = found.index.chunk
    touched: set[tuple[int, int]] = set()
    for part in found.index.tensors["w"].parts:
        for row in range(box.start[0], box.start[0] + box.size[0]):
            if part.box.start[0] <= row < part.box.start[0] + part.box.size[0]:
                first = part.offset + ((row - part.box.start[0]) * 3072 + box.start[1]) * 4
                last = first + box.size[1] * 4 - 1
                touched |= {(part.file, at) for at in range(first // chunk, last // chunk + 1)}
    assert found.bytes_wanted == box.volume * 4
    assert found.bytes_read <= len(touched) * chunk
    print(f"{box}: {found.bytes_read / found.bytes_wanted:.3f} times the bytes wanted")


# ---- several processes ----


@pytest.mark.long
@pytest.mark.slow
def test_real_processes(run_processes: Run, tmp_path: Path) -> None:
    """Meshes as goku makes them, in every direction; what is replicated is read once and sent."""
    root = {"root": str(tmp_path)}
    run_processes(4, SCRIPT, ("save_all", root), ("load_all", root))
    run_processes(2, SCRIPT, ("load_all", root), ("save_all", root))
    run_processes(3, SCRIPT, ("load_all", root))
    run_processes(1, SCRIPT, ("load_all", root))
