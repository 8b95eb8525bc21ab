"""gated_residual_adaln: the sum sample by sample, then what adaln_modulate does; its contract."""

import pytest
import torch

from goku_kernels import (
    Packing,
    adaln_modulate,
    gated_residual_adaln,
    gated_residual_adaln_bytes,
    gated_residual_adaln_flops,
)

D = 6
LENGTHS = [3, 0, 1, 4]
CU = Packing.from_lengths(LENGTHS).cu_seqlens


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def plain(residual, branch, gate, shift, scale, norm, weight, eps=1e-6):
    """One sample at a time."""
    ys, outs = [], []
    for i, (r, b) in enumerate(zip(residual.split(LENGTHS), branch.split(LENGTHS), strict=True)):
        out = y = r + (b if gate is None else b * gate[i])
        if norm == "layer":
            y = y - y.mean(-1, keepdim=True)
        if norm != "none":
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
        y = y if weight is None else y * weight
        y = y if scale is None else y * (1 + scale[i])
        ys.append(y if shift is None else y + shift[i])
        outs.append(out)
    return torch.cat(ys), torch.cat(outs)


@pytest.mark.parametrize(
    ("norm", "weighted", "gated", "modulated"),
    [
        ("rms", True, True, False),  # after self-attention
        ("rms", True, False, True),  # after cross-attention
        ("none", False, True, False),  # after the FFN
        ("layer", False, True, True),
    ],
)
def test_equals_the_plain_reference(norm, weighted, gated, modulated):
    residual, branch = draw(8, D), draw(8, D, seed=1)
    gate = draw(4, D, seed=2) if gated else None
    shift, scale = (draw(4, D, seed=s) if modulated else None for s in (3, 4))
    weight = draw(D) if weighted else None
    got = gated_residual_adaln(residual, branch, gate, shift, scale, CU, norm=norm, weight=weight)
    want = plain(residual, branch, gate, shift, scale, norm, weight)
    inputs = [x for x in (residual, branch, gate, shift, scale, weight) if x is not None]
    a, b = (
        torch.autograd.grad((y * residual.detach()).sum() + out.square().sum(), inputs)
        for y, out in (got, want)
    )
    # fp64 rounding of a dozen operations stays under 1e-12
    for x, y in [*zip(got, want, strict=True), *zip(a, b, strict=True)]:
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_equals_its_two_halves_bit_for_bit_with_bf16_branches(residual_dtype):
    residual, branch = draw(8, D, dtype=residual_dtype), draw(8, D, seed=1, dtype=torch.bfloat16)
    gate, shift, scale = (draw(4, D, seed=s, dtype=torch.float32) for s in (2, 3, 4))
    y, out = gated_residual_adaln(residual, branch, gate, shift, scale, CU)
    rows = gate.repeat_interleave(torch.tensor(LENGTHS), 0)
    halves = torch.addcmul(residual.float(), branch.float(), rows).to(residual_dtype)
    assert torch.equal(out, halves)
    assert torch.equal(y, adaln_modulate(halves, shift, scale, CU))
    assert y.dtype == out.dtype == residual_dtype
    inputs = (residual, branch, gate, shift, scale)
    grads = torch.autograd.grad(y.float().sum() + out.float().sum(), inputs)
    assert [grad.dtype for grad in grads] == [x.dtype for x in inputs]


def test_gate_per_token_and_for_all_without_cu_seqlens():
    residual, branch, gate = draw(5, D), draw(5, D, seed=1), draw(5, D, seed=2)
    _, out = gated_residual_adaln(residual, branch, gate, None, None)
    torch.testing.assert_close(out, residual + gate * branch, rtol=1e-14, atol=1e-14)
    _, out = gated_residual_adaln(residual, branch, gate[0], None, None)
    torch.testing.assert_close(out, residual + gate[0] * branch, rtol=1e-14, atol=1e-14)


def test_shards_concatenate_to_the_whole():
    residual, branch, gate = draw(8, D), draw(8, D, seed=1), draw(4, D, seed=2)
    whole = gated_residual_adaln(residual, branch, gate, gate, gate, CU)
    parts = [
        gated_residual_adaln(residual[a:b], branch[a:b], gate, gate, gate, CU, token_offset=a)
        for a, b in ((0, 2), (2, 8))
    ]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_padding_rows_are_zero_even_when_they_hold_nan():
    residual, branch = (torch.randn(10, D, dtype=torch.float64) for _ in range(2))
    residual[8:], branch[9:] = float("nan"), float("inf")
    residual.requires_grad_()
    branch.requires_grad_()
    gate = draw(4, D)
    y, out = gated_residual_adaln(residual, branch, gate, gate, gate, CU)
    grads = torch.autograd.grad(y.sum() + out.sum(), (residual, branch, gate))
    for x in (y, out, *grads[:2]):
        assert torch.equal(x[8:], torch.zeros(2, D, dtype=torch.float64))
        assert x[:8].isfinite().all()
    assert grads[2].isfinite().all()


_X = torch.zeros(8, D)
_BAD = {
    "residual has dtype": {"residual": _X.long()},
    r"branch has shape \(7, 6\): wanted \(8, 6\)": {"branch": _X[:7]},
    "branch is on meta": {"branch": _X.to("meta")},
    "branch has dtype torch.float64: beside a torch.float32 residual": {"branch": _X.double()},
    r"gate has shape \(3, 6\): wanted \(4, 6\)": {"gate": torch.zeros(3, D)},
    "gate has dtype torch.float64": {"gate": torch.zeros(4, D).double()},
    "norm is 'batch'": {"norm": "batch"},
    "cu_seqlens has dtype": {"cu_seqlens": CU.long()},
    "token_offset is 1.5": {"token_offset": 1.5},
    "backend is 'flash'": {"backend": "flash"},
}


@pytest.mark.parametrize("message", _BAD)
def test_refusals(message):
    good = {"residual": _X, "branch": _X, "gate": None, "shift": None, "scale": None}
    with pytest.raises(ValueError, match=f"gated_residual_adaln: {message}"):
        gated_residual_adaln(**(good | {"cu_seqlens": CU} | _BAD[message]))


def test_an_absent_backend_says_what_brings_it():
    with pytest.raises(RuntimeError, match="'triton' is not available"):
        gated_residual_adaln(_X, _X, None, None, None, backend="triton")


def test_costs():
    assert gated_residual_adaln_flops(10, 4) == 80 + 320
    assert gated_residual_adaln_flops(10, 4, norm="rms", backward=True) == 160 + 480
    assert gated_residual_adaln_bytes(10, 4, itemsize=2) == 320
    assert gated_residual_adaln_bytes(10, 4, itemsize=2, backward=True) == 480
