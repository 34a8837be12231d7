"""Train methods side by side, each at its own best learning rate and warmup, from the same seeds and budget.

    python benchmarks/compare.py DATA-BIN --methods postln,preln,admin --depths 6-6,18-18 --lr 5e-4,1e-3,2e-3 \\
        --warmup 200 --seeds 1,2 --updates 800 --out DIR -- --encoder-embed-dim 128 --max-tokens 1024 ...

Every combination is one fairseq-train in a folder of its own under DIR. Of each method and depth, the learning rate and
warmup with the lowest mean validation perplexity over the seeds are the best, and only these runs translate the test
set. DIR gets table.md, compare.csv (a row a run), compare.png (training perplexity of the best) and lr.png (validation
perplexity by learning rate). Give the same command again to go on after an interruption; with more methods, depths,
rates, warmups or seeds it trains what is missing. Each run keeps its weights, without optimizer state, on the disk.

What follows -- goes to fairseq-train: widths, --max-tokens, --optimizer and so on, the same for all. Where it does not
say otherwise: Adam (0.9, 0.98), inverse_sqrt, dropout 0.1, label smoothing 0.1, --max-tokens 4096, one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import numpy as np
import sacrebleu
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import admin_fairseq  # noqa: E402, I001  (before fairseq, whose modules set up everybody's logging)
import fairseq  # noqa: E402
from fairseq.data import Dictionary, data_utils  # noqa: E402
from admin_fairseq.architectures import METHODS  # noqa: E402
from admin_fairseq.errors import DATA_HINT, AdminError  # noqa: E402
from admin_fairseq.files import as_csv, writing  # noqa: E402
from benchmarks import divergence  # noqa: E402
from benchmarks.divergence import DIVERGED, context_free_perplexities, final_loss, judge, smooth  # noqa: E402
from benchmarks.figures import panels  # noqa: E402

# a line is left out where the user gives its first option: fairseq-train knows the others only beside it
DEFAULTS = """
--optimizer adam --adam-betas '(0.9, 0.98)'
--lr-scheduler inverse_sqrt
--criterion label_smoothed_cross_entropy --label-smoothing 0.1
--dropout 0.1
--max-tokens 4096
--required-batch-size-multiple 1
--num-workers 0
--distributed-world-size 1
"""
# the last line: one validation and one checkpoint, at the end
OURS = """--user-dir {plugin} --save-dir {folder} --arch transformer_{method} --encoder-layers {encoder}
--decoder-layers {decoder} --lr {lr:g} --warmup-updates {warmup} --seed {seed} --max-update {updates}
--log-format json --log-interval {interval}
--validate-interval 1000000 --save-interval 1000000 --no-epoch-checkpoints --no-save-optimizer-state"""
REFUSED = {
    "--disable-validation": "the best runs are those with the lowest validation perplexity",
    "--valid-subset": "the best runs are those with the lowest perplexity of the validation set",
    "--no-save": "the best runs translate the test set",
    "--encoder-normalize-before": "it would make every method Pre-LN, which is the method preln",
    "--decoder-normalize-before": "it would make every method Pre-LN, which is the method preln",
}
GENERATE = "--beam 5 --max-len-a 1.2 --max-len-b 10 --required-batch-size-multiple 1"
Result = Dict[str, Any]  # what result.json holds


@dataclass(frozen=True)
class Run:
    method: str
    depth: str
    lr: float
    warmup: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_{self.depth}_lr{self.lr:g}_w{self.warmup}_s{self.seed}"

    @property
    def layers(self) -> list[int]:
        return [int(layers) for layers in self.depth.split("-")]


# --- data -------------------------------------------------------------------------------------------------------------


class Data:
    """A data-bin: its content's fingerprint, languages, context-free perplexities, and how its words were split."""

    def __init__(self, folder: Path, extra: list[str]) -> None:
        languages = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        languages.add_argument("-s", "--source-lang")
        languages.add_argument("-t", "--target-lang")
        asked, _ = languages.parse_known_args(extra)
        inferred = data_utils.infer_language_pair(str(folder)) if folder.is_dir() else (None, None)
        self.folder, self.source = folder, asked.source_lang or inferred[0]
        self.target = asked.target_lang or inferred[1]
        pairs = (f"{self.source}-{self.target}", f"{self.target}-{self.source}")
        found = [
            name for name in (f"train.{pair}.{self.target}" for pair in pairs) if (folder / f"{name}.idx").exists()
        ]
        if not found:
            raise AdminError(f"{folder} has no binarised training targets; {DATA_HINT.replace('DATA', 'DATA-BIN')}")
        digest = hashlib.sha256()
        for file in sorted(itertools.chain.from_iterable(folder.glob(kind) for kind in ("dict.*", "*.idx", "*.bin"))):
            digest.update(file.name.encode() + file.read_bytes())
        self.fingerprint = digest.hexdigest()[:16]
        dictionary = Dictionary.load(str(folder / f"dict.{self.target}.txt"))
        targets = data_utils.load_indexed_dataset(str(folder / found[0]), dictionary)
        sentences = (targets[i].numpy() for i in range(len(targets)))
        self.unigram, self.positional = context_free_perplexities(sentences, len(dictionary))
        self.pairs, self.tokens = len(targets), int(np.sum(targets.sizes))
        self.test = any((folder / f"test.{pair}.{self.target}.idx").exists() for pair in pairs)
        self.remove_bpe = []
        if any(symbol.endswith("@@") for symbol in dictionary.symbols):
            self.remove_bpe = ["--remove-bpe"]
        elif any(symbol.startswith("▁") for symbol in dictionary.symbols):
            self.remove_bpe = ["--remove-bpe", "sentencepiece"]


