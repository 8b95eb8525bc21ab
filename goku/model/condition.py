"""How given frames enter the model: channel-wise concatenation with the noised tokens and one MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class FrameCondition(nn.Module):
    """Linear, GELU (tanh), Linear on a noised token and what its place is given; added to the stream.

    The paper (arXiv 2502.04896) passes the concatenation through one MLP and leaves the rest of the
    network unchanged. Ours are its width, that it maps to the residual stream beside the patch
    embedding (patch_dim numbers could not hold the noised token and the given one apart), and that
    fc2 begins at zero: the first forward is then that of the model without it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.patch_dim + config.condition_dim, config.dim)
        self.fc2 = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (T, patch_dim), condition (T, condition_dim) -> (T, d) in the parameters' dtype, under
        autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.fc1.weight.dtype
            hidden = self.fc1(torch.cat((x.to(dtype), condition.to(dtype)), dim=-1))
            return self.fc2(F.gelu(hidden, approximate="tanh"))
