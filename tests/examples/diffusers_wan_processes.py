"""diffusers_wan.py against diffusers alone. Run by tests/launch.py."""

import copy

import diffusers_wan as example
import torch
import torch.distributed as dist
from plain_loop_processes import same_weights

from goku_runtime.mesh import ParallelDims, sequence_parallel_group


def plain_training(model, steps):
    """All videos of a step in one batch of the model as it is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    results = []
    for step in range(steps):
        videos = example.videos_of_step(step, range(example.VIDEOS))
        out = model(videos.noisy, videos.times, videos.texts).sample
        loss = (out - videos.velocities).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


def compare(rank, world, degrees, recompute=False, steps=3):
    # fp32, as diffusers' norms are, whatever the model's dtype; 1e-5 as for transformers_model.
    model = example.build()
    reference = copy.deepcopy(model)
    expected = plain_training(reference, steps)
    assert expected[0][1] > 0.5, "clipping is to take part"
    mesh = ParallelDims(*degrees).build_mesh("cpu")
    results = list(example.train(model, mesh, steps, recompute))
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=0)
    same_weights(model, reference, rtol=0, atol=1e-5)


def times_of_tokens(rank, world):
    """A time per token, as Wan 2.2 TI2V has, and arguments by name; gradients summed by hand."""
    model = example.build()
    reference = copy.deepcopy(model)
    group = sequence_parallel_group(ParallelDims(sp=world).build_mesh("cpu"))
    example.parallelise(model, group)
    videos = example.videos_of_step(0, range(2))
    times = torch.linspace(0, 1000, 2 * 45).view(2, 45)
    for wan, share in ((reference, 1), (model, 1 / world)):
        out = wan(
            hidden_states=videos.noisy, timestep=times, encoder_hidden_states=videos.texts
        ).sample
        ((out - videos.velocities).square().mean() * share).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        dist.all_reduce(ours.grad)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