# --- runs -------------------------------------------------------------------------------------------------------------


class RunError(Exception):
    """A command failed otherwise than by diverging; the message is one line."""


class Runner:
    """fairseq's commands as sub-processes, several at a time; they end when this process does, but for kill -9.

    ``lock`` is an open, locked file that they inherit: one that outlives us keeps it locked.
    """

    def __init__(self, args: argparse.Namespace, data: Data, lock: Any) -> None:
        self.args, self.data, self.lock, self.failures = args, data, lock, 0
        self.live: set[subprocess.Popen] = set()
        self.guard, self.stopped = threading.Lock(), False

    def command(self, log: Path, program: str, *arguments: Any) -> tuple[list[tuple[float, str]], float | None]:
        """Run it and write ``log``: (its lines, each with its time, and the peak resident set in MB).

        Raises:
            RunError: it failed, and not by a FloatingPointError.
        """
        command = [os.path.join(os.path.dirname(sys.executable), program), *map(str, arguments)]
        # with warnings on, torch and fairseq print hundreds of lines on each other's deprecations
        environment = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(self.args.threads)}
        with self.guard:
            if self.stopped:
                raise RunError("interrupted")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
            self.live.add(process)
        lines, memory = [], None
        with process, open(log, "w", encoding="utf-8") as out:
            out.write(shlex.join(command) + "\n")
            for line in process.stdout:
                lines.append((time.monotonic(), line))
                out.write(line)
                out.flush()
                memory = peak_memory(process.pid) or memory
        with self.guard:
            self.live.remove(process)
        if process.returncode != 0 and not any(line.startswith("FloatingPointError: ") for _, line in lines):
            last = next((line.strip() for _, line in reversed(lines) if line.strip()), "no output")
            raise RunError(f"exit code {process.returncode}: {last[:300]} (all of it in {log})")
        return lines, memory

    def stop(self) -> None:
        with self.guard:
            self.stopped = True
            for process in self.live:
                with contextlib.suppress(ProcessLookupError):  # it just ended
                    os.killpg(process.pid, signal.SIGKILL)

    def parallel(self, function: Callable[[Run], Any], runs: list[Run]) -> Iterator[tuple[Run, Any]]:
        """(run, function(run)) in the order in which they finish; what fails is said and left out."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = {pool.submit(function, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is None:
                        yield futures[future], future.result()
                    elif isinstance(error, RunError):
                        self.failures += 1
                        print(f"error: {futures[future].name}: {error}", file=sys.stderr, flush=True)
                    else:
                        raise error
            except BaseException:
                self.stop()
                raise

    def settings(self, run: Run) -> Result:
        """Everything that a result depends on and that two calls of this script may not share."""
        return {
            **asdict(run),
            "updates": self.args.updates,
            "data": self.data.fingerprint,
            "options": self.args.extra,
        }

    def stored(self, run: Run) -> Result | None:
        """The result of an earlier call, None if the run did not finish.

        Raises:
            AdminError: it came from other settings.
        """
        file = self.args.out / run.name / "result.json"
        if not file.exists():
            return None
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise AdminError(f"{file} is no result of this script; remove it, and the run is done again") from None
        for key, value in self.settings(run).items():
            if result["settings"].get(key) != value:
                was, now = (shlex.join(x) if isinstance(x, list) else x for x in (result["settings"].get(key), value))
                raise AdminError(f"{file.parent} was run with {key}: {was}; this is {now}. Choose another --out")
        return result

    def train(self, run: Run) -> Result:
        """Train from the start, and write result.json.

        Raises:
            RunError: fairseq-train failed otherwise than by diverging.
        """
        folder, extra, started = self.args.out / run.name, self.args.extra, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        defaults = [shlex.split(line) for line in DEFAULTS.strip().splitlines()]
        defaults = [word for line in defaults if not given(line[0], extra) for word in line]
        places = {"plugin": ROOT / "admin_fairseq", "folder": folder}  # may hold blanks, so filled in after splitting
        numbers = {**asdict(run), "encoder": run.layers[0], "decoder": run.layers[1], "updates": self.args.updates}
        ours = [word.format(**places, **numbers, interval=max(self.args.updates // 100, 1)) for word in OURS.split()]
        lines, memory = self.command(folder / "train.log", "fairseq-train", self.data.folder, *defaults, *extra, *ours)
        for spare in ("checkpoint_best.pt", "crash.pt"):  # the first is a copy of checkpoint_last.pt
            (folder / spare).unlink(missing_ok=True)
        result = {"settings": self.settings(run), **read_log(lines, memory, self.data.positional, self.args.updates)}
        result.update(bleu=None, seconds=round(time.monotonic() - started), environment=environment(self.args))
        write(folder / "result.json", json.dumps(result))
        return result

    def translate(self, run: Run) -> float:
        """BLEU of the run's translation of the test set against the tokenised reference."""
        folder, data = self.args.out / run.name, self.data
        lines, _ = self.command(
            *(folder / "generate.log", "fairseq-generate", data.folder, "--user-dir", ROOT / "admin_fairseq"),
            *("--path", folder / "checkpoint_last.pt", "-s", data.source, "-t", data.target, *data.remove_bpe),
            *(*GENERATE.split(), *(["--cpu"] if given("--cpu", self.args.extra) else [])),
        )
        return bleu("".join(line for _, line in lines))

    def run_all(self, runs: list[Run]) -> dict[Run, Result]:
        """Train what is not finished, then translate with the best; a line for each."""
        results = {run: result for run in runs if (result := self.stored(run)) is not None}
        missing = [run for run in runs if run not in results]
        print(f"{len(runs)} runs, {len(results)} finished before; logs: {self.args.out}/<run>/train.log", flush=True)
        started, cost, done = time.monotonic(), sum(sum(run.layers) + 4 for run in missing), 0
        for count, (run, result) in enumerate(self.parallel(self.train, missing), 1):
            results[run], done = result, done + sum(run.layers) + 4
            minutes = (time.monotonic() - started) / 60 * (cost - done) / done
            at = "" if result["update"] is None else f" at {result['update']}"
            print(
                f"[{count}/{len(missing)}] {run.name}: {result['verdict']}{at}, perplexity"
                f" {number(result['train_ppl'])} (valid {number(result['valid_ppl'])}),"
                f" {number(result['ms_per_update'])} ms/update, {number(result['memory_mb'])} MB,"
                f" {result['seconds']} s; {minutes:.0f} min left",
                flush=True,
            )
            write_tables(results, self.args, self.data)
        if not self.args.no_bleu:
            chosen = [run for group in best(results).values() for run in group if results[run]["bleu"] is None]
            chosen = [run for run in chosen if (self.args.out / run.name / "checkpoint_last.pt").exists()]
            for run, score in self.parallel(self.translate, chosen):
                results[run]["bleu"] = round(score, 2)
                write(self.args.out / run.name / "result.json", json.dumps(results[run]))
                print(f"{run.name}: BLEU {score:.1f}", flush=True)
        return {run: results[run] for run in runs if run in results}


