"""The study of how omega and the weights should start: train its runs, keep their results, write docs/reproduction.md.

    python -m benchmarks.study train multi30k=DATA-BIN --out DIR [--only short-18-18] [--jobs 2]
    python -m benchmarks.study page

The first trains what PLAN lists and is not finished yet, by benchmarks.compare in DIR/<data>/<regime>, and after each
part of the plan writes all results to benchmarks/records/study.jsonl, where those of other data stay. It can be stopped
at any time; the same command goes on with the next run. The second writes docs/reproduction.md from that file alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from admin_fairseq.errors import AdminError
from admin_fairseq.profile_file import STACKS
from benchmarks import compare, significance
from benchmarks.common import ROOT, child_environment, write
from benchmarks.compare import mean_valid
from benchmarks.runs import Run
from benchmarks.tables import markdown, number, spread

RECORD = ROOT / "benchmarks" / "records" / "study.jsonl"
PAGE = ROOT / "docs" / "reproduction.md"
PROSE = Path(__file__).with_name("reproduction.md.in")  # what PAGE says between its tables
MODEL = shlex.split(
    "--cpu --share-all-embeddings --encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-attention-heads 4"
    " --decoder-attention-heads 4 --max-tokens 1024"
)


class Regime(NamedTuple):
    warmup: int
    updates: int

    def __str__(self) -> str:
        return f"{self.warmup:,} updates of warmup, {self.updates:,} in all"


REGIMES = {"short": Regime(200, 600), "paper": Regime(1200, 3200)}
WHEN = ("start", "end")  # of training
WEIGHTS = {"authors": "the authors'", "fairseq": "today's fairseq's"}
NAMES = {  # of the methods, in the order of the tables
    "postln": "Post-LN",
    "preln": "Pre-LN",
    "admin --admin-margin 1": "Admin, K = 1 (the paper's)",
    "admin --admin-margin 4": "Admin, K = 4",
    "admin --admin-margin 16": "Admin, K = 16 (default)",
    "admin --admin-margin 64": "Admin, K = 64",
    "admin --admin-init logn": "Admin, logn",
    "deepnorm": "DeepNorm",
    "rezero": "ReZero",
}


class Part(NamedTuple):
    """Runs of one regime and depth: these methods at these rates, from these seeds; all by the same weights' start."""

    regime: str
    depth: str
    methods: str  # as in NAMES, by commas
    rates: str
    seeds: str = "1"
    weights: str = "authors"
    bleu: bool = False

    @property
    def name(self) -> str:
        return f"{self.regime}-{self.depth}"


BOTH = "preln,admin --admin-margin 16"
MARGINS = "admin --admin-margin 1,admin --admin-margin 4,admin --admin-margin 64"
PLAN = [  # what decides most comes first
    Part("short", "18-18", BOTH, "2e-3,4e-3,8e-3"),
    Part("short", "18-18", BOTH, "4e-3", "1,2,3", bleu=True),
    Part("short", "12-12", BOTH, "2e-3,4e-3,8e-3"),
    Part("short", "6-6", BOTH, "2e-3,4e-3,8e-3"),
    Part("short", "12-12", BOTH, "4e-3", "1,2,3", bleu=True),
    Part("short", "6-6", BOTH, "4e-3", "1,2,3", bleu=True),
    Part("short", "12-12", "preln", "16e-3"),
    Part("short", "12-12", "preln", "8e-3", "1,2,3", bleu=True),
    Part("short", "6-6", "preln", "16e-3"),
    Part("short", "6-6", "preln", "8e-3", "1,2,3", bleu=True),
    Part("paper", "12-12", BOTH, "1e-3,2e-3,4e-3"),
    Part("paper", "12-12", BOTH, "8e-3"),
    Part("paper", "12-12", BOTH, "4e-3", "1,2,3", bleu=True),
    Part("paper", "18-18", BOTH, "2e-3,4e-3,8e-3"),
    Part("paper", "18-18", BOTH, "4e-3", "1,2,3", bleu=True),
    Part("short", "18-18", BOTH, "2e-3,4e-3", weights="fairseq"),
    Part("short", "18-18", MARGINS, "2e-3,4e-3"),
    Part("short", "18-18", "admin --admin-init logn,rezero,deepnorm,postln", "2e-3,4e-3"),
    Part("short", "18-18", "admin --admin-margin 1,admin --admin-init logn", "2e-3,4e-3", weights="fairseq"),
    Part("paper", "18-18", "admin --admin-margin 1", "1e-3,2e-3,4e-3"),
    Part("short", "60-12", BOTH, "1e-3,2e-3,4e-3"),
]


