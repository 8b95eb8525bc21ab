"""Records against torch.save of the tensor itself: byte for byte but for CRC and id, and by loading."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from goku_runtime.checkpoint import records
from goku_runtime.checkpoint.records import DTYPES, Skeleton, dtype_name, skeleton

SHAPES = [
    (),
    (1,),
    (7,),
    (0,),
    (3, 2),
    (1, 1),
    (0, 3),
    (3, 0, 2),
    (2, 3, 4),
    (1, 2, 1, 3, 2),
    (300, 70),
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bits, NaNs among them; a bool's byte is 0 or 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    most = 2 if dtype is torch.bool else 256
    raw = torch.randint(most, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def payload(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def saved(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def bits_equal(left: Tensor, right: Tensor) -> bool:
    same = (
        left.dtype == right.dtype and left.shape == right.shape and left.stride() == right.stride()
    )
    return same and payload(left) == payload(right)


@pytest.mark.parametrize("name", DTYPES)
def test_loads_bit_exact_and_is_laid_out_as_torch_does(name: str) -> None:
    dtype = DTYPES[name]
    for shape in SHAPES:
        tensor = random_tensor(dtype, shape)
        made = skeleton(dtype, shape)
        assert made.nbytes == tensor.numel() * dtype.itemsize
        assert len(made.before) % 64 == 0
        whole = made.before + payload(tensor) + made.after
        assert len(whole) == made.length
        loaded = torch.load(io.BytesIO(whole), weights_only=True)
        assert bits_equal(loaded, tensor), shape
        real = saved(tensor)
        assert len(real) == len(whole), shape
        assert real[: len(made.before)] == made.before, shape
        assert differing(real, whole) <= crcs_and_id(real), shape


def differing(left: bytes, right: bytes) -> set[int]:
    return {i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b}


def crcs_and_id(real: bytes) -> set[int]:
    """Where the payload's CRC stands, and the id with its CRC."""
    places: set[int] = set()
    with zipfile.ZipFile(io.BytesIO(real)) as archive:
        at = archive.start_dir
        for info in archive.infolist():
            if info.filename.endswith(("/data/0", "/.data/serialization_id")):
                name, extra = (
                    int.from_bytes(real[info.header_offset + k :][:2], "little") for k in (26, 28)
                )
                content = info.header_offset + 30 + name + extra
                end = content + info.file_size
                places |= set(range(at + 16, at + 20))
                if info.file_size:  # the CRC stands after the content, too
                    places |= set(range(end + 4, end + 8))
                if info.filename.endswith("_id"):
                    places |= set(range(content, end))
            at += 46 + len(info.filename.encode()) + len(info.extra)
    return places


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=5))
def test_any_shape(name: str, sizes: list[int]) -> None:
    tensor = random_tensor(DTYPES[name], tuple(sizes))
    made = skeleton(tensor.dtype, tuple(sizes))
    loaded = torch.load(io.BytesIO(made.before + payload(tensor) + made.after), weights_only=True)
    assert bits_equal(loaded, tensor.contiguous())


