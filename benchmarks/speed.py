"""Step time, memory and generation speed of Admin beside stock fairseq at the same depth.

    python benchmarks/speed.py --depths 6-6,18-18,60-12 --out DIR              # on the CPU, synthetic data
    python benchmarks/speed.py DATA-BIN --device cuda --dtype bf16 --max-tokens 8192 --out DIR
    python benchmarks/speed.py --gpu-report --out DIR                          # the best batches of a GPU

Every update goes through fairseq's Trainer.train_step, as in fairseq-train. The methods of a depth take turns in one
process, an update each a round, so that what else the machine does meets all of them; the ratio is the median of the
rounds' ratios to the first method, and its range the middle half of them. "Optimizer" is all of a step that is neither
forward nor backward pass: gradient norm and clipping, the update, logging. Peak memory is that of a fresh process with
one model. The pre-pass is compared with training forward passes of the same model on the same batch. Generation is
beam search to a fixed length with the models as they are. FLOPs are the model's own (three times those of the forward
pass's matrix products, without padding), their rate is a share of that of a large matrix product measured beside it.

The defaults take about 12 minutes on two quiet cores and 16 GB; fewer --rounds or --depths take less. Where three
models do not fit, --one-at-a-time gives each its process, a round after another. DIR gets speed.csv,
speed.png and record.md. What follows -- goes to fairseq-train, the same for all methods.

--gpu-report searches the largest --max-tokens (doubled until memory runs out or the batch stops growing) and the
fastest of them, at 60-12 and 100-100: stock in fp16, Admin in bf16, with and without --checkpoint-activations. Its
tokens ratio is to stock's fastest batch. A line that fails is named in the table and does not end the others. `make
gpu-report` adds the pre-pass and generation on the GPU, and the kernels by themselves (benchmarks/kernel.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import admin_fairseq  # noqa: E402, I001  (before fairseq, whose modules set up everybody's logging)
from fairseq import options, tasks  # noqa: E402
from fairseq.data import Dictionary, indexed_dataset  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from admin_fairseq.architectures import METHODS  # noqa: E402
from admin_fairseq.errors import AdminError  # noqa: E402
from admin_fairseq.files import as_csv  # noqa: E402
from admin_fairseq.model import AdminModel, sub_layers  # noqa: E402
from benchmarks.compare import environment, peak_memory, several, split_options, write  # noqa: E402
from benchmarks.figures import against_depth  # noqa: E402

TRAIN = """--optimizer adam --adam-betas (0.9,0.98) --lr-scheduler inverse_sqrt --lr 5e-4 --warmup-updates 4000
--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0.1 --seed 1
--required-batch-size-multiple 1 --num-workers 0 --distributed-world-size 1 --no-save --log-format none"""
NO_ROOM = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
WARMUP = 2  # updates before the clock counts: the first ones allocate the optimizer's state
Row = Dict[str, Any]
Setting = Dict[str, Any]  # what a worker is to measure


# --- the worker: models of one depth in one process -------------------------------------------------------------------


class Clock:
    """Seconds of forward pass, backward pass and the whole of ``Trainer.train_step``."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.marks = trainer, {}
        self.cuda = trainer.cuda
        trainer.criterion.register_forward_pre_hook(lambda *_: self.mark("forward"))
        trainer.criterion.register_forward_hook(lambda *_: self.mark("forward"))
        optimizer, backward = trainer.optimizer, trainer.optimizer.backward

        def timed(loss: torch.Tensor) -> None:
            self.mark("backward")
            backward(loss)
            self.mark("backward")

        optimizer.backward = timed

    def mark(self, name: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.marks.setdefault(name, []).append(time.perf_counter())

    def step(self, sample: dict[str, Any]) -> dict[str, float]:
        """Of one update; a step that fp16's loss scale skipped is none, and is made again with half of it."""
        updates = self.trainer.get_num_updates()
        while self.trainer.get_num_updates() == updates:
            self.marks = {}
            self.mark("step")
            self.trainer.train_step([sample], raise_oom=True)
            self.mark("step")
        seconds = {name: end - start for name, (start, end) in self.marks.items()}
        seconds["optimizer"] = seconds["step"] - seconds["forward"] - seconds["backward"]
        return seconds


def make_trainer(method: str, setting: Setting) -> Trainer:
    encoder, decoder = setting["depth"].split("-")
    argv = [
        setting["data"],
        "--arch",
        f"transformer_{method}",
        "--encoder-layers",
        encoder,
        "--decoder-layers",
        decoder,
    ]
    argv += [*TRAIN.split(), "--max-tokens", str(setting["max_tokens"]), "--save-dir", setting["folder"]]
    argv += {"fp32": [], "fp16": ["--fp16"], "bf16": ["--bf16"]}[setting["dtype"]]
    argv += ["--cpu"] if setting["device"] == "cpu" else []
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*argv, *setting["extra"]]))
    task = tasks.setup_task(cfg.task)
    cfg.model.share_all_embeddings = task.source_dictionary == task.target_dictionary
    task.load_dataset("train")
    torch.manual_seed(cfg.common.seed)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    trainer.optimizer  # noqa: B018  (builds it, after the pre-pass)
    return trainer