# --- training ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Raises:
    AdminError: a part of the plan failed; benchmarks.compare has said why.
    """
    name, _, data = args.data.partition("=")
    if not data or not name.replace("-", "").isalnum():
        raise AdminError(f"{args.data}: give a name and a folder that fairseq-preprocess wrote, multi30k=DATA-BIN")
    parts = [part for part in PLAN if fnmatch.fnmatch(part.name, args.only)]
    if not parts:
        raise AdminError(f"--only {args.only}: the plan has {', '.join(sorted({part.name for part in PLAN}))}")
    for count, part in enumerate(parts, 1):
        regime = REGIMES[part.regime]
        methods = [with_weights(method, part.weights) for method in part.methods.split(",")]
        command = [sys.executable, "-m", "benchmarks.compare", data, "--out", str(args.out / name / part.regime)]
        command += ["--methods", ",".join(methods), "--depths", part.depth, "--lr", part.rates, "--seeds", part.seeds]
        command += ["--warmup", str(regime.warmup), "--updates", str(regime.updates), "--jobs", str(args.jobs)]
        command += [*([] if part.bleu else ["--no-bleu"]), "--", *MODEL]
        print(f"== {count} of {len(parts)}: {name} {part}", flush=True)
        if subprocess.run(command, env=child_environment(), cwd=ROOT).returncode:
            raise AdminError(f"{part.name}: see above; the same command goes on")
        record(name, data, args.out / name)


def with_weights(method: str, weights: str) -> str:
    base, *options = method.split()
    return " ".join([base, "--init-weights", weights, *options])


def record(name: str, data: str, folder: Path) -> None:
    """Put every finished run in ``folder`` and its differences in BLEU into RECORD, in the place of earlier ones.

    ``data`` is the data-bin, on which a run's shares are measured.
    """
    rows = [row for row in recorded() if row["data"] != name]
    for regime in REGIMES:
        results = {}
        for file in sorted((folder / regime).glob("*/result.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            run = Run(**{field: result["settings"][field] for field in Run.__dataclass_fields__})
            results[run] = result
            step = max(len(result["curve"]) // 25, 1)
            kept = {key: result[key] for key in ("verdict", "train_ppl", "valid_ppl", "bleu", "seconds", "environment")}
            curve = [[update, loss and round(loss, 3)] for update, loss in result["curve"][step - 1 :: step]]
            row = {"data": name, "regime": regime, **vars(run), **kept, "curve": curve}
            has_shares = run.seed == 1 and file.with_name("checkpoint_last.pt").exists()  # what diverged left none
            rows.append({**row, "shares": shares(file.parent, data)} if has_shares else row)
        baselines = [method for method in {run.method for run in results} if compare.is_baseline(method.split()[0])]
        depths = sorted({run.depth for run in results})
        compared = argparse.Namespace(depths=depths, out=folder / regime, baselines=sorted(baselines))
        for row in compare.tests(results, compared):
            rows.append({"data": name, "regime": regime, "depth": row.pop("depth"), "significance": row})
    write(RECORD, "".join(json.dumps(row) + "\n" for row in rows))


def shares(folder: Path, data: str) -> dict[str, dict[str, dict[str, float]]]:
    """At the start and after training, by stack: the sums of the branches' shares, and the input's share of the output.

    Raises:
        AdminError: ``admin-fairseq analyze dependency`` failed, which has said why.
    """
    out = folder / "dependency"
    if not (out / "dependency.json").exists():
        command = [sys.executable, "-m", "admin_fairseq", "analyze", "dependency", data, "--out", str(out), "--cpu"]
        if subprocess.run([*command, "--path", str(folder)], env=child_environment(), cwd=ROOT).returncode:
            raise AdminError(f"{folder}: its shares could not be measured, see above")
    found = {}
    for model, when in zip(json.loads((out / "dependency.json").read_text(encoding="utf-8"))["models"], WHEN):
        found[when] = {}
        for stack, values in model["stacks"].items():
            each = [*zip(values["sub_layers"], values["share"])]
            ffn = sum(share for name, share in each if name.endswith("ffn"))
            sums = {"attention": sum(share for _, share in each) - ffn, "feed-forward": ffn}
            sums["input"] = values["beta2"][-1][0]
            found[when][stack] = {name: round(value, 4) for name, value in sums.items()}
    return found


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()] if RECORD.exists() else []


# --- the page ---------------------------------------------------------------------------------------------------------


def split_method(method: str) -> tuple[str, str]:
    """The method without its weights' start, and that: "fairseq" or "authors"."""
    base, _, weights, *options = method.split()
    return " ".join([base, *options]), weights


