"""The kernels of qk_norm_rope, compiled for chips that are not here."""

import importlib
import re

import pytest

from goku_kernels.triton import qk_norm_rope, qk_norm_rope_kernels
from goku_kernels.triton.compiling import compile_shipped
from goku_kernels.triton.configs import table


@pytest.mark.shipped
def test_every_shipped_configuration_fits(chip, assert_fits):
    for name, launch, report in compile_shipped(qk_norm_rope, chip):
        assert_fits(name, report, launch)
        if report.kernel != "rows_kernel":
            continue
        sass = report.asm["sass"]
        # Angles need no slow path: it would keep its state in local memory.
        assert report.stack_bytes <= 16, f"{name}: {report.stack_bytes} bytes of stack"
        # Pairs are taken apart and put together in registers: shared memory is for sums over a
        # token and for tokens read ahead (two of 16 KiB at most), never for a transposition.
        assert report.shared_bytes <= 36 * 1024, f"{name}: {report.shared_bytes} bytes shared"
        if "interleaved" in name:
            # 16 bytes a thread: half of the bandwidth is lost with less.
            assert re.search(r"LDG(STS)?\.E\.(BYPASS\.)?(LTC128B\.)?128", sass), name
            assert "STG.E.128" in sass, name
            assert not re.search(r"(LDG|STG)\.E\.(U16|64)", sass.replace("LDG.E.64.CON", "")), name
        elif " of 64" in name or " of 72" in name:
            # Pairs half an axis apart lie in runs of 4 channels.
            assert re.search(r"LDG(STS)?\.E\.(BYPASS\.)?(LTC128B\.)?64", sass), name


def test_no_integer_is_compiled_in(kernels_of, assert_no_value_is_compiled_in):
    for kernel in kernels_of(qk_norm_rope_kernels).values():
        assert_no_value_is_compiled_in(kernel)


def test_what_the_operator_refuses_is_what_has_no_configuration():
    operator = importlib.import_module("goku_kernels.qk_norm_rope")
    assert {row["size"] for row in table("qk_norm_rope") if row["size"] >= operator._LARGEST} == {
        operator._LARGEST
    }
