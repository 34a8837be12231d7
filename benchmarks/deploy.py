"""A recipe's run translated by fairseq-generate and by CTranslate2, side by side: scores and sentences per second.

    python -m benchmarks.deploy RUN [--threads 1 2] [--repeat 3]

All translate the recipe's binarised or BPE'd test set with its beam and length penalty, in batches of so many tokens
with padding: stock fairseq what `admin-fairseq fold` makes of the checkpoint, fairseq with this plugin the checkpoint
itself, CTranslate2 what examples/deploy/convert.py makes of it, in float32 and in int8. The time is that of the search
alone (fairseq's own clock; the call of translate_batch): no start, no reading, no tokenising. Each round runs all once
after another, so that what else the machine does meets all; of several rounds the fastest counts. Prints a table, and
what it was measured with.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ctranslate2
from sacremoses import MosesDetokenizer

from benchmarks.common import PLUGIN, child_environment
from benchmarks.tables import markdown
from examples.common.score import hypotheses, score
from examples.deploy.convert import call, checkpoint_of, convert, read_json

STOCK = "stock fairseq-generate"


def read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8").split("\n")[:-1]


class Work(NamedTuple):
    """What everybody translates, and how."""

    data: Path
    source: list[str]  # in BPE
    search: dict[str, Any]  # CTranslate2's names
    tokens: int  # of a batch
    length: int | None  # of every translation, if that is given


def by_fairseq(work: Work, threads: int, checkpoint: Path, *flags: object) -> tuple[list[str], float]:
    """The test set's translations, in tokens, and seconds."""
    command = [
        *(Path(sys.executable).with_name("fairseq-generate"), work.data, "--cpu", "--path", checkpoint, *flags),
        *("--beam", work.search["beam_size"], "--lenpen", work.search["length_penalty"], "--max-tokens", work.tokens),
        *("--required-batch-size-multiple", 1, "--post-process", "subword_nmt"),
    ]
    if work.length:
        command += ["--min-len", work.length, "--max-len-a", 0, "--max-len-b", work.length]
    environment = child_environment(OMP_NUM_THREADS=str(threads), PYTHONWARNINGS="ignore")
    finished = subprocess.run([*map(str, command)], env=environment, capture_output=True)
    if finished.returncode != 0:
        sys.exit(finished.stderr.decode() + "error: fairseq-generate failed")
    seconds = re.search(r"Translated [\d,]+ sentences .* in ([\d.]+)s", finished.stderr.decode())[1]
    return hypotheses(finished.stdout.decode(), len(work.source)), float(seconds)


def by_ctranslate2(work: Work, threads: int, folder: Path) -> tuple[list[str], float]:
    """The same."""
    translator = ctranslate2.Translator(str(folder), intra_threads=threads)
    pieces = [line.split() for line in work.source]
    lengths = {"min_decoding_length": work.length or 1, "max_decoding_length": work.length or 200}
    started = time.perf_counter()
    results = translator.translate_batch(
        pieces, max_batch_size=work.tokens, batch_type="tokens", **lengths, **work.search
    )
    seconds = time.perf_counter() - started
    return [(" ".join(result.hypotheses[0]) + " ").replace("@@ ", "").rstrip() for result in results], seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deploy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="what prepare.sh made, if it was moved since the training")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument("--tokens", type=int, default=8000, metavar="N", help="of a batch (default: 8000)")
    parser.add_argument("--length", type=int, metavar="N", help="so many tokens each, for an untrained model's speed")
    args = parser.parse_args()

    data = args.data or Path(read_json(args.run / "settings.json")["DATA"])
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"float32": Path(temporary, "float32"), "int8": Path(temporary, "int8")}
        convert(args.run, folders["float32"], data)
        convert(args.run, folders["int8"], data, "int8")
        text = read_json(folders["int8"] / "text.json")
        source = read_lines(data / "text" / f"bpe.test.{text['source']}")
        references = [read_lines(data / "text" / f"{kind}.test.{text['target']}") for kind in ("tok", "raw")]
        work = Work(data, source, text["search"], args.tokens, args.length)
        checkpoint, folded = checkpoint_of(args.run).resolve(), Path(temporary, "folded.pt")
        call(sys.executable, "-m", "admin_fairseq", "fold", checkpoint, folded)
        plugin = ("--user-dir", PLUGIN)
        systems = {
            STOCK: lambda threads: by_fairseq(work, threads, folded),
            "fairseq-generate": lambda threads: by_fairseq(work, threads, checkpoint, *plugin),
            "fairseq-generate --bf16": lambda threads: by_fairseq(work, threads, checkpoint, *plugin, "--bf16"),
            **{
                f"CTranslate2 {name}": functools.partial(by_ctranslate2, work, folder=folder)
                for name, folder in folders.items()
            },
        }
        found, seconds = {}, {}
        for threads in args.threads:
            for _ in range(args.repeat):
                for name, translate in systems.items():
                    found[name], duration = translate(threads)
                    seconds.setdefault((name, threads), []).append(duration)
                    print(f"{threads} thread(s), {name}: {duration:.2f} s", file=sys.stderr, flush=True)

    detokenize = MosesDetokenizer(lang=text["target"]).detokenize
    rows = [["", "tokenised BLEU", "sacreBLEU", "chrF", "same as stock"]]
    rows[0] += [f"sentences/s, {threads} thread{'s'[: threads > 1]}" for threads in args.threads]
    for name, lines in found.items():
        plain = [detokenize(line.split()) for line in lines]
        scores = score(lines, references[0], plain, references[1], lowercase="lowercase" in text["tokenize"])
        same = sum(map(str.__eq__, lines, found[STOCK]))
        row = [name, *(f"{result['score']:.2f}" for result in scores.values()), f"{same:,} of {len(lines):,}"]
        rows.append([*row, *(f"{len(lines) / min(seconds[name, threads]):.1f}" for threads in args.threads)])
    print(markdown(rows))
    packages = ", ".join(f"{name} {version(name)}" for name in ("ctranslate2", "torch", "sacrebleu"))
    print(f"\nPython {platform.python_version()}, {packages}; {os.cpu_count()} cores, {platform.machine()}")


if __name__ == "__main__":
    main()