def in_words(method: str) -> str:
    name, weights = split_method(method)
    return f"{NAMES.get(name, name)}, {WEIGHTS[weights]} weights"


def layers(depth: str) -> int:
    return sum(map(int, depth.split("-")))


def best_rate(rows: list[dict[str, Any]]) -> tuple[float, bool]:
    """The rate with the lowest mean of those that most seeds have, and whether it ends the grid."""
    rates = {rate: [row for row in rows if row["lr"] == rate] for rate in sorted({row["lr"] for row in rows})}
    most = max(map(len, rates.values()))  # as in compare.best: means of fewer are not comparable
    best = min((rate for rate in rates if len(rates[rate]) == most), key=lambda rate: mean_valid(rates[rate]))
    return best, best in (min(rates), max(rates))


def runs_by_depth(rows: list[dict[str, Any]], data: str, regime: str) -> dict[str, list[dict[str, Any]]]:
    runs = [row for row in rows if row["data"] == data and row["regime"] == regime and "method" in row]
    depths = sorted({row["depth"] for row in runs}, key=layers)
    return {depth: [row for row in runs if row["depth"] == depth] for depth in depths}


def tables(rows: list[dict[str, Any]], data: str, regime: str) -> str:
    """By weights' start a table: methods by depth, validation perplexity at each one's best rate, BLEU."""
    runs, text = runs_by_depth(rows, data, regime), []
    for weights, title in WEIGHTS.items():
        table = [["weights: " + title, *runs]]
        for method, label in NAMES.items():
            own = [[row for row in each if split_method(row["method"]) == (method, weights)] for each in runs.values()]
            if any(own):
                table.append([label, *(cell(each) if each else "" for each in own)])
        if len(table) > 1:
            text.append(markdown(table))
    return "\n\n".join(text)


def summary(rows: list[dict[str, Any]], data: str) -> str:
    """The short regime's Pre-LN and recommended start, as README has them."""
    runs = runs_by_depth(rows, data, "short")
    table = [["", *runs]]
    for method in BOTH.split(","):
        own = [[row for row in each if row["method"] == with_weights(method, "authors")] for each in runs.values()]
        table.append([NAMES[method], *(short_cell(each) if each else "" for each in own)])
    return markdown(table)


def at_best_rate(runs: list[dict[str, Any]]) -> tuple[str, str]:
    """Validation perplexity and, where there is one, BLEU."""
    rate, _ = best_rate(runs)
    chosen = [row for row in runs if row["lr"] == rate]
    bleu = [row["bleu"] for row in chosen if row["bleu"] is not None]
    return spread([row["valid_ppl"] for row in chosen]), spread(bleu) if bleu else ""


