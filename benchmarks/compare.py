"""Train methods side by side, each at its own best learning rate and warmup, from the same seeds and budget.

    python -m benchmarks.compare DATA-BIN --methods postln,preln,admin --depths 6-6,18-18 --lr 5e-4,1e-3,2e-3 \\
        --warmup 200 --seeds 1,2 --updates 800 --out DIR -- --encoder-embed-dim 128 --max-tokens 1024 ...

Every combination is one run of fairseq-train in a folder of its own under DIR. For each method and depth, the learning
rate and warmup with the lowest mean validation perplexity over the seeds are the best, and only these runs translate
the test set. DIR gets table.md, compare.csv (one row per run), significance.csv, compare.png (training perplexity of
the best) and lr.png (validation perplexity by learning rate). Give the same command again to go on after an
interruption; with more methods, depths, rates, warmups or seeds it trains what is missing. Each run keeps its weights,
without optimizer state, and its translations on the disk.

Each method's translations are compared by sacrebleu's paired bootstrap with those of the best of --baselines at that
depth, the one with the highest BLEU. COMET=MODEL.ckpt in the environment adds COMET, by a model that is on this machine
and the command comet-score of unbabel-comet. Both come also of a finished comparison, by the same command.

What follows -- goes to fairseq-train: widths, --max-tokens, --optimizer and so on, the same for all. Where it does not
say otherwise: Adam (0.9, 0.98), inverse_sqrt, dropout 0.1, label smoothing 0.1, --max-tokens 4096, one worker. Options
behind a method's name are for this method alone, and make it a variant with results of its own:
--methods "postln,admin,admin --admin-init sqrt". They are split at blanks and hold no comma.

Your own methods are compared without a change here: --user-dir is the folder that registers them by @register_method.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

from admin_fairseq.architectures import METHODS
from admin_fairseq.errors import AdminError
from admin_fairseq.files import as_csv
from benchmarks import divergence, significance
from benchmarks.common import PLUGIN, comma_separated, command_line, depths, given, split_options, write
from benchmarks.data import Data
from benchmarks.divergence import DIVERGED, smooth
from benchmarks.figures import panels
from benchmarks.logs import Result, RunError, perplexity
from benchmarks.runs import BUILT_IN, FIXED, GENERATE, Run, Runner, import_methods
from benchmarks.tables import markdown, number, spread
from examples.common.score import CometError, check_comet

REFUSED = {
    "--disable-validation": "the best runs are those with the lowest validation perplexity",
    "--valid-subset": "the best runs are those with the lowest perplexity of the validation set",
    "--no-save": "the best runs translate the test set",
    "--encoder-normalize-before": "it would make every method Pre-LN, which is the method preln",
    "--decoder-normalize-before": "it would make every method Pre-LN, which is the method preln",
}
COLUMNS = (
    *("method", "depth", "lr", "warmup", "seed", "verdict", "update", "train_ppl", "valid_ppl", "bleu"),
    *("ms_per_update", "memory_mb", "parameters", "seconds", "best", "comet"),
)


# --- the best of the runs ---------------------------------------------------------------------------------------------


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


# --- tables -----------------------------------------------------------------------------------------------------------


def table_csv(results: dict[Run, Result]) -> str:
    chosen = {run for group in best(results).values() for run in group}
    rows = ({**result, **asdict(run), "best": "yes" if run in chosen else "no"} for run, result in results.items())
    return as_csv(rows, COLUMNS)


def divergences(results: list[Result]) -> str:
    """For example "2 of 3: plateau at 120, collapsed at 300"; slow runs are named, but did not diverge."""
    named = [f"{result['verdict']} at {result['update']}" for result in results if result["verdict"] in DIVERGED]
    count = f"{len(named)} of {len(results)}"
    named += ["slow" for result in results if result["verdict"] == "slow"]
    return ": ".join([count, ", ".join(named)] if named else [count])


def tests(results: dict[Run, Result], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each depth, every method's translations against those of its best baseline."""
    found = []
    for depth in args.depths:
        systems: dict[str, dict[int, significance.Translations]] = {}
        for method, runs in ((method, runs) for (method, its), runs in best(results).items() if its == depth):
            # what was cut off has no score, and of a score's translations the log may have been removed
            done = [run for run in runs if results[run]["bleu"] is not None]
            folders = {run.seed: args.out / run.name for run in done}
            kept = {seed: folder for seed, folder in folders.items() if (folder / "generate.log").exists()}
            systems[method] = {seed: significance.of_folder(folder) for seed, folder in kept.items()}
        found += [{"depth": depth, **row} for row in significance.against_best(systems, args.baselines)]
    return found


