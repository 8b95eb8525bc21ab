"""A Goku block on the Triton kernels under FSDP2, two processes: the same as one without it."""

import os
import subprocess
import sys
from pathlib import Path

ROLE = "GOKU_TEST_FSDP2_RANK"


def work(rank, folder):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from goku.model import GokuBlock, KernelConfig, ModelConfig
    from goku.model.initialise import initialise
    from goku_kernels import Packing

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    config = ModelConfig(dim=128, depth=1, heads=2, text_dim=24, mlp_ratio=1.0)

    def make():
        block = GokuBlock(config, KernelConfig(backend="triton"))
        initialise(block, 0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in block.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        return block

    def draw(seed):
        packing, text = Packing.from_grids([(1, 2, 2), (1, 1, 3)]), Packing.from_lengths([2, 1])
        generator = torch.Generator().manual_seed(seed)
        shapes = ((packing.total, 128), (2, 128), (text.total, 24))
        return [torch.randn(s, generator=generator) for s in shapes] + [packing, text]

    # One process: the mean over both processes' losses.
    alone = make()
    for seed in (1, 2):
        (alone(*draw(seed)).square().mean() / 2).backward()

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    block = make()
    fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    block(*draw(1 + rank)).square().mean().backward()
    for (name, p), (_, q) in zip(block.named_parameters(), alone.named_parameters(), strict=True):
        grad = p.grad.full_tensor()
        # fp32: two terms added after and before the division by 2, sums in another order.
        assert (grad - q.grad).norm() <= 1e-6 * q.grad.norm(), name
    dist.destroy_process_group()
    print(f"rank {rank} compared {len(list(block.parameters()))} gradients")


def test_gradients_of_a_sharded_block(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(tmp_path)],
            env=os.environ | {ROLE: str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    assert all("compared 20 gradients" in words for words in said), said


if __name__ == "__main__":
    work(int(os.environ[ROLE]), sys.argv[1])
