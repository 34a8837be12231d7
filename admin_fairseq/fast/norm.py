"""Faster computations of :mod:`admin_fairseq.norm`'s equation.

On CPUs, :class:`_FewerPasses`: torch's own operations, each on whole tensors, but fewer of them. On GPUs, the kernels
of :mod:`admin_fairseq.fast.kernels`. Both give the eager values to rounding. Neither can be differentiated twice, nor
by torch.autograd.grad(is_grads_batched=True): the dropout mask is overwritten, which saves 2 to 10% of the time. That
needs --admin-fast off.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from admin_fairseq.fast import dropout
from admin_fairseq.fast.measured import wanted
from admin_fairseq.norm import OmegaLayerNorm

logger = logging.getLogger(__name__)

Drawn = Tuple[Optional[Tensor], float]  # a mask, of f's dtype or of few bits, and the factor of what it keeps
Fused = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, float], Tensor]

layer_norm_backward = torch.ops.aten.native_layer_norm_backward

_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)  # torch 2.1

# whether backward runs with retain_graph; torch 2.1
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class FastOmegaLayerNorm(OmegaLayerNorm):
    """The same sub-layer, computed faster where that is possible; ``mode`` is --admin-fast, "measured" or "all"."""

    mode = "measured"

    def forward(self, branch_and_shortcut: tuple[Tensor, Tensor]) -> Tensor:
        f, x = branch_and_shortcut
        p = dropout.probability(self.dropout)
        is_observed = "add" in vars(self)
        compute = None if is_observed else choose(self.mode, f, x, self.omega, self.weight, p)
        if compute is None:
            return super().forward(branch_and_shortcut)
        return compute(f, x, self.omega, self.weight, self.bias, self.eps, p)


def choose(mode: str, f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, p: float) -> Fused | None:
    """What computes LN(omega * x + dropout(f)): ``fused(f, x, omega, weight, bias, eps, p)``, or None for eager.

    Where the kernels are asked for and cannot run, a line is logged that says why, once.
    """
    if p >= 1 or _is_compiling() or torch.jit.is_tracing() or not wanted("sub-layer", x.device, mode):
        return None
    if not x.is_cuda:
        dtypes = {t.dtype for t in (f, x, omega, weight)}
        served = dtypes in ({torch.float32}, {torch.float64}) or (dtypes == {torch.bfloat16} and _bf16_with_fp32())
        if x.device.type != "cpu" or not served:
            return None
        return functools.partial(few_passes, few_bits=dropout.serves(x.device, mode))
    if torch.cuda.is_current_stream_capturing():  # a CUDA graph would replay one dropout mask
        return None
    return _kernel(x.device, (f.dtype, x.dtype, omega.dtype, weight.dtype), x.shape[-1], omega.numel(), p)


@functools.lru_cache(maxsize=None)
def _kernel(device: torch.device, dtypes: tuple[torch.dtype, ...], width: int, omegas: int, p: float) -> Fused | None:
    try:
        from admin_fairseq.fast import kernels

        if not set(dtypes) <= {torch.float32, torch.float16, torch.bfloat16}:
            raise ValueError(f"dtype {', '.join(sorted(map(str, set(dtypes))))}")
        if width > kernels.MAX_WIDTH:
            raise ValueError(f"width {width}")
        # a GPU too old, or no C compiler, shows only when something is run; training's random numbers stay its own
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            shapes = ((1, width), (1, width), (omegas,), (width,))
            f, x, omega, weight = (
                torch.zeros(shape, dtype=dtype, device=device).requires_grad_() for shape, dtype in zip(shapes, dtypes)
            )
            y = kernels.omega_layer_norm(f, x, omega, weight, weight, 1e-5, p)
            torch.autograd.grad(y.sum(), (f, x, omega, weight))
    except Exception as error:
        _say(str(error).strip().split("\n")[0] or type(error).__name__)
        return None
    return kernels.omega_layer_norm


@functools.lru_cache(maxsize=None)
def _bf16_with_fp32() -> bool:
    """Whether torch's LayerNorm takes fp32 weights for a bf16 input; torch 1.13 does not."""
    try:
        F.layer_norm(torch.zeros(1, 1, dtype=torch.bfloat16), (1,), torch.ones(1), torch.zeros(1))
    except RuntimeError:
        return False
    return True


