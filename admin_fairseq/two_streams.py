"""Methods with two streams: a Post-LN one, x, beside a sum of all branches that no LayerNorm touches, s.

Both start at the stack's input. Between layers the two travel side by side, as one tensor (time, batch, 2 d), so that
fairseq's stacks, activation checkpointing and incremental decoding serve as they are. A stack ends in x + LN(s).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admin_fairseq.architectures import register_method
from admin_fairseq.norms_in_front import TwoNorms
from admin_fairseq.rules import Rule


@register_method("residual")
class ResiDual(Rule):
    """Post-LN beside a Pre-LN shortcut: x <- LN(x + f(x)) and s <- s + f(x).

    Source: Xie et al. 2023, "ResiDual: Transformer with Dual Residual Connections", section 2 and figure 1. (The LN of
    s at the end has fairseq's eps, 1e-5; that of the authors' code, microsoft/ResiDual, 1e-7.)
    """

    crosses_sub_layers = True

    @staticmethod
    def set_up_stacks(stacks: dict[str, nn.Module]) -> None:
        _join(stacks)

    branch_sum: Tensor  # s, while a layer runs

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        self.branch_sum = self.branch_sum + x
        return residual + x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x, self.branch_sum = _split(x, self.embed_dim)
        try:
            result = super().forward(x, *args, **kwargs)
            x, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
            both = torch.cat([x, self.branch_sum], dim=-1)
        finally:
            self.branch_sum = None
        return both if rest is None else (both, *rest)


@register_method("siamese")
class SiameseNorm(TwoNorms):
    """Both streams feed every branch: f = f(LN_in(x + LN_s(s))), x <- LN_out(x + l^(-1/2) f) and s <- s + f.

    l counts the sub-layers of the stack from 1.

    Source: Li et al. 2026, "SiameseNorm: Breaking the Barrier to Reconciling Pre/Post-Norm" (arXiv 2602.08064),
    algorithm 1 with its two additions, LN_in and the scale by depth, by two summaries that agree and the authors' code
    (Qwen-Applications/SiameseNorm); of the paper itself only the abstract could be read here. (Their code scales both
    sub-layers of a layer as its second, and puts one more LayerNorm on the sum at the end.)
    """

    depth_matters = True  # l
    crosses_sub_layers = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        names = self.norm_names()
        for name in names:
            setattr(self, name, StreamsIn(self.embed_dim))
        super().set_up(stack, layers)
        first = (self.number - 1) * len(names) + 1
        self.scales = {name: (first + i) ** -0.5 for i, name in enumerate(names)}

    @staticmethod
    def set_up_stacks(stacks: dict[str, nn.Module]) -> None:
        _join(stacks)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        normed, branch_sum = _split(residual, self.embed_dim)
        normed = self.norm_out(normed + self.scales[self.running] * x)
        return torch.cat([normed, branch_sum + x], dim=-1)


class StreamsIn(nn.LayerNorm):
    """In front of a branch: LN(x + LN(s)) of the two streams; (time, batch, 2 d) to (time, batch, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.branch_sum_norm = nn.LayerNorm(dim)

    def forward(self, both: Tensor) -> Tensor:
        x, branch_sum = _split(both, self.normalized_shape[0])
        return super().forward(x + self.branch_sum_norm(branch_sum))


class StreamsJoined(nn.LayerNorm):
    """The end of a stack: x + LN(s) of the two streams; (time, batch, 2 d) to (time, batch, d)."""

    def forward(self, both: Tensor) -> Tensor:
        x, branch_sum = _split(both, self.normalized_shape[0])
        return x + F.layer_norm(branch_sum, self.normalized_shape, self.weight, self.bias, self.eps)


def _join(stacks: dict[str, nn.Module]) -> None:
    for stack in stacks.values():
        stack.layer_norm = StreamsJoined(stack.layers[0].embed_dim)


def _split(both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x and s; in front of the first layer they are the same."""
    return both.split(dim, dim=-1) if both.shape[-1] == 2 * dim else (both, both)
