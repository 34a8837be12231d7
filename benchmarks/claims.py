"""The paper's side experiments on optimizers, at a size for a few cores: which optimizers train a Transformer, and how
much warmup it needs.

    python -m benchmarks.claims DATA-BIN --experiment sgd --updates 400 --out DIR -- --encoder-embed-dim 64 ...

  sgd        SGD with momentum beside Adam, RAdam and NovoGrad, each over a grid of learning rates. The paper
             (Liu et al. 2020, abstract and section 3): SGD fails to train Transformers, and gradients that
             vanish are not the cause; adaptive optimizers train.
  no-warmup  learning rate x Adam's beta2 with one update of warmup and linear decay to zero, the grid of the authors'
             "No Warmup" study (theirs: lr 1e-4 to 5e-4, beta2 0.99, 0.995, 0.999, 100,000 updates).
  warmup     the number of warmup updates at one peak learning rate, with linear decay to zero. (After inverse_sqrt's
             warmup the learning rate depends on its length.)

Each is a set of runs of benchmarks.compare in DIR/<experiment>/<variant>, which can be stopped and go on like those.
DIR gets <experiment>.csv (one row per run) and <experiment>.png (validation perplexity; one panel per method). What
follows -- goes to fairseq-train.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from admin_fairseq.errors import AdminError
from admin_fairseq.files import as_csv
from benchmarks.common import child_environment, split_options, write
from benchmarks.data import Data
from benchmarks.figures import panels
from benchmarks.tables import number


class Variant(NamedTuple):
    """A label, options of benchmarks.compare and of fairseq-train; {updates} is the number of updates."""

    label: str
    compare: str
    fairseq: str


ADAM = "--optimizer adam --adam-betas '(0.9, 0.98)'"
LINEAR = "--lr-scheduler polynomial_decay --total-num-update {updates}"
EXPERIMENTS = {
    "sgd": [
        Variant("SGD", "--lr 1e-2,1e-1,1", "--optimizer sgd --momentum 0.9"),
        Variant("Adam", "--lr 5e-4,1e-3,2e-3", ADAM),
        Variant("RAdam", "--lr 5e-4,1e-3,2e-3", "--optimizer radam --adam-betas '(0.9, 0.98)'"),
        Variant("NovoGrad", "--lr 5e-3,1e-2,2e-2", "--optimizer novograd --adam-betas '(0.9, 0.98)'"),
    ],
    "no-warmup": [
        Variant(
            f"beta2 {beta2}",
            "--warmup 1 --lr 5e-4,1e-3,2e-3,4e-3",
            f"--optimizer adam --adam-betas '(0.9, {beta2})' {LINEAR}",
        )
        for beta2 in (0.98, 0.995, 0.999)
    ],
    "warmup": [Variant("Adam", "--warmup 1,25,50,100,200 --lr 2e-3", f"{ADAM} {LINEAR}")],
}


def train_variants(name: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Every run of an experiment, as compare.csv has it, with the column "variant".

    NovoGrad is left out, and this said, where its package is not installed.

    Raises:
        AdminError: benchmarks.compare failed; it has said why.
    """
    rows, variants = [], EXPERIMENTS[name]
    if importlib.util.find_spec("pytorch_optimizer") is None:
        for variant in variants:
            if "--optimizer novograd" in variant.fairseq:
                print(f"{variant.label} is left out, it needs a package: pip install pytorch-optimizer", flush=True)
        variants = [variant for variant in variants if "--optimizer novograd" not in variant.fairseq]
    for variant in variants:
        folder = args.out / name / re.sub(r"\W+", "-", variant.label.lower())
        words = shlex.split(variant.fairseq.format(updates=args.updates)) + args.extra
        command = [sys.executable, "-m", "benchmarks.compare", args.data, "--methods", args.methods]
        command += ["--depths", args.depth, "--updates", args.updates, "--seeds", args.seeds, "--out", folder]
        command += ["--jobs", args.jobs, "--no-bleu", *shlex.split(variant.compare), "--", *words]
        print(f"== {name}: {variant.label}", flush=True)
        if subprocess.run([str(word) for word in command], env=child_environment()).returncode:
            raise AdminError(f"{variant.label}: see above; the same command goes on")
        with open(folder / "compare.csv", encoding="utf-8", newline="") as file:
            rows += [{"variant": variant.label, **row} for row in csv.DictReader(file)]
    return rows


def main() -> None:
    argv, extra = split_options(sys.argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA-BIN", help="folder that fairseq-preprocess wrote")
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--methods", default="postln,preln,admin", help="as in benchmarks.compare (%(default)s)")
    parser.add_argument("--depth", default="6-6", help="encoder and decoder layers (%(default)s)")
    parser.add_argument("--seeds", default="1", help="seeds (%(default)s)")
    parser.add_argument("--updates", type=int, required=True, help="training updates of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    args = parser.parse_args(argv)
    args.extra = extra
    rows = train_variants(args.experiment, args)
    write(args.out / f"{args.experiment}.csv", as_csv(rows, rows[0]))
    axis = "warmup" if args.experiment == "warmup" else "lr"
    lines = {}
    for method, variant in dict.fromkeys((row["method"], row["variant"]) for row in rows):
        own = [row for row in rows if (row["method"], row["variant"]) == (method, variant)]
        points = {float(row[axis]): [] for row in own}
        for row in own:
            points[float(row[axis])].append(float(row["valid_ppl"] or "inf"))
        lines[method, variant] = list(points), [statistics.fmean(values) for values in points.values()]
    ticks = sorted({x for xs, _ in lines.values() for x in xs})
    label = {"lr": "learning rate", "warmup": "warmup updates"}[axis]
    unigram = Data(args.data, extra).unigram
    write(args.out / f"{args.experiment}.png", panels(lines, unigram, label, "validation perplexity", ticks))
    for row in rows:
        at = f" at {row['update']}" if row["update"] else ""
        print(
            f"{row['variant']:12} {row['method']:8} lr {row['lr']:>6} warmup {row['warmup']:>4}: {row['verdict']}{at},"
            f" valid perplexity {number(float(row['valid_ppl'] or 'inf'))}"
        )


if __name__ == "__main__":
    main()
