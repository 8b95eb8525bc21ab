"""Philox and its normals against published vectors, an implementation in Python integers, libm."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goku_kernels.philox import (
    block_normals,
    box_muller,
    cos_sin_of_24_bits,
    log_of_24_bits,
    philox4x32,
    split64,
    sqrt,
)

U32 = st.integers(0, 2**32 - 1)


def reference_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """The SC11 paper's definition in unbounded integers."""
    (r0, l0, r1, l1), (k0, k1) = counter, key
    for number in range(10):
        ka = (k0 + number * 0x9E3779B9) % 2**32
        kb = (k1 + number * 0xBB67AE85) % 2**32
        p0, p1 = r0 * 0xD2511F53, r1 * 0xCD9E8D57
        r0, l0, r1, l1 = p1 // 2**32 ^ l0 ^ ka, p1 % 2**32, p0 // 2**32 ^ l1 ^ kb, p0 % 2**32
    return [r0, l0, r1, l1]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_matches_the_known_answers_of_random123(
    counter: str, key: str, expected: str
) -> None:
    counter_words, key_words, answer = (
        [int(word, 16) for word in text.split()] for text in (counter, key, expected)
    )
    assert philox4x32(torch.tensor(counter_words), key_words).tolist() == answer
    assert reference_philox(tuple(counter_words), tuple(key_words)) == answer


@given(
    counters=st.lists(st.tuples(U32, U32, U32, U32), min_size=1, max_size=9),
    key=st.tuples(U32, U32),
)
def test_philox_matches_unbounded_integers(
    counters: list[tuple[int, ...]], key: tuple[int, int]
) -> None:
    given_counters = torch.tensor(counters)
    kept = given_counters.clone()
    expected = [reference_philox(counter, key) for counter in counters]
    assert philox4x32(given_counters, key).tolist() == expected
    assert torch.equal(given_counters, kept)  # the in-place steps stay inside


def test_philox_keeps_leading_dimensions() -> None:
    counter = torch.arange(24).reshape(2, 3, 4)
    flat = philox4x32(counter.reshape(6, 4), (1, 2))
    assert torch.equal(philox4x32(counter, (1, 2)), flat.reshape(2, 3, 4))
    assert philox4x32(torch.empty(0, 4, dtype=torch.int64), (1, 2)).shape == (0, 4)


def test_normals_at_the_corners_ofbox_muller() -> None:
    last = 2**32 - 1
    eighth = 2**29
    x = torch.tensor([0, last, 2**31, 0, 0, 0, 0, 0, 0])
    y = torch.tensor([0, 0, 0, 2**30, 2**31, 3 * 2**30, last, eighth, 7 * eighth])
    cosine, sine = box_muller(x, y)
    tail = math.sqrt(48 * math.log(2))
    assert cosine[0].item() == pytest.approx(tail, rel=1e-15)
    assert cosine[1].item() == 0.0  # u1 = 1: the logarithm is exactly 0
    # The reduction to quarter turns is exact, so the axes are exact zeros, unlike libm's.
    assert sine[[0, 4]].tolist() == [0.0, 0.0]
    assert cosine[[3, 5]].tolist() == [0.0, 0.0]
    assert sine[3].item() == cosine[0].item() == -cosine[4].item() == -sine[5].item()
    assert cosine[7].item() == pytest.approx(sine[7].item(), rel=1e-15)
    assert cosine[8].item() == pytest.approx(-sine[8].item(), rel=1e-15)
    assert sine[6].item() == pytest.approx(-tail * math.sin(2 * math.pi * 2.0**-24), rel=1e-9)


def test_log_and_trigonometry_are_accurate_over_their_whole_domain() -> None:
    # Every 4,099th of the 2^24 arguments (a prime stride) and both ends.
    k = torch.cat([torch.arange(1, 2**24, 4099), torch.tensor([2**24 - 1])])
    expected = torch.tensor(
        [math.log(value * 2.0**-24) for value in k.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(log_of_24_bits(k), expected, rtol=1e-15, atol=0.0)
    cosine, sine = cos_sin_of_24_bits(k)
    angles = [2 * math.pi * value * 2.0**-24 for value in k.tolist()]
    # 1e-15: libm is handed an angle of up to 6.28 rounded by up to 4.4e-16.
    for got, function in ((cosine, math.cos), (sine, math.sin)):
        values = torch.tensor([function(angle) for angle in angles], dtype=torch.float64)
        torch.testing.assert_close(got, values, rtol=0.0, atol=1e-15)


def test_square_root_is_correctly_rounded() -> None:
    k = torch.cat([torch.arange(1, 2**24, 41), torch.tensor([2**24])])
    v = log_of_24_bits(k) * -2.0
    expected = torch.tensor([math.sqrt(value) for value in v.tolist()], dtype=torch.float64)
    assert torch.equal(sqrt(v), expected)  # math.sqrt is the C library's, correctly rounded


@given(blocks=st.lists(U32, max_size=5), purpose=U32, low=U32, high=U32, key=st.tuples(U32, U32))
def test_normals_of_blocks_pair_the_words(
    blocks: list[int], purpose: int, low: int, high: int, key: tuple[int, int]
) -> None:
    given_blocks = torch.tensor(blocks, dtype=torch.int64)
    kept = given_blocks.clone()
    got = block_normals(given_blocks, purpose, torch.tensor(low), torch.tensor(high), key)
    assert got.shape == (len(blocks), 4)
    assert got.dtype == torch.float64
    assert torch.equal(given_blocks, kept)
    for block, values in zip(blocks, got, strict=True):
        words = torch.tensor(reference_philox((block, purpose, low, high), key))
        for first in (0, 2):
            pair = torch.stack(box_muller(words[first : first + 1], words[first + 1 : first + 2]))
            assert torch.equal(values[first : first + 2], pair[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: philox4x32(torch.zeros(4), (0, 0)), "counter has dtype torch.float32"),
        (lambda: philox4x32(torch.zeros(3).long(), (0, 0)), r"counter has shape \(3,\)"),
        (lambda: philox4x32(torch.zeros(4, dtype=torch.int64), (0, 2**32)), "key is"),
        (lambda: philox4x32(torch.zeros(4, dtype=torch.int64), (0,)), "key is"),
        (lambda: split64(2**64, "seed"), "seed contains 18446744073709551616"),
        (lambda: split64(-1, "seed"), "seed contains -1"),
    ],
)
def test_bad_arguments_are_refused(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
