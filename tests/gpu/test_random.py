"""Random numbers and the loss on an accelerator: the same bits as on the CPU, and deterministic."""

import pytest
import torch

from goku.flow import per_sample_mse
from goku.random import Purpose, bits, normal, normal_packed
from goku_kernels import Packing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_bits_equal_those_of_the_cpu() -> None:
    on_device = bits(1, 2**40, 100_001, Purpose.SHUFFLE, device="cuda")
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), bits(1, 2**40, 100_001, Purpose.SHUFFLE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_equal_those_of_the_cpu_bit_for_bit(dtype: torch.dtype) -> None:
    streams, lengths = (5, 2**63, 7), (3_000_001, 3, 250_002)
    on_device = normal_packed(3, streams, lengths, device="cuda", dtype=dtype)
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), normal_packed(3, streams, lengths, dtype=dtype))


def test_the_loss_and_its_gradient_are_deterministic_and_the_cpus() -> None:
    lengths = [30_000, 1, 257, 4096]
    n = sum(lengths)
    prediction, target = (normal(4, i, n * 64).view(n, 64) for i in range(2))

    def run(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = prediction.to(device).requires_grad_()
        packing = Packing.from_lengths(lengths, device=device)
        means = per_sample_mse(leaf, target.to(device), packing)
        means.sum().backward()
        assert leaf.grad is not None
        return means.detach().cpu(), leaf.grad.cpu()

    means, gradient = run("cuda")
    for _ in range(5):
        again = run("cuda")
        assert torch.equal(again[0], means)
        assert torch.equal(again[1], gradient)
    expected_means, expected_gradient = run("cpu")
    # fp32 row means in another order, then fp64: about two roundings of 2^-24 on either side, and in
    # the worst case all four add up.
    torch.testing.assert_close(means, expected_means, rtol=5e-7, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=5e-7, atol=0)
