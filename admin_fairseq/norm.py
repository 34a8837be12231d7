"""The paper's one equation: a Post-LN sub-layer whose shortcut is scaled by omega.

    x_i = LN(omega_i * x_{i-1} + dropout(f_i(x_{i-1})))

x_{i-1} is the sub-layer's input, f_i its residual branch (self-attention, encoder-decoder attention or
feed-forward network), LN layer normalisation and omega_i a trainable vector with one entry a dimension.
omega_i = 1 is the stock Post-LN Transformer.

Source: Liu et al. 2020, "Understanding the Difficulty of Training Transformers", section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OmegaLayerNorm(nn.LayerNorm):
    """Dropout on the residual branch, omega-scaled shortcut and LayerNorm, as one module.

    Args:
        dim: width d of the model.
        dropout: the module applied to the residual branch.

    Shapes: ``f`` and ``x`` are (..., d), for example (time, batch, d); the result has the same shape.
    """

    def __init__(self, dim: int, dropout: nn.Module) -> None:
        super().__init__(dim)
        self.dropout = dropout
        self.omega = nn.Parameter(torch.ones(dim))  # draws no random number: stock weights stay stock

    def forward(self, branch_and_shortcut: tuple[Tensor, Tensor]) -> Tensor:
        f, x = branch_and_shortcut
        return super().forward(self.add(x, self.dropout(f)))

    def add(self, x: Tensor, f: Tensor) -> Tensor:
        return self.omega * x + f