def test_a_slice_of_a_file_as_dcp_reads_it(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.utils import _create_file_view

    tensor = random_tensor(torch.bfloat16, (5, 3))
    made = skeleton(tensor.dtype, (5, 3))
    path = tmp_path / "f"
    path.write_bytes(b"x" * 192 + made.before + payload(tensor) + made.after + b"y" * 100)
    with open(path, "rb") as stream:
        loaded = torch.load(_create_file_view(stream, 192, made.length), weights_only=True)
    assert bits_equal(loaded, tensor)


def test_more_than_four_gib_without_allocating_them(tmp_path: Path) -> None:
    """The zip's 64-bit fields: torch maps a sparse file, and Python's zipfile agrees on the sizes."""
    count = (1 << 32) + 5
    made = skeleton(torch.uint8, (count,))
    path = tmp_path / "large"
    with open(path, "wb") as stream:
        stream.write(made.before)
        stream.seek(made.nbytes - 3, io.SEEK_CUR)
        stream.write(b"end" + made.after)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == (count,)
    assert bytes(loaded[-4:].tolist()) == b"\0end"
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["archive/data/0"] == count
        assert archive.read("archive/version").strip().isdigit()
    del loaded


def test_huge_shapes_cost_nothing() -> None:
    made = skeleton(torch.float64, (1 << 30, 1 << 29))
    assert made.nbytes == 1 << 62
    assert len(made.before) + len(made.after) < 4096


def test_the_same_object_and_the_same_bytes() -> None:
    assert skeleton(torch.float32, (3, 4)) is skeleton(torch.float32, torch.Size((3, 4)))
    code = (
        "import hashlib, torch; from goku_runtime.checkpoint.records import *\n"
        "made = [skeleton(d, s) for d in DTYPES.values() for s in ((), (0, 2), (70, 3))]\n"
        "print(hashlib.sha256(b''.join(m.before + m.after for m in made)).hexdigest())"
    )
    run = [sys.executable, "-c", code]
    found = {
        subprocess.run(
            run, check=True, capture_output=True, text=True,
            env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("storage_alignment", 4096), ("compute_crc32", False)]
)
def test_options_of_the_caller_change_nothing(field: str, value: object) -> None:
    from torch.utils.serialization import config

    wanted = skeleton(torch.int16, (9, 2))
    before = getattr(config.save, field)
    clear()
    try:
        setattr(config.save, field, value)
        found = skeleton(torch.int16, (9, 2))
    finally:
        setattr(config.save, field, before)
        clear()
    assert found == wanted
    assert found is not wanted


def clear() -> None:
    records.skeleton.cache_clear()
    records._template.cache_clear()


def test_an_unknown_layout_of_archives_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a torch that adds an entry or another field: plain records, and the log says so."""
    tensor = random_tensor(torch.float32, (4, 5))
    real_assembled = records._assembled

    def other(prefix: str, entries: object, alignment: int) -> Skeleton:
        made = real_assembled(prefix, entries, alignment)  # type: ignore[arg-type]
        return Skeleton(made.before, made.nbytes, made.after + b"!")

    monkeypatch.setattr(records, "_assembled", other)
    clear()
    try:
        with caplog.at_level(logging.WARNING):
            made = skeleton(torch.float32, (4, 5))
    finally:
        clear()
    assert "plain" in caplog.text
    loaded = torch.load(io.BytesIO(made.before + payload(tensor) + made.after), weights_only=True)
    assert bits_equal(loaded, tensor)
    real = saved(torch.zeros(4, 5))
    assert (made.before, made.after) == (real[: len(made.before)], real[-len(made.after) :])


@pytest.mark.parametrize(
    ("dtype", "shape", "text"),
    [
        (torch.quint8, (2,), "dtype is torch.quint8; allowed: bool"),
        (torch.int8, (2, -1), r"shape is \(2, -1\); allowed: sizes >= 0"),
        (torch.int16, (1 << 40, 1 << 30), r"less than 2\*\*63"),
    ],
)
def test_refused(dtype: torch.dtype, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        skeleton(dtype, shape)


def test_every_dtype_of_this_torch_is_known() -> None:
    """Whatever torch.save can write; a dtype that a new torch adds has to be decided on."""
    known = set(DTYPES.values())
    odd = {"torch.int1", "torch.uint1", "torch.bits", "torch.qint", "torch.quint"}
    for dtype in {each for each in vars(torch).values() if isinstance(each, torch.dtype)}:
        packed = str(dtype).startswith(tuple(odd)) or str(dtype)[-2:] in {
            f"t{k}" for k in range(1, 8)
        }
        assert packed or dtype in known, dtype
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())


def test_fast_enough_for_thousands_of_shapes() -> None:
    """About 30 us each, measured; ten times that is a fault."""
    skeleton(torch.bfloat16, (1,))
    begin = time.perf_counter()
    for i in range(500):
        skeleton(torch.bfloat16, (123_457 + i, 3))
    assert (time.perf_counter() - begin) / 500 < 300e-6 * 5
