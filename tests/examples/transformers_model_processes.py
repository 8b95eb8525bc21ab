"""transformers_model.py against transformers alone. Run by tests/launch.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers_model as example
from plain_loop_processes import same_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from goku_runtime.mesh import ParallelDims


def plain_training(model, steps):
    """Sample by sample, with transformers' own attention, labels shifted by it too."""
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    results = []
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for pack in example.packs_of_step(step, model.config.vocab_size):
            for sample in pack.tokens.split(pack.lengths):
                logits = model(input_ids=sample[None], use_cache=False).logits[0]
                total = total + F.cross_entropy(logits[:-1], sample[1:], reduction="sum")
                count += len(sample) - 1
        loss = total / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


def compare(rank, world, degrees, recompute=False, llama=False, steps=3):
    # fp32, as transformers' norms and rotary tables are, whatever the model's dtype. 1e-5 for the
    # loss and the norm: some hundred roundings of 6e-8. Weights: a step of AdamW is lr = 1e-2 whatever
    # the gradient's size, so that a gradient near 0 may turn; SGD-like agreement within 1e-2 of that.
    model = example.build()
    if llama:
        config = LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=3,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation=example.NAME)
    reference = copy.deepcopy(model)
    expected = plain_training(reference, steps)
    assert expected[0][1] > 1.0, "clipping is to take part"
    mesh = ParallelDims(*degrees).build_mesh("cpu")
    results = list(example.train(model, mesh, steps, recompute))
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=0)
    same_weights(model, reference, rtol=0, atol=1e-4)


def refuse(rank, world):
    model = example.build()
    attend = example.attention
    q = torch.zeros(2, 6, 4, 8)
    more = {"sequence_parallel": None, "cu_seqlens": None, "lengths": [4]}
    with pytest.raises(ValueError, match="one row"):
        attend(model, q, q, q, None, **more)
    with pytest.raises(ValueError, match="mask"):
        attend(model, q[:1], q[:1], q[:1], torch.ones(4, 4), **more)
    with pytest.raises(ValueError, match="sliding_window 3"):
        attend(model, q[:1], q[:1], q[:1], None, sliding_window=3, **more)
