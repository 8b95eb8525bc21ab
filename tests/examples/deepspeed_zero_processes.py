"""deepspeed_zero.py against the plain training of the same model. Run by tests/launch.py."""

import logging
import os

import deepspeed
import deepspeed.ops
import deepspeed_zero as example
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param
from packed_transformer import PACKS, Model
from plain_loop_processes import plain_training, same_weights

from goku_runtime.mesh import ParallelDims, data_parallel_size

# gloo's all-reduce instead of DeepSpeed's own in shared memory, which it would compile first.
deepspeed.ops.__compatible_ops__ = {}
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def trained(stage, told, degrees, steps, **zero):
    torch.manual_seed(0)
    model = Model()
    mesh = ParallelDims(*degrees).build_mesh("cpu")
    config = example.configuration(stage, told, PACKS // data_parallel_size(mesh))
    config["zero_optimization"] |= zero
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as torchrun does; DeepSpeed asks
    groups.mpu = None  # DeepSpeed's memory of the engine before
    results = list(example.train(model, mesh, steps, config, told))
    return model, results


def compare(rank, world, stage, told, degrees, steps=3):
    # fp32, as ZeRO's sums are; tolerances as in transformers_model_processes.
    torch.manual_seed(0)
    reference = Model()
    expected = plain_training(reference, steps)
    assert expected[0][1] > 0.3, "clipping is to take part"
    model, results = trained(stage, told, degrees, steps)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=0)
    same_weights(model, reference, gather, rtol=0, atol=1e-4)


def gather(parameter):
    """The whole parameter, in the precision that the optimizer keeps, of any stage."""
    return safe_get_full_fp32_param(parameter).view(getattr(parameter, "ds_shape", parameter.shape))


def wrong_scale(rank, world):
    """Why stage 3 with an mpu goes without reduce_scatter: with it, gradients are sp times too small.

    Where this fails DeepSpeed has mended it, and `configuration` can do without the exception.
    """
    torch.manual_seed(0)
    expected = plain_training(Model(), 1)[0][1]
    _, [(_, norm)] = trained(3, "mpu", (1, -1, 2), 1, reduce_scatter=True)
    torch.testing.assert_close(norm, expected / 2, rtol=1e-5, atol=0)
