"""varlen_attention's kernels compiled for every chip they are shipped for, without one."""

import itertools

import pytest
import torch

from bench import ahead
from goku_kernels.triton import configs
from goku_kernels.triton import varlen_attention as kernels
from goku_kernels.triton.compiling import compile_launch
from goku_kernels.triton.configs import find
from goku_kernels.triton.launch import CHIPS, Recorder

# One register saved and read once or twice; the loops over keys and queries stay free of it.
SPILLS_ALLOWED = 16
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}
FORWARD = {"forward_kernel", "specialised_forward_kernel"}
MAIN = FORWARD | {"gradient_kv_kernel", "gradient_q_kernel"}
OP = "varlen_attention"
CASES = [(chip, name, case) for chip in CHIPS for name, case in ahead.shipped(OP, chip)]


def record(chip, case):
    recorder = Recorder(chip)
    case(recorder)
    return recorder.launches


@pytest.mark.shipped
@pytest.mark.parametrize(
    ("chip", "case"), [c[::2] for c in CASES], ids=[f"sm_{c[0]} {c[1]}" for c in CASES]
)
def test_every_shipped_configuration(chip, case, assert_fits):
    launched = record(chip, case)
    reports = [compile_launch(launch, chip) for launch in launched]
    others = {"gradient_kv_kernel", "gradient_q_kernel", "plan_kernel", "delta_kernel"}
    assert {r.kernel for r in reports} - FORWARD == others
    for launch, report in zip(launched, reports, strict=True):
        assert_fits(report.kernel, report, launch)
        # Triton 3.7 makes an empty kernel of one that needs too much of sm_100's tensor memory.
        assert report.tensor_core == (MATRIX[chip] if report.kernel in MAIN else "none"), report
        assert report.registers > 16, report


def launches(chip):
    return [launch for _, case in ahead.shipped(OP, chip) for launch in record(chip, case)]


def forward_of(chip, name):
    case = dict(ahead.shipped(OP, chip))[name]
    return next(x for x in record(chip, case) if x.kernel.fn.__name__ in FORWARD)


def gradients(chip, size, *, dtype=torch.bfloat16, **options):
    """What the backward launches for heads of `size`."""
    qkv = torch.empty((64, 24, size), dtype=dtype, device="meta")
    q, k, v = qkv.chunk(3, dim=1)
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    lse = torch.empty((8, 64), dtype=torch.float32, device="meta")
    recorder = Recorder(chip)
    kernels.backward(q, q, k, v, q, lse, None, cu, cu, 0.125, run=recorder, **options)
    return recorder.launches


def test_all_gradients_at_once_where_their_bits_may_vary():
    names = {
        (chip, deterministic): [
            x.kernel.fn.__name__ for x in gradients(chip, 64, deterministic=deterministic)
        ]
        for chip in CHIPS for deterministic in (False, True)
    }  # fmt: skip
    both = ["delta_kernel", "plan_kernel", "gradient_kv_kernel", "gradient_q_kernel"]
    for (chip, deterministic), found in names.items():
        assert found == (both[:-1] if chip == 90 and not deterministic else both)
    # fp32 has no such configuration, and without being asked nobody gets other bits.
    assert len(gradients(90, 64, dtype=torch.float32, deterministic=False)) == len(both)
    assert len(gradients(90, 64)) == len(both)


def test_who_reduces_has_descriptors():
    """Only what loads through descriptors is given memory for them."""
    for row in configs.table(OP):
        assert not row["config"].get("reduce") or row["config"]["tma"], row


@pytest.mark.parametrize("reduce", [0, 1])
@pytest.mark.parametrize("size", [64, 72, 128])
def test_dq_is_added_up_by_wide_atomics_or_by_the_copy_engine(size, reduce):
    row = dict(find(OP, "gradient", size, torch.bfloat16, 90))
    others = {name: find(OP, name, size, torch.bfloat16, 90) for name in ("delta", "gradient_q")}
    override = {**others, "gradient": row | {"reduce": reduce}}
    launch = gradients(90, size, deterministic=False, override=override)[-1]
    report = compile_launch(launch, 90)
    assert (report.kernel, report.tensor_core) == ("gradient_kv_kernel", "HGMMA")
    assert report.spill_bytes <= SPILLS_ALLOWED
    assert ("cp.reduce.async.bulk.tensor" in report.asm["ptx"]) == bool(reduce)
    # Four channels at a time: one by one they would be four times the instructions.
    assert ("ADD.F32x4" in report.asm["sass"]) == (not reduce)


