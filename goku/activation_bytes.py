"""How many bytes a training step keeps for its backward pass, from a model's shape and a checkpointing policy.

A closed form in bytes per token, checked to 10% (tests) against torch's saved-tensor hooks and against the storages
that live after a forward. It counts what grows with a process's tokens: rows of samples, text and copies of weights
are small beside it and left out.
"""

from __future__ import annotations

import math

from goku.model import ModelConfig
from goku_runtime.activation_checkpoint import EXCHANGES, ActivationCheckpointing

__all__ = ["recomputed_bytes_per_token", "saved_bytes_per_token", "unpredicted_operators"]


def saved_bytes_per_token(
    model: ModelConfig,
    element_bytes: int,
    policy: ActivationCheckpointing | None = None,
    *,
    sp: int = 1,
    fused: bool = False,
) -> float:
    """Bytes that each token of a process leaves saved for the backward pass, the residual stream being fp32.

    Exchanges and attention's heads are those of the busiest process, where sp does not divide the heads. Operators of
    `unpredicted_operators` count nothing.

    Args:
        model: the shape.
        element_bytes: of the dtype of matrix products: 4, or 2 under autocast.
        policy: what is kept; None for everything.
        sp: processes that share a pack. A process has 1/sp of its tokens.
        fused: of the Triton kernels; otherwise of the eager operators, which save more.
    """
    policy = policy or ActivationCheckpointing()
    recomputed = {"none": 0, "every_nth": math.ceil(model.depth / policy.every)}.get(
        policy.mode, model.depth
    )
    whole = _whole_block(model, element_bytes, sp, fused)
    little = _recomputed_block(model, element_bytes, policy, sp, fused)
    # The final layer: eager, its input, norm, scale and result; fused, its input and result.
    outside = model.patch_dim * element_bytes + model.dim * 4 * (2 if fused else 4)
    if model.condition_dim:  # in fp32: the input of its MLP, and hidden rows before and after GELU
        outside += 4 * (model.patch_dim + model.condition_dim + 2 * model.dim)
    return (model.depth - recomputed) * whole + recomputed * little + outside


def recomputed_bytes_per_token(
    model: ModelConfig,
    element_bytes: int,
    policy: ActivationCheckpointing,
    *,
    sp: int = 1,
    fused: bool = False,
) -> float:
    """Bytes per token that come back while one block is computed again, beside what it had kept; arguments as above.

    The backward pass holds them for one block at a time. 0 where nothing is recomputed.
    """
    if policy.mode == "none":
        return 0.0
    kept = _recomputed_block(model, element_bytes, policy, sp, fused)
    return max(0.0, _whole_block(model, element_bytes, sp, fused) - kept)


def unpredicted_operators(policy: ActivationCheckpointing) -> tuple[str, ...]:
    """Operators that a policy keeps and `saved_bytes_per_token` knows nothing of, in alphabetical order."""
    if policy.mode != "operators":
        return ()
    known = set(_outputs(ModelConfig(dim=8, depth=1, heads=1), 4, 1, True)) | set(EXCHANGES)
    return tuple(sorted(_names(policy) - known))


def _names(policy: ActivationCheckpointing) -> set[str]:
    return {name.removesuffix(".default") for name in policy.save}


def _share(model: ModelConfig, sp: int) -> float:
    """Heads of the busiest process over the average."""
    return math.ceil(model.heads / sp) * sp / model.heads


def _exchanged(model: ModelConfig, element: int, sp: int) -> float:
    """What self-attention received: q, k and v of whole samples, then its result for the process's own tokens."""
    return (3 * _share(model, sp) + 1) * element * model.dim if sp > 1 else 0.0


def _recomputed_block(
    model: ModelConfig, element: int, policy: ActivationCheckpointing, sp: int, fused: bool
) -> float:
    """A block that is recomputed, per token: its input, the residual stream; what it exchanged; what it was told to."""
    little = 4 * model.dim + _exchanged(model, element, sp)
    if policy.mode == "operators":
        outputs = _outputs(model, element, sp, fused)
        little += sum(outputs.get(name, 0.0) for name in _names(policy))
    return little


def _whole_block(model: ModelConfig, element: int, sp: int, fused: bool) -> float:
    """A block that recomputes nothing, per token."""
    more = (
        _share(model, sp) - 1
    )  # the busiest process's surplus of q, k and v, which attention saves
    if not fused:
        # Fitted to the hooks: in the dtype of products what linear maps, attention and GELU save; in fp32 what norms,
        # rotation, modulation and residuals do, six of them the norms of q and k.
        fp32 = 15 if model.qk_norm == "none" else 21
        return model.dim * ((9 + 2 * model.mlp_ratio + 3 * more) * element + fp32 * 4)
    # The residual stream at its three places; then, in the order of the block, inputs of projections (autocast copies
    # them for each), q and k before and after norm and rotation, v, result and projection of both attentions; the
    # FFN's input, hidden rows before and after GELU, result; each query's log-sum-exp.
    inputs = 5 if element < 4 else 3
    products = inputs + (2 + 2 + 1 + 1 + 1) + (1 + 1 + 1 + 1) + (2 * model.mlp_ratio + 1)
    products += 3 * more + (_share(model, sp) if sp > 1 else 0)  # sent and received are two tensors
    return model.dim * (products * element + 3 * 4) + 4 * model.heads * (_share(model, sp) + 1)


def _outputs(model: ModelConfig, element: int, sp: int, fused: bool) -> dict[str, float]:
    """What the operators of one block that can be predicted return, per token."""
    dim, share = model.dim, _share(model, sp)
    lse = 4 * model.heads * (share + 1) if fused else 0.0
    called = (
        1 if fused else 0
    )  # the eager operators are made of torch's, under whose names they are kept
    return {
        "goku_kernels::varlen_attention": (share + 1) * dim * element + lse,
        "goku_kernels::qk_norm_rope": called * 3.0 * dim * element,
        "goku_kernels::adaln_modulate": called * 4.0 * dim,
        # Three calls return five rows in all; the last is the next block's input, counted there.
        "goku_kernels::gated_residual_adaln": called * 4.0 * 4 * dim,
        "aten::mm": 6.0 * dim * element,  # projections without bias: q, k, v, o; q, o
        "aten::addmm": (model.mlp_ratio + 1) * dim * element,
        "aten::gelu": model.mlp_ratio * dim * element,
        "_c10d_functional::wait_tensor": 0.0,  # the exchange's own memory
    }
