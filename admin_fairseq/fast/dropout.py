"""Dropout whose masks cost few random bits, on CPUs.

``bernoulli_`` draws a random number an element, which is most of what dropout costs there. Here 16 bits decide an
element, and one draw serves four: the probability of dropping is the nearest multiple of 2^-16, and what is kept is
scaled by its exact inverse, so that expectations stay. The masks come from torch's generator, so activation
checkpointing draws them again, but they are not those that stock fairseq draws from the same seed.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.modules import FairseqDropout
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from admin_fairseq.fast.measured import wanted

STEPS = 2**16  # of probability
LOWEST = torch.iinfo(torch.int64).min
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def probability(dropout: nn.Module) -> float:
    """Of dropping an element now; fairseq's module may go on after training (--retain-dropout)."""
    is_on = dropout.training or getattr(dropout, "apply_during_inference", False)
    return getattr(dropout, "p", 0.0) if is_on else 0.0


def from_few_bits(like: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask of the shape of ``like`` in int16, all bits set where an element is kept, and what is kept's factor.

    0 < p < 1.
    """
    dropped = min(max(round(p * STEPS), 1), STEPS - 1)
    lowest = dropped - STEPS // 2  # number that keeps
    count = like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(LOWEST, None).view(torch.int16)[:count]
    # a comparison would give bools, and converting those takes longer than drawing them
    return bits.clamp_(lowest - 1, lowest).neg_().add_(lowest - 1).view(like.shape), STEPS / (STEPS - dropped)


def only(kept: Tensor, x: Tensor) -> Tensor:
    """x where the mask keeps it, 0 elsewhere."""
    integers = INTEGERS[x.element_size()]
    return (x.view(integers) & kept.to(integers)).view(x.dtype)


def serves(device: torch.device, mode: str) -> bool:
    return device.type == "cpu" and wanted("dropout", device, mode)


class FastDropout(FairseqDropout):
    """fairseq's dropout, with masks from few bits; ``mode`` is --admin-fast."""

    mode: str  # set by speed_up

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        p = probability(self)
        if not 0 < p < 1 or torch.jit.is_tracing() or not serves(x.device, self.mode):
            return super().forward(x, inplace)
        return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept, ctx.scale = from_few_bits(x, p)
        ctx.save_for_backward(kept)
        return only(kept, x).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return only(kept, dy).mul_(ctx.scale), None


class DroppedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d_head)) v with dropped weights, on a CPU, where torch has no fused kernel for that.

    Shapes: q (batch, heads, time, d_head), k and v the same with the keys' time; ``hidden``, of the keys that may not
    be seen, broadcasts to (batch, heads, time, keys' time), or is None. The weights are kept for the backward pass,
    the dropped ones and their scale are not.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, p: float) -> Tensor:
        ctx.per_root = q.size(-1) ** -0.5
        with torch.autocast("cpu", enabled=False):  # which knows nothing of the backward pass
            q = q * ctx.per_root
            weights = q @ k.transpose(-2, -1)
            if hidden is not None:
                weights.masked_fill_(hidden, float("-inf"))
            weights = torch.softmax(weights, -1)
            kept, ctx.scale = from_few_bits(weights, p)
            ctx.save_for_backward(q, k, v, weights, kept)
            return (only(kept, weights) @ v).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        dx = dx * ctx.scale
        dv = only(kept, weights).transpose(-2, -1) @ dx
        of_weights = only(kept, dx @ v.transpose(-2, -1))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        return (of_scores @ k).mul_(ctx.per_root), of_scores.transpose(-2, -1) @ q, dv, None, None


def speed_up(stacks: dict[str, nn.Module], mode: str) -> None:
    """Let every dropout of the stacks draw its masks so, in place; ``mode`` is --admin-fast."""
    for stack in stacks.values():
        for module in stack.modules():
            if type(module) is FairseqDropout:
                module.__class__ = FastDropout
                module.mode = mode
