"""Train methods side by side, each at its own best learning rate and warmup, from the same seeds and budget.

    python benchmarks/compare.py DATA-BIN --methods postln,preln,admin --depths 6-6,18-18 --lr 5e-4,1e-3,2e-3 \\
        --warmup 200 --seeds 1,2 --updates 800 --out DIR -- --encoder-embed-dim 128 --max-tokens 1024 ...

Every combination is one fairseq-train in a folder of its own under DIR. Of each method and depth the learning rate and
warmup with the lowest mean validation perplexity over the seeds are the best, and only these translate the test set.
DIR gets compare.csv (a row a run), table.md, compare.png (training curves) and lr.png (validation perplexity by
learning rate). Give the same command again to go on after an interruption; a longer list of methods, depths, rates or
seeds trains what is missing.

What follows -- goes to fairseq-train: widths, --max-tokens, --optimizer and so on, the same for all. Unless they say
otherwise it trains with Adam (0.9, 0.98), inverse_sqrt, dropout 0.1, label smoothing 0.1 and --max-tokens 4096.

Verdicts, from the training loss without label smoothing, averaged over neighbouring log lines:
  non-finite  the loss or its gradient became infinite or NaN, and fairseq stopped
  loss-scale  the fp16 loss scale shrank to its minimum, and fairseq stopped
  plateau     it ended where the source and the words before were of no use, and no longer fell
  collapsed   it made use of them, then rose back to where they are of none, and stayed
  slow        it ended there too, but was still falling: the updates are too few to tell
  trained     none of these
Where that is: a model that ignores its input reaches the perplexity of the target words' own frequencies (unigram), and
at best that of their frequencies at each position of the sentence (positional). To end above the latter is to have
learnt nothing from the input. Both are computed from DATA-BIN, sentence ends included.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import io
import itertools
import json
import logging
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
from typing import Any, Iterable

import numpy as np
import sacrebleu
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
logging.disable(logging.INFO)  # importing fairseq turns on everybody's debug lines

import fairseq  # noqa: E402
from fairseq.data import Dictionary, data_utils  # noqa: E402
from fairseq.models import ARCH_MODEL_REGISTRY  # noqa: E402

import admin_fairseq  # noqa: E402
from admin_fairseq import AdminError  # noqa: E402

STOCK = {
    "postln": ("--arch", "transformer"),
    "preln": ("--arch", "transformer", "--encoder-normalize-before", "--decoder-normalize-before"),
}
DEFAULTS = (
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr-scheduler", "inverse_sqrt", "--dropout", "0.1"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--max-tokens", "4096"),
    *("--required-batch-size-multiple", "1", "--num-workers", "0"),
)
OURS = (
    *("--arch", "--encoder-layers", "--decoder-layers", "--lr", "--warmup-updates", "--seed", "--max-update"),
    *("--save-dir", "--user-dir", "--log-format", "--log-interval", "--validate-interval", "--save-interval"),
)
GENERATE = ("--beam", "5", "--max-len-a", "1.2", "--max-len-b", "10", "--required-batch-size-multiple", "1")
DIVERGED = ("plateau", "collapsed", "non-finite", "loss-scale")
FLAT = 0.05  # nats: a curve that falls by less than 5% of its perplexity in a third of the training is flat
USED_CONTEXT = 0.2  # nats below the positional level, so that noise around it is no collapse


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
    def layers(self) -> int:
        return sum(map(int, self.depth.split("-")))


# --- what the loss says ------------------------------------------------------------------------------------------


def context_free_perplexities(sentences: Iterable[np.ndarray], vocabulary: int) -> tuple[float, float]:
    """Lowest perplexities that models without input reach on these targets: (unigram, positional).

    ``sentences`` are arrays of token ids [length], each with its sentence end. The first model knows the frequency of
    every token, the second its frequency at every position (from the 256th on, taken together). Both are conditional
    entropies of the data, H(token) and H(token | position).
    """
    counts = np.zeros((256, vocabulary), dtype=np.int64)
    sentences = iter(sentences)
    while True:
        chunk = list(itertools.islice(sentences, 100_000))
        if not chunk:
            break
        positions = np.concatenate([np.minimum(np.arange(len(sentence)), 255) for sentence in chunk])
        tokens = np.concatenate(chunk)
        counts += np.bincount(positions * vocabulary + tokens, minlength=counts.size).reshape(counts.shape)

    def entropy(frequencies: np.ndarray) -> float:
        shares = frequencies[frequencies > 0] / frequencies.sum()
        return float(-(shares * np.log(shares)).sum())

    return math.exp(entropy(counts.sum(0))), math.exp(entropy(counts) - entropy(counts.sum(1)))


def smooth(losses: list[float]) -> list[float]:
    """Mean over the neighbouring twentieth of the curve on either side."""
    half = len(losses) // 20
    return [statistics.fmean(losses[max(i - half, 0) : i + half + 1]) for i in range(len(losses))]


def final_loss(losses: list[float]) -> float:
    """Mean over the last tenth of the curve."""
    return statistics.fmean(losses[-max(len(losses) // 10, 1) :])


def judge(curve: list[tuple[int, float]], positional: float, error: str = "") -> tuple[str, int | None]:
    """What became of a training: (verdict, the update at which it diverged).

    ``curve`` holds (update, training loss in nats), ``positional`` the positional perplexity, ``error`` the
    FloatingPointError with which fairseq stopped, if it did. The verdicts are those of this script's docstring.
    """
    for update, loss in curve:
        if not math.isfinite(loss):
            return "non-finite", update
    if error:  # after the last update that was logged
        return "loss-scale" if "loss scale" in error else "non-finite", curve[-1][0] if curve else 0
    updates, losses = zip(*curve)
    smoothed, final, level = smooth(losses), final_loss(losses), math.log(positional)
    if final < level:
        return "trained", None
    if min(smoothed) < level - USED_CONTEXT:
        return "collapsed", updates[max(i for i, loss in enumerate(smoothed) if loss < level)]
    if smoothed[len(smoothed) * 2 // 3] - final > FLAT:
        return "slow", None
    return "plateau", next(update for update, loss in zip(updates, smoothed) if loss < final + FLAT)


# --- data --------------------------------------------------------------------------------------------------------


class Data:
    """A data-bin: its fingerprint, languages, context-free perplexities, and how its words were split."""

    def __init__(self, folder: Path, extra: list[str]) -> None:
        languages = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        languages.add_argument("-s", "--source-lang")
        languages.add_argument("-t", "--target-lang")
        asked, _ = languages.parse_known_args(extra)
        inferred = data_utils.infer_language_pair(str(folder)) if folder.is_dir() else (None, None)
        self.folder, self.source, self.target = folder, *(asked.source_lang, asked.target_lang)
        self.source, self.target = self.source or inferred[0], self.target or inferred[1]
        found = [
            f"train.{pair}.{self.target}" for pair in (f"{self.source}-{self.target}", f"{self.target}-{self.source}")
        ]
        found = [name for name in found if (folder / f"{name}.idx").exists()]
        if not found:
            raise AdminError(f"{folder} is no data-bin of fairseq-preprocess: no train.<source>-<target>.<target>.idx")
        files = sorted([*folder.glob("dict.*.txt"), *folder.glob("*.idx"), *folder.glob("*.bin")])
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.name.encode() + file.read_bytes())
        self.fingerprint = digest.hexdigest()[:16]
        dictionary = Dictionary.load(str(folder / f"dict.{self.target}.txt"))
        dataset = data_utils.load_indexed_dataset(str(folder / found[0]), dictionary)
        sentences = (dataset[i].numpy() for i in range(len(dataset)))
        self.unigram, self.positional = context_free_perplexities(sentences, len(dictionary))
        self.pairs, self.tokens = len(dataset), int(dataset.sizes.sum())
        self.remove_bpe = []
        if any(symbol.endswith("@@") for symbol in dictionary.symbols):
            self.remove_bpe = ["--remove-bpe"]
        elif any(symbol.startswith("▁") for symbol in dictionary.symbols):
            self.remove_bpe = ["--remove-bpe", "sentencepiece"]


# --- sub-processes -----------------------------------------------------------------------------------------------


class Commands:
    """fairseq's commands as sub-processes that end when this one does."""

    def __init__(self, threads: int, lock: Any) -> None:
        self.environment = dict(os.environ, PYTHONWARNINGS="ignore", PYTHONUNBUFFERED="1", OMP_NUM_THREADS=str(threads))
        # A training that outlives this process, as after kill -9, keeps the folder locked.
        self.lock = lock
        self.live: set[subprocess.Popen] = set()
        self.guard, self.stopped = threading.Lock(), False

    def run(self, log: Path, program: str, *arguments: Any) -> tuple[list[tuple[float, str]], int, float]:
        """Run it and write ``log``: (its lines with the time of each, exit code, peak resident set in MB)."""
        command = [os.path.join(os.path.dirname(sys.executable), program), *map(str, arguments)]
        with self.guard:
            if self.stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self.environment,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
            self.live.add(process)
        lines = []
        with open(log, "w", encoding="utf-8") as out:
            out.write(shlex.join(command) + "\n")
            for line in process.stdout:
                lines.append((time.monotonic(), line))
                out.write(line)
                out.flush()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        with self.guard:
            self.live.discard(process)
            if self.stopped:
                raise KeyboardInterrupt
        return lines, process.returncode, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def stop(self) -> None:
        with self.guard:
            self.stopped = True
            for process in self.live:
                os.killpg(process.pid, signal.SIGKILL)


