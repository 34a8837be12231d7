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

from admin_fairseq import fused

Observer = Callable[["OmegaLayerNorm", Tensor, Tensor], None]


class OmegaLayerNorm(nn.LayerNorm):
    """Dropout on the residual branch, omega-scaled shortcut and LayerNorm, as one module.

    Args:
        dim: width d of the model.
        dropout: the module applied to the residual branch.

    ``fast`` is --admin-fast; :mod:`admin_fairseq.fused` then computes the same where it is quicker. Nothing else needs
    to know: the equation is the last line of ``forward``.

    Shapes: ``f`` and ``x`` are (..., d), for example (time, batch, d); the result has the same shape.
    """

    fast = "off"

    def __init__(self, dim: int, dropout: nn.Module) -> None:
        super().__init__(dim)
        self.dropout = dropout
        self.omega = nn.Parameter(torch.ones(dim))  # draws no random number: stock weights stay stock
        self.observer: Observer | None = None  # set during the profiling pre-pass only

    def forward(self, branch_and_shortcut: tuple[Tensor, Tensor]) -> Tensor:
        f, x = branch_and_shortcut
        if self.observer is None and self.fast != "off":
            p = _probability(self.dropout)
            compute = fused.choose(self.fast, f, x, self.omega, self.weight, p)
            if compute is not None:
                return compute(f, x, self.omega, self.weight, self.bias, self.eps, p)
        f = self.dropout(f)
        if self.observer is not None:
            self.observer(self, x, f)
        return F.layer_norm(x * self.omega + f, self.normalized_shape, self.weight, self.bias, self.eps)


def _probability(dropout: nn.Module) -> float:
    """Of dropping an element now; fairseq's module may go on after training (--retain-dropout)."""
    is_on = dropout.training or getattr(dropout, "apply_during_inference", False)
    return getattr(dropout, "p", 0.0) if is_on else 0.0
