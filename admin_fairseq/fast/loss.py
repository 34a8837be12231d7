"""fairseq's label-smoothed cross-entropy in fewer passes over memory.

fairseq makes some ten passes over matrices of [tokens x vocabulary] in fp32, and holds three of them at once.

On CPUs the same operations run on a block of rows that stays in the cache, and the backward pass computes a block's
log-probabilities again instead of keeping all of them. Loss and gradient are fairseq's to the bit in fp32. On GPUs
torch.compile fuses the operations, and the values are fairseq's to rounding.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable

import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

Sums = Callable[[Tensor, Tensor, int], "tuple[Tensor, Tensor]"]  # logits, target, padding

BLOCK = 2**17  # logits, in a core's cache


def speed_up(criterion: LabelSmoothedCrossEntropyCriterion) -> None:
    """Have a criterion compute its loss as above.

    The instance's method is replaced, not its class: fairseq resumes only if the class's name is what it was.
    """
    criterion.compute_loss = functools.partial(_compute_loss, criterion)


def _compute_loss(
    criterion: LabelSmoothedCrossEntropyCriterion,
    model: nn.Module,
    net_output: Any,
    sample: dict[str, Any],
    reduce: bool = True,
) -> tuple[Tensor, Tensor]:
    """(loss, negative log-likelihood), each summed over the target tokens without padding."""
    sums = None
    if reduce and getattr(model.decoder, "adaptive_softmax", None) is None:
        sums = choose(net_output[0])
    if sums is None:
        return type(criterion).compute_loss(criterion, model, net_output, sample, reduce=reduce)
    start, epsilon = criterion.ignore_prefix_size, criterion.eps
    logits, target = net_output[0][:, start:], model.get_targets(sample, net_output)[:, start:]
    logits, target = logits.reshape(-1, logits.size(-1)), target.reshape(-1, 1)
    nll, smooth = sums(logits, target, criterion.padding_idx)
    rest = epsilon / (logits.size(-1) - 1)
    return (1.0 - epsilon - rest) * nll + rest * smooth, nll


def choose(logits: Tensor) -> Sums | None:
    """What computes the two sums for logits (..., vocabulary); None for fairseq's own loss."""
    if logits.device.type == "cpu":
        return InBlocks.apply
    return _compiled(logits.device, logits.dtype, logits.size(-1))


def smoothed_sums(logits: Tensor, target: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Sums over the rows that are not padding of -log p(target), and of -log p(word) over all words.

    ``logits`` is (tokens, vocabulary), ``target`` (tokens, 1).
    """
    log_p, padded = torch.log_softmax(logits, -1, dtype=torch.float32), target.eq(padding)
    nll, smooth = -log_p.gather(-1, target), -log_p.sum(-1, keepdim=True)
    return nll.masked_fill(padded, 0.0).sum(), smooth.masked_fill(padded, 0.0).sum()


@functools.lru_cache(maxsize=None)
def _compiled(device: torch.device, dtype: torch.dtype, vocabulary: int) -> Sums | None:
    """Compiled and tried; a second number of tokens compiles it again, for any number."""
    try:
        compute = torch.compile(smoothed_sums)
        with torch.inference_mode(False), torch.enable_grad():
            logits = torch.zeros(2, vocabulary, device=device, dtype=dtype).requires_grad_()
            torch.autograd.grad(sum(compute(logits, torch.ones(2, 1, device=device, dtype=torch.long), 0)), logits)
    except Exception as error:  # no compiler, a torch without it: whatever it is, fairseq's own loss serves
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        logger.warning(f"the loss cannot be compiled here ({reason}): it is fairseq's own")
        return None
    return compute


class InBlocks(torch.autograd.Function):
    """:func:`smoothed_sums`, a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        nll, smooth = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
        for x, t, n, s in _blocks(logits, target, nll, smooth):
            log_p = torch.log_softmax(x, -1, dtype=torch.float32)
            n.copy_(log_p.gather(-1, t))
            torch.sum(log_p, -1, keepdim=True, out=s)
        ctx.save_for_backward(logits, target)
        ctx.padding = padding
        padded = target.eq(padding)
        return tuple(each.neg_().masked_fill_(padded, 0.0).sum() for each in (nll, smooth))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_nll: Tensor, of_smooth: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        padded = target.eq(ctx.padding)
        on_target, on_all = (of.neg().expand_as(target).masked_fill(padded, 0.0) for of in (of_nll, of_smooth))
        gradient = torch.empty_like(logits)
        for x, t, a, b, out in _blocks(logits, target, on_target, on_all, gradient):
            log_p = torch.log_softmax(x, -1, dtype=torch.float32)
            of_log_p = torch.zeros_like(log_p).scatter_(-1, t, a).add_(b)
            out.copy_(torch._log_softmax_backward_data(of_log_p, log_p, -1, torch.float32))
        return gradient, None, None


def _blocks(logits: Tensor, *others: Tensor) -> Any:
    rows = max(1, BLOCK * torch.get_num_threads() // logits.size(-1))
    return zip(*(each.split(rows) for each in (logits, *others)))
