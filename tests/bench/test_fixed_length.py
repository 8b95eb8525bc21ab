"""What packing costs: the table beside fixed-length batches, from rows whose answer is known."""

import pytest

from bench import fixed_length, report
from bench.packs import LONG_PACKS, TEXT_TOKENS
from goku_kernels import varlen_attention_flops

(MIXED,) = fixed_length.compared()
RATES = {4608: 2e11, 8100: 3e11, 16200: 4e11, 32400: 5e11}  # FLOPs a millisecond


def row(pack, peer, rate=None, *, direction="forward", ms=None, run=8e14, **change):
    """A row of samples that ran at `rate`, or in `ms`."""
    backward = direction == "backward"
    work = varlen_attention_flops(pack.lengths, pack.lengths, heads=28, head_dim=64,
                                  backward=backward)  # fmt: skip
    shape = {"heads": 28, "head_dim": 64, "keys": pack.tokens, "tokens": pack.tokens}
    found = {
        "case": "goku-2b", "pack": pack.name, "direction": direction, "peer": peer, "shape": shape,
        "status": "measured", "work": work, "median_ms": ms or work / rate,
        "ceiling": {"value": run}, "sources_sha256": "a", "hardware": {"device": "NVIDIA H100"},
    }  # fmt: skip
    return found | change


def batches(peer, factor=1.0, **given):
    return [
        row(pack, peer, factor * RATES[pack.lengths[0]], **given)
        for pack in LONG_PACKS
        if pack is not MIXED
    ]


def expected(direction="forward"):
    """Milliseconds by hand: 4 FLOPs a pair, head and channel forward, 8 backward."""
    each = (8 if direction == "backward" else 4) * 28 * 64
    return sum(each * n**2 / RATES[n] for n in MIXED.lengths)


def lines(*records, stale=()):
    return fixed_length.lines(records, lambda r: report.STALE if r in stale else "")


def test_every_long_pack_has_a_batch_of_each_of_its_lengths():
    assert set(MIXED.lengths) == set(RATES) <= set(fixed_length.batches())
    assert min(MIXED.lengths) >= 4096
    for pack in LONG_PACKS:
        assert abs(pack.tokens / 2**16 - 1) < 0.02
    for length, name in fixed_length.batches().items():
        (pack,) = (p for p in (*fixed_length.GPU_PACKS, *LONG_PACKS) if p.name == name)
        assert set(pack.lengths) == {length}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("slower", "within"), [(0.98, "yes"), (1.029, "yes"), (1.031, "no")])
def test_a_pack_is_compared_with_the_rates_of_its_lengths(direction, slower, within):
    ours = row(MIXED, "goku triton", ms=slower * expected(direction), direction=direction)
    given = [*batches("goku triton", direction=direction), ours]
    given += batches(fixed_length.CUDNN, 2.0, direction=direction)
    (cells,) = lines(*given)
    assert len(cells) == len(fixed_length.HEAD)
    assert cells[:4] == ["NVIDIA H100", "goku-2b", MIXED.name, direction]
    assert cells[4:8] == [
        f"{slower * expected(direction):.3f}", f"{expected(direction):.3f}", f"{slower:.3f}", within
    ]  # fmt: skip
    assert cells[8:] == [f"{expected(direction) / 2:.3f}", f"{2 * slower:.3f}"]


def test_rows_of_another_kind_are_not_taken():
    ours = row(MIXED, "goku triton", ms=expected())
    good = batches("goku triton")
    others = []
    for given in good:  # twice as fast each, and later in the list
        fast = given | {"median_ms": given["median_ms"] / 2}
        keys = given["shape"] | {"keys": 14 * TEXT_TOKENS}
        others += [
            fast | {"direction": "backward"}, fast | {"case": "goku-8b"}, fast | {"shape": keys},
            fast | {"hardware": {"device": "NVIDIA H200"}}, fast | {"peer": "eager"},
            fast | {"status": "wrong"},
        ]  # fmt: skip
    (cells,) = lines(ours, *good, *others)
    assert cells[5] == f"{expected():.3f}"


def test_a_length_without_a_batch_is_named():
    ours = row(MIXED, "goku triton", ms=expected())
    given = [r for r in batches("goku triton") if "8100" not in r["pack"]]
    (cells,) = lines(ours, *given)
    assert cells[5:] == ["no batch of samples of 8100 was measured", "", "", *["not measured"] * 2]


def test_what_is_not_of_one_run_or_stale_is_marked():
    ours = row(MIXED, "goku triton", ms=expected())
    good = batches("goku triton")
    plain = f"{expected():.3f}"
    assert lines(ours, *good)[0][5] == plain
    other_run = [*good[:-1], good[-1] | {"ceiling": {"value": 799000000000000.0}}]
    assert lines(ours, *other_run)[0][5] == plain + fixed_length.OTHER_RUN
    other_sources = [*good[:-1], good[-1] | {"sources_sha256": "b"}]
    assert lines(ours, *other_sources)[0][5] == plain + fixed_length.OTHER_RUN
    assert lines(ours, *good, stale=good[:1])[0][5] == plain + report.STALE
    assert lines(ours, *good, stale=[ours])[0][4] == plain + report.STALE


def test_nothing_is_shown_for_a_pack_that_we_were_not_measured_on():
    assert lines(*batches("goku triton"), row(MIXED, "eager", ms=1.0)) == []
