"""The sub-layer's LN(omega * x + dropout(f)): eager, fused, and stock's LN(x + dropout(f)), side by side.

    python -m benchmarks.kernel --out DIR                               # on a GPU: share of the copy bandwidth
    python -m benchmarks.kernel --device cpu --threads 1 --out DIR      # on a CPU: time relative to stock

All run in turns, round after round, so that what else the machine does meets all of them alike. On a GPU a copy of
1 GiB is timed first, then forward and backward each: the GPU's own time (the queue is filled before it starts, the
inputs are no longer in its cache) and the time as called, gaps between launches included. The bytes counted are those
that nothing can avoid: f, x, y forward; dy, f, x, df, dx backward. If the kernel is faster in every row, add the GPU's
name to "sub-layer" in the table of admin_fairseq/fast/measured.py.
"""

from __future__ import annotations

import argparse
import operator
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from admin_fairseq import AdminError
from admin_fairseq.fast import norm as fast_norm
from admin_fairseq.files import as_csv
from benchmarks.common import command_line, write
from benchmarks.tables import markdown

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stock(f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float) -> Tensor:
    return F.layer_norm(x + F.dropout(f, p), weight.shape, weight, bias, eps)


def eager(f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float) -> Tensor:
    return F.layer_norm(x * omega + F.dropout(f, p), weight.shape, weight, bias, eps)


def inputs(tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """(f, x, omega, weight, bias), dy."""
    f, x, dy = torch.randn(3, tokens, width, device=device).to(dtype)
    vectors = (1 + 0.1 * torch.randn(3, width, device=device)).to(dtype)
    return [t.clone().requires_grad_() for t in (f, x, *vectors)], dy.clone()


def gpu_seconds(calls: list[Callable[[], object]], waiting: bool) -> float:
    """Seconds of each of these calls on average; ``waiting``: the queue is filled before the GPU starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if waiting:
        torch.cuda._sleep(20_000_000 + 500_000 * len(calls))  # clock cycles: 10 ms, and 0.25 ms a call
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / len(calls)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)] * 5
    gpu_seconds(calls, True)
    return 2 * source.numel() * 4 / statistics.median(gpu_seconds(calls, True) for _ in range(7))


def time_on_gpu(args: argparse.Namespace) -> list[dict[str, object]]:
    reference, rows = copy_bandwidth(), []
    print(f"copy: {reference / 1e9:.0f} GB/s")
    x = torch.empty(1, 512, device="cuda", dtype=DTYPES[args.dtype])
    kernel = fast_norm.choose("all", x, x, x[0], x[0], args.dropout)
    if kernel is None:
        raise AdminError("the fused kernels cannot run here; the line above says why")
    ways = {"stock": stock, "eager": eager, "fused": kernel}
    for width in args.widths:
        for tokens in args.tokens:
            size = tokens * width * x.element_size()
            sets = [inputs(tokens, width, DTYPES[args.dtype], "cuda") for _ in range(max(3, 2**28 // (3 * size)))]
            calls: dict[tuple[str, str], list[Callable[[], object]]] = {}
            for way, compute in ways.items():
                forward, backward = [], []
                for tensors, dy in sets:
                    forward.append(lambda compute=compute, tensors=tensors: compute(*tensors, 1e-5, args.dropout))
                    y, wanted = forward[-1](), tensors[:2] + tensors[2 if way != "stock" else 3 :]
                    backward.append(
                        lambda y=y, wanted=wanted, dy=dy: torch.autograd.grad(y, wanted, dy, retain_graph=True)
                    )
                calls[way, "forward"], calls[way, "backward"] = forward, backward
            seconds: dict[tuple[str, str, bool], list[float]] = {}
            for number in range(args.rounds + 1):
                for (way, which), functions in calls.items():
                    for waiting in (True, False):
                        took = gpu_seconds(functions, waiting)
                        if number:  # the first round compiles and warms up
                            seconds.setdefault((way, which, waiting), []).append(took)
            for way, which in calls:
                best, called = (statistics.median(seconds[way, which, waiting]) for waiting in (True, False))
                speed = (3 if which == "forward" else 5) * size / best
                rows.append(
                    {
                        "width": width,
                        "tokens": tokens,
                        "pass": which,
                        "computed": way,
                        "us": round(best * 1e6, 1),
                        "us as called": round(called * 1e6, 1),
                        "GB/s": round(speed / 1e9),
                        "of copy": f"{speed / reference:.0%}",
                    }
                )
    return rows


def time_on_cpu(args: argparse.Namespace) -> list[dict[str, object]]:
    torch.set_num_threads(args.threads)
    ways, rows = {"stock": stock, "eager": eager, "fused": fast_norm.few_passes}, []
    for width in args.widths:
        for tokens in args.tokens:
            tensors, dy = inputs(tokens, width, torch.float32, "cpu")
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(args.rounds + 1):
                for way, compute in ways.items():
                    started = time.perf_counter()
                    wanted = tensors[:2] + tensors[2 if way != "stock" else 3 :]
                    torch.autograd.grad(compute(*tensors, 1e-5, args.dropout), wanted, dy)
                    if number:
                        seconds[way].append(time.perf_counter() - started)
            for way, own in seconds.items():
                ratios = map(operator.truediv, own, seconds["stock"])
                rows.append(
                    {
                        "width": width,
                        "tokens": tokens,
                        "computed": way,
                        "ms, fastest": round(min(own) * 1e3, 2),
                        "of stock, fastest": f"{min(own) / min(seconds['stock']):.2f}",
                        "of stock, median of rounds": f"{statistics.median(ratios):.2f}",
                    }
                )
    return rows


def versions(args: argparse.Namespace) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    load = "" if args.device == "cuda" else f", load {os.getloadavg()[0]:.1f}"
    return f"{machine}{load}; Python {platform.python_version()}, torch {torch.__version__}, triton {triton}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="on a GPU; fp32 on a CPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 4096 to 65536 on a GPU, 1024 4096 on a CPU")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, help="folder for kernel.csv and kernel.md")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise AdminError("torch sees no GPU here; --device cpu measures the CPU's computation")
    args.tokens = args.tokens or ([1024, 4096] if args.device == "cpu" else [2**n for n in range(12, 17)])
    rows = time_on_gpu(args) if args.device == "cuda" else time_on_cpu(args)
    table = markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)])
    print(f"{table}\n\n{versions(args)}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = f"# LN(omega * x + dropout(f))\n\n    {command_line('kernel')}\n\n{table}\n\n{versions(args)}\n"
        write(args.out / "kernel.md", text)
        write(args.out / "kernel.csv", as_csv(rows))


if __name__ == "__main__":
    main()
