"""Bad input raises the same ValueError whichever backend would have run."""

import pytest
import torch

from goku_kernels import (
    Packing,
    adaln_modulate,
    gated_residual_adaln,
    qk_norm_rope,
    rectified_flow_noise,
    varlen_attention,
    velocity_loss,
)

P = Packing.from_grids([(1, 2, 2), (1, 1, 2)])
CU, GRIDS = P.cu_seqlens, P.grid_sizes
X, ROWS, Q = torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2, 64, dtype=torch.float16)


def cu(*offsets, dtype=torch.int32):
    return torch.tensor(offsets, dtype=dtype)


OPERATORS = {
    "adaln_modulate": (adaln_modulate, {"x": X, "shift": ROWS, "scale": ROWS, "cu_seqlens": CU}),
    "gated_residual_adaln": (
        gated_residual_adaln,
        {
            "residual": X,
            "branch": X,
            "gate": ROWS,
            "shift": ROWS,
            "scale": ROWS,
            "cu_seqlens": CU,
        },
    ),
    "qk_norm_rope": (
        qk_norm_rope,
        {"q": Q, "k": Q, "cu_seqlens": CU, "grid_sizes": GRIDS, "axes_dim": (16, 24, 24)},
    ),
    "varlen_attention": (
        varlen_attention,
        {
            "q": Q,
            "k": Q,
            "v": Q,
            "cu_seqlens_q": CU,
            "cu_seqlens_k": CU,
            "max_seqlen_q": 4,
            "max_seqlen_k": 4,
        },
    ),
    "rectified_flow_noise": (
        rectified_flow_noise,
        {
            "x1": X,
            "t": torch.ones(2),
            "stream_index": torch.arange(2),
            "cu_seqlens": CU,
            "seed": 0,
        },
    ),
    "velocity_loss": (
        velocity_loss,
        {"prediction": X, "target": X, "weights": torch.ones(2), "cu_seqlens": CU, "weight_sum": 2},
    ),
}
OFFSETS = {
    "dtype torch.int64": cu(0, 4, 6, dtype=torch.int64),
    "decreases from 6 to 4": cu(0, 6, 4),
    r"\[0\] is 1": cu(1, 4, 6),
    "stride": cu(0, 0, 4, 4, 6, 6)[::2],
    "on meta": CU.to("meta"),
    "is a list": [0, 4, 6],
}
OTHERS = [
    ("adaln_modulate", {"shift": torch.ones(3, 8)}, r"shift has shape \(3, 8\): wanted \(2, 8\)"),
    ("adaln_modulate", {"x": X.t().contiguous().t()}, "x has inner stride"),
    ("adaln_modulate", {"norm": "batch"}, "norm is 'batch'"),
    ("gated_residual_adaln", {"branch": X[:5]}, r"branch has shape \(5, 8\)"),
    ("gated_residual_adaln", {"gate": ROWS.double()}, "gate has dtype torch.float64"),
    ("qk_norm_rope", {"grid_sizes": GRIDS + 1}, r"grid_sizes\[0\] is \(2, 3, 3\)"),
    ("qk_norm_rope", {"grid_sizes": [(1, 2, 2), (1, 1, 2)]}, "grid_sizes is a list"),
    ("qk_norm_rope", {"position_offset": (0, 1, 1)}, "position_offset is a tuple"),
    ("qk_norm_rope", {"axes_dim": (16, 16, 16)}, "axes_dim is"),
    ("qk_norm_rope", {"k": Q.float()}, "k has dtype torch.float32"),
    ("varlen_attention", {"cu_seqlens_k": cu(0, 4, 7)}, "cu_seqlens_k ends at 7: k has 6 rows"),
    ("varlen_attention", {"max_seqlen_q": 3}, "max_seqlen_q is 3: the longest segment has 4"),
    ("varlen_attention", {"v": Q[:, :, :32]}, "v has shape"),
    ("rectified_flow_noise", {"t": torch.ones(3)}, r"t has shape \(3,\)"),
    ("rectified_flow_noise", {"stream_index": [0, 1]}, "stream_index is a list"),
    ("velocity_loss", {"prediction": [[1.0] * 8] * 6}, "prediction is a list"),
    ("velocity_loss", {"target": X[:5]}, "target has shape"),
    *((name, {"backend": "cudnn"}, "backend is 'cudnn': allowed are") for name in OPERATORS),
]


def refuse(name, change, message, backend):
    operator, arguments = OPERATORS[name]
    arguments = {"backend": backend, **arguments, **change}
    with pytest.raises(ValueError, match=message) as error:
        operator(**arguments)
    return str(error.value)


@pytest.mark.parametrize("message", OFFSETS)
@pytest.mark.parametrize("name", OPERATORS)
def test_bad_offsets(name, message):
    wanted = [key for key in OPERATORS[name][1] if key.startswith("cu_seqlens")]
    for key in wanted:
        said = {refuse(name, {key: OFFSETS[message]}, message, b) for b in ("torch", "triton")}
        assert len(said) == 1
        assert said.pop().startswith(f"{name}: {key}")


@pytest.mark.parametrize(("name", "change", "message"), OTHERS)
def test_other_bad_arguments(name, change, message):
    said = {refuse(name, change, message, backend) for backend in ("torch", "triton")}
    assert len(said) == 1


def test_good_arguments_are_taken():
    for operator, arguments in OPERATORS.values():
        for backend in ("torch", "triton"):
            operator(**arguments, backend=backend)


def test_bf16_attention_is_refused_by_the_interpreter():
    q = Q.bfloat16()
    with pytest.raises(ValueError, match="interpreter multiplies it wrongly"):
        varlen_attention(q, q, q, CU, CU, 4, 4, backend="triton")