def bleu(log: str) -> float:
    """Tokenised BLEU of fairseq-generate's output, computed as multi-bleu.perl does."""
    references = dict(re.findall(r"^T-(\d+)\t(.*)$", log, re.M))
    hypotheses = dict(re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", log, re.M))
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    return metric.corpus_score([hypotheses[key] for key in references], [list(references.values())]).score


def read_log(lines: list[tuple[float, str]], memory: float | None, positional: float, updates: int) -> Result:
    """What the log of a training of ``updates`` updates says; losses in it are in bits, here in nats.

    Raises:
        RunError: the training ended early, not by diverging, or without a validation.
    """

    def nats(row: Result, prefix: str = "") -> float:  # fairseq logs nll_loss only where it differs from the loss
        return float(row.get(f"{prefix}nll_loss", row[f"{prefix}loss"])) * math.log(2)

    log = "".join(line for _, line in lines)
    rows = [(moment, re.search(r"\| train_inner \| (\{.*\})", line)) for moment, line in lines]
    rows = [(moment, json.loads(found[1])) for moment, found in rows if found]
    curve = [(int(row["num_updates"]), nats(row)) for _, row in rows]
    error = re.search(r"^FloatingPointError: (.*)", log, re.M)
    valid = re.findall(r"\| valid \| (\{.*\})", log)
    done = max(map(int, re.findall(r'num_updates": "?(\d+)', log)), default=0)
    if done < updates and not error:
        raise RunError(f"it ended after {done} of {updates} updates: does an option behind -- stop it, as --max-epoch?")
    if not valid and not error:
        raise RunError("there was no validation at its end")
    verdict, update = judge(curve, positional, error[1] if error else "")
    paces = [
        (rows[i][0] - rows[i - 1][0]) / (curve[i][0] - curve[i - 1][0]) * 1000
        for i in range(1, len(rows))
        if curve[i][0] > curve[i - 1][0]
    ]
    # on a GPU fairseq logs how much torch's counter left free at its peak
    total = re.search(r"total memory = ([\d.]+) GB", log)
    free = [float(row["gb_free"]) for _, row in rows if "gb_free" in row]
    parameters = re.search(r"num\. shared model params: ([\d,]+)", log)
    return {
        "verdict": verdict,
        "update": update,
        "train_ppl": perplexity(final_loss([loss for _, loss in curve])) if curve else None,
        "valid_ppl": perplexity(nats(json.loads(valid[-1]), "valid_")) if valid else None,
        "ms_per_update": statistics.median(paces) if paces else None,
        "memory_mb": (float(total[1]) - min(free)) * 1024 if total and free else memory,
        "parameters": int(parameters[1].replace(",", "")) if parameters else None,
        "curve": [(update, loss if math.isfinite(loss) else None) for update, loss in curve],
    }


def perplexity(loss: float) -> float | None:
    """None where it is no use as a number: for NaN, and where its square, as in a standard deviation, overflows."""
    return math.exp(loss) if loss < 350 else None


def peak_memory(pid: int) -> float | None:
    """Peak resident set of a running process in MB, where /proc knows it.

    What wait4 reports is no use here: it is at least what this process held when it started the other.
    """
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def environment(args: argparse.Namespace) -> str:
    """Versions and hardware in one line."""
    device = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available() and not given("--cpu", args.extra):
        device = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        device = f"{os.cpu_count()} cores of {found[1]}" if found else device
    versions = f"admin_fairseq {admin_fairseq.__version__}, fairseq {fairseq.__version__}, torch {torch.__version__}"
    return f"{versions}, Python {platform.python_version()}; {device}, {args.jobs} x {args.threads} threads"


def given(option: str, words: list[str]) -> bool:
    return any(word.split("=")[0] == option for word in words)


def write(path: Path, content: str | bytes) -> None:
    with writing(str(path)) as out:
        out.write(content.encode() if isinstance(content, str) else content)


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("method", "depth", "lr", "warmup", "seed", "verdict", "update", "train_ppl", "valid_ppl", "bleu"),
    *("ms_per_update", "memory_mb", "parameters", "seconds", "best"),
)


