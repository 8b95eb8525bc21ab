"""Occupancy against the guide's numbers, loops of made-up machine code, and what binds an estimate."""

import math

import pytest
import torch

from bench import forecast, machine_code
from bench.forecast import Residency, Work
from bench.machine_code import Loop


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks", "limit"),
    [
        (32, 0, 1024, 2, "registers"),  # of 2,048 threads; registers allow as many
        (16, 0, 1024, 2, "warps"),
        (16, 0, 32, 32, "blocks"),
        (128, 0, 256, 2, "registers"),
        (129, 0, 256, 1, "registers"),  # in units of 8 a thread: 136
        (255, 0, 128, 2, "registers"),
        (168, 0, 384, 1, "registers"),  # 3 warps in each of 4 partitions
        (40, 227 * 1024, 128, 1, "shared memory"),
        (40, 113 * 1024, 128, 2, "shared memory"),  # and 1 KiB of each is reserved
        (40, 113 * 1024 + 1, 128, 1, "shared memory"),
    ],
)
def test_resident_blocks_are_those_of_the_guide(registers, shared, threads, blocks, limit):
    assert forecast.resident(registers, shared, threads) == Residency(blocks, limit)


def sass(*lines):
    return "".join(f"        /*{16 * i:04x}*/   {line} ;\n" for i, line in enumerate(lines))


def test_the_loop_over_rows_is_found_and_counted():
    code = sass(
        "LDC R1, c[0x0][0x28]",
        "LDG.E R4, desc[UR4][R2.64]",  # a search, 4 bytes at a time
        "@!P0 BRA 0x10",
        "@P1 LDGSTS.E.BYPASS.128 [R20], desc[UR8][R4.64]",  # from here on the loop
        "LDS.128 R4, [R20]",
        "SHFL.BFLY PT, R5, R4, 0x10, 0x1f",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "STG.E.128 desc[UR8][R2.64], R4",
        "@P0 BRA 0x30",
        "@P2 BRA 0x10",  # over the samples
        "EXIT",
        "BRA 0xb0",
    )
    found = machine_code.main_loop(code)
    assert (found.instructions, found.load_bytes, found.store_bytes, found.narrow) == (6, 16, 16, 0)
    assert (found.counts["SHFL"], found.counts["BAR"], found.counts["LDS"]) == (1, 1, 1)
    assert found.asynchronous
    assert len(machine_code.loops(code)) == 3
    assert machine_code.main_loop(sass("LDG.E.U16 R1, [R2]", "EXIT")) == machine_code.whole(
        sass("LDG.E.U16 R1, [R2]", "EXIT")
    )
    assert machine_code.whole(sass("LDG.E.U16 R1, [R2]", "EXIT")).narrow == 1


def loop(instructions, **counts):
    return Loop(instructions, counts, 16, 16, 0)


PASS = Work(read=4096, written=4096, ahead=2, programs=4)
FITS = Residency(4, "registers")


def test_an_estimate_names_what_binds():
    traffic = forecast.forecast(loop(100), FITS, 128, PASS, "H200")
    assert (traffic.bound, traffic.share) == ("traffic", 1.0)
    # Its bytes over the bandwidth of one of 132 processors, in cycles
    assert traffic.cycles["traffic"] == pytest.approx(8192 / (4.3e12 / 132 / 1.7e9))
    assert traffic.in_flight == 4 * 2 * 4096
    assert traffic.needed == pytest.approx(4.3e12 * 700e-9 / 132)
    busy = forecast.forecast(loop(1000), FITS, 128, PASS, "H200")
    assert (busy.cycles["instructions"], busy.share < 0.5) == (1000, True)
    # Rows that are not read ahead wait for memory every time, and more so alone.
    waits = Work(4096, 4096, 0, 2)
    alone = Work(4096, 4096, 0, 1)
    shares = [forecast.forecast(loop(100), FITS, 128, w, "H200").share for w in (waits, alone)]
    assert shares[0] == pytest.approx(2 * shares[1])
    chained = forecast.forecast(loop(100, SHFL=40, BAR=20), FITS, 128, PASS, "H200")
    assert chained.bound == "chain"
    # The same code has less to do on slower memory.
    assert forecast.forecast(loop(1000), FITS, 128, PASS, "H100").share > busy.share


def test_programs_that_do_not_fit_run_in_a_second_wave():
    fitting = forecast.forecast(loop(100), FITS, 128, PASS, "H200")
    five = Work(4096, 4096, 2, 5)
    assert forecast.forecast(loop(100), FITS, 128, five, "H200").share == pytest.approx(
        5 / 8 * fitting.share
    )
    none = forecast.forecast(loop(100), Residency(0, "shared memory"), 128, PASS, "H200")
    assert (none.share, none.bound) == (0.0, "does not fit")
    assert math.isinf(none.cycles["does not fit"])


def test_work_is_what_the_tensors_of_tokens_hold():
    x = torch.empty((8, 100), dtype=torch.bfloat16, device="meta")
    arguments = {"dy": x, "dout": None, "x": x, "branch": None, "dx": x, "sum_shift": x.float(),
                 "ROWS": 2, "STAGES": 3}  # fmt: skip
    copied = Loop(1, {"LDGSTS": 1}, 16, 16, 0)
    assert forecast.work("backward_kernel", arguments, copied, 5) == Work(800.0, 400.0, 2, 5)
    waited = Loop(1, {"LDG": 1}, 16, 16, 0)
    assert forecast.work("backward_kernel", arguments, waited, 5).ahead == 0
    noise = {"x1": x, "x_t": x, "target": x.float(), "GROUPS": 50, "GROUP": 4, "D": 100}
    assert forecast.work("noise_kernel", noise, waited, 0) == Work(400.0, 1200.0, 0, 0)