def tests_csv(rows: list[dict[str, Any]]) -> str:
    """One row a seed."""
    return as_csv(
        [
            {**row, "seed": seed, **difference._asdict()}
            for row in rows
            for seed, difference in zip(row["seeds"], row["differences"])
        ],
        ("method", "depth", "baseline", "seed", "bleu", "above", "p"),
    )


def table(results: dict[Run, Result], args: argparse.Namespace, data: Data, tested: str = "") -> str:
    rows = [["method", "depth", "lr", "warmup", "train ppl", "valid ppl", "BLEU", "diverged", "of the grid"]]
    rows[0][7:7] = ["COMET x 100"] if args.comet else []
    rows[0] += ["ms/update", "memory MB"]
    found = grouped(results, "method", "depth")
    for (method, depth), every in found.items():
        runs = best(results)[method, depth]
        own = {column: [results[run][column] for run in runs] for column in COLUMNS[7:-2]}
        bad = sum(results[run]["verdict"] in DIVERGED for run in every)
        edge = " (edge)" if len(args.lr) > 1 and runs[0].lr in (min(args.lr), max(args.lr)) else ""
        row = [method, depth, f"{runs[0].lr:g}{edge}", str(runs[0].warmup)]
        row += [spread(own["train_ppl"]), spread(own["valid_ppl"]), spread(own["bleu"])]
        comets = [results[run].get("comet") for run in runs]
        row += [spread([value and 100 * value for value in comets])] if args.comet else []
        row += [divergences([results[run] for run in runs]), f"{bad} of {len(every)}"]
        known = {column: [value for value in own[column] if value] for column in ("ms_per_update", "memory_mb")}
        rows.append([*row, *(f"{statistics.median(values):.0f}" if values else "-" for values in known.values())])
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
            markdown(rows, aligned=True),
            "",
            f"{seeds}, {args.updates} updates each, at the learning rate and warmup with the lowest mean validation",
            f"perplexity. 'Of the grid' counts divergences at all of them ({len(results)} of {grid} runs finished).",
            *caveats,
            *(["", tested, ""] if tested else []),
            f"Perplexity without input: {data.unigram:.1f} (unigram), {data.positional:.1f} (positional).",
            f"BLEU is tokenised; decoding: {decoding}.",
            *([f"COMET of detokenised text, by {args.comet}."] if args.comet else []),
            f"Data: {data.source}-{data.target}, {data.pairs:,} pairs, {data.tokens:,} target tokens"
            f" (fingerprint {data.fingerprint}).",
            *sorted({f"{result['environment']}." for result in results.values()}),
            "",
            "    " + command_line("compare"),
            "",
        ]
    )


def write_tables(results: dict[Run, Result], args: argparse.Namespace, data: Data, tested: str = "") -> str:
    """Write compare.csv and table.md, and return the second."""
    text = table(results, args, data, tested)
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


# --- training ---------------------------------------------------------------------------------------------------------


def train_and_translate(runner: Runner, runs: list[Run]) -> dict[Run, Result]:
    """Train what is not finished, then translate with the best; prints a line on each."""
    args = runner.args
    results = {run: result for run in runs if (result := runner.stored(run)) is not None}
    missing = [run for run in runs if run not in results]
    print(f"{len(runs)} runs, {len(results)} finished before; logs: {args.out}/<run>/train.log", flush=True)
    started, cost, done = time.monotonic(), sum(sum(run.layers) + 4 for run in missing), 0
    for count, (run, result) in enumerate(runner.parallel(runner.train, missing), 1):
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
        write_tables(results, args, runner.data)
    if not args.no_bleu:
        chosen = [run for group in best(results).values() for run in group if results[run]["bleu"] is None]
        chosen = [run for run in chosen if (args.out / run.name / "checkpoint_last.pt").exists()]
        for run, score in runner.parallel(runner.translate, chosen):
            results[run]["bleu"] = round(score, 2)
            write(args.out / run.name / "result.json", json.dumps(results[run]))
            print(f"{run.name}: BLEU {score:.1f}", flush=True)
        if args.comet:
            score_by_comet(runner, results)
    return {run: results[run] for run in runs if run in results}


def score_by_comet(runner: Runner, results: dict[Run, Result]) -> None:
    """Of the best runs that have translated, those that this model has not scored; one at a time, as it is large."""
    for run in [run for group in best(results).values() for run in group]:
        result, model = results[run], runner.args.comet
        if result["bleu"] is None or result.get("comet_model") == model:
            continue
        try:
            result.update(comet=runner.comet(run), comet_model=model)
        except RunError as error:
            raise AdminError(f"{error}; without COMET the same command goes on") from None
        write(runner.args.out / run.name / "result.json", json.dumps(result))
        print(f"{run.name}: COMET {result['comet']:.4f}", flush=True)


