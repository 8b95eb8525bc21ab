"""rectified_flow_noise against the noise of goku/random.py and the path of goku/flow.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku.flow import interpolate, velocity_target
from goku.random import Purpose, normal_packed, stream_tensor
from goku_kernels import Packing
from goku_kernels.rectified_flow_noise import (
    rectified_flow_noise,
    rectified_flow_noise_bytes,
    rectified_flow_noise_flops,
)

SEED = 2**63 + 12345
STREAMS = [5, 2**64 - 1, 2**40 + 3, 2**63, 0, 7]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def times(batch, dtype=torch.float64):
    return torch.tensor([0.3, 1 - 1e-9, 0.0, 1.0, 0.999, 0.5][:batch], dtype=dtype)


def separate(x1, t, streams, lengths, purpose=Purpose.NOISE):
    """What training did before there was an operator: noise, path and target one by one."""
    elements = [n * x1.shape[1] for n in lengths]
    x0 = normal_packed(SEED, streams, elements, purpose).view_as(x1)
    ids = Packing.from_lengths(lengths).segment_ids()
    return interpolate(x1, x0, t, ids), velocity_target(x1, x0)


def call(x1, t, streams, lengths, **options):
    cu = Packing.from_lengths(lengths).cu_seqlens
    return rectified_flow_noise(x1, t, stream_tensor(streams), cu, seed=SEED, **options)


def assert_same_bits(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 8, 27, 1])
def test_equals_noise_path_and_target_bit_for_bit(dtype, width):
    lengths = [3, 0, 1, 7]
    x1 = draw(11, width, dtype=dtype)
    for time in (torch.float32, torch.float64):
        t = times(4, time)
        got = call(x1, t, STREAMS[:4], lengths, purpose=int(Purpose.EVAL))
        assert_same_bits(got, separate(x1, t, STREAMS[:4], lengths, Purpose.EVAL))


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    width=st.integers(1, 13),
    rows=st.integers(1, 40),
    data=st.data(),
)
def test_any_shard_of_any_packing_gets_the_same_bits(lengths, width, rows, data):
    x1, t, streams = draw(sum(lengths), width), times(len(lengths)), STREAMS[: len(lengths)]
    want = separate(x1, t, streams, lengths)
    first = data.draw(st.integers(0, sum(lengths)))
    last = data.draw(st.integers(first, sum(lengths)))
    with pytest.MonkeyPatch.context() as patch:  # passes of few rows
        patch.setattr("goku_kernels.philox._BLOCKS_PER_PASS_CPU", rows)
        assert_same_bits(call(x1, t, streams, lengths), want)
        shard = call(x1[first:last], t, streams, lengths, token_offset=first)
    assert_same_bits(shard, [x[first:last] for x in want])


def test_the_formula_by_hand():
    x1, x0 = draw(2, 4, dtype=torch.float64), normal_packed(SEED, [9], [8]).view(2, 4).double()
    x_t, target = call(x1, torch.tensor([0.25]), [9], [2])
    assert torch.equal(x_t, 0.25 * x1 + 0.75 * x0)  # both products are exact in float64
    assert torch.equal(target, x1 - x0)
    # 1 - t is taken before t is rounded to float32, where it would be 0.
    near = call(torch.zeros(2, 4), torch.tensor([1 - 1e-9], dtype=torch.float64), [9], [2])[0]
    torch.testing.assert_close(near, 1e-9 * x0.float(), rtol=1e-6, atol=0)


def test_padding_rows_are_zero_even_when_they_hold_nan():
    x1 = draw(7, 8)
    x1[4:] = float("nan")
    got = call(x1, times(2), STREAMS[:2], [1, 3])
    want = separate(x1[:4], times(2), STREAMS[:2], [1, 3])
    assert_same_bits(got, [torch.cat([x, torch.zeros(3, 8)]) for x in want])


def test_no_tokens_and_no_channels():
    assert call(draw(0, 8), times(2), STREAMS[:2], [0, 0])[0].shape == (0, 8)
    assert call(draw(3, 0), times(1), STREAMS[:1], [3])[1].shape == (3, 0)


def test_strided_rows_and_autocast_change_nothing():
    wide = draw(5, 20)
    want = separate(wide[:, 4:12].contiguous(), times(1), [3], [5])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(call(wide[:, 4:12], times(1), [3], [5]), want)


def test_arguments_that_require_a_gradient_are_refused():
    x1, t = draw(3, 4).requires_grad_(), times(1)
    with pytest.raises(ValueError, match="x1 requires a gradient"):
        call(x1, t, [1], [3])
    with pytest.raises(ValueError, match="t requires a gradient"):
        call(x1.detach(), t.requires_grad_(), [1], [3])
    with torch.no_grad():
        call(x1, t, [1], [3])


X, CU, S = torch.zeros(5, 4), Packing.from_lengths([2, 3]).cu_seqlens, torch.zeros(2).long()
BAD = {
    "x1 has dtype": {"x1": X.long()},
    r"x1 has shape \(5,\)": {"x1": X[:, 0]},
    "x1 has inner stride 5": {"x1": torch.zeros(4, 5).t()},
    "t has dtype torch.bfloat16": {"t": torch.zeros(2, dtype=torch.bfloat16)},
    r"t has shape \(3,\): wanted \(2,\)": {"t": torch.zeros(3)},
    "t has stride": {"t": torch.zeros(4)[::2]},
    "stream_index has dtype torch.int32": {"stream_index": S.int()},
    r"stream_index has shape \(1,\)": {"stream_index": S[:1]},
    "stream_index is on meta": {"stream_index": S.to("meta")},
    "cu_seqlens has dtype": {"cu_seqlens": CU.long()},
    "cu_seqlens decreases": {"cu_seqlens": torch.tensor([0, 3, 2], dtype=torch.int32)},
    "give a sample 19327352823 elements": {
        "cu_seqlens": torch.tensor([0, 0, 2**31 - 1], dtype=torch.int32),
        "x1": torch.zeros(1, 9),
    },
    "seed is -1": {"seed": -1},
    "seed is 18446744073709551616": {"seed": 2**64},
    "purpose is 4294967296": {"purpose": 2**32},
    "token_offset is -1": {"token_offset": -1},
    "backend is 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_refused(message):
    options = {
        "x1": X, "t": torch.zeros(2), "stream_index": S, "cu_seqlens": CU, "seed": 1,
    } | BAD[message]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rectified_flow_noise(**options)


def test_triton_on_a_cpu_says_what_it_needs():
    with pytest.raises(RuntimeError, match="rectified_flow_noise: backend 'triton' is not"):
        call(X, torch.zeros(2), [1, 2], [2, 3], backend="triton")


def test_costs():
    assert rectified_flow_noise_bytes(10, 64, itemsize=4) == 10 * 64 * 12
    assert rectified_flow_noise_bytes(10, 64, itemsize=2) == 10 * 64 * 8
    assert rectified_flow_noise_bytes(10, 64, itemsize=8) == 10 * 64 * 24
    assert rectified_flow_noise_flops(10, 64) == 10 * 32 * 77
