"""plain_loop.py against the same training without goku_runtime. Run by tests/launch.py."""

import plain_loop
import torch
import torch.nn.functional as F
from packed_transformer import HEADS, WIDTH, Model, packs_of_step
from torch.distributed.tensor import DTensor

from goku_runtime.mesh import ParallelDims


def plain_training(model, steps):
    """Sample by sample on one process: (loss, gradient norm) of each step; the model is trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    results = []
    for step in range(steps):
        total, elements = torch.zeros(()), 0
        for pack in packs_of_step(step):
            samples = zip(
                pack.inputs.split(pack.lengths), pack.targets.split(pack.lengths), strict=True
            )
            for x, target in samples:
                for block in model.blocks:
                    qkv = block.qkv(block.norm1(x)).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
                    attended = F.scaled_dot_product_attention(*qkv)  # (HEADS, samples' tokens, D)
                    x = x + block.out(attended.transpose(0, 1).reshape(len(x), WIDTH))
                    x = x + block.mlp(block.norm2(x))
                total = total + (model.head(x) - target).square().sum()
                elements += target.numel()
        loss = total / elements
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


def same_weights(model, reference, gather=None, **tolerances):
    """Every parameter of `model`, gathered, against the reference's."""
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if gather is not None:
            ours = gather(ours)
        elif isinstance(ours, DTensor):
            ours = ours.full_tensor()
        off = (ours - theirs).abs().max().item()
        torch.testing.assert_close(ours, theirs, **tolerances, msg=f"{name} is off by up to {off}")


def compare(rank, world, degrees, steps=3):
    # fp64: what is left is the order of sums, a few units of 1e-16 per operation; AdamW's first
    # steps divide gradients by themselves, which spreads errors of small ones, hence 1e-9.
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    reference, model = Model(), Model()
    model.load_state_dict(reference.state_dict())
    expected = plain_training(reference, steps)
    assert expected[0][1] > 0.3, "clipping is to take part"
    mesh = ParallelDims(*degrees).build_mesh("cpu")
    results = list(plain_loop.train(model, mesh, steps))
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=0)
    same_weights(model, reference, rtol=1e-9, atol=1e-9)
