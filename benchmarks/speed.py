"""Step time, memory and generation speed of Admin beside stock fairseq at the same depth.

    python -m benchmarks.speed --depths 6-6,18-18,60-12 --out DIR              # on the CPU, synthetic data
    python -m benchmarks.speed DATA-BIN --device cuda --dtype bf16 --max-tokens 8192 --out DIR
    python -m benchmarks.speed --gpu-report --out DIR                          # the best batches of a GPU
    python -m benchmarks.speed --features --depths 18-18 --device cuda --dtype bf16 --max-tokens 16384 --out DIR

Every update goes through fairseq's Trainer.train_step, as in fairseq-train. The methods of a depth take turns in one
process, one update each per round, so that whatever else the machine does affects all of them; the ratio is the median
of the rounds' ratios to the first method, and its range the middle half of them. "Optimizer" is all of a step that is
neither forward nor backward pass: gradient norm and clipping, the update, logging. Peak memory is that of a fresh
process with one model. The pre-pass is compared with training forward passes of the same model on the same batch.
Generation is beam search to a fixed length with the models as they are. FLOPs are the model's own (three times those of
the forward pass's matrix products, without padding), their rate is a share of that of a large matrix product measured
beside it. On a CPU one more update is profiled: the shares of its time by kind of operation.

A method is METHOD[:FEATURES][/DTYPE]: "postln,admin:all/bf16" has stock beside Admin with every faster computation and
in bf16, on the same batches. lm_METHOD is a language model, whose depth is the second number. The settings of a recipe:

    python -m benchmarks.speed DATA-BIN --methods postln,admin,admin:all,admin:all/bf16 --max-tokens 2048 --out DIR -- \
        --dropout 0.1 --attention-dropout 0.1 --activation-dropout 0.1

The defaults take about 12 minutes on two quiet cores and 16 GB; fewer --rounds or --depths take less. Where three
models do not fit, --one-at-a-time gives each its own process, round after round. DIR gets speed.csv, speed.png and
record.md. What follows -- goes to fairseq-train, the same for all methods.

--gpu-report searches the largest --max-tokens (doubled until memory runs out or the batch stops growing) and the
fastest of them, at 60-12 and 100-100 or --depths: stock in fp16, Admin in bf16, and so on. What is fastest takes the
least for an epoch, its updates by the mean of the rounds, since a batch twice as large has not twice the words that are
not padding; the tokens ratio is that of stock's fastest batch by it. A line that fails is named in the table and does
not end the others.

--features has Admin with each faster computation by itself in the place of --methods: what the table in
admin_fairseq/fast/measured.py is set by.

benchmarks/gpu.sh runs all this and benchmarks.kernel within ten minutes of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator

import numpy as np
import torch
from fairseq.data import Dictionary, indexed_dataset

from admin_fairseq.architectures import METHODS
from admin_fairseq.errors import AdminError
from admin_fairseq.fast.measured import MEASURED
from admin_fairseq.files import as_csv
from benchmarks.common import (
    child_environment,
    comma_separated,
    command_line,
    depths,
    split_options,
    versions_and_hardware,
    write,
)
from benchmarks.figures import against_depth
from benchmarks.tables import markdown
from benchmarks.worker import SHARES, Answer, Setting, Variant

Row = Dict[str, Any]  # of the table
Worker = Callable[[Setting], Answer]


class Process:
    """A worker in a process of its own, a fresh one unless nothing but batches differs from the setting before."""

    def __init__(self) -> None:
        self.models: Setting | None = None
        self.running: subprocess.Popen[str] | None = None
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as this object is there)

    def __call__(self, setting: Setting) -> Answer:
        """The worker's answer.

        Raises:
            AdminError: it failed; its last lines are printed.
        """
        models = {key: value for key, value in setting.items() if key not in ("max_tokens", "rounds")}
        if self.running is None or models != self.models:
            self.close()
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            self.running, self.models = subprocess.Popen(command, env=child_environment(), text=True, **pipes), models
        with contextlib.suppress(BrokenPipeError):  # it has died, and why is said below
            print(json.dumps(setting), file=self.running.stdin, flush=True)
        answer = self.running.stdout.readline()
        if answer:
            return json.loads(answer)
        self.errors.seek(0)
        lines, code = self.errors.read().splitlines()[-20:], self.running.wait()
        self.close()
        say("\n".join(lines))
        what = f"{', '.join(setting['methods'])} {setting['depth']}"
        raise AdminError(f"measuring {what} failed ({code}): {''.join(lines[-1:])}")

    def close(self) -> None:
        if self.running is not None:
            with contextlib.suppress(BrokenPipeError):
                self.running.stdin.close()
            self.running.stdout.close()
            self.running.wait()
        self.running = None
        self.errors.seek(0)
        self.errors.truncate()


# --- methods beside each other at each depth --------------------------------------------------------------------------


def features(device: str, generates: bool) -> list[str]:
    """Those that are to be measured, each by itself. On a GPU dropout is as it was."""
    idle = {"dropout": device == "cuda", "beams": not generates}
    names = [name.replace("one", "attention+one") for name in MEASURED if not idle.get(name)]
    return ["off", *names, "all"]


def write_synthetic(folder: Path, vocabulary: int, pairs: int, seed: int = 1) -> str:
    """A data-bin of random sentences of 5 to 60 words; words are as frequent as 1 / rank.

    The first side is a language model's data, too.
    """
    random = np.random.RandomState(seed)
    dictionary = Dictionary()
    for i in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{i}", pairs)
    weights = 1 / np.arange(1, vocabulary - dictionary.nspecial + 1)
    lengths = np.clip(random.lognormal(3.1, 0.5, (pairs, 2)), 5, 60).astype(int)
    for side, language in enumerate(("de", "en")):
        dictionary.save(str(folder / f"dict.{language}.txt"))
        prefix = str(folder / f"train.de-en.{language}")
        builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
        words = random.choice(len(weights), lengths[:, side].sum(), p=weights / weights.sum()) + dictionary.nspecial
        for sentence in np.split(words, np.cumsum(lengths[:-1, side])):
            builder.add_item(torch.from_numpy(np.append(sentence, dictionary.eos())))
        builder.finalize(f"{prefix}.idx")
    (folder / "dict.txt").symlink_to(folder / "dict.de.txt")
    for ending in ("bin", "idx"):
        (folder / f"train.{ending}").symlink_to(folder / f"train.de-en.de.{ending}")
    return str(folder)


def within_memory(worker: Worker, setting: Setting) -> Answer:
    """The worker's answer.

    Raises:
        AdminError: it failed, or ran out of memory.
    """
    answer = worker(setting)
    if "out of memory" in answer:
        raise AdminError("out of memory")
    return answer


def depth_report(args: Namespace, folder: str, data: str, worker: Worker) -> Iterator[list[Row]]:
    """For each depth and batch size that can be measured, one row of the table per method."""
    for depth in args.depths:
        for tokens in args.max_tokens:
            base = {"depth": depth, "max_tokens": tokens, "rounds": args.rounds, "methods": args.methods}
            base.update({"data": data, "folder": folder, "device": args.device, "dtype": args.dtype})
            base.update({"threads": args.threads, "extra": args.extra, "prepass": not args.features, "matmul": True})
            base.update({"generate": tokens == args.max_tokens[0] and not args.no_generate, "length": args.length})
            base.update({"beam": args.beam})
            alone = {**base, "rounds": 1, "prepass": False, "generate": False, "matmul": args.one_at_a_time}
            each: list[Answer] = []
            try:
                if args.one_at_a_time:
                    for number in range(args.rounds):
                        last = {"prepass": number == args.rounds - 1, "generate": number == 0 and base["generate"]}
                        each += [
                            within_memory(worker, {**alone, **last, "methods": [method]}) for method in args.methods
                        ]
                    answer = merged(each)
                else:
                    answer = within_memory(worker, base)
                    if not args.no_memory:
                        each = [within_memory(worker, {**alone, "methods": [method]}) for method in args.methods]
            except AdminError as error:
                say(f"{depth}, --max-tokens {tokens}: {error}")
                continue
            memory = {next(iter(one["rounds"])): one["memory_mb"] for one in each}
            say(f"{depth}, --max-tokens {tokens}: done")
            yield rows(answer, memory, base)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def merged(answers: Iterable[Answer]) -> Answer:
    """Several workers' answers as if one had given them."""
    whole: Answer = {key: {} for key in ("rounds", "parameters", "prepass", "generation", "matmul", "parts")}
    for answer in answers:
        for method, found in answer["rounds"].items():
            whole["rounds"].setdefault(method, []).extend(found)
        for key in ("parameters", "prepass", "generation", "parts"):
            whole[key].update(answer[key])
        for method, rate in answer["matmul"].items():
            whole["matmul"][method] = max(rate, whole["matmul"].get(method, 0.0))
    return whole


