"""The sub-layer's LN(omega * x + dropout(f)): eager, by torch.compile, fused, and stock's LN(x + dropout(f)).

    python -m benchmarks.kernel --out DIR                               # on a GPU: share of the copy bandwidth
    python -m benchmarks.kernel --device cpu --threads 1 --out DIR      # on a CPU: time relative to stock
    python -m benchmarks.kernel --device interpreter --tokens 64        # what runs on a GPU, where there is none

All run in turns, round after round, so that what else the machine does meets all of them alike. On a GPU a copy of
1 GiB is timed first, then forward and backward each: the GPU's own time (the queue is filled before it starts, the
inputs are no longer in its cache) and the time as called, gaps between launches included. The bytes counted are those
that nothing can avoid: f, x, y forward; dy, f, x, df, dx backward. A row is written as soon as it is known. If the
kernel is faster in every row, add the GPU's name to "sub-layer" in the table of admin_fairseq/fast/measured.py.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import torch
import torch.nn.functional as F
from torch import Tensor

from admin_fairseq import AdminError
from admin_fairseq.fast import norm as fast_norm
from admin_fairseq.files import as_csv
from benchmarks.common import DTYPES, command_line, write
from benchmarks.tables import of_rows

Calls = List[Callable[[], object]]
Row = Dict[str, object]


def stock(f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float) -> Tensor:
    return F.layer_norm(x + F.dropout(f, p), weight.shape, weight, bias, eps)


def eager(f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float) -> Tensor:
    return F.layer_norm(x * omega + F.dropout(f, p), weight.shape, weight, bias, eps)


def inputs(tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """(f, x, omega, weight, bias), dy."""
    f, x, dy = torch.randn(3, tokens, width, device=device).to(dtype)
    vectors = (1 + 0.1 * torch.randn(3, width, device=device)).to(dtype)
    return [t.clone().requires_grad_() for t in (f, x, *vectors)], dy.clone()


def gpu_seconds(calls: Calls, waiting: bool) -> float:
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


def interpreter_seconds(calls: Calls, waiting: bool) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) / len(calls)


def copy_bandwidth(device: str, seconds: Callable[[Calls, bool], float]) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)] * 5
    seconds(calls, True)
    return 2 * source.numel() * 4 / statistics.median(seconds(calls, True) for _ in range(7))


def fused(args: argparse.Namespace) -> fast_norm.Fused:
    """Our kernels.

    Raises:
        AdminError: they cannot run here; the log says why.
    """
    x = torch.empty(1, 512, device="cuda", dtype=DTYPES[args.dtype])
    kernel = fast_norm.choose("all", x, x, x[0], x[0], args.dropout)
    if kernel is None:
        raise AdminError("the fused kernels cannot run here; the line above says why")
    return kernel


def interpreted() -> fast_norm.Fused:
    """The same in Triton's interpreter; eager where that fails, as Triton 3.6's does with numpy 2.5."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which kernels does
    from admin_fairseq.fast import kernels

    tensors, dy = inputs(2, 16, torch.float32, "cpu")
    try:
        kernels.omega_layer_norm(*tensors, 1e-5, 0.1).backward(dy)
    except Exception as error:
        print(f"skipped, eager in its place: the kernels in Triton's interpreter ({error})", flush=True)
        return eager
    return kernels.omega_layer_norm


def passes(compute: fast_norm.Fused, sets: list[tuple[list[Tensor], Tensor]], p: float) -> dict[str, Calls]:
    """Forward and backward of each set of inputs."""
    forward, backward = [], []
    for tensors, dy in sets:
        forward.append(lambda tensors=tensors: compute(*tensors, 1e-5, p))
        y, wanted = forward[-1](), tensors[:2] + tensors[2 if compute is not stock else 3 :]
        backward.append(lambda y=y, wanted=wanted, dy=dy: torch.autograd.grad(y, wanted, dy, retain_graph=True))
    return {"forward": forward, "backward": backward}


def keep_buffers() -> None:
    """Let a compiled backward pass run again and again; torch 2.6 and newer would reuse its buffers in the first."""
    from torch._functorch import config  # torch 2

    if hasattr(config, "donated_buffer"):
        config.donated_buffer = False


