"""gated_residual_adaln's kernels in the interpreter, against fp64, forward and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_kernels import Packing, adaln_modulate, gated_residual_adaln

OP = torch.ops.goku_kernels.gated_residual_adaln.default
D = 24
NAMES = ("residual", "branch", "modulation", "weight")
# (norm, weighted, which of gate, shift and scale): Goku's three, and the fullest.
CASES = {
    "before cross-attention": ("rms", True, "gate"),
    "before the FFN": ("rms", True, "shift scale"),
    "the block's end": ("none", False, "gate"),
    "everything": ("layer", True, "gate shift scale"),
    "nothing": ("none", False, ""),
}


def draw(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(lengths, padding=0, token_offset=0, dtype=torch.float32, branch=None, seed=0):
    cu = Packing.from_lengths(lengths).cu_seqlens
    rows = sum(lengths) - token_offset + padding
    return cu, [
        draw(seed, rows, D, dtype=dtype) + 3,
        draw(seed + 1, rows, D, dtype=branch or dtype),
        draw(seed + 2, len(lengths), 3 * D),
        draw(seed + 3, D),
    ]


def run(backend, cu, tensors, case, dtype=None, use=("y", "out"), **options):
    """Outputs and gradients by name; the loss reads only the outputs in `use`."""
    norm, weighted, names = CASES[case]
    leaves = [(v if dtype is None else v.to(dtype)).detach().requires_grad_() for v in tensors]
    rows = zip(("gate", "shift", "scale"), leaves[2].chunk(3, dim=-1), strict=True)
    modulation = [row if name in names.split() else None for name, row in rows]
    y, out = gated_residual_adaln(
        leaves[0], leaves[1], *modulation, cu, norm=norm, weight=leaves[3] if weighted else None,
        backend=backend, **options,
    )  # fmt: skip
    # Transposes: gradients whose rows are not contiguous.
    given = {"y": draw(8, *y.shape[::-1]).t(), "out": draw(9, *y.shape[::-1]).t()}
    outs = {"y": y, "out": out}
    grads = torch.autograd.grad(
        [outs[name] for name in use], leaves, [given[name].to(y.dtype) for name in use],
        allow_unused=True,
    )  # fmt: skip
    results = {"y": y.detach(), "out": out.detach(), **dict(zip(NAMES, grads, strict=True))}
    return {name: v for name, v in results.items() if v is not None}


def judge(flash_rule, cu, tensors, case, token_offset=0, **options):
    options["token_offset"] = token_offset
    got = run("triton", cu, tensors, case, **options)
    same = run("torch", cu, tensors, case, **options)
    exact = run("torch", cu, tensors, case, dtype=torch.float64, **options)
    # Where autograd finds no path there may be a gradient of zeros instead.
    assert got.keys() >= exact.keys()
    assert not any(got[name].any() for name in got.keys() - exact.keys())
    for name in exact:
        rows = cu if name in ("y", "out", "residual", "branch") else None
        flash_rule(name, got[name], same[name], exact[name], rows, token_offset)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_pack(flash_rule, pack, case, dtype):
    cu, tensors = inputs(*pack, dtype=dtype)
    judge(flash_rule, cu, tensors, case)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.data())
def test_any_shard_of_any_packing(flash_rule, lengths, data):
    offset = data.draw(st.integers(0, sum(lengths)))
    padding = data.draw(st.integers(0, 3))
    cu, tensors = inputs(lengths, padding, offset, dtype=torch.float16)
    judge(flash_rule, cu, tensors, "everything", token_offset=offset)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("use", ["y", "out"])
def test_one_output_alone_is_used(flash_rule, case, use):
    cu, tensors = inputs([3, 6], padding=2)
    judge(flash_rule, cu, tensors, case, use=(use,))


@pytest.mark.parametrize("case", CASES)
def test_a_half_branch_beside_an_fp32_residual(flash_rule, case):
    cu, tensors = inputs([3, 0, 6], branch=torch.float16)
    judge(flash_rule, cu, tensors, case)


@pytest.mark.parametrize("rows", [(), (9,)], ids=["shared", "per token"])
def test_without_offsets(flash_rule, rows):
    _, tensors = inputs([9])
    tensors[2] = draw(2, *rows, 3 * D)
    judge(flash_rule, None, tensors, "everything")


def test_padding_that_holds_nan_reaches_nothing():
    cu, tensors = inputs([5, 9], padding=4)
    clean = run("triton", cu, tensors, "everything")
    tensors[0][14:], tensors[1][15] = float("nan"), float("inf")
    dirty = run("triton", cu, tensors, "everything")
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_equals_the_sum_and_then_adaln_modulate_bit_for_bit():
    cu, (residual, branch, modulation, weight) = inputs([5, 9], dtype=torch.float16)
    gate, shift, scale = modulation.chunk(3, dim=1)
    y, out = gated_residual_adaln(
        residual, branch, gate, shift, scale, cu, weight=weight, backend="triton"
    )
    assert torch.equal(y, adaln_modulate(out, shift, scale, cu, weight=weight, backend="triton"))


def test_equal_bits_on_every_run():
    cu, tensors = inputs([50, 1, 33], dtype=torch.float16)
    first, again = (run("triton", cu, tensors, "everything") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_rows_past_two_to_the_31():
    storage = torch.empty(3 * 2**30 + D, dtype=torch.float16)
    wide = storage.as_strided((4, D), (2**30, 1))
    wide.copy_(draw(0, 4, D))
    cu, (_, _, modulation, _) = inputs([1, 3])
    gate, shift, scale = modulation.chunk(3, dim=1)
    narrow = wide.contiguous()
    results = []
    for residual, branch, grad in ((wide, wide, wide), (narrow, narrow, narrow)):
        leaves = [residual.detach().requires_grad_(), branch.detach().requires_grad_()]
        y, out = gated_residual_adaln(*leaves, gate, shift, scale, cu, backend="triton")
        results.append([y, out, *torch.autograd.grad([y, out], leaves, [grad, grad])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_opcheck():
    cu, (residual, branch, modulation, weight) = inputs([3, 0, 2], padding=1)
    for v in (residual, branch, modulation, weight):
        v.requires_grad_()
    gate, shift, scale = modulation.chunk(3, dim=1)
    for arguments in (
        (residual, branch, gate, shift, scale, cu, "rms", weight, 1e-6, 0),
        (residual, branch, None, shift, None, cu, "layer", None, 1e-6, 2),
        (residual, branch, gate, None, None, cu, "none", None, 1e-6, 0),
    ):
        torch.library.opcheck(OP, arguments)


def test_fp64_is_refused_by_name():
    x = torch.zeros(2, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gated_residual_adaln: x has dtype torch\.float64"):
        gated_residual_adaln(x, x, None, None, None, backend="triton")