def measure(setting: Setting) -> Row:
    """What one worker answers: by method, seconds of every round and counts; ``{"out of memory": True}`` if so."""
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])
    try:
        return _measure(setting)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in NO_ROOM):
            raise
        return {"out of memory": True}


def _measure(setting: Setting) -> Row:
    trainers = {method: make_trainer(method, setting) for method in setting["methods"]}
    clocks = {method: Clock(trainer) for method, trainer in trainers.items()}
    first = next(iter(trainers.values()))
    cuda = first.cuda
    if cuda:  # which the trainer would do after every update
        torch.cuda.reset_peak_memory_stats = lambda *_: None
    batches = some_batches(first, WARMUP + setting["rounds"])
    rounds: dict[str, list[Row]] = {method: [] for method in trainers}
    for number, batch in enumerate(batches):
        for method in in_turn(clocks, number):
            seconds = clocks[method].step(batch)
            if number >= WARMUP:
                rounds[method].append({**seconds, **counts(batch, trainers[method])})
    answer: Row = {"rounds": rounds, "parameters": {}, "prepass": {}, "generation": {}, "matmul": 0.0}
    answer["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_memory(os.getpid())
    for method, trainer in trainers.items():
        model = trainer.get_model()
        answer["parameters"][method] = sum(p.numel() for p in model.parameters())
        if isinstance(model, AdminModel) and setting["prepass"]:
            answer["prepass"][method] = prepass(trainer, clocks[method], batches[0], setting["rounds"])
    if setting["generate"]:
        answer["generation"] = generate(trainers, batches[0], setting)
    if setting["matmul"]:
        answer["matmul"] = matmul_rate(next(first.get_model().parameters()))
    return answer


def in_turn(methods: Iterable[str], number: int) -> list[str]:
    """The methods in the order of a round: each is the first as often as the others."""
    order = list(methods)
    return order[number % len(order) :] + order[: number % len(order)]


def some_batches(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    """Batches of short, middling and long sentences in random order."""
    dataset, chosen = trainer.task.dataset("train"), trainer.get_train_iterator(1, load_dataset=False).frozen_batches
    places = np.linspace(0, max(0, len(chosen) - 2), count).astype(int)  # the last one may be small
    np.random.RandomState(1).shuffle(places)
    return [dataset.collater([dataset[i] for i in chosen[place]]) for place in places]


def counts(batch: dict[str, Any], trainer: Trainer) -> Row:
    """Target tokens of a batch, and the FLOPs of an update on it."""
    cfg, padding = trainer.cfg.model, trainer.task.target_dictionary.pad()
    source, target = (batch["net_input"][side].ne(padding).sum(1) for side in ("src_tokens", "prev_output_tokens"))
    d, vocabulary = cfg.decoder_embed_dim, len(trainer.task.target_dictionary)
    encoder = cfg.encoder_layers * (4 * d * d + 2 * d * cfg.encoder_ffn_embed_dim)
    decoder = cfg.decoder_layers * (6 * d * d + 2 * d * cfg.decoder_ffn_embed_dim) + d * vocabulary
    products = source.sum() * (encoder + cfg.decoder_layers * 2 * d * d) + target.sum() * decoder
    attention = 2 * d * (cfg.encoder_layers * source**2 + cfg.decoder_layers * (target**2 + source * target)).sum()
    return {"tokens": int(target.sum()), "flops": 3 * 2 * int(products + attention)}


def prepass(trainer: Trainer, clock: Clock, batch: dict[str, Any], rounds: int) -> list[float]:
    """Pre-passes on a batch, each in units of a training forward pass beside it."""
    model, ratios = trainer.get_model(), []
    norms = [norm for stack in model.stacks().values() for norm in sub_layers(stack).values()]
    before = [norm.omega.detach().clone() for norm in norms]
    sample, _ = trainer._prepare_sample(batch)
    for _ in range(rounds):
        clock.marks = {}
        model.train()
        trainer.criterion(model, sample)
        clock.mark("profile")
        admin_fairseq.profile(model, [admin_fairseq.Sample(sample["net_input"], True, 1)])
        clock.mark("profile")
        (start, end), (begin, finish) = clock.marks["forward"], clock.marks["profile"]
        ratios.append((finish - begin) / (end - start))
    with torch.no_grad():
        for norm, omega in zip(norms, before):
            norm.omega.copy_(omega)
    return ratios


def generate(trainers: dict[str, Trainer], batch: dict[str, Any], setting: Setting) -> dict[str, list[float]]:
    """Seconds of beam search, by method and round; as fairseq-generate, to a fixed length."""
    search = Namespace(beam=setting["beam"], max_len_a=0, max_len_b=setting["length"], min_len=setting["length"])
    generators = {}
    seconds: dict[str, list[float]] = {method: [] for method in trainers}
    for method, trainer in trainers.items():
        trainer.zero_grad()
        model = trainer.get_model()
        model.eval()
        model.prepare_for_inference_(trainer.cfg)
        generators[method] = trainer.task.build_generator([model], search)
    for number in range(1 + setting["rounds"]):
        for method in in_turn(trainers, number):
            trainer = trainers[method]
            sample, _ = trainer._prepare_sample(batch)
            if trainer.cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            trainer.task.inference_step(generators[method], [trainer.get_model()], sample)
            if trainer.cuda:
                torch.cuda.synchronize()
            seconds[method].append(time.perf_counter() - started)
    return {method: each[1:] for method, each in seconds.items()}


def matmul_rate(like: torch.Tensor) -> float:
    """FLOPs a second of the product of two large square matrices, the best of several."""
    n = 8192 if like.is_cuda else 1024
    a, b = (torch.randn(n, n, device=like.device).to(like.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if like.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if like.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def in_a_process(setting: Setting) -> Row:
    """:func:`measure` in a fresh process.

    Raises:
        AdminError: it failed.
    """
    command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        what = f"{', '.join(setting['methods'])} {setting['depth']}"
        last = "".join(done.stderr.strip().splitlines()[-1:])
        raise AdminError(f"measuring {what} failed ({done.returncode}): {last}")
    return json.loads(done.stdout.splitlines()[-1])


# --- what is measured -------------------------------------------------------------------------------------------------


def write_synthetic(folder: Path, vocabulary: int, pairs: int, seed: int = 1) -> str:
    """A data-bin of random sentences of 5 to 60 words; words are as frequent as 1 / rank."""
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
    return str(folder)


def fitting(worker: Callable[[Setting], Row], setting: Setting) -> Row:
    """The worker's answer.

    Raises:
        AdminError: it failed, or ran out of memory.
    """
    answer = worker(setting)
    if "out of memory" in answer:
        raise AdminError("out of memory")
    return answer


def measure_all(args: Namespace, folder: str, data: str, worker: Callable[[Setting], Row]) -> Iterator[list[Row]]:
    """For each depth and batch size that can be measured, a row of the table a method."""
    for depth in args.depths:
        for tokens in args.max_tokens:
            base = {"depth": depth, "max_tokens": tokens, "rounds": args.rounds, "methods": args.methods}
            base.update({"data": data, "folder": folder, "device": args.device, "dtype": args.dtype})
            base.update({"threads": args.threads, "extra": args.extra, "prepass": True, "matmul": True})
            base.update({"generate": tokens == args.max_tokens[0] and not args.no_generate, "length": args.length})
            base.update({"beam": args.beam})
            alone = {**base, "rounds": 1, "prepass": False, "generate": False, "matmul": args.one_at_a_time}
            each: list[Row] = []
            try:
                if args.one_at_a_time:
                    for number in range(args.rounds):
                        last = {"prepass": number == args.rounds - 1, "generate": number == 0 and base["generate"]}
                        each += [fitting(worker, {**alone, **last, "methods": [method]}) for method in args.methods]
                    answer = merged(each)
                else:
                    answer = fitting(worker, base)
                    if not args.no_memory:
                        each = [fitting(worker, {**alone, "methods": [method]}) for method in args.methods]
            except AdminError as error:
                say(f"{depth}, --max-tokens {tokens}: {error}")
                continue
            memory = {next(iter(one["rounds"])): one["memory_mb"] for one in each}
            say(f"{depth}, --max-tokens {tokens}: done")
            yield rows(answer, memory, base)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def merged(answers: Iterable[Row]) -> Row:
    """Several workers' answers as if one had given them."""
    whole: Row = {"rounds": {}, "parameters": {}, "prepass": {}, "generation": {}, "matmul": 0.0}
    for answer in answers:
        for method, found in answer["rounds"].items():
            whole["rounds"].setdefault(method, []).extend(found)
        for key in ("parameters", "prepass", "generation"):
            whole[key].update(answer[key])
        whole["matmul"] = max(whole["matmul"], answer["matmul"])
    return whole


def rows(answer: Row, memory: dict[str, float], setting: Setting) -> list[Row]:
    """Medians and ratios of what a worker answered, a row a method."""
    found, encoder, decoder = answer["rounds"], *map(int, setting["depth"].split("-"))
    stock = next(iter(found))
    result = []
    for method, each in found.items():
        row: Row = {"depth": setting["depth"], "layers": encoder + decoder, "sub_layers": 2 * encoder + 3 * decoder}
        row.update({"max_tokens": setting["max_tokens"], "method": method, "dtype": setting["dtype"]})
        row["parameters"] = answer["parameters"][method]
        for part in ("forward", "backward", "optimizer", "step"):
            row[f"{part}_s"] = statistics.median(one[part] for one in each)
            low, middle, high = quartiles([a[part] / b[part] for a, b in zip(each, found[stock])])
            row[f"{part}_ratio"] = middle
            if part == "step":
                row["ratio_low"], row["ratio_high"] = low, high
        row["tokens_per_s"] = statistics.median(one["tokens"] / one["step"] for one in each)
        row["flops_share"] = statistics.median(one["flops"] / one["step"] for one in each) / answer["matmul"]
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

PLAN = (  # method, depth, precision, further options; the stock line of a depth first
    ("postln", "60-12", "fp16", []),
    ("admin", "60-12", "bf16", []),
    ("admin", "60-12", "bf16", ["--admin-fast", "all"]),
    ("admin", "60-12", "bf16", ["--checkpoint-activations"]),
    ("admin", "60-12", "bf16", ["--checkpoint-activations", "--admin-fast", "all"]),
    ("postln", "100-100", "fp16", []),
    ("admin", "100-100", "bf16", []),
    ("admin", "100-100", "bf16", ["--admin-fast", "all"]),
    ("admin", "100-100", "bf16", ["--checkpoint-activations"]),
)


def search(measure_at: Callable[[int], Row], start: int, limit: int = 2**20) -> tuple[list[Row], str]:
    """Answers at ``start`` tokens, twice as many and so on, and what ended them: the first that fails or is no larger.

    Data may be smaller than a batch could be.
    """
    found: list[Row] = []
    tokens, before = start, 0
    while tokens <= limit:
        try:
            answer = measure_at(tokens)
        except AdminError as error:
            return found, f"{tokens}: {error}"
        size = sum(one["tokens"] for each in answer["rounds"].values() for one in each)
        if size <= before:
            return found, f"{tokens}: no larger batch in the data"
        found.append({**answer, "max_tokens": tokens})
        tokens, before = 2 * tokens, size
    return found, f"{tokens}: not tried"


def gpu_report(args: Namespace, folder: str, data: str, worker: Callable[[Setting], Row]) -> Iterator[list[Row]]:
    """The best batch of every line of ``PLAN``, and the largest; without figures where none fitted."""
    stock: dict[str, float] = {}
    for method, depth, dtype, extra in PLAN:
        setting = {"depth": depth, "methods": [method], "dtype": dtype, "extra": [*args.extra, *extra], "data": data}
        setting.update({"rounds": args.rounds, "folder": folder, "device": "cuda", "threads": 0, "prepass": False})
        setting.update({"generate": False, "matmul": True, "beam": args.beam, "length": args.length})

        def measure_at(tokens: int, setting: Setting = setting) -> Row:
            return fitting(worker, {**setting, "max_tokens": tokens})

        found, end = search(measure_at, args.max_tokens[0])
        best: Row = {"depth": depth, "method": method, "dtype": dtype}
        if found:
            lines = [rows(one, {method: one["memory_mb"]}, {**setting, **one})[0] for one in found]
            best = max(lines, key=lambda row: row["tokens_per_s"])
            largest = lines[-1]
            per_token = None
            if len(lines) > 1:  # between two batch sizes parameters and optimizer cancel
                per_token = (largest["memory_mb"] - lines[-2]["memory_mb"]) * 1024
                per_token /= largest["max_tokens"] - lines[-2]["max_tokens"]
            best = {key: value for key, value in best.items() if "ratio" not in key}  # a line is measured by itself
            best.update(largest_max_tokens=largest["max_tokens"], kb_per_token=per_token)
            if method == "postln":
                stock[depth] = best["tokens_per_s"]
            if depth in stock:
                best["tokens_ratio"] = best["tokens_per_s"] / stock[depth]
        say(" ".join([method, depth, dtype, *extra]) + f": ended at --max-tokens {end}")
        yield [{**best, "options": " ".join(extra), "ended_at": end}]


# --- output -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("depth", "max_tokens", "method", "dtype", "options", "layers", "sub_layers", "parameters", "forward_s"),
    *("backward_s", "optimizer_s", "step_s", "forward_ratio", "backward_ratio", "optimizer_ratio", "step_ratio"),
    *("ratio_low", "ratio_high", "tokens_per_s", "tokens_ratio", "flops_share", "memory_mb", "memory_ratio"),
    *("prepass_forwards", "generation_s", "generation_ratio", "generation_low", "generation_high"),
    *("largest_max_tokens", "kb_per_token", "ended_at"),
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
    lines = [[each[i] for i in used] for each in [head, ["---"] * len(SHOWN), *cells]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scaling(table: list[Row]) -> list[str]:
    """Step time a sub-layer by depth, and a token by batch size."""
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
    flags = ["--cpu"] if args.device == "cpu" else []
    where = environment(Namespace(extra=flags, jobs=1, threads=args.threads or torch.get_num_threads()))
    data = args.data or f"synthetic, vocabulary {args.vocabulary:,}"
    ratios = (
        "ratios are to the depth's first method, a range is the middle half of the rounds' ratios."
        if not args.gpu_report
        else "the tokens ratio is to the depth's stock line, each at its fastest batch."
    )
    return "\n".join(
        [
            f"# Admin beside stock fairseq: step time, memory, generation, {date.today():%-d %B %Y}",
            "",
            "    " + shlex.join(["python", *sys.argv]),
            "",
            as_markdown(table),
            "",
            *([] if args.gpu_report else scaling(table)),
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
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [DATA-BIN] --out DIR [options] [-- OPTIONS]",
    )
    methods = several(str, f"method; there are {', '.join(METHODS)}", "|".join(METHODS))
    depths = several(str, "depth such as 6-6", r"[1-9]\d*-[1-9]\d*")
    option = parser.add_argument
    option("data", nargs="?", metavar="DATA-BIN", help="what fairseq-preprocess wrote (default: synthetic)")
    option("--methods", type=methods, default="postln,preln,admin", help="the first is the reference (%(default)s)")
    option("--depths", type=depths, default="6-6,18-18,60-12", help="encoder and decoder layers (%(default)s)")
    sizes = several(int, "number of tokens", r"[1-9]\d*")
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
    option("--gpu-report", action="store_true", help="the report described above instead; needs a GPU")
    option("--out", type=Path, required=True, help="folder for speed.csv, speed.png and record.md")
    args = parser.parse_args(argv)
    args.extra = extra
    args.max_tokens = args.max_tokens or [4096 if args.gpu_report or args.device == "cuda" else 512]
    if args.device == "cpu" and args.dtype != "fp32":
        parser.error(f"--dtype {args.dtype} needs --device cuda")
    if min(args.rounds, args.beam, args.length) < 1:
        parser.error("--rounds, --beam and --length must be at least 1")
    return args


def main(argv: list[str], worker: Callable[[Setting], Row] = in_a_process) -> list[Row]:
    args = parse(argv)
    if (args.gpu_report or args.device == "cuda") and not torch.cuda.is_available():
        raise AdminError("no GPU here: what needs one was not measured")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = 400_000 if args.gpu_report else 2 * max(args.max_tokens)
        data = args.data or write_synthetic(Path(folder), args.vocabulary, pairs)
        if args.gpu_report:
            args.device, args.dtype = "cuda", "bf16, stock fp16"
        table: list[Row] = []
        for measured in (gpu_report if args.gpu_report else measure_all)(args, folder, data, worker):
            table += measured
            text = record(table, args)
            write(args.out / "speed.csv", as_csv(table, COLUMNS))
            write(args.out / "record.md", text)
    if not any("step_s" in row for row in table):
        raise AdminError("nothing was measured; where memory ran out: smaller --max-tokens, or --one-at-a-time")
    if not args.gpu_report:
        write(args.out / "speed.png", against_depth(table))
    print(text)
    return table


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        logging.disable(logging.INFO)
        print("\n" + json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