def rows(answer: Answer, memory: dict[str, float], setting: Setting) -> list[Row]:
    """Medians and ratios of what a worker answered, one row per method."""
    found, encoder, decoder = answer["rounds"], *map(int, setting["depth"].split("-"))
    stock = next(iter(found))
    result = []
    for method, each in found.items():
        row: Row = {"depth": setting["depth"], "layers": encoder + decoder, "sub_layers": 2 * encoder + 3 * decoder}
        dtype = Variant.of(method, setting).dtype
        row.update({"max_tokens": setting["max_tokens"], "method": method, "dtype": dtype})
        row["parameters"] = answer["parameters"][method]
        for part in ("forward", "backward", "optimizer", "step"):
            row[f"{part}_s"] = statistics.median(one[part] for one in each)
            low, middle, high = quartiles([a[part] / b[part] for a, b in zip(each, found[stock])])
            row[f"{part}_ratio"] = middle
            if part == "step":
                row["ratio_low"], row["ratio_high"] = low, high
        row["tokens_per_s"] = statistics.median(one["tokens"] / one["step"] for one in each)
        row["flops_share"] = statistics.median(one["flops"] / one["step"] for one in each) / answer["matmul"][method]
        row.update(answer["parts"].get(method, {}))
        row["memory_mb"] = memory.get(method)
        if row["memory_mb"] and memory.get(stock):
            row["memory_ratio"] = row["memory_mb"] / memory[stock]
        if answer["prepass"].get(method):
            row["prepass_forwards"] = statistics.median(answer["prepass"][method])
        if answer["generation"].get(method):
            seconds, reference = answer["generation"][method], answer["generation"][stock]
            row["generation_s"] = statistics.median(seconds)
            low, middle, high = quartiles([a / b for a, b in zip(seconds, reference)])
            row.update(generation_low=low, generation_ratio=middle, generation_high=high)
        result.append(row)
    return result


def quartiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


# --- the report of a GPU ----------------------------------------------------------------------------------------------

PLAN = (  # method, precision, further options, of each depth; the stock line first, and then the most telling
    ("postln", "fp16", []),
    ("admin", "bf16", ["--admin-fast", "all"]),
    ("admin", "bf16", ["--admin-fast", "off"]),
    ("postln", "bf16", []),
    ("admin", "bf16", ["--checkpoint-activations", "--admin-fast", "all"]),
)


def search(attempt: Callable[[int], Answer], start: int, limit: int = 2**20) -> str:
    """Try ``start`` tokens, twice as many and so on, and say what ended it: the first that fails or is no larger.

    Data may be smaller than a batch could be.
    """
    tokens, before = start, 0
    while tokens <= limit:
        try:
            answer = attempt(tokens)
        except AdminError as error:
            return f"{tokens}: {error}"
        size = sum(one["tokens"] for each in answer["rounds"].values() for one in each)
        if size <= before:
            return f"{tokens}: no larger batch in the data"
        tokens, before = 2 * tokens, size
    return f"{tokens}: not tried"


def as_text(row: Row) -> str:
    share = f"{row['flops_share']:.0%} of the matrix product's rate"
    speed = f"{row['epoch_s']:.0f} s an epoch, {row['tokens_per_s']:.0f} tokens a second"
    return f"{speed}, {share}, {row['memory_mb']:.0f} MB"


def gpu_report(args: Namespace, folder: str, data: str, worker: Worker) -> Iterator[list[Row]]:
    """The best batch of every line of ``PLAN``, and the largest; without figures where none fitted."""
    stock: dict[str, float] = {}
    for depth, (method, dtype, extra) in itertools.product(args.depths, PLAN[:2] if args.rehearse else PLAN):
        dtype = "fp32" if args.rehearse else dtype
        setting = {"depth": depth, "methods": [method], "dtype": dtype, "extra": [*args.extra, *extra], "data": data}
        setting.update({"rounds": args.rounds, "folder": folder, "device": args.device, "threads": args.threads})
        setting.update({"generate": False, "matmul": True, "beam": args.beam, "length": args.length, "prepass": False})
        name, lines = " ".join([method, depth, dtype, *extra]), []

        def attempt(tokens: int, setting: Setting = setting, name: str = name, lines: list[Row] = lines) -> Answer:
            own = {**setting, "max_tokens": tokens}
            answer = within_memory(worker, own)
            lines += rows(answer, dict.fromkeys(setting["methods"], answer["memory_mb"]), own)
            seconds = statistics.fmean(one["step"] for one in answer["rounds"][setting["methods"][0]])
            lines[-1]["epoch_s"] = answer["updates_an_epoch"] * seconds
            say(f"{name}, --max-tokens {tokens}: {as_text(lines[-1])}")
            return answer

        end = search(attempt, args.max_tokens[0])
        best: Row = {"depth": depth, "method": method, "dtype": dtype}
        if lines:
            best = min(lines, key=lambda row: row["epoch_s"])
            largest = lines[-1]
            per_token = None
            if len(lines) > 1:  # between two batch sizes parameters and optimizer cancel
                per_token = (largest["memory_mb"] - lines[-2]["memory_mb"]) * 1024
                per_token /= largest["max_tokens"] - lines[-2]["max_tokens"]
            best = {key: value for key, value in best.items() if "ratio" not in key}  # a line is measured by itself
            best.update(largest_max_tokens=largest["max_tokens"], kb_per_token=per_token)
            if method == "postln":
                stock[depth] = best["epoch_s"]
            if depth in stock:
                best["tokens_ratio"] = stock[depth] / best["epoch_s"]
        say(f"{name}: ended at --max-tokens {end}")
        yield [{**best, "options": " ".join(extra), "ended_at": end}]