def grouped(runs: Iterable[Run], *fields: str) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, field) for field in fields), []).append(run)
    return groups


def comparable(runs: Iterable[Run]) -> dict[tuple[float, int], list[Run]]:
    """Runs by learning rate and warmup: those with the most seeds, as the means of fewer are not comparable."""
    groups = grouped(runs, "lr", "warmup")
    most = max(map(len, groups.values()))
    return {key: group for key, group in groups.items() if len(group) == most}


def mean_valid(results: list[Result]) -> float:
    """Mean validation perplexity, infinite if a run has none."""
    values = [result["valid_ppl"] for result in results]
    return math.inf if None in values else statistics.fmean(values)


def best(results: dict[Run, Result]) -> dict[tuple[str, str], list[Run]]:
    """By method and depth, the runs (one a seed) of the learning rate and warmup with the lowest mean perplexity."""
    return {
        key: min(comparable(runs).values(), key=lambda group: mean_valid([results[run] for run in group]))
        for key, runs in grouped(results, "method", "depth").items()
    }


def table_csv(results: dict[Run, Result]) -> str:
    chosen = {run for group in best(results).values() for run in group}
    rows = ({**result, **asdict(run), "best": "yes" if run in chosen else "no"} for run, result in results.items())
    return as_csv(rows, COLUMNS)