def is_baseline(method: str) -> bool:
    """Whether it is neither Admin nor the user's own."""
    return method in BUILT_IN and not method.startswith("admin")


# --- command line -----------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    argv, extra = split_options(argv)
    outside = argparse.ArgumentParser(add_help=False)
    outside.add_argument(
        "--user-dir",
        type=lambda text: Path(text).absolute(),
        default=PLUGIN,
        metavar="DIR",
        help="folder that registers methods of your own beside these (default: this plugin)",
    )
    import_methods(outside.parse_known_args(argv)[0].user_dir)  # before --methods is parsed
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        epilog="Verdicts. " + divergence.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s DATA-BIN --methods M,... --depths E-D,... --updates N --out DIR [options] [-- OPTIONS]",
        parents=[outside],
    )
    known, whole, positive = ", ".join(METHODS), r"\d+", r"(?!0*\.?0*(e|$))(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
    item = rf"\s*({'|'.join(map(re.escape, METHODS))})(\s+-\S+(\s+\S+)*)?\s*"
    methods = comma_separated(lambda item: " ".join(item.split()), f"method; there are {known}", item)
    option = parser.add_argument
    option("data", type=Path, metavar="DATA-BIN", help="folder that fairseq-preprocess wrote")
    option("--methods", type=methods, required=True, help=f"of {known}; options of a variant follow its method's name")
    option("--depths", type=depths, required=True, help="encoder and decoder layers, such as 6-6,18-18")
    rates = comma_separated(float, "learning rate", positive)
    option("--lr", type=rates, default="5e-4,1e-3,2e-3", help="peak learning rates (%(default)s)")
    warmups = comma_separated(int, "number of updates", whole)
    option(
        "--warmup",
        type=warmups,
        default="200",
        help="warmup updates (%(default)s); with inverse_sqrt they also set the decay",
    )
    option("--seeds", type=comma_separated(int, "seed", whole), default="1", help="seeds (%(default)s)")
    option("--updates", type=int, required=True, help="training updates of each run")
    option("--out", type=Path, required=True, help="folder for everything written")
    option("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    option("--threads", type=int, default=1, help="CPU threads of each run (%(default)s)")
    option("--baselines", type=methods, help="of --methods (default: those of this plugin that are not Admin's)")
    option("--no-bleu", action="store_true", help="do not translate the test set")
    args = parser.parse_args(argv)
    args.extra, args.comet = extra, None if args.no_bleu else os.environ.get("COMET")
    if args.baselines is None:
        args.baselines = [method for method in args.methods if is_baseline(method.split()[0])]
    for method in args.baselines:
        if method not in args.methods:
            parser.error(f"--baselines: {method} is not among --methods")
    variants = [method.split() for method in args.methods]
    for before, words in (("--", extra), *((name, options) for name, *options in variants)):
        for word in FIXED.split():
            if word.startswith("--") and given(word, words):
                parser.error(f"{word} is set by this script and cannot follow {before}")
        for word, why in REFUSED.items():
            if given(word, words):
                parser.error(f"{word} cannot follow {before}: {why}")
    if 0 in args.warmup and not all(given("--lr-scheduler", [*extra, *variant]) for variant in variants):
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
    if args.comet:
        try:
            check_comet(args.comet)  # before hours of training
        except CometError as error:
            raise AdminError(str(error)) from None
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
                f"another comparison, or a run that it left behind, is at work in {args.out};"
                f" to find it: pgrep -af {args.out.name}"
            ) from None
        runner = Runner(args, data, lock)

        def interrupted(*_: Any) -> None:
            runner.stop()
            sys.exit("interrupted; the same command goes on")

        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, interrupted)
        results = train_and_translate(runner, runs)
        if not results:
            raise AdminError("no run finished")
        tested = [] if args.no_bleu else tests(results, args)
        text = write_tables(results, args, data, significance.table(tested))
        write(args.out / "significance.csv", tests_csv(tested))
        curves = panels(training_curves(results), data.unigram, "update", "training perplexity")
        write(args.out / "compare.png", curves)
        rates = panels(by_rate(results), data.unigram, "learning rate", "validation perplexity", ticks=args.lr)
        write(args.out / "lr.png", rates)
    print("\n" + text)
    if runner.failures:
        raise AdminError(f"{runner.failures} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()