# --- output -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("depth", "max_tokens", "method", "dtype", "options", "layers", "sub_layers", "parameters", "forward_s"),
    *("backward_s", "optimizer_s", "step_s", "forward_ratio", "backward_ratio", "optimizer_ratio", "step_ratio"),
    *("ratio_low", "ratio_high", "tokens_per_s", "epoch_s", "tokens_ratio", "flops_share", "memory_mb", "memory_ratio"),
    *("prepass_forwards", "generation_s", "generation_ratio", "generation_low", "generation_high"),
    *("largest_max_tokens", "kb_per_token", "ended_at", *SHARES),
)
SHOWN = {
    "depth": "{}",
    "max_tokens": "{}",
    "method": "{}",
    "dtype": "{}",
    "options": "{}",
    "forward_s": "{:.3g}",
    "backward_s": "{:.3g}",
    "optimizer_s": "{:.3g}",
    "step_s": "{:.3g}",
    "step_ratio": "{:.3f}",
    "range": "{}",
    "tokens_per_s": "{:.0f}",
    "epoch_s": "{:.0f}",
    "tokens_ratio": "{:.2f}",
    "flops_share": "{:.0%}",
    "memory_mb": "{:.0f}",
    "memory_ratio": "{:.3f}",
    "prepass_forwards": "{:.2f}",
    "generation_s": "{:.3g}",
    "generation_ratio": "{:.3f}",
    "generation_range": "{}",
    "largest_max_tokens": "{}",
    "kb_per_token": "{:.1f}",
    "ended_at": "{}",
}


def as_markdown(table: list[Row]) -> str:
    def cell(row: Row, column: str) -> str:
        value = row.get(column)
        prefix = {"range": "ratio", "generation_range": "generation"}.get(column)
        if f"{prefix}_low" in row:
            value = f"{row[f'{prefix}_low']:.3f}-{row[f'{prefix}_high']:.3f}"
        return "" if value is None else SHOWN[column].format(value)

    cells = [[cell(row, column) for column in SHOWN] for row in table]
    used = [i for i in range(len(SHOWN)) if any(row[i] for row in cells)]
    head = [column.replace("_", " ") for column in SHOWN]
    return markdown([[row[i] for i in used] for row in (head, *cells)])


def where_it_goes(table: list[Row]) -> list[str]:
    """The shares of an update's time, of each method."""
    measured = [row for row in table if "Python" in row]
    if not measured:
        return []
    cells = [[row["depth"], row["method"], *(f"{row[share]:.0%}" for share in SHARES)] for row in measured]
    return ["", "Where one profiled update's time goes:", "", markdown([["depth", "method", *SHARES], *cells])]


