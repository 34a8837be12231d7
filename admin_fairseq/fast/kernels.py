"""The paper's equation in one Triton kernel forward and one backward, for GPUs.

    y = LN(omega * x + dropout(f))

The sum is never written to memory: backward computes it again from f and x, and the dropout mask from its seed. In
16-bit precision an element costs 6 bytes forward (f, x, y) and 10 backward (f, x, dy, df, dx). Arithmetic is in fp32
(in fp64 where the inputs are). Gradients of omega, weight and bias are summed in two stages, without atomics, so
that they are the same in every run.

Importing this module needs Triton 3; :mod:`admin_fairseq.fast.norm` says when it is used. With ``TRITON_INTERPRET=1``
in the environment the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_WIDTH = 8192  # a row stays in the registers of one program
TILE = 1024  # elements of a program's tile, 8 a thread: 16 bytes at a time in 16-bit precision, and no register spills


@triton.jit
def _kept(seed, row, col, DROP: tl.constexpr):
    """Which elements dropout keeps, (R, BLOCK): each is dropped with probability DROP / 2^31.

    Philox gives every row a 64-bit key; a hash keyed by it (two rounds of multiply and shift) takes the columns. Philox
    for each element would cost more time than memory does.
    """
    low, high, _, _ = tl.randint4x(seed, row)
    low, high = low.to(tl.uint32, bitcast=True)[:, None], high.to(tl.uint32, bitcast=True)[:, None]
    h = low + col[None, :].to(tl.uint32) * 0x9E3779B1
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15) ^ high) * 0x846CA68B
    h = h ^ (h >> 16)
    return (h >> 1).to(tl.int32) >= DROP  # 31 bits: the comparison is between positive int32


@triton.jit(do_not_specialize=["rows", "seed"])
def _forward(
    f_ptr, x_ptr, omega_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, rows, seed,
    eps: tl.constexpr, SCALE: tl.constexpr, DROP: tl.constexpr, SCALAR: tl.constexpr, COMPUTE: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]  # more than 2^31 elements
    f = tl.load(f_ptr + at, mask, 0.0).to(COMPUTE)
    x = tl.load(x_ptr + at, mask, 0.0).to(COMPUTE)
    omega = tl.load(omega_ptr + (col * 0 if SCALAR else col), col < D, 0.0).to(COMPUTE)[None, :]
    if DROP > 0:
        f = tl.where(_kept(seed, row, col, DROP), f * SCALE, 0.0)
    s = omega * x + f
    mean = tl.sum(s, 1) / D
    centred = tl.where(mask, s - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = tl.load(weight_ptr + col, col < D, 0.0).to(COMPUTE)[None, :]
    bias = tl.load(bias_ptr + col, col < D, 0.0).to(COMPUTE)[None, :]
    y = centred * rstd[:, None] * weight + bias
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(stats_ptr + row, mean, row < rows)
    tl.store(stats_ptr + rows + row, rstd, row < rows)


@triton.jit(do_not_specialize=["rows", "seed"])
def _backward(
    dy_ptr, f_ptr, x_ptr, omega_ptr, weight_ptr, stats_ptr, df_ptr, dx_ptr, sums_ptr, rows, seed,
    OMEGA: tl.constexpr, SCALE: tl.constexpr, DROP: tl.constexpr, SCALAR: tl.constexpr, COMPUTE: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)
    omega = tl.load(omega_ptr + (col * 0 if SCALAR else col), col < D, 0.0).to(COMPUTE)[None, :]
    weight = tl.load(weight_ptr + col, col < D, 0.0).to(COMPUTE)[None, :]
    dweight = tl.zeros([R, BLOCK], COMPUTE)
    dbias = tl.zeros([R, BLOCK], COMPUTE)
    domega = tl.zeros([R, BLOCK], COMPUTE)
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = tile * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        dy = tl.load(dy_ptr + at, mask, 0.0).to(COMPUTE)
        f = tl.load(f_ptr + at, mask, 0.0).to(COMPUTE)
        x = tl.load(x_ptr + at, mask, 0.0).to(COMPUTE)
        mean = tl.load(stats_ptr + row, row < rows, 0.0)[:, None]
        rstd = tl.load(stats_ptr + rows + row, row < rows, 0.0)[:, None]
        if DROP > 0:
            kept = _kept(seed, row, col, DROP)
            f = tl.where(kept, f * SCALE, 0.0)
        # outside the mask dy, weight, omega and x are 0, and so is all that is summed
        normed = (omega * x + f - mean) * rstd
        g = dy * weight
        ds = rstd * (g - tl.sum(g, 1)[:, None] / D - normed * (tl.sum(g * normed, 1)[:, None] / D))
        dweight += dy * normed
        dbias += dy
        if OMEGA:
            domega += ds * x
        tl.store(dx_ptr + at, (ds * omega).to(dx_ptr.dtype.element_ty), mask)
        if DROP > 0:
            ds = tl.where(kept, ds * SCALE, 0.0)
        tl.store(df_ptr + at, ds.to(df_ptr.dtype.element_ty), mask)
    # sums is (2 or 3, programs, D)
    at = tl.program_id(0) * D + col
    tl.store(sums_ptr + at, tl.sum(dweight, 0), col < D)
    tl.store(sums_ptr + tl.num_programs(0) * D + at, tl.sum(dbias, 0), col < D)
    if OMEGA:
        tl.store(sums_ptr + 2 * tl.num_programs(0) * D + at, tl.sum(domega, 0), col < D)


def constants(width: int, p: float, is_scalar: bool, is_double: bool) -> dict[str, Any]:
    """What the kernels are compiled for. Block sizes are powers of two; narrow rows share a program."""
    block = max(16, triton.next_power_of_2(width))
    tile_rows = max(1, TILE // block)
    return {
        "SCALE": 1 / (1 - p),
        "DROP": round(p * 2**31),
        "SCALAR": is_scalar,
        "COMPUTE": tl.float64 if is_double else tl.float32,
        "D": width,
        "BLOCK": block,
        "R": tile_rows,
        "num_warps": max(4, min(16, block * tile_rows // 256)),
    }


class _OmegaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float
    ) -> Tensor:
        f, x, omega, weight, bias = (t.contiguous() for t in (f, x, omega, weight, bias))
        width = x.shape[-1]
        rows = x.numel() // width
        dtype = torch.promote_types(torch.promote_types(x.dtype, omega.dtype), f.dtype)
        if torch.is_autocast_enabled() and dtype != torch.float64:
            dtype = torch.float32  # as autocast runs layer_norm
        is_double = dtype == torch.float64
        ctx.seed = int(torch.randint(2**62, (), device="cpu")) if p else 0  # the GPU is not waited for
        ctx.constants = constants(width, p, omega.numel() == 1, is_double)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        stats = torch.empty(2, rows, dtype=torch.float64 if is_double else torch.float32, device=x.device)
        grid = (max(1, triton.cdiv(rows, ctx.constants["R"])),)
        with torch.cuda.device_of(x):
            _forward[grid](f, x, omega, weight, bias, y, stats, rows, ctx.seed, eps=eps, **ctx.constants)
        ctx.save_for_backward(f, x, omega, weight, bias, stats)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        f, x, omega, weight, bias, stats = ctx.saved_tensors
        rows, width, tile_rows = stats.shape[1], x.shape[-1], ctx.constants["R"]
        df, dx = torch.empty_like(f), torch.empty_like(x)
        programs = max(1, min(triton.cdiv(rows, 4 * tile_rows), 4 * _processors(x.device)))
        trains_omega = ctx.needs_input_grad[2]
        sums = torch.empty(2 + trains_omega, programs, width, dtype=stats.dtype, device=x.device)
        with torch.cuda.device_of(x):
            _backward[(programs,)](
                *(dy.contiguous(), f, x, omega, weight, stats, df, dx, sums, rows, ctx.seed),
                **ctx.constants,
                OMEGA=trains_omega,
            )
        sums = sums.sum(1)
        domega = None
        if trains_omega:
            domega = (sums[2].sum(0, keepdim=True) if omega.numel() == 1 else sums[2]).to(omega.dtype)
        return df, dx, domega, sums[0].to(weight.dtype), sums[1].to(bias.dtype), None, None


@functools.lru_cache(maxsize=None)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def omega_layer_norm(f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float) -> Tensor:
    """LN(omega * x + dropout(f)) with gradients for f, x, omega, weight and bias; they cannot be differentiated again.

    Shapes: f and x (..., d) with d at most ``MAX_WIDTH``; omega (d,) or (1,); weight and bias (d,). The result has x's
    shape, and the dtype that the same operations of torch would give, under autocast too.

    Args:
        p: the probability, below 1, of dropping an element of f; 0 where dropout is off. The mask's seed is drawn from
            torch's CPU generator, which activation checkpointing restores.
    """
    return _OmegaLayerNorm.apply(f, x, omega, weight, bias, eps, p)
