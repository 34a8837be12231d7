"""The paper's central claim in minutes on two CPU cores: an 18-18 Transformer as Post-LN, Pre-LN and Admin.

Writes a synthetic German-English corpus (grammar.py), applies BPE, trains the same model from the same seed and
budget by each method with fairseq-train, translates the test set with fairseq-generate, scores it with sacrebleu,
and prints and draws what came out. Run it by  make demo.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import grammar
import report

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"Post-LN": "transformer_postln", "Pre-LN": "transformer_preln", "Admin": "transformer_admin"}
MODEL = (
    *("--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128, "--share-all-embeddings", "--dropout", 0),
    *("--init-weights", "authors"),  # Admin's default, for all three
    *("--encoder-attention-heads", 4, "--decoder-attention-heads", 4),
)
TRAINING = (
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", 2e-3),
    *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", 150),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1, "--max-tokens", 1000),
    *("--cpu", "--num-workers", 0, "--disable-validation", "--no-epoch-checkpoints", "--log-format", "json"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for everything written (demo/)")
    parser.add_argument("--layers", type=int, default=18, help="encoder and decoder layers (18)")
    parser.add_argument("--updates", type=int, default=750, help="training updates of each method (750)")
    parser.add_argument("--pairs", type=int, default=24000, help="training pairs (24000)")
    parser.add_argument("--test-pairs", type=int, default=300, help="test pairs (300)")
    parser.add_argument("--seed", type=int, default=1, help="seed of corpus and models (1)")
    args = parser.parse_args()

    started = time.time()
    for folder in ("data", "runs"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    prepare(args)
    unigram = unigram_perplexity(args.out / "data/bpe.train.en")
    print(f"\nA model that knows nothing but word frequencies has perplexity {unigram:.0f}.\n", flush=True)

    # all at once, on one thread each: the three share what the machine gives, which makes their times comparable
    board = Board(args.updates)
    with ThreadPoolExecutor(len(METHODS)) as pool:
        results = dict(zip(METHODS, pool.map(lambda method: run_method(method, args, board), METHODS)))
    board.close()
    source, reference = (
        (args.out / f"data/test.{language}").read_text("utf-8").splitlines() for language in ("de", "en")
    )
    report.table(results, unigram)
    report.translations(results, source, reference, count=3)
    report.draw(results, unigram, args.layers, args.out / "demo.png")
    print(f"\nCurves and omega: {args.out / 'demo.png'}\nAll in {time.time() - started:.0f} s.")


def prepare(args: argparse.Namespace) -> None:
    data = args.out / "data"
    print(f"Writing {args.pairs:,} training and {args.test_pairs} test pairs to {data}")
    sizes = ("--train", args.pairs, "--valid", 100, "--test", args.test_pairs, "--seed", args.seed)
    grammar.main([str(data), *map(str, sizes)])
    print("Learning and applying 1,000 BPE merges, binarising", flush=True)
    with open(data / "all", "wb") as both:
        for language in ("de", "en"):
            both.write((data / f"train.{language}").read_bytes())
    run("subword-nmt", "learn-bpe", "-s", 1000, "-i", data / "all", "-o", data / "codes")
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            plain, pieces = data / f"{split}.{language}", data / f"bpe.{split}.{language}"
            run("subword-nmt", "apply-bpe", "-c", data / "codes", "-i", plain, "-o", pieces)
    run(
        *("fairseq-preprocess", "-s", "de", "-t", "en", "--joined-dictionary", "--destdir", data / "bin"),
        *("--trainpref", data / "bpe.train", "--validpref", data / "bpe.valid", "--testpref", data / "bpe.test"),
    )


def unigram_perplexity(path: Path) -> float:
    """Perplexity of the best model without context, sentence ends counted as fairseq counts them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    counts = Counter(token for line in lines for token in (*line.split(), "</s>"))
    total = sum(counts.values())
    return math.exp(-sum(count / total * math.log(count / total) for count in counts.values()))


def run_method(method: str, args: argparse.Namespace, board: Board) -> dict[str, Any]:
    """Train, translate and score; loss is per update in nats, label smoothing left out."""
    folder = args.out / "runs" / method.lower()
    command = (
        *("fairseq-train", args.out / "data/bin", "--user-dir", ROOT / "admin_fairseq", "--arch", METHODS[method]),
        *("--encoder-layers", args.layers, "--decoder-layers", args.layers, *MODEL, *TRAINING),
        *("--max-update", args.updates, "--seed", args.seed, "--log-interval", max(args.updates // 50, 1)),
        *("--save-dir", folder),
    )
    started = time.time()
    curve = []
    for line in stream(folder.with_suffix(".log"), *command):
        found = re.search(r"train_inner \| (\{.*\})", line)
        if found:
            row = json.loads(found[1])
            curve.append((int(row["num_updates"]), float(row["nll_loss"]) * math.log(2)))
            board.show(method, *curve[-1])
    seconds = time.time() - started

    output = run(
        *("fairseq-generate", args.out / "data/bin", "--user-dir", ROOT / "admin_fairseq"),
        *("--path", folder / "checkpoint_last.pt", "--beam", 4, "--max-len-b", 30, "--max-tokens", 3000),
        *("--required-batch-size-multiple", 1),  # or newer fairseq drops the last batch
        *("--remove-bpe", "--cpu"),
    )
    hypotheses = dict(re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", output, flags=re.MULTILINE))
    ordered = [hypotheses[str(number)] for number in range(len(hypotheses))]
    translation = folder.with_suffix(".hyp")
    translation.write_text("\n".join(ordered) + "\n", encoding="utf-8")
    # --force: the corpus is made of tokens, which sacrebleu remarks on at length
    bleu = run("sacrebleu", args.out / "data/test.en", "-i", translation, "--score-only", "--force")
    return {"curve": curve, "bleu": float(bleu), "seconds": seconds, "hypotheses": ordered, "folder": folder}


class Board:
    """Live progress of all methods: one line that is written over on a terminal, ten lines a method in a file."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.started = time.time()
        self.state: dict[str, str] = {}

    def show(self, method: str, update: int, loss: float) -> None:
        seconds, perplexity = f"{time.time() - self.started:4.0f} s", f"{math.exp(loss):.1f}"
        if sys.stdout.isatty():
            self.state[method] = f"{method} {update}: {perplexity:6}"
            print(f"\r{seconds}  update: perplexity  {'  '.join(self.state.values())}", end="", flush=True)
        elif update == self.updates or update % max(self.updates // 10, 1) == 0:
            print(f"{seconds}  {method:8}{update:4}/{self.updates} updates, perplexity {perplexity:>6}", flush=True)

    def close(self) -> None:
        if sys.stdout.isatty():
            print()


def run(*command: Any) -> str:
    return "".join(stream(None, *command))


def stream(log: Path | None, *command: Any) -> Iterator[str]:
    """Run one of this environment's commands and yield its output by line; on failure print it and stop."""
    program, *arguments = map(str, command)
    # with warnings on, torch and fairseq print hundreds of lines on each other's deprecations
    environment = dict(os.environ, PYTHONWARNINGS="ignore", PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    lines = []
    with subprocess.Popen(
        [os.path.join(os.path.dirname(sys.executable), program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            lines.append(line)
            yield line
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(lines), encoding="utf-8")
    if process.returncode != 0:
        sys.exit(
            "".join(lines[-20:]) + f"\n{program} failed with exit code {process.returncode}; its last lines are above"
        )


if __name__ == "__main__":
    main()
