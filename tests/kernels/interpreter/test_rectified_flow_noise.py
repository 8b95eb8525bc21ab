"""The noising kernel in the interpreter: the bits of the eager operator, for every packing."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing
from goku_kernels.philox import box_muller, philox4x32
from goku_kernels.rectified_flow_noise import _noise, rectified_flow_noise
from goku_kernels.triton import philox

SEED = 2**63 + 99
STREAMS = torch.tensor([3, -1, 2**40 + 5, -(2**63), 0, 2**31, 7, 2**32 - 1])


@triton.jit
def words_kernel(counter, key, out, N: tl.constexpr):
    """Raw words of N blocks: int64 (N, 4) counters and (2,) key, uint32 values inside."""
    i = tl.arange(0, N)
    c0, c1, c2, c3 = philox.words(
        tl.load(counter + 4 * i).to(tl.uint32),
        tl.load(counter + 4 * i + 1).to(tl.uint32),
        tl.load(counter + 4 * i + 2).to(tl.uint32),
        tl.load(counter + 4 * i + 3).to(tl.uint32),
        tl.load(key).to(tl.uint32),
        tl.load(key + 1).to(tl.uint32),
    )
    tl.store(out + 4 * i, c0.to(tl.int64))
    tl.store(out + 4 * i + 1, c1.to(tl.int64))
    tl.store(out + 4 * i + 2, c2.to(tl.int64))
    tl.store(out + 4 * i + 3, c3.to(tl.int64))


@triton.jit
def normals_kernel(x, y, a, b, N: tl.constexpr):
    """Two normals from each of N pairs of words, given as int64."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    first, second = philox.normals(tl.load(x + i).to(tl.uint32), tl.load(y + i).to(tl.uint32))
    tl.store(a + i, first)
    tl.store(b + i, second)


U32 = st.integers(0, 2**32 - 1)


@settings(max_examples=20)
@given(
    counter=st.lists(st.tuples(U32, U32, U32, U32), min_size=8, max_size=8), key=st.tuples(U32, U32)
)
def test_raw_words(counter, key):
    counter = torch.tensor(counter)
    out = torch.empty_like(counter)
    words_kernel[(1,)](counter, torch.tensor(key), out, N=8)
    assert torch.equal(out, philox4x32(counter, key))