class RunError(Exception):
    """A command failed for another reason than a divergence; the message is one line."""


def failed(log: Path, lines: list[tuple[float, str]], code: int) -> RunError:
    last = next((line.strip() for _, line in reversed(lines) if line.strip()), "no output")
    return RunError(f"exit code {code}: {last[:300]} (all of it in {log})")


def write(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


# --- one run -----------------------------------------------------------------------------------------------------


def settings(run: Run, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Everything that a result depends on and that may differ between two calls of this script."""
    return {**asdict(run), "updates": args.updates, "data": data.fingerprint, "options": args.extra}


def stored(run: Run, args: argparse.Namespace, data: Data) -> dict[str, Any] | None:
    """The result of an earlier call, None if the run did not finish.

    Raises:
        AdminError: it came from other settings.
    """
    file = args.out / run.name / "result.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    wanted = settings(run, args, data)
    for key, value in wanted.items():
        if result["settings"].get(key) != value:
            raise AdminError(
                f"{file.parent} was run with {key} {result['settings'].get(key)}, not {value}: choose another --out"
            )
    return result


def train(run: Run, args: argparse.Namespace, data: Data, commands: Commands) -> dict[str, Any]:
    """Train, and write result.json.

    Raises:
        RunError: fairseq-train failed otherwise than by diverging.
    """
    folder = args.out / run.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    encoder, decoder = run.depth.split("-")
    started = time.monotonic()
    lines, code, memory = commands.run(
        *(folder / "train.log", "fairseq-train", data.folder, *DEFAULTS, *args.extra),
        *("--user-dir", ROOT / "admin_fairseq", *STOCK.get(run.method, ("--arch", f"transformer_{run.method}"))),
        *("--encoder-layers", encoder, "--decoder-layers", decoder, "--lr", f"{run.lr:g}"),
        *("--warmup-updates", run.warmup, "--seed", run.seed, "--max-update", args.updates, "--save-dir", folder),
        *("--log-format", "json", "--log-interval", max(args.updates // 100, 1)),
        # one validation and one checkpoint, at the end
        *("--validate-interval", 10**9, "--save-interval", 10**9, "--no-epoch-checkpoints"),
        "--no-save-optimizer-state",
    )
    log = "".join(line for _, line in lines)
    error = re.search(r"^FloatingPointError: (.*)", log, re.M)
    if code != 0 and not error:
        raise failed(folder / "train.log", lines, code)
    curve, times, free = [], [], []
    for moment, line in lines:
        found = re.search(r"\| train_inner \| (\{.*\})", line)
        if found:
            row = json.loads(found[1])
            curve.append((int(row["num_updates"]), nats(row)))
            times.append(moment)
            free += [float(row["gb_free"])] if "gb_free" in row else []
    if not curve and not error:
        raise RunError(f"no training loss in {folder / 'train.log'}")
    verdict, at = judge(curve, data.positional, error[1] if error else "")
    paces = [
        (times[i] - times[i - 1]) / (curve[i][0] - curve[i - 1][0])
        for i in range(1, len(curve))
        if curve[i][0] > curve[i - 1][0]
    ]
    total = re.search(r"total memory = ([\d.]+) GB", log)
    valid = re.search(r"\| valid \| (\{.*\})", log)
    parameters = re.search(r"num\. shared model params: ([\d,]+)", log)
    for spare in ("checkpoint_best.pt", "crash.pt"):  # the first is a copy of checkpoint_last.pt
        (folder / spare).unlink(missing_ok=True)
    result = {
        "settings": settings(run, args, data),
        "verdict": verdict,
        "update": at,
        "error": error[1] if error else None,
        "train_ppl": perplexity(final_loss([loss for _, loss in curve])) if curve else None,
        "valid_ppl": perplexity(nats(json.loads(valid[1]), "valid_")) if valid else None,
        "bleu": None,
        "ms_per_update": round(1000 * statistics.median(paces), 1) if paces else None,
        "memory_mb": round((float(total[1]) - min(free)) * 1024 if total and free else memory),
        "parameters": int(parameters[1].replace(",", "")) if parameters else None,
        "seconds": round(time.monotonic() - started),
        "environment": environment(),
        "curve": [(update, loss if math.isfinite(loss) else None) for update, loss in curve],
    }
    write(folder / "result.json", json.dumps(result))
    return result


def nats(row: dict[str, Any], prefix: str = "") -> float:
    """Loss without label smoothing; fairseq logs bits, and nll_loss only where it differs from the loss."""
    return float(row.get(f"{prefix}nll_loss", row[f"{prefix}loss"])) * math.log(2)


def perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None  # also None for NaN


def translate(run: Run, args: argparse.Namespace, data: Data, commands: Commands) -> float:
    """BLEU of the run's translation of the test set, against the tokenised reference.

    Raises:
        RunError: fairseq-generate failed.
    """
    folder = args.out / run.name
    lines, code, _ = commands.run(
        *(folder / "generate.log", "fairseq-generate", data.folder, "--user-dir", ROOT / "admin_fairseq", *GENERATE),
        *("--path", folder / "checkpoint_last.pt", "-s", data.source, "-t", data.target, *data.remove_bpe),
        *(["--cpu"] if "--cpu" in args.extra else []),
    )
    if code != 0:
        raise failed(folder / "generate.log", lines, code)
    log = "".join(line for _, line in lines)
    references = dict(re.findall(r"^T-(\d+)\t(.*)$", log, re.M))
    hypotheses = dict(re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", log, re.M))
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)
    return metric.corpus_score([hypotheses[key] for key in references], [list(references.values())]).score


def environment() -> str:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        cpu = found[1] if found else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of {cpu}"
    versions = f"admin_fairseq {admin_fairseq.__version__}, fairseq {fairseq.__version__}, torch {torch.__version__}"
    return f"{versions}, Python {platform.python_version()}; {device}"


# --- all runs ----------------------------------------------------------------------------------------------------


def run_all(runs: list[Run], args: argparse.Namespace, data: Data, commands: Commands) -> dict[Run, dict[str, Any]]:
    """Train what is not finished, then translate with the best; a line for each. Failures are said and left out."""
    results = {run: result for run in runs if (result := stored(run, args, data)) is not None}
    missing = [run for run in runs if run not in results]
    print(f"{len(runs)} runs, {len(results)} of them finished before; logs in {args.out}/<run>/train.log", flush=True)
    started, cost, done = time.monotonic(), sum(run.layers + 4 for run in missing), 0

    def parallel(function: Any, todo: list[Run]) -> Iterable[tuple[Run, Any]]:
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {pool.submit(function, run, args, data, commands): run for run in todo}
            try:
                for future in as_completed(futures):
                    try:
                        yield futures[future], future.result()
                    except RunError as error:
                        args.failures += 1
                        print(f"error: {futures[future].name}: {error}", file=sys.stderr, flush=True)
            except BaseException:
                commands.stop()
                for future in futures:
                    future.cancel()
                raise

    for count, (run, result) in enumerate(parallel(train, missing), 1):
        results[run] = result
        done += run.layers + 4
        left = (time.monotonic() - started) * (cost - done) / done
        at = f" at update {result['update']}" if result["update"] is not None else ""
        print(
            f"[{count}/{len(missing)}] {run.name}: {result['verdict']}{at}, perplexity {number(result['train_ppl'])}"
            f" (valid {number(result['valid_ppl'])}), {number(result['ms_per_update'])} ms an update,"
            f" {result['memory_mb']} MB, {result['seconds']} s; {left / 60:.0f} min left",
            flush=True,
        )
    if not args.no_bleu:
        chosen = [run for group in best(results).values() for run in group if results[run]["bleu"] is None]
        chosen = [run for run in chosen if (args.out / run.name / "checkpoint_last.pt").exists()]
        for run, score in parallel(translate, chosen):
            results[run]["bleu"] = score
            write(args.out / run.name / "result.json", json.dumps(results[run]))
            print(f"{run.name}: BLEU {score:.1f}", flush=True)
    return {run: results[run] for run in runs if run in results}


def best(results: dict[Run, dict[str, Any]]) -> dict[tuple[str, str], list[Run]]:
    """By method and depth, the runs (one a seed) of the learning rate and warmup with the lowest mean perplexity."""
    chosen = {}
    for (method, depth), runs in grouped(results, lambda run: (run.method, run.depth)).items():
        candidates = grouped(runs, lambda run: (run.lr, run.warmup)).values()
        chosen[method, depth] = min(candidates, key=lambda group: mean_valid([results[run] for run in group]))
    return chosen


def grouped(runs: Iterable[Run], key: Any) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def mean_valid(results: list[dict[str, Any]]) -> float:
    """Mean validation perplexity, infinite if a run has none."""
    values = [result["valid_ppl"] for result in results]
    return math.inf if None in values else statistics.fmean(values)


# --- output ------------------------------------------------------------------------------------------------------

COLUMNS = "method depth lr warmup seed verdict update train_ppl valid_ppl bleu ms_per_update memory_mb parameters"
COLUMNS = (*COLUMNS.split(), "seconds", "best")


def table_csv(results: dict[Run, dict[str, Any]]) -> str:
    chosen = {run for group in best(results).values() for run in group}
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(COLUMNS)
    for run, result in results.items():
        row = {**asdict(run), **result, "best": "yes" if run in chosen else "no"}
        rows.writerow(["" if row[column] is None else row[column] for column in COLUMNS])
    return out.getvalue()


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return number(statistics.fmean(known)) + (f" ± {number(statistics.stdev(known))}" if len(known) > 1 else "")


def diverged(results: list[dict[str, Any]]) -> str:
    """For example 2 of 3: plateau at 120, collapsed at 300; slow runs are named but did not diverge."""
    bad = [result for result in results if result["verdict"] in DIVERGED]
    named = [f"{result['verdict']} at {result['update']}" for result in bad]
    named += ["slow" for result in results if result["verdict"] == "slow"]
    return f"{len(bad)} of {len(results)}" + (": " + ", ".join(named) if named else "")


def table(results: dict[Run, dict[str, Any]], args: argparse.Namespace, data: Data) -> str:
    header = (
        *("method", "depth", "best lr", "warmup", "train ppl", "valid ppl", "BLEU", "diverged, of the best's seeds"),
        *("of all runs", "ms/update", "memory MB"),
    )
    rows = [header]
    for (method, depth), runs in best(results).items():
        own = [results[run] for run in runs]
        every = [result for run, result in results.items() if (run.method, run.depth) == (method, depth)]
        bad = sum(result["verdict"] in DIVERGED for result in every)
        columns = {key: [result[key] for result in own] for key in COLUMNS if key in own[0]}
        rows.append(
            (
                *(method, depth, f"{runs[0].lr:g}", str(runs[0].warmup), spread(columns["train_ppl"])),
                *(spread(columns["valid_ppl"]), spread(columns["bleu"]), diverged(own), f"{bad} of {len(every)}"),
                *(number(statistics.median(columns["ms_per_update"])), str(max(columns["memory_mb"]))),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    seeds = "one seed" if len(args.seeds) == 1 else f"{len(args.seeds)} seeds, mean ± standard deviation"
    notes = [
        "",
        f"{args.updates} updates each; {seeds}. Best: the lowest mean validation perplexity on the grid.",
        f"Without any input: perplexity {data.unigram:.1f} (unigram), {data.positional:.1f} (positional).",
        "BLEU: tokenised, fairseq-generate " + " ".join((*GENERATE, *data.remove_bpe)) + ".",
        f"Data: {data.source}-{data.target}, {data.pairs:,} pairs, {data.tokens:,} target tokens, {data.fingerprint}.",
        "",
        "    " + shlex.join(["python", *sys.argv]),
        "",
        *(f"- {line}" for line in sorted({result["environment"] for result in results.values()})),
    ]
    return "\n".join(lines + notes) + "\n"


# --- figures -----------------------------------------------------------------------------------------------------

# Okabe-Ito; with more methods than colours the dashes differ too
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", "-.", ":")


def draw(results: dict[Run, dict[str, Any]], args: argparse.Namespace, data: Data) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        method: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)]}
        for i, method in enumerate(args.methods)
    }
    chosen = best(results)
    for name, ylabel in (("compare", "training perplexity"), ("lr", "validation perplexity")):
        figure, axes = pyplot.subplots(
            *(1, len(args.depths)),
            figsize=(1 + 4 * len(args.depths), 4.2),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, depth in zip(axes[0], args.depths):
            for method in args.methods:
                if name == "compare" and (method, depth) in chosen:
                    curves = [results[run]["curve"] for run in chosen[method, depth]]
                    length = min(map(len, curves))
                    updates = [update for update, _ in curves[0][:length]]
                    losses = [
                        statistics.fmean(values)
                        for values in zip(*([loss or math.nan for _, loss in curve] for curve in curves))
                    ]
                    axis.plot(updates, [math.exp(loss) for loss in smooth(losses)], label=method, **styles[method])
                elif name == "lr":
                    points = {}
                    own = [run for run in results if (run.method, run.depth) == (method, depth)]
                    for (lr, _), runs in grouped(own, lambda run: (run.lr, run.warmup)).items():
                        points[lr] = min(points.get(lr, math.inf), mean_valid([results[run] for run in runs]))
                    axis.plot(list(points), list(points.values()), marker="o", label=method, **styles[method])
            axis.axhline(data.unigram, color="grey", linewidth=1, linestyle="--")
            axis.set(title=depth, xlabel="update" if name == "compare" else "learning rate", yscale="log")
            if name == "lr":
                axis.set_xscale("log")
        axes[0][0].set_ylabel(ylabel)
        axes[0][-1].legend()
        out = io.BytesIO()
        figure.savefig(out, dpi=150, format="png")
        pyplot.close(figure)
        write(args.out / f"{name}.png", out.getvalue())


# --- command line ------------------------------------------------------------------------------------------------


def listed(kind: Any, what: str, pattern: str) -> Any:
    def parse(text: str) -> list[Any]:
        items = text.split(",")
        if not all(re.fullmatch(pattern, item) for item in items):
            raise argparse.ArgumentTypeError(f"{text} is no list of {what}")
        return list(dict.fromkeys(map(kind, items)))

    return parse


def parse(argv: list[str]) -> argparse.Namespace:
    argv, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s DATA-BIN --methods M,... --depths E-D,... --updates N --out DIR [options] [-- fairseq-train's]",
    )
    parser.add_argument("data", type=Path, metavar="DATA-BIN", help="folder that fairseq-preprocess wrote")
    parser.add_argument(
        "--methods",
        type=listed(str, "method names such as postln,preln,admin", r"\w+"),
        required=True,
        help="postln, preln, admin, ...: METHOD is fairseq's --arch transformer_METHOD",
    )
    parser.add_argument(
        "--depths",
        type=listed(str, "depths such as 6-6,18-18", r"[1-9]\d*-[1-9]\d*"),
        required=True,
        help="encoder and decoder layers, as 6-6,18-18",
    )
    rate = r"(\d+\.?\d*|\.\d+)(e-?\d+)?"
    parser.add_argument(
        "--lr",
        type=listed(float, "learning rates", rate),
        default=[5e-4, 1e-3, 2e-3],
        help="peak learning rates (5e-4,1e-3,2e-3)",
    )
    parser.add_argument(
        "--warmup", type=listed(int, "numbers of updates", r"\d+"), default=[200], help="warmup updates (200)"
    )
    parser.add_argument("--seeds", type=listed(int, "seeds", r"\d+"), default=[1], help="seeds (1)")
    parser.add_argument("--updates", type=int, required=True, help="training updates of each run")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (1)")
    parser.add_argument("--no-bleu", action="store_true", help="do not translate the test set")
    args = parser.parse_args(argv)
    args.extra, args.failures = extra, 0
    for method in args.methods:
        if method not in STOCK and f"transformer_{method}" not in ARCH_MODEL_REGISTRY:
            parser.error(f"--methods: there is no architecture transformer_{method}")
    for option in OURS:
        if any(word.split("=")[0] == option for word in extra):
            parser.error(f"{option} is set by this script; it cannot follow --")
    for option in ("updates", "jobs", "threads"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    data = Data(args.data, args.extra)
    runs = [
        Run(method, depth, lr, warmup, seed)
        for depth, method, lr, warmup, seed in itertools.product(
            args.depths, args.methods, args.lr, args.warmup, args.seeds
        )
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AdminError(
                f"another compare.py, or a training that it left behind, is at work in {args.out}"
            ) from None
        for number_ in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number_, lambda *_: sys.exit(1))
        results = run_all(runs, args, data, Commands(args.threads, lock))
        if not results:
            raise AdminError("no run finished")
        write(args.out / "compare.csv", table_csv(results))
        text = table(results, args, data)
        write(args.out / "table.md", text)
        draw(results, args, data)
    print("\n" + text)
    if args.failures:
        raise AdminError(f"{args.failures} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
