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
    ttir = report.asm["ttir"]
    offsets = re.findall(r"tt\.addptr .* : .*?, (?:tensor<[^>]*x)?(i\d+)", ttir)
    matrices = [v for v in launch.arguments.values() if isinstance(v, torch.Tensor) and v.dim() > 1]
    if "make_tensor_descriptor" not in ttir:  # descriptors take coordinates, not offsets
        assert offsets.count("i64") >= len(matrices), f"{name}: {offsets}, {len(matrices)} matrices"
    for product, factor in narrow_products(ttir):
        # A block, a head or a program times less than 128; a row times a row's width is more.
        assert factor is not None, f"{name}: 32 bits for {product}"
        assert factor <= 128, f"{name}: 32 bits for {product}"


def narrow_products(ttir):
    """32-bit products among what is added to pointers: (text, its constant factor or None).

    Follows every offset of the intermediate code back through sums, widenings and changes of shape
    up to the first product: a row times its stride has to be multiplied in 64 bits, not widened
    afterwards.
    """
    lines = [re.sub(r" loc\(.*\)\s*$", "", line) for line in ttir.splitlines()]
    made = {m[1]: m for line in lines if (m := re.match(r"\s*(%[\w#]+) = (\S+) ?(.*)$", line))}
    through = {"addi", "subi", "extsi", "splat", "broadcast", "expand_dims", "reshape"}
    found = []
    for line in lines:
        start = re.search(r"tt\.addptr %\S+, (%[\w#]+) :", line)
        todo, seen = [start[1]] if start else [], set()
        while todo:
            value = todo.pop()
            if value in seen or value not in made:
                continue
            seen.add(value)
            operation, rest = made[value][2].split(".")[-1], made[value][3]
            operands = re.findall(r"%[\w#]+", rest.split(" : ")[0])
            if operation == "muli" and re.search(r"i32>?$", rest):
                constants = [
                    int(number[1])
                    for operand in operands
                    if operand in made
                    and (number := re.match(r"(?:dense<)?(-?\d+)", made[operand][3]))
                    and made[operand][2] == "arith.constant"
                ]
                found.append((made[value][0].strip(), constants[0] if constants else None))
            elif operation in through:
                todo += operands
    return found


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
