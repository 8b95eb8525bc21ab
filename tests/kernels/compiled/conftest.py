"""Every shipped configuration compiled for chips that this machine does not have.

Not under TRITON_INTERPRET=1: an interpreted kernel cannot be compiled.
"""

import re

import pytest
import torch

from goku_kernels.triton.compiling import SHARED_LIMIT
from goku_kernels.triton.launch import CHIPS, interpreted

# A thread's spilled bytes that are let pass: a handful of registers once per tile cost nothing that
# could be measured, and versions of ptxas differ by that much.
SPILL_LIMIT = 16


def pytest_configure(config):
    if interpreted():
        raise pytest.UsageError("tests/kernels/compiled cannot run under TRITON_INTERPRET=1")


@pytest.fixture(params=CHIPS, ids=[f"sm_{chip}" for chip in CHIPS])
def chip(request):
    return request.param


def assert_fits(name, report, launch):
    """No spills to speak of, no more shared memory than the chip has, offsets in 64 bits."""
    assert report.spill_bytes <= SPILL_LIMIT, f"{name}: {report.spill_bytes} bytes spilled"
    assert report.shared_bytes <= SHARED_LIMIT[report.chip], f"{name}: {report.shared_bytes} bytes"
    # What is added to a pointer is a row's offset: one of 32 bits would overflow at 2^31 elements.
    offsets = re.findall(r"tt\.addptr .* : .*?, (?:tensor<[^>]*x)?(i\d+)", report.asm["ttir"])
    matrices = [v for v in launch.arguments.values() if isinstance(v, torch.Tensor) and v.dim() > 1]
    assert offsets.count("i64") >= len(matrices), f"{name}: {offsets}, {len(matrices)} matrices"


def kernels_of(*modules):
    """The jitted kernels (not the device functions they call) of modules."""
    found = {
        kernel.fn.__name__: kernel
        for module in modules
        for kernel in vars(module).values()
        if hasattr(kernel, "fn") and kernel.fn.__name__.endswith("_kernel")
    }
    assert found
    return found


def assert_no_value_is_compiled_in(kernel):
    """Every integer argument has a fixed type and is not specialised on its value."""
    for parameter in kernel.params:
        if parameter.is_constexpr or not parameter.annotation:
            continue  # a tensor
        assert parameter.annotation_type in ("i32", "i64", "fp32"), parameter.name
        assert parameter.do_not_specialize, f"{kernel.fn.__name__}: {parameter.name}"


@pytest.fixture(scope="session", name="assert_fits")
def _assert_fits():
    return assert_fits


@pytest.fixture(scope="session", name="kernels_of")
def _kernels_of():
    return kernels_of


@pytest.fixture(scope="session", name="assert_no_value_is_compiled_in")
def _assert_no_value_is_compiled_in():
    return assert_no_value_is_compiled_in