def scaling(table: list[Row]) -> list[str]:
    """Step time per sub-layer by depth, and tokens per second by batch size."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in table):
        own = [row for row in table if row["method"] == method]
        tokens = own[0]["max_tokens"]
        by_depth = [row for row in own if row["max_tokens"] == tokens]
        if len(by_depth) > 1:
            each = [f"{row['depth']} {row['step_s'] / row['sub_layers'] * 1000:.1f}" for row in by_depth]
            lines.append(f"- {method}: ms of a step a sub-layer at --max-tokens {tokens}: {', '.join(each)}")
        for depth in dict.fromkeys(row["depth"] for row in own):
            sizes = [row for row in own if row["depth"] == depth]
            if len(sizes) > 1:
                each = [f"{row['max_tokens']} {row['tokens_per_s']:.0f}" for row in sizes]
                lines.append(f"- {method} {depth}: tokens a second by --max-tokens: {', '.join(each)}")
    return lines


def record(table: list[Row], args: Namespace) -> str:
    where = versions_and_hardware(args.device == "cpu", 1, args.threads or torch.get_num_threads())
    data = args.data or f"synthetic, vocabulary {args.vocabulary:,}"
    ratios = (
        "ratios are to the depth's first method, a range is the middle half of the rounds' ratios."
        if not args.gpu_report
        else "the tokens ratio is to the depth's stock line, by the seconds of an epoch at each one's fastest batch."
    )
    return "\n".join(
        [
            f"# Admin beside stock fairseq: step time, memory, generation, {date.today():%-d %B %Y}",
            "",
            "    " + command_line("speed"),
            "",
            as_markdown(table),
            "",
            *([] if args.gpu_report else [*scaling(table), *where_it_goes(table)]),
            "",
            f"Medians of {args.rounds} rounds; {ratios}",
            f"Times in seconds an update. Data: {data}.",
            f"{where}; {args.dtype}.",
            "",
        ]
    )


def parse(argv: list[str]) -> Namespace:
    argv, extra = split_options(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [DATA-BIN] --out DIR [options] [-- OPTIONS]",
    )
    feature = "|".join(MEASURED)
    methods = comma_separated(
        str,
        f"METHOD[:FEATURES][/DTYPE]; methods are {', '.join(METHODS)}, features off, all or {'+'.join(MEASURED)}",
        rf"(lm_)?({'|'.join(METHODS)})(:(off|all|({feature})(\+({feature}))*))?(/(fp32|fp16|bf16))?",
    )
    option = parser.add_argument
    option("data", nargs="?", metavar="DATA-BIN", help="what fairseq-preprocess wrote (default: synthetic)")
    option("--methods", type=methods, default="postln,preln,admin", help="the first is the reference (%(default)s)")
    option("--depths", type=depths, help="encoder and decoder layers (6-6,18-18,60-12; of a report 60-12,100-100)")
    sizes = comma_separated(int, "number of tokens", r"[1-9]\d*")
    option("--max-tokens", type=sizes, help="of a batch; several to see the scaling (512, on a GPU from 4096)")
    option("--rounds", type=int, default=5, help="updates of each method that count (%(default)s)")
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    option("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    option("--vocabulary", type=int, default=8192, help="of the synthetic data (%(default)s)")
    option("--beam", type=int, default=5, help="of the search (%(default)s)")
    option("--length", type=int, default=20, help="tokens of every translation (%(default)s)")
    option("--no-generate", action="store_true", help="do not measure generation")
    option("--no-memory", action="store_true", help="do not measure peak memory")
    option("--one-at-a-time", action="store_true", help="a process for each model and round: for models that fill it")
    option("--features", action="store_true", help="in the place of --methods, as described above")
    option("--gpu-report", action="store_true", help="the report described above instead; needs a GPU")
    option("--rehearse", action="store_true", help="two lines of --gpu-report on a CPU, in fp32: does it run?")
    option("--out", type=Path, required=True, help="folder for speed.csv, speed.png and record.md")
    args = parser.parse_args(argv)
    args.extra = extra
    args.depths = args.depths or (["60-12", "100-100"] if args.gpu_report else ["6-6", "18-18", "60-12"])
    if args.features:
        args.methods = ["postln", *(f"admin:{name}" for name in features(args.device, not args.no_generate))]
    args.max_tokens = args.max_tokens or [4096 if args.gpu_report or args.device == "cuda" else 512]
    if args.device == "cpu" and "fp16" in (args.dtype, *(method.partition("/")[2] for method in args.methods)):
        parser.error("fp16 needs --device cuda")
    args.no_generate |= any(method.startswith("lm_") for method in args.methods)
    if min(args.rounds, args.beam, args.length) < 1:
        parser.error("--rounds, --beam and --length must be at least 1")
    return args


def main(argv: list[str], worker: Worker | None = None) -> list[Row]:
    args = parse(argv)
    if args.gpu_report:
        args.device, args.dtype = ("cpu", "fp32") if args.rehearse else ("cuda", "bf16 and fp16")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise AdminError("no GPU here: what needs one was not measured")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Process()) as process:
        worker = worker or process
        pairs = 100_000 if args.gpu_report else 2 * max(args.max_tokens)
        data = args.data or write_synthetic(Path(folder), args.vocabulary, pairs)
        table: list[Row] = []
        for measured in (gpu_report if args.gpu_report else depth_report)(args, folder, data, worker):
            table += measured
            text = record(table, args)
            write(args.out / "speed.csv", as_csv(table, COLUMNS))
            write(args.out / "record.md", text)
    if not any("step_s" in row for row in table):
        raise AdminError("nothing was measured; where memory ran out: smaller --max-tokens, or --one-at-a-time")
    if not args.gpu_report and not args.features:
        write(args.out / "speed.png", against_depth(table))
    print(text)
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
