"""The paper's one equation: a Post-LN sub-layer whose shortcut is scaled by omega.

    x_i = LN(omega_i * x_{i-1} + dropout(f_i(x_{i-1})))

x_{i-1} is the sub-layer's input, f_i its residual branch (self-attention, encoder-decoder attention or
feed-forward network), LN layer normalisation and omega_i a trainable vector with one entry a dimension.
omega_i = 1 is the stock Post-LN Transformer.

Source: Liu et al. 2020, "Understanding the Difficulty of Training Transformers", section 4.3.
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Observer = Callable[["OmegaLayerNorm", Tensor, Tensor], None]


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
        self.observer: Observer | None = None  # set during the profiling pre-pass only

    def forward(self, branch_and_shortcut: tuple[Tensor, Tensor]) -> Tensor:
        f, x = branch_and_shortcut
        f = self.dropout(f)
        if self.observer is not None:
            self.observer(self, x, f)
        return F.layer_norm(x * self.omega + f, self.normalized_shape, self.weight, self.bias, self.eps)