def normals_of(x, y):
    a, b = torch.empty(len(x)), torch.empty(len(x))
    n = 1 << 16
    normals_kernel[(len(x) // n,)](x, y, a, b, N=n)
    return a, b


def test_normals_on_a_dense_subset_of_their_arguments():
    """Bit for bit: the same rounded operations in the same order, so that no ulp may differ.

    The logarithm and the angle take 24 bits each; every 61st value of either (a prime), the ends
    and the neighbours of the branches. All 2^24 of both agreed when this was written.
    """
    corners = [0, 1, 2**21 - 1, 2**21, 2**21 + 1, 2**22, 2**23, 2**24 - 1]
    corners += [int(0.5**0.5 * 2**p) + e for p in (24, 23, 5) for e in (-2, -1, 0, 1)]
    k = torch.cat([torch.arange(0, 2**24, 61), torch.tensor(corners)])
    k = k[-(len(k) // 2**16 * 2**16) :]
    # A partner for each, elsewhere in its own range; the low 8 bits of a word must not matter.
    partner = (k * 40503 + 977) % 2**24
    for x, y in ((k, partner), (partner, k)):
        x, y = x * 256 + k % 256, y * 256 + k % 251
        got = normals_of(x, y)
        for g, w in zip(got, box_muller(x, y), strict=True):
            assert torch.equal(g, w.float())


def both(x1, t, streams, cu, **options):
    """The kernel's outputs and the eager ones, from the same arguments."""
    return [
        rectified_flow_noise(x1, t, streams, cu, seed=SEED, backend=b, **options)
        for b in ("triton", "torch")
    ]


def assert_same_bits(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def arguments(lengths, padding, width, dtype=torch.float32, time=torch.float64):
    generator = torch.Generator().manual_seed(width)
    x1 = torch.randn(sum(lengths) + padding, width, generator=generator).to(dtype)
    x1[sum(lengths) :] = float("nan")
    t = torch.linspace(0, 1 - 1e-9, len(lengths), dtype=torch.float64).to(time)
    return x1, t, STREAMS[: len(lengths)], Packing.from_lengths(lengths).cu_seqlens


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 12, 27, 1])
def test_same_bits_as_eager(pack, width, dtype):
    lengths, padding = pack
    for time in (torch.float32, torch.float64):
        x1, t, streams, cu = arguments(lengths, padding, width, dtype, time)
        got, want = both(x1, t, streams, cu, purpose=6)
        assert_same_bits(got, want)
        assert torch.equal(got[0][cu[-1] :], torch.zeros(padding, width, dtype=dtype))
        again, _ = both(x1, t, streams, cu, purpose=6)
        assert_same_bits(again, got)


@pytest.mark.parametrize("width", [64, 6])
def test_shards_that_begin_inside_a_sample(pack, width):
    lengths, padding = pack
    x1, t, streams, cu = arguments(lengths, padding, width)
    whole = rectified_flow_noise(x1, t, streams, cu, seed=SEED, backend="torch")
    for first in {len(x1) // 3, len(x1) // 2, len(x1)}:
        got = rectified_flow_noise(
            x1[first:], t, streams, cu, seed=SEED, token_offset=first, backend="triton"
        )
        assert_same_bits(got, [x[first:] for x in whole])


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    padding=st.integers(0, 3),
    width=st.sampled_from([4, 64, 5]),
)
def test_any_packing(lengths, padding, width):
    assert_same_bits(*both(*arguments(lengths, padding, width)))


def test_more_samples_than_one_load_of_offsets():
    """1,500 samples of one token: the search takes two loads, the walk many steps."""
    cu = torch.arange(1501, dtype=torch.int32)
    x1 = torch.randn(20, 4)
    t, streams = torch.rand(1500), torch.arange(1500) * 2**33
    for first in (0, 1015, 1485):
        assert_same_bits(*both(x1, t, streams, cu, token_offset=first))


def test_rows_of_a_wider_tensor_and_beyond_2_to_31_elements():
    x1, t, streams, cu = arguments([5, 7], 0, 64)
    wide = torch.randn(12, 160)
    wide[:, 8:72] = x1
    assert_same_bits(both(wide[:, 8:72], t, streams, cu)[0], both(x1, t, streams, cu)[1])
    wide[:, 9:73] = x1  # rows that begin on no 16 bytes
    assert_same_bits(both(wide[:, 9:73], t, streams, cu)[0], both(x1, t, streams, cu)[1])
    # Virtual memory: only the pages of the rows are touched. 11 * stride is past 2^31.
    far = torch.empty_strided((12, 64), (2**28, 1))
    far.copy_(x1)
    assert_same_bits(both(far, t, streams, cu)[0], both(x1, t, streams, cu)[1])


def test_elements_past_2_to_32():
    """The 34-bit element number of a row far inside its sample, in a shard."""
    cu = torch.tensor([0, 3, 2**27], dtype=torch.int32)
    x1, t = torch.randn(4, 64), torch.tensor([0.1, 0.6])
    got, want = both(x1, t, STREAMS[:2], cu, token_offset=2**27 - 3)
    assert_same_bits(got, want)
    other, _ = both(x1, t, STREAMS[:2], cu, token_offset=2**26 - 3)
    assert not torch.equal(other[1], got[1])  # 2^32 elements on


def test_opcheck():
    x1, t, streams, cu = arguments([2, 3], 1, 4)
    torch.library.opcheck(_noise, (x1.nan_to_num(), t, streams, cu, 5, 2**31 + 3, 0, 0))


def test_fp64_is_refused_by_name_and_falls_back():
    x1, t, streams, cu = arguments([2], 0, 4, torch.float64)
    with pytest.raises(ValueError, match=r"x1 has dtype torch\.float64"):
        rectified_flow_noise(x1, t, streams, cu, seed=1, backend="triton")
    assert rectified_flow_noise(x1, t, streams, cu, seed=1)[0].dtype == torch.float64


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31])
def test_rows_far_past_the_end_are_padding(offset):
    x, cu = torch.ones(4, 8), torch.tensor([0, 3, 5], dtype=torch.int32)
    outs = rectified_flow_noise(
        x, torch.ones(2), torch.arange(2), cu, seed=0, token_offset=offset, backend="triton"
    )
    assert not any(out.any() for out in outs)


def test_what_is_too_wide_is_refused():
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="x1 has width 9000: allowed"):
        rectified_flow_noise(
            torch.ones(2, 9000), torch.ones(1), torch.arange(1), cu, seed=0, backend="triton"
        )