@functools.lru_cache(maxsize=None)
def _say(reason: str) -> None:
    logger.warning(f"the fused kernels cannot run here ({reason}): sub-layers are computed eagerly")


class _FewerPasses(torch.autograd.Function):
    """The equation for tensors of one dtype on a CPU.

    Eager makes a tensor of omega * x and one of the scaled dropout mask; backward, one of ds * x to sum it up. Here
    omega * x is added to in place, the mask stays unscaled, and the sum over tokens of ds * x is what LayerNorm's
    backward returns for its weight, given mean 0 and deviation 1. In bf16 the sums over tokens are more exact than
    eager's.
    """

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, drawn: Drawn
    ) -> Tensor:
        mask, ctx.scale = drawn
        if mask is None:
            s = torch.addcmul(f, x, omega)
        elif mask.dtype == f.dtype:
            s = (x * omega).addcmul_(f, mask, value=ctx.scale)
        else:
            s = dropout.only(mask, f).mul_(ctx.scale).addcmul_(x, omega)
        ctx.eps = eps
        # fp32 weights for bf16: means and deviations are then kept in fp32, too
        wide = (t.float() if t.dtype == torch.bfloat16 else t for t in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(s, weight.shape, *wide, eps)
        ctx.save_for_backward(x, omega, weight, bias, s, mean, rstd, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, omega, weight, bias, s, mean, rstd, mask = ctx.saved_tensors
        shape, in_bf16 = weight.shape, s.dtype == torch.bfloat16
        if in_bf16:
            ds, dweight, dbias = _backward_in_bf16(dy, s, mean, rstd, weight, bias, ctx.eps)
        else:
            ds, dweight, dbias = layer_norm_backward(dy, s, shape, mean, rstd, weight, bias, [True, True, True])
        domega = None
        if ctx.needs_input_grad[2]:
            if in_bf16:
                domega = _over_tokens(ds * x)
            else:
                zero, one = torch.zeros_like(mean), torch.ones_like(rstd)
                domega = layer_norm_backward(ds, x, shape, zero, one, weight, bias, [False, True, False])[1]
            if omega.numel() == 1:
                domega = domega.sum(0, keepdim=True)
        if mask is None:
            df, dx = ds, ds * omega
        else:
            df, dx = _masked(ds, mask).mul_(ctx.scale), ds.mul_(omega)
        return df, dx, domega, dweight, dbias, None, None


def _masked(ds: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != ds.dtype:
        return dropout.only(mask, ds)
    return ds * mask if _keeps_graph() else mask.mul_(ds)


def _backward_in_bf16(
    dy: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm's three gradients, of which torch adds up the latter two in bf16.

    Over 8,192 tokens they are then 10% off, and 58% where the summands' mean is not 0.
    """
    ds = layer_norm_backward(dy, s, weight.shape, mean, rstd, weight.float(), bias.float(), [True, False, False])[0]
    normal = torch.native_layer_norm(s, weight.shape, None, None, eps)[0]
    return ds, _over_tokens(normal.mul_(dy)), _over_tokens(dy)


def _over_tokens(x: Tensor) -> Tensor:
    """The sum of (..., d) over all but d, in fp32 until it is rounded."""
    return x.flatten(0, -2).sum(0)


def few_passes(
    f: Tensor,
    x: Tensor,
    omega: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    few_bits: bool = False,
) -> Tensor:
    """LN(omega * x + dropout(f)), each element of f dropped with probability p < 1.

    Shapes: f and x (..., d); omega (d,) or (1,); weight and bias (d,). ``few_bits``: the mask is
    :mod:`admin_fairseq.fast.dropout`'s, not the one that stock draws.
    """
    if p == 0 and not torch.is_grad_enabled():
        return F.layer_norm(torch.addcmul(f, x, omega), weight.shape, weight, bias, eps)
    drawn: Drawn = None, 1.0
    if p > 0 and few_bits:
        drawn = dropout.from_few_bits(f, p)
    elif p > 0:
        drawn = torch.empty_like(f).bernoulli_(1 - p), 1 / (1 - p)  # the draws of F.dropout, from the same generator
    return _FewerPasses.apply(f, x, omega, weight, bias, eps, drawn)
