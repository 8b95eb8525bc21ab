"""The kernels of velocity_loss, compiled for chips that are not here."""

import re

import pytest

from goku_kernels.triton import velocity_loss
from goku_kernels.triton.compiling import compile_shipped


@pytest.mark.shipped
def test_every_shipped_configuration_fits(chip, assert_fits):
    kernels = set()
    for name, launch, report in compile_shipped(velocity_loss, chip):
        kernels.add(report.kernel)
        assert_fits(name, report, launch)
        assert report.registers <= 128, f"{name}: {report.registers} registers"
        assert "atom" not in report.asm["ptx"], name  # sums in a fixed order
        assert "red.global" not in report.asm["ptx"], name
        if report.kernel != "means_kernel" and launch.arguments["D"] % 8 == 0:
            # 16 bytes a thread: half of the bandwidth is lost with less.
            assert re.search(r"LDG\.E\.(LTC128B\.)?128", report.asm["sass"]), name
    assert kernels == {"sums_kernel", "means_kernel", "gradient_kernel"}


def test_no_integer_is_compiled_in(kernels_of, assert_no_value_is_compiled_in):
    for kernel in kernels_of(velocity_loss).values():
        assert_no_value_is_compiled_in(kernel)