def number(value: float | None) -> str:
    return (
        "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.3g}"
    )


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return number(statistics.fmean(known)) + (f" ± {number(statistics.stdev(known))}" if len(known) > 1 else "")


def divergences(results: list[Result]) -> str:
    """For example "2 of 3: plateau at 120, collapsed at 300"; slow runs are named, but did not diverge."""
    named = [f"{result['verdict']} at {result['update']}" for result in results if result["verdict"] in DIVERGED]
    count = f"{len(named)} of {len(results)}"
    named += ["slow" for result in results if result["verdict"] == "slow"]
    return ": ".join([count, ", ".join(named)] if named else [count])


def table(results: dict[Run, Result], args: argparse.Namespace, data: Data) -> str:
    rows = [["method", "depth", "lr", "warmup", "train ppl", "valid ppl", "BLEU", "diverged", "of the grid"]]
    rows[0] += ["ms/update", "memory MB"]
    found = grouped(results, "method", "depth")
    for (method, depth), every in found.items():
        runs = best(results)[method, depth]
        own = {column: [results[run][column] for run in runs] for column in COLUMNS[7:-1]}
        bad = sum(results[run]["verdict"] in DIVERGED for run in every)
        edge = " (edge)" if len(args.lr) > 1 and runs[0].lr in (min(args.lr), max(args.lr)) else ""
        row = [method, depth, f"{runs[0].lr:g}{edge}", str(runs[0].warmup)]
        row += [spread(own["train_ppl"]), spread(own["valid_ppl"]), spread(own["bleu"])]
        row += [divergences([results[run] for run in runs]), f"{bad} of {len(every)}"]
        known = {column: [value for value in own[column] if value] for column in ("ms_per_update", "memory_mb")}
        rows.append([*row, *(f"{statistics.median(values):.0f}" if values else "-" for values in known.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    seeds = f"Mean ± standard deviation of {len(args.seeds)} seeds" if len(args.seeds) > 1 else "One seed"
    grid = math.prod(map(len, (args.methods, args.depths, args.lr, args.warmup, args.seeds)))
    decoding = " ".join([GENERATE, *data.remove_bpe])
    caveats = []
    if any("(edge)" in row[2] for row in rows):
        caveats += ["(edge): the lowest or highest learning rate of the grid; a better one may lie beyond it."]
    lost = [f"{method} {depth}" for depth in args.depths for method in args.methods if (method, depth) not in found]
    if lost:
        caveats += [f"No run finished: {', '.join(lost)}."]
    if args.jobs > 1:
        caveats += [f"ms/update is wall time, with up to {args.jobs} runs at work at once: no measure of speed."]
    return "\n".join(
        [
            *lines,
            "",
            f"{seeds}, {args.updates} updates each, at the learning rate and warmup with the lowest mean validation",
            f"perplexity. 'Of the grid' counts divergences at all of them ({len(results)} of {grid} runs finished).",
            *caveats,
            f"Perplexity without input: {data.unigram:.1f} (unigram), {data.positional:.1f} (positional).",
            f"BLEU is tokenised; decoding: {decoding}.",
            f"Data: {data.source}-{data.target}, {data.pairs:,} pairs, {data.tokens:,} target tokens"
            f" (fingerprint {data.fingerprint}).",
            *sorted({f"{result['environment']}." for result in results.values()}),
            "",
            "    " + shlex.join(["python", *sys.argv]),
            "",
        ]
    )


def write_tables(results: dict[Run, Result], args: argparse.Namespace, data: Data) -> str:
    """Write compare.csv and table.md, and return the second."""
    text = table(results, args, data)
    write(args.out / "compare.csv", table_csv(results))
    write(args.out / "table.md", text)
    return text


Lines = Dict[Tuple[str, str], Tuple[List[float], List[float]]]


def training_curves(results: dict[Run, Result]) -> Lines:
    """By depth and method, training perplexity by update of the best: geometric mean over the seeds."""
    lines = {}
    for (method, depth), runs in best(results).items():
        seeds = [results[run]["curve"] for run in runs]
        updates = [update for update, _ in min(seeds, key=len)]  # a seed may have stopped early
        losses = [smooth([math.nan if loss is None else loss for _, loss in curve[: len(updates)]]) for curve in seeds]
        lines[f"{depth} layers", method] = (
            updates,
            [perplexity(statistics.fmean(each)) or math.inf for each in zip(*losses)],
        )
    return lines


def by_rate(results: dict[Run, Result]) -> Lines:
    """By depth and method, validation perplexity by learning rate at its best warmup, where every seed has one."""
    lines = {}
    for (method, depth), every in grouped(results, "method", "depth").items():
        points: dict[float, float] = {}
        for (lr, _), runs in sorted(comparable(every).items()):
            points[lr] = min(points.get(lr, math.inf), mean_valid([results[run] for run in runs]))
        points = {lr: value for lr, value in points.items() if value < math.inf}
        lines[f"{depth} layers", method] = list(points), list(points.values())
    return lines


# --- command line -----------------------------------------------------------------------------------------------------


def several(kind: Callable[[str], Any], what: str, pattern: str) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        for item in text.split(","):
            if not re.fullmatch(pattern, item):
                raise argparse.ArgumentTypeError(f"{item!r} is no {what}")
        return list(dict.fromkeys(map(kind, text.split(","))))

    return parse


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The script's own options, and those for fairseq-train behind --."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def parse(argv: list[str]) -> argparse.Namespace:
    argv, extra = split_options(argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Verdicts. " + divergence.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s DATA-BIN --methods M,... --depths E-D,... --updates N --out DIR [options] [-- OPTIONS]",
    )
    known, whole, positive = ", ".join(METHODS), r"\d+", r"(?!0*\.?0*(e|$))(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
    methods = several(str, f"method; there are {known}", "|".join(METHODS))
    depths = several(str, "depth such as 6-6", r"[1-9]\d*-[1-9]\d*")
    option = parser.add_argument
    option("data", type=Path, metavar="DATA-BIN", help="folder that fairseq-preprocess wrote")
    option("--methods", type=methods, required=True, help=f"of {known}")
    option("--depths", type=depths, required=True, help="encoder and decoder layers, such as 6-6,18-18")
    rates = several(float, "learning rate", positive)
    option("--lr", type=rates, default="5e-4,1e-3,2e-3", help="peak learning rates (%(default)s)")
    warmups = several(int, "number of updates", whole)
    option(
        "--warmup",
        type=warmups,
        default="200",
        help="warmup updates (%(default)s); with inverse_sqrt they also set the decay",
    )
    option("--seeds", type=several(int, "seed", whole), default="1", help="seeds (%(default)s)")
    option("--updates", type=int, required=True, help="training updates of each run")
    option("--out", type=Path, required=True, help="folder for everything written")
    option("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    option("--threads", type=int, default=1, help="CPU threads of each run (%(default)s)")
    option("--no-bleu", action="store_true", help="do not translate the test set")
    args = parser.parse_args(argv)
    args.extra = extra
    for word in OURS.split():
        if word.startswith("--") and given(word, extra):
            parser.error(f"{word} is set by this script and cannot follow --")
    for word, why in REFUSED.items():
        if given(word, extra):
            parser.error(f"{word} cannot follow --: {why}")
    if 0 in args.warmup and not given("--lr-scheduler", extra):
        parser.error("--warmup 0 needs another scheduler: -- --lr-scheduler polynomial_decay --total-num-update N")
    if math.inf in args.lr:
        parser.error("--lr: a learning rate must be finite")
    for name in ("updates", "jobs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    data = Data(args.data, args.extra)
    if not (args.no_bleu or data.test):
        raise AdminError(f"{args.data} has no binarised test set to translate; give --no-bleu to do without")
    grid = itertools.product(args.depths, args.methods, args.lr, args.warmup, args.seeds)
    runs = [Run(method, depth, lr, warmup, seed) for depth, method, lr, warmup, seed in grid]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdminError(f"--out {args.out} cannot be made a folder ({error.strerror}); give another") from None
    with open(args.out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AdminError(
                f"another compare.py, or a run that it left behind, is at work in {args.out};"
                f" to find it: pgrep -af {args.out.name}"
            ) from None
        runner = Runner(args, data, lock)

        def interrupted(*_: Any) -> None:
            runner.stop()
            sys.exit("interrupted; the same command goes on")

        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, interrupted)
        results = runner.run_all(runs)
        if not results:
            raise AdminError("no run finished")
        text = write_tables(results, args, data)
        curves = panels(training_curves(results), data.unigram, "update", "training perplexity")
        write(args.out / "compare.png", curves)
        rates = panels(by_rate(results), data.unigram, "learning rate", "validation perplexity", ticks=args.lr)
        write(args.out / "lr.png", rates)
    print("\n" + text)
    if runner.failures:
        raise AdminError(f"{runner.failures} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()
