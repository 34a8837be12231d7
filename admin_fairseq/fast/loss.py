"""fairseq's label-smoothed cross-entropy in fewer passes over memory.

fairseq makes some ten passes over matrices of [tokens x vocabulary] in fp32, and holds three of them at once. Here the
backward pass computes the log-probabilities again instead of keeping them. On CPUs the same operations run on a block
of rows that stays in the cache, and loss and gradient are fairseq's to the bit in fp32. On GPUs torch.compile fuses
them, and the values are fairseq's to rounding.
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
    if not reduce or getattr(model.decoder, "adaptive_softmax", None) is not None:
        return type(criterion).compute_loss(criterion, model, net_output, sample, reduce=reduce)
    start = criterion.ignore_prefix_size
    logits, target = net_output[0][:, start:], model.get_targets(sample, net_output)[:, start:]
    return label_smoothed(logits.reshape(-1, logits.size(-1)), target.reshape(-1), criterion.eps, criterion.padding_idx)


def label_smoothed(logits: Tensor, target: Tensor, epsilon: float, padding: int) -> tuple[Tensor, Tensor]:
    """(loss, negative log-likelihood), each summed over the rows that are not padding.

    ``logits`` is (tokens, vocabulary), ``target`` (tokens,).
    """
    nll, smooth = _Sums.apply(logits, target[:, None], padding)
    rest = epsilon / (logits.size(-1) - 1)
    return (1.0 - epsilon - rest) * nll + rest * smooth, nll


class _Sums(torch.autograd.Function):
    """Sums over the rows that are not padding of -log p(target), and of -log p(word) over all words.

    ``logits`` is (tokens, vocabulary), ``target`` (tokens, 1).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        compute = choose(logits)[0]
        nll, smooth = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
        for x, t, n, s in _blocks(logits.detach(), target, nll, smooth):
            compute(x, t, n, s)
        ctx.save_for_backward(logits, target)
        ctx.padding = padding
        padded = target.eq(padding)
        return tuple(each.neg_().masked_fill_(padded, 0.0).sum() for each in (nll, smooth))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_nll: Tensor, of_smooth: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        compute = choose(logits)[1]
        padded = target.eq(ctx.padding)
        on_target, on_all = (of.neg().expand_as(target).masked_fill(padded, 0.0) for of in (of_nll, of_smooth))
        gradient = torch.empty_like(logits)
        for x, t, a, b, out in _blocks(logits.detach(), target, on_target, on_all, gradient):
            compute(x, t, a, b, out)
        return gradient, None, None


def _sums(x: Tensor, target: Tensor, nll: Tensor, smooth: Tensor) -> None:
    log_p = torch.log_softmax(x, -1, dtype=torch.float32)
    nll.copy_(log_p.gather(-1, target))
    smooth.copy_(log_p.sum(-1, keepdim=True))


def _gradient(x: Tensor, target: Tensor, of_nll: Tensor, of_smooth: Tensor, out: Tensor) -> None:
    log_p = torch.log_softmax(x, -1, dtype=torch.float32)
    of_log_p = torch.zeros_like(log_p).scatter_(-1, target, of_nll).add_(of_smooth)
    out.copy_(torch._log_softmax_backward_data(of_log_p, log_p, -1, torch.float32))


def choose(logits: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """What computes a block's sums, and its gradient."""
    if logits.device.type == "cpu" or len(logits) < 2:
        return _sums, _gradient
    return _compiled(logits.device, logits.dtype, logits.size(-1))


@functools.lru_cache(maxsize=None)
def _compiled(
    device: torch.device, dtype: torch.dtype, vocabulary: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Both compiled, for any number of rows from two, and tried; where that fails, as they are."""
    try:
        sums, gradient = torch.compile(_sums), torch.compile(_gradient)
        with torch.inference_mode(False), torch.no_grad():
            x, out = (torch.zeros(2, vocabulary, device=device, dtype=dtype) for _ in range(2))
            a, b = (torch.zeros(2, 1, device=device) for _ in range(2))
            target = torch.zeros(2, 1, device=device, dtype=torch.long)
            for tensor in (x, out, a, b, target):
                torch._dynamo.mark_dynamic(tensor, 0)
            sums(x, target, a, b)
            gradient(x, target, a, b, out)
    except torch.cuda.OutOfMemoryError:
        raise  # fairseq leaves the batch out, and the next one tries again
    except Exception as error:  # no compiler, a torch without it: whatever it is
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        logger.warning(f"the loss cannot be compiled here ({reason}): it takes more memory and time")
        return _sums, _gradient
    return sums, gradient


def _blocks(logits: Tensor, *others: Tensor) -> Any:
    on_cpu = logits.device.type == "cpu"
    rows = BLOCK * torch.get_num_threads() // logits.size(-1) if on_cpu else len(logits)
    return zip(*(each.split(max(1, rows)) for each in (logits, *others)))