@pytest.mark.parametrize("size", [64, 128])
def test_the_forward_of_sm_90_has_specialised_warps(size):
    for heads in ("8:8", "8:2"):
        if (size, heads) == (64, "8:2"):
            continue
        name = f"{size} bfloat16 {heads} heads"
        report = compile_launch(forward_of(90, name), 90)
        chosen = configs.find(OP, "forward_specialised", size, torch.bfloat16, 90)
        if (
            chosen is None
        ):  # slower than the plain one where they were measured, or never seen there
            assert report.kernel == "forward_kernel"
            name = f"{name}, all in use"
        launch = forward_of(90, name)
        report = compile_launch(launch, 90)
        assert report.kernel == "specialised_forward_kernel"
        # 64 tokens of 8 heads in 3 samples: one program for each tile there can be.
        assert launch.grid == (4 * 8,)
        assert report.warp_specialized
        assert "setmaxnreg" in report.asm["ptx"]
        assert report.threads == 3 * 128


def test_heads_that_are_not_adjacent_take_the_other_forward():
    qkv = torch.empty((64, 24, 72), dtype=torch.bfloat16, device="meta")[..., :64]
    q, k, v = qkv.chunk(3, dim=1)
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    recorder = Recorder(90)
    kernels.forward(q, k, v, cu, cu, 0.125, run=recorder)
    report = compile_launch(recorder.launches[-1], 90)
    assert (report.kernel, report.tensor_core) == ("forward_kernel", "HGMMA")
    assert report.spill_bytes <= SPILLS_ALLOWED


@pytest.mark.parametrize("chip", CHIPS)
def test_descriptors_are_used_where_they_are_asked_for(chip):
    seen = set()
    for launch in launches(chip):
        if launch.kernel.fn.__name__ in MAIN and launch.arguments["D"] in (64, 128):
            asked = launch.arguments.get("TMA", True)  # the specialised forward knows nothing else
            key = (launch.kernel, launch.arguments["D"], asked)
            if key not in seen:
                seen.add(key)
                ptx = compile_launch(launch, chip).asm["ptx"]
                assert ("cp.async.bulk.tensor" in ptx) == asked, key
    assert any(tma for _, _, tma in seen) == (chip >= 90)


def test_no_integer_is_compiled_in():
    """Whatever the pack, the same code runs: every integer has a type and is not specialised on."""
    for launch in launches(90):
        for parameter in launch.kernel.params:
            if isinstance(launch.arguments[parameter.name], (int, float)):
                fixed = parameter.is_constexpr or parameter.do_not_specialize
                assert fixed, (launch.kernel.fn.__name__, parameter.name)
                assert parameter.is_constexpr or parameter.annotation_type, parameter.name


def test_another_pack_takes_no_other_kernel():
    """Two packs of different sizes differ in typed integers and in what tensors point to alone."""

    def signature(tokens, samples):
        qkv = torch.empty((tokens, 24, 64), dtype=torch.bfloat16, device="meta")
        q, k, v = qkv.chunk(3, dim=1)
        cu = torch.empty(samples + 1, dtype=torch.int32, device="meta")
        recorder = Recorder(90)
        out, lse = kernels.forward(q, k, v, cu, cu, 0.125, run=recorder)
        for deterministic in (True, False):
            kernels.backward(
                out, q, k, v, out, lse, None, cu, cu, 0.125, run=recorder,
                deterministic=deterministic,
            )  # fmt: skip
        return [
            {
                p.name: launch.arguments[p.name]
                for p in launch.kernel.params
                if p.is_constexpr or launch.arguments[p.name] is None
            }
            | launch.options
            for launch in recorder.launches
        ]

    assert signature(1, 1) == signature(16, 3) == signature(233_017, 1_000)


@pytest.mark.parametrize(
    ("samples", "tokens"), [*itertools.product([1, 3000], [0, 1, 64, 65, 10_000])]
)
def test_the_grid_covers_every_tile(samples, tokens):
    """The bound on the host is not below the tiles of any division into samples and padding."""
    lengths = [1] * min(samples - 1, tokens) + [0] * max(samples - 1 - tokens, 0)
    lengths += [tokens - sum(lengths)]
    q = torch.empty((tokens, 8, 64), device="meta")
    cu = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    tiles = sum(-(-n // 64) for n in lengths) * 8
    assert kernels._tiles(q, 64, cu) >= tiles
