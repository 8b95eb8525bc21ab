"""The streams of random numbers against an implementation in Python integers and libm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.random import (
    Purpose,
    bits,
    normal,
    normal_packed,
    stream_tensor,
    uniform,
    uniform_each,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PURPOSES = st.sampled_from(list(Purpose))


def reference_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """The SC11 paper's definition in unbounded integers."""
    (r0, l0, r1, l1), (k0, k1) = counter, key
    for number in range(10):
        ka = (k0 + number * 0x9E3779B9) % 2**32
        kb = (k1 + number * 0xBB67AE85) % 2**32
        p0, p1 = r0 * 0xD2511F53, r1 * 0xCD9E8D57
        r0, l0, r1, l1 = p1 // 2**32 ^ l0 ^ ka, p1 % 2**32, p0 // 2**32 ^ l1 ^ kb, p0 % 2**32
    return [r0, l0, r1, l1]


def reference_words(seed: int, stream: int, n: int, purpose: int) -> list[int]:
    key = (seed % 2**32, seed // 2**32)
    words: list[int] = []
    for block in range(-(-n // 4)):
        words += reference_philox((block, purpose, stream % 2**32, stream // 2**32), key)
    return words[:n]


def reference_normals(words: list[int]) -> list[float]:
    """Box-Muller with libm's functions."""
    values = []
    for x, y in zip(words[::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((x >> 8) + 1) * 2.0**-24))
        angle = 2 * math.pi * (y >> 8) * 2.0**-24
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values


@given(seed=U64, stream=U64, n=st.integers(0, 13), purpose=PURPOSES)
def test_bits_and_uniform_follow_the_counter_layout(
    seed: int, stream: int, n: int, purpose: Purpose
) -> None:
    words = reference_words(seed, stream, n, int(purpose))
    assert bits(seed, stream, n, purpose).tolist() == words
    numbers = uniform(seed, stream, n, purpose)
    assert numbers.dtype == torch.float64
    assert numbers.tolist() == [word / 2**32 for word in words]


@given(seed=U64, streams=st.lists(U64, max_size=6), element=st.integers(0, 20), purpose=PURPOSES)
def test_uniform_each_picks_one_element_of_every_stream(
    seed: int, streams: list[int], element: int, purpose: Purpose
) -> None:
    expected = [
        reference_words(seed, stream, element + 1, int(purpose))[element] / 2**32
        for stream in streams
    ]
    numbers = uniform_each(seed, streams, purpose, element=element)
    assert numbers.shape == (len(streams),)
    assert numbers.tolist() == expected


@given(seed=U64, stream=U64, n=st.integers(1, 70), purpose=PURPOSES)
def test_normals_match_box_muller_in_libm(seed: int, stream: int, n: int, purpose: Purpose) -> None:
    words = reference_words(seed, stream, n + (-n) % 2, int(purpose))
    expected = torch.tensor(reference_normals(words)[:n], dtype=torch.float64)
    values = normal(seed, stream, n, purpose, dtype=torch.float64)
    # Relative: libm errs by 1 ulp per function. Absolute: libm is handed an angle that is off by up
    # to 7e-16 (its own rounding and that of pi), times the radius of at most 5.8.
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=5e-15)
    assert torch.equal(normal(seed, stream, n, purpose), values.float())  # rounded once


def test_normals_use_only_correctly_rounded_operations() -> None:
    """The fp64 values equal, bit for bit, the same formula in Python floats, which are IEEE 754.

    That is what makes them independent of the device, of SIMD width and of the position in a
    tensor: +, -, * and / have one right answer, the log, cos and sqrt of a library have not.
    """
    from goku_kernels.philox import ATANH, COS, SIN

    def horner(x: float, coefficients: tuple[float, ...]) -> float:
        result = x * coefficients[-1]
        for coefficient in coefficients[-2:0:-1]:
            result = (result + coefficient) * x
        return result + coefficients[0]

    expected = []
    n = 4003
    words = reference_words(11, 2**40 + 3, n + 1, 0)
    for x, y in zip(words[::2], words[1::2], strict=True):
        m, power = math.frexp(float((x >> 8) + 1))
        if m < math.sqrt(0.5):
            m, power = 2 * m, power - 1
        s = (m - 1) / (m + 1)
        log = horner(s * s, ATANH) * s * 2 + (power - 24) * math.log(2.0)
        radius = math.sqrt(log * -2)
        quarter = ((y >> 8) + 2**21) >> 22
        angle = ((y >> 8) - (quarter << 22)) * (2 * math.pi / 2**24)
        c, s = horner(angle * angle, COS), horner(angle * angle, SIN) * angle
        c, s = ((c, s), (-s, c), (-c, -s), (s, -c))[quarter % 4]
        expected += [radius * c, radius * s]
    got = normal(11, 2**40 + 3, n, dtype=torch.float64)
    assert torch.equal(got, torch.tensor(expected[:n], dtype=torch.float64))


@given(
    seed=U64,
    samples=st.lists(st.tuples(U64, st.integers(0, 40)), max_size=6),
    purpose=PURPOSES,
    blocks_per_pass=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_packed_normals_are_the_concatenation(
    seed: int,
    samples: list[tuple[int, int]],
    purpose: Purpose,
    blocks_per_pass: int,
    dtype: torch.dtype,
) -> None:
    streams, lengths = [s for s, _ in samples], [n for _, n in samples]
    parts = [normal(seed, s, n, purpose, dtype=dtype) for s, n in samples]
    expected = torch.cat([torch.empty(0, dtype=dtype), *parts])
    with pytest.MonkeyPatch.context() as patch:  # cut streams at every possible place
        patch.setattr("goku_kernels.philox._BLOCKS_PER_PASS_CPU", blocks_per_pass)
        packed = normal_packed(seed, streams, lengths, purpose, dtype=dtype)
    assert packed.dtype == dtype
    assert torch.equal(packed, expected)


def test_packed_normals_of_real_size_are_the_concatenation() -> None:
    # More blocks than one pass holds, lengths that are not multiples of 4 or of any SIMD width.
    streams, lengths = (5, 2**63, 5, 0), (300_001, 3, 250_002, 1)
    parts = [normal(3, stream, n) for stream, n in zip(streams, lengths, strict=True)]
    assert torch.equal(normal_packed(3, streams, lengths), torch.cat(parts))
    assert torch.equal(parts[0][:250_002], parts[2])


@given(seed=U64, stream=U64, n=st.integers(1, 2000), m=st.integers(1, 2000))
@settings(max_examples=30)
def test_a_prefix_does_not_depend_on_the_number_of_elements(
    seed: int, stream: int, n: int, m: int
) -> None:
    short, long = min(n, m), max(n, m)
    for dtype in (torch.float32, torch.float64):
        whole = normal(seed, stream, long, dtype=dtype)
        assert torch.equal(normal(seed, stream, short, dtype=dtype), whole[:short])
    prefix = bits(seed, stream, short, Purpose.CROP)
    assert torch.equal(prefix, bits(seed, stream, long, Purpose.CROP)[:short])


def test_the_number_of_threads_and_the_global_generator_play_no_part() -> None:
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    try:
        torch.set_num_threads(1)
        one = normal(9, 9, 200_003)
        torch.set_num_threads(3)
        torch.manual_seed(1)
        three = normal(9, 9, 200_003)
        drawn = torch.rand(2)
        torch.manual_seed(1)
        assert torch.equal(drawn, torch.rand(2))  # nothing was taken from the global generator
    finally:
        torch.set_num_threads(threads)
        torch.random.set_rng_state(state)
    assert torch.equal(one, three)


def test_moments_of_the_normals() -> None:
    n = 1_000_000
    z = normal(2024, 7, n, dtype=torch.float64)
    # Each moment within 4.5 of its own standard errors (6.8e-6 two-sided, and the seed is fixed);
    # Var(z^k) = (2k - 1)!! - E[z^k]^2.
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((z**power).mean().item() - mean) < 4.5 * math.sqrt(variance / n), power
    assert z.abs().max().item() <= math.sqrt(48 * math.log(2)) * (1 + 1e-15)
    ordered = z.sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - rank[:-1]).abs().max(), (rank[1:] - cdf).abs().max())
    assert distance.item() < 2.23 / math.sqrt(n)  # Kolmogorov's 1e-4 quantile


def test_moments_of_the_uniforms() -> None:
    n = 1_000_000
    u = uniform(2024, 7, n, Purpose.SAMPLE)
    assert u.min().item() >= 0.0
    assert u.max().item() < 1.0
    assert abs(u.mean().item() - 0.5) < 4.5 * math.sqrt(1 / 12 / n)
    assert abs(((u - 0.5) ** 2).mean().item() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / n)


def test_neighbouring_streams_are_independent() -> None:
    """Seeds, stream indices and purposes that differ in one bit give uncorrelated numbers."""
    n = 40_000
    origin = (0, 0, Purpose.NOISE)
    others = [(1, 0, Purpose.NOISE), (2**32, 0, Purpose.NOISE), (0, 1, Purpose.NOISE),
              (0, 2**32, Purpose.NOISE), (0, 2**63, Purpose.NOISE)]  # fmt: skip
    others += [(0, 0, purpose) for purpose in Purpose if purpose is not Purpose.NOISE]
    z = torch.stack([normal(s, i, n, p, dtype=torch.float64) for s, i, p in [origin, *others]])
    # Also a stream against itself, moved: the words within and across blocks.
    z = torch.cat([z, torch.stack([z[0].roll(lag) for lag in (1, 2, 3, 4, 8)])])
    for values in (z, z * z - 1):  # the squares too: a pair shares its radius
        correlation = torch.corrcoef(values).fill_diagonal_(0.0)
        # 153 correlations, each of standard error 1/sqrt(n): 5.5 of them have p = 6e-6 together.
        assert correlation.abs().max().item() < 5.5 / math.sqrt(n)


def test_stream_indices_as_tensors_keep_their_bits() -> None:
    indices = [0, 2**63 - 1, 2**63, 2**64 - 1, 12345678901234567890]
    tensor = stream_tensor(indices)
    assert tensor.dtype == torch.int64
    assert [value % 2**64 for value in tensor.tolist()] == indices
    assert stream_tensor([]).shape == (0,)


def test_purposes_are_frozen() -> None:
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "NOISE": 0, "TIME": 1, "TEXT_DROP": 2, "POSTERIOR": 3,
        "SHUFFLE": 4, "SAMPLE": 5, "EVAL": 6, "CROP": 7, "CONDITION": 8, "MIX": 9, "CAPTION": 10,
    }  # fmt: skip


def test_stored_values_do_not_change() -> None:
    """A change of the layout would break every resumed run: these are frozen too."""
    words = bits(1234567890123456789, 9876543210987654321, 3, Purpose.POSTERIOR).tolist()
    assert words == reference_words(1234567890123456789, 9876543210987654321, 3, 3)
    assert [value.hex() for value in normal(1, 2, 3, dtype=torch.float64).tolist()] == FROZEN


FROZEN = ["-0x1.b727cc93567b9p-2", "-0x1.2073fb1ab331cp-3", "0x1.9fa8fc2816224p+0"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream_tensor([0, 2**64]), "stream_indices contains 18446744073709551616"),
        (lambda: stream_tensor([-1]), "stream_indices contains -1"),
        (lambda: bits(-1, 0, 1, Purpose.NOISE), "seed contains -1"),
        (lambda: bits(2**64, 0, 1, Purpose.NOISE), "seed contains 18446744073709551616"),
        (lambda: uniform(0, -5, 1, Purpose.NOISE), "stream_index contains -5"),
        (lambda: bits(0, 0, -2, Purpose.NOISE), "n contains -2"),
        (lambda: uniform_each(0, [1, 2**64], Purpose.NOISE), "stream_indices contains"),
        (lambda: uniform_each(0, [1], Purpose.NOISE, element=2**34), r"element \+ 1 contains"),
        (lambda: uniform_each(0, [1], Purpose.NOISE, element=-2), r"element \+ 1 contains"),
        (lambda: normal_packed(0, [1], [1, 2]), "lengths has 2 entries"),
        (lambda: normal_packed(0, [1], [-1]), "lengths contains -1"),
        (lambda: normal_packed(0, [1], [2**34 + 1]), "lengths contains 17179869185"),
        (lambda: normal(0, 0, 1, dtype=torch.bfloat16), "dtype is torch.bfloat16"),
        (lambda: bits(0, 0, 1, Purpose(99)), "99 is not a valid Purpose"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