def short_cell(runs: list[dict[str, Any]]) -> str:
    perplexity, bleu = at_best_rate(runs)
    return f"{perplexity} ({bleu})" if bleu else perplexity


def cell(runs: list[dict[str, Any]]) -> str:
    rate, is_edge = best_rate(runs)
    perplexity, bleu = at_best_rate(runs)
    count, others = sum(row["lr"] == rate for row in runs), sorted({row["lr"] for row in runs} - {rate})
    parts = [f"**{perplexity}** at {rate:g}{' (edge)' if is_edge and others else ''}"]
    parts += [f"{count} seeds" if count > 1 else "1 seed"]
    parts += [f"BLEU {bleu}"] if bleu else []
    parts += [f"{number(mean_valid([row for row in runs if row['lr'] == lr]))} at {lr:g}" for lr in others]
    return "; ".join(parts)


def readings(rows: list[dict[str, Any]], data: str, regime: str = "short") -> str:
    """The shares of seed 1 at the start and after training, beside the perplexity, by depth and method."""
    table = [["", *(f"{stack}, {when}" for stack in STACKS for when in WHEN), "valid ppl"]]
    found = [row for row in rows if row["data"] == data and "shares" in row and row["regime"] == regime]
    for row in sorted(
        found, key=lambda row: (layers(row["depth"]), row["lr"], row["shares"]["start"]["encoder"]["input"])
    ):
        cells = [share(row["shares"][when][stack]) for stack in STACKS for when in WHEN]
        name = f"{row['depth']}, {row['lr']:g}: {in_words(row['method'])}"
        table.append([name, *cells, number(row["valid_ppl"])])
    return markdown(table)


def share(sums: dict[str, float]) -> str:
    return f"{sums['attention']:.2f} + {sums['feed-forward']:.2f}; {sums['input']:.2f}"


def differences(rows: list[dict[str, Any]], data: str) -> str:
    """BLEU against the best baseline, seed by seed."""
    table = [["", "against", "BLEU above it, by seed", "p, by seed"]]
    for row in rows:
        if row["data"] == data and "significance" in row:
            found = row["significance"]
            each = [significance.Difference(*difference) for difference in found["differences"]]
            names = [in_words(found[key]) for key in ("method", "baseline")]
            table.append(
                [
                    f"{row['regime']}, {row['depth']}: {names[0]}",
                    names[1],
                    " ".join(f"{one.above:+.1f}" for one in each),
                    " ".join(f"{one.p:.3f}" for one in each),
                ]
            )
    return markdown(table) if len(table) > 1 else "None has been translated yet."


def page(args: argparse.Namespace) -> None:
    """Write PAGE: the prose, with a table in the place of each {data regime} and of {data BLEU}."""
    rows = recorded()
    text = PROSE.read_text(encoding="utf-8")
    for name, regime in REGIMES.items():
        text = text.replace(f"{{{name}}}", str(regime))
    for data in sorted({row["data"] for row in rows}):
        for name in REGIMES:
            text = text.replace(f"{{{data} {name}}}", tables(rows, data, name) or "Not run yet.")
        text = text.replace(f"{{{data} summary}}", summary(rows, data))
        text = text.replace(f"{{{data} BLEU}}", differences(rows, data))
        text = text.replace(f"{{{data} shares}}", readings(rows, data))
    environments = sorted({row["environment"] for row in rows if "environment" in row})
    write(PAGE, text.replace("{environments}", "\n".join(f"- {line}" for line in environments)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train what is not finished, and record it")
    command.add_argument("data", metavar="NAME=DATA-BIN", help="multi30k=FOLDER, as the tables are named")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    command.add_argument("--only", default="*", metavar="PART", help="such as short-18-18 or 'paper-*'")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    command.set_defaults(run=train)
    command = commands.add_parser("page", help="write docs/reproduction.md")
    command.set_defaults(run=page)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