def time_as_on_gpu(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of each width and number of tokens."""
    on_gpu = args.device == "cuda"
    device, seconds_of = ("cuda", gpu_seconds) if on_gpu else ("cpu", interpreter_seconds)
    ways = {"stock": stock, "eager": eager, "fused": fused(args) if on_gpu else interpreted()}
    reference = copy_bandwidth(device, seconds_of)
    print(f"copy: {reference / 1e9:.0f} GB/s", flush=True)
    for width, tokens in itertools.product(args.widths, args.tokens):
        size = tokens * width * torch.empty(0, dtype=DTYPES[args.dtype]).element_size()
        count = max(3, 2**28 // (3 * size)) if on_gpu else 3  # more than a GPU's cache holds
        sets = [inputs(tokens, width, DTYPES[args.dtype], device) for _ in range(count)]
        calls = {way: passes(compute, sets, args.dropout) for way, compute in ways.items()}
        try:
            torch._dynamo.reset()  # each size is compiled for itself; from the ninth on it would be computed eagerly
            keep_buffers()
            compiled = passes(torch.compile(eager, dynamic=False), sets, args.dropout)
            compiled["backward"][0]()
            calls["torch.compile"] = compiled
        except Exception as error:
            print(f"torch.compile cannot run here: {type(error).__name__}: {str(error)[-300:]}", flush=True)
        timed = [(way, which, queued) for way in calls for which in calls[way] for queued in (True, False)]
        seconds: dict[tuple[str, str, bool], list[float]] = {key: [] for key in timed}
        for number in range(args.rounds + 1):
            for way, which, queued in timed:
                took = seconds_of(calls[way][which], queued)
                if number:  # the first round compiles and warms up
                    seconds[way, which, queued].append(took)
        rows = []
        for way, which in itertools.product(calls, ("forward", "backward")):
            best, called = (statistics.median(seconds[way, which, queued]) for queued in (True, False))
            speed = (3 if which == "forward" else 5) * size / best
            row: Row = {"width": width, "tokens": tokens, "pass": which, "computed": way}
            row.update({"us": round(best * 1e6, 1), "us as called": round(called * 1e6, 1)})
            rows.append({**row, "GB/s": round(speed / 1e9), "of copy": f"{speed / reference:.0%}"})
        yield rows


def time_on_cpu(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    ways = {"stock": stock, "eager": eager, "fused": fast_norm.few_passes}
    for width, tokens in itertools.product(args.widths, args.tokens):
        tensors, dy = inputs(tokens, width, torch.float32, "cpu")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(args.rounds + 1):
            for way, compute in ways.items():
                started = time.perf_counter()
                wanted = tensors[:2] + tensors[2 if way != "stock" else 3 :]
                torch.autograd.grad(compute(*tensors, 1e-5, args.dropout), wanted, dy)
                if number:
                    seconds[way].append(time.perf_counter() - started)
        rows = []
        for way, own in seconds.items():
            ratios = map(operator.truediv, own, seconds["stock"])
            row: Row = {"width": width, "tokens": tokens, "computed": way, "ms, fastest": round(min(own) * 1e3, 2)}
            row["of stock, fastest"] = f"{min(own) / min(seconds['stock']):.2f}"
            row["of stock, median of rounds"] = f"{statistics.median(ratios):.2f}"
            rows.append(row)
        yield rows


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
    parser.add_argument("--device", choices=["cuda", "cpu", "interpreter"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="on a GPU and interpreted; fp32 on a CPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 4096 to 65536 on a GPU, 1024 4096 on a CPU")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, help="folder for kernel.csv and kernel.md")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise AdminError("torch sees no GPU here; --device cpu measures the CPU's computation")
    args.tokens = args.tokens or ([1024, 4096] if args.device != "cuda" else [2**n for n in range(12, 17)])
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for measured in (time_on_cpu if args.device == "cpu" else time_as_on_gpu)(args):
        rows += measured
        table = of_rows(rows)
        if args.out:
            text = f"# LN(omega * x + dropout(f))\n\n    {command_line('kernel')}\n\n{table}\n\n{versions(args)}\n"
            write(args.out / "kernel.md", text)
            write(args.out / "kernel.csv", as_csv(rows))
    print(f"{table}\n\n{versions(args)}")


if __name__ == "__main__":
    main()
