"""The kernels of adaln_modulate and gated_residual_adaln, compiled for chips that are not here."""

import importlib
import re

import pytest
import torch
import triton
import triton.language as tl

from goku_kernels.triton import adaln_modulate, gated_residual_adaln, modulation
from goku_kernels.triton.compiling import compile_launch, compile_shipped
from goku_kernels.triton.configs import table
from goku_kernels.triton.launch import Launch


@pytest.mark.shipped
@pytest.mark.parametrize(
    "operator",
    [adaln_modulate, gated_residual_adaln],
    ids=["adaln_modulate", "gated_residual_adaln"],
)
def test_every_shipped_configuration_fits(operator, chip, assert_fits):
    for name, launch, report in compile_shipped(operator, chip):
        assert_fits(name, report, launch)
        if report.kernel != "reduce_kernel":
            # 16 bytes a thread: half of the bandwidth is lost with less.
            assert re.search(r"LDG(STS)?\.E\.(BYPASS\.)?(LTC128B\.)?128", report.asm["sass"]), name
            assert "STG.E.128" in report.asm["sass"], name


def test_no_integer_is_compiled_in(kernels_of, assert_no_value_is_compiled_in):
    for kernel in kernels_of(modulation).values():
        assert_no_value_is_compiled_in(kernel)


@pytest.mark.parametrize("operator", [adaln_modulate.OP, gated_residual_adaln.OP])
def test_what_the_operator_refuses_is_what_has_no_configuration(operator):
    largest = importlib.import_module("goku_kernels.adaln_modulate")._LARGEST_WIDTH
    assert {row["size"] for row in table(operator) if row["size"] >= largest} == {largest}


@triton.jit(do_not_specialize=["width"])
def _narrow_kernel(x, width: tl.int32):
    tl.store(x + (tl.program_id(0) * width).to(tl.int64), 1.0)


@triton.jit(do_not_specialize=["width"])
def _wide_kernel(x, width: tl.int32):
    tl.store(x + tl.program_id(0).to(tl.int64) * width, 1.0)


def test_an_offset_multiplied_in_32_bits_is_found(assert_fits):
    x = torch.empty((4, 4), device="meta")
    for kernel in (_narrow_kernel, _wide_kernel):
        launch = Launch(kernel, (4,), {"x": x, "width": 4}, {"num_warps": 1})
        report = compile_launch(launch, 80)
        if kernel is _wide_kernel:
            assert_fits("wide", report, launch)
        else:
            with pytest.raises(AssertionError, match="32 bits for"):
                assert_fits("narrow", report, launch)
