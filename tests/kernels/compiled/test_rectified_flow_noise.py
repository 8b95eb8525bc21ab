"""The noising kernel, compiled for chips that are not here: its size, and that its bits are exact."""

import re

import pytest

from goku_kernels.triton import rectified_flow_noise
from goku_kernels.triton.compiling import compile_shipped


@pytest.mark.shipped
def test_every_shipped_configuration_fits_and_rounds_every_operation(chip, assert_fits):
    for name, launch, report in compile_shipped(rectified_flow_noise, chip):
        assert_fits(name, report, launch)
        # More registers would leave less than half of the threads of a multiprocessor.
        assert report.registers <= 64, f"{name}: {report.registers} registers"
        ptx, sass = report.asm["ptx"], report.asm["sass"]
        # A product and a sum in one instruction round once; .rn on either forbids ptxas to fuse.
        assert not re.search(r"\b(fma|mad)\S*\.f(32|64)", ptx), name
        assert not re.search(r"\b(add|sub|mul)\.f64", ptx), name
        divisions = re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.\S+", ptx)
        assert set(divisions) == {"div.rn.f64", "sqrt.rn.f64"}, name
        if launch.arguments["D"] == 64:
            # One block of Philox for 4 elements: a logarithm for 2.
            pairs = 2 * launch.arguments["GROUPS"] // report.threads
            assert divisions.count("sqrt.rn.f64") == pairs, name
            assert re.search(r"LDG\.E\.(LTC128B\.)?(64|128)", sass), name
            assert "STG.E.128" in sass, name


def test_no_integer_is_compiled_in(kernels_of, assert_no_value_is_compiled_in):
    for kernel in kernels_of(rectified_flow_noise).values():
        assert_no_value_is_compiled_in(kernel)
