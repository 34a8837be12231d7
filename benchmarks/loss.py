"""The last projection and its label-smoothed cross-entropy: stock's, ours, stock's by torch.compile, and Liger's.

    python -m benchmarks.loss --out DIR                                              # on a GPU, bf16
    python -m benchmarks.loss --device cpu --tokens 64 --words 1000 --out DIR        # does it run?

From the decoder's features to loss and gradients of features and weight, forward and backward, all in turns, round
after round. Memory is the peak above what inputs and gradients need. Liger's (pip install liger-kernel) makes no matrix
of [tokens x words] at all; it needs a GPU and is left out where it is not installed. Its smoothing counts the target
among the words that share epsilon, so epsilon V / (V - 1) is fairseq's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch import Tensor

from admin_fairseq import AdminError
from admin_fairseq.fast.loss import label_smoothed
from admin_fairseq.files import as_csv
from benchmarks.common import DTYPES, command_line, versions_and_hardware, write
from benchmarks.tables import of_rows

Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # features, weight, target: the loss, summed over tokens
EPSILON = 0.1
PADDING = 1


def stock(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_p = F.log_softmax(F.linear(features, weight), -1, dtype=torch.float32)
    return label_smoothed_nll_loss(log_p, target, EPSILON, PADDING)[0]


def ours(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return label_smoothed(F.linear(features, weight), target, EPSILON, PADDING)[0]


def ligers() -> Way:
    """Raises ImportError without it."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    def loss(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        epsilon = EPSILON * weight.size(0) / (weight.size(0) - 1)
        return Function.apply(features, weight, target, None, None, PADDING, 0.0, epsilon, "sum")[0]

    return loss


def measure(way: Way, inputs: list[Tensor], on_gpu: bool) -> tuple[dict[str, float], list[Tensor]]:
    """Milliseconds and megabytes of one pass, and what came out: the loss and both gradients."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    loss = way(*inputs)
    gradients = torch.autograd.grad(loss, inputs[:2])
    if on_gpu:
        torch.cuda.synchronize()
    row = {"ms": (time.perf_counter() - started) * 1e3}
    if on_gpu:
        kept = sum(g.numel() * g.element_size() for g in gradients)
        row["MB"] = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    return row, [loss.detach(), *gradients]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], help="%(default)s")
    parser.add_argument("--words", type=int, nargs="+", default=[10000, 32768], help="%(default)s")
    parser.add_argument("--width", type=int, default=512, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="%(default)s")
    parser.add_argument("--out", type=Path, help="folder for loss.csv and loss.md")
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise AdminError("torch sees no GPU here; --device cpu runs on the CPU")
    ways = {"stock": stock, "ours": ours, "torch.compile": torch.compile(stock, dynamic=False)}
    try:
        ways["Liger"] = ligers()
    except ImportError as error:
        print(f"without Liger: {error}", flush=True)
    rows = []
    for words, tokens in itertools.product(args.words, args.tokens):
        torch._dynamo.reset()
        features, weight = torch.randn(tokens, args.width), torch.randn(words, args.width) * args.width**-0.5
        inputs = [t.to(args.device, DTYPES[args.dtype]).requires_grad_() for t in (features, weight)]
        inputs.append(torch.randint(PADDING, words, (tokens,), device=args.device))
        found: dict[str, list[dict[str, float]]] = {}
        values: dict[str, list[Tensor]] = {}
        for number, way in itertools.product(range(args.rounds + 2), list(ways)):
            try:
                figures, values[way] = measure(ways[way], inputs, on_gpu)
            except Exception as error:  # of a compiler: the others are measured all the same
                print(f"{way} cannot run here: {type(error).__name__}: {str(error)[-300:]}", flush=True)
                del ways[way]
                continue
            if number > 1:  # the first compiles, the second warms up
                found.setdefault(way, []).append(figures)
        exact = [t.detach().float() for t in inputs[:2]]
        exact = measure(stock, [*(t.requires_grad_() for t in exact), inputs[2]], on_gpu)[1]
        for way in ways:
            each = {key: statistics.median(one[key] for one in found[way]) for key in found[way][0]}
            row = {"words": words, "tokens": tokens, "computed": way, "ms": f"{each['ms']:.2f}"}
            row["of stock"] = f"{statistics.median(a['ms'] / b['ms'] for a, b in zip(found[way], found['stock'])):.2f}"
            row["MB"] = f"{each['MB']:.0f}" if on_gpu else ""
            for name, got, wanted in zip(("loss", "features", "weight"), values[way], exact):
                row[f"error, {name}"] = f"{(got.float() - wanted).norm() / wanted.norm():.1e}"
            rows.append(row)
        table = of_rows(rows)
        where = versions_and_hardware(not on_gpu, 1, torch.get_num_threads())
        text = f"# Projection and label-smoothed cross-entropy\n\n    {command_line('loss')}\n\n{table}\n\n{where}\n"
        if args.out:
            write(args.out / "loss.md", text)
            write(args.out / "loss.csv", as_csv(rows))
    print(text)


if __name__ == "__main__":
    main()
