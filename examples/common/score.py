"""Scores of a fairseq-generate log, by sacrebleu: the papers' tokenised BLEU, detokenised BLEU, chrF; COMET if asked.

    python score.py OUT TEXT LANGUAGE [--lowercase] [--compounds] [--comet MODEL.ckpt --source LANGUAGE]

Reads OUT/generate.log and the references TEXT/{raw,tok}.test.LANGUAGE; writes OUT/{hypotheses,references}{,.tok}.txt
and OUT/scores.json. With --lowercase the detokenised scores ignore case, as the translations have none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Sequence

import sacrebleu
from sacremoses import MosesDetokenizer


def sentences(log: str, kind: str) -> dict[int, str]:
    """A log's lines of a kind by the sentence's number: H, the best hypothesis, or T, the reference."""
    score = r"[^\t]*\t" if kind == "H" else ""
    return {int(number): text for number, text in re.findall(rf"^{kind}-(\d+)\t{score}(.*)$", log, re.M)}


def hypotheses(log: str, count: int, messages: str = "") -> list[str]:
    """The best hypothesis of each sentence, in the test set's order; none of those that fairseq says it left out."""
    found = sentences(log, "H")
    missing = sorted(set(range(count)) - found.keys())
    left_out = re.search(r"([\d,]+) samples have invalid sizes and will be skipped, max_positions=\((\d+),", messages)
    if len(found) + len(missing) != count or len(missing) != (int(left_out[1].replace(",", "")) if left_out else 0):
        sys.exit(f"error: the log holds {len(found)} translations; the test set has {count} sentences")
    if left_out:
        print(
            f"note: {len(missing):,} of {count:,} sentences have more than {int(left_out[2]) - 1:,} tokens; an empty"
            " line stands for their translation: line"
            f" {', '.join(str(number + 1) for number in missing[:10])}{', ...' if len(missing) > 10 else ''}"
        )
    return [found.get(number, "") for number in range(count)]


def split_compounds(line: str) -> str:
    """Every hyphen between two characters as a token of its own, as fairseq's compound_split_bleu.sh does.

    That script expects text with its dashes left alone. Ours was split at dashes already (" @-@ "), and splitting
    inside that mark again would count each twice; so the marks are undone first.
    """
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", line.replace(" @-@ ", "-"))


def tokenised_bleu() -> sacrebleu.BLEU:
    """As multi-bleu.perl computes it, of text that is tokenised already."""
    return sacrebleu.BLEU(tokenize="none", smooth_method="none", force=True)


def score(
    hypotheses_tok: list[str],
    references_tok: list[str],
    hypotheses: list[str],
    references: list[str],
    lowercase: bool = False,
    compounds: bool = False,
) -> dict[str, dict[str, object]]:
    """The scores by name, each with its value, sacrebleu's signature and its own line of details."""
    tokenised = tokenised_bleu()
    runs = {"tokenised BLEU, as in the paper": (tokenised, hypotheses_tok, references_tok)}
    if compounds:
        halves = [[split_compounds(line) for line in lines] for lines in (hypotheses_tok, references_tok)]
        runs["tokenised BLEU, compounds split"] = (tokenised, *halves)
    runs["detokenised sacreBLEU"] = (sacrebleu.BLEU(lowercase=lowercase), hypotheses, references)
    runs["chrF"] = (sacrebleu.CHRF(lowercase=lowercase), hypotheses, references)
    scores = {}
    for name, (metric, ours, theirs) in runs.items():
        result = metric.corpus_score(ours, [theirs])
        scores[name] = {
            "score": round(result.score, 2),
            "signature": str(metric.get_signature()),
            "details": str(result),
        }
    return scores


class CometError(Exception):
    """COMET cannot be computed; the message is one line."""


def check_comet(model: str) -> None:
    """
    Raises:
        CometError: its package or this model is missing here.
    """
    if shutil.which("comet-score") is None:
        raise CometError(
            "COMET needs comet-score on PATH: pip install unbabel-comet, best in an environment of its own"
        )
    if not (model.endswith(".ckpt") and os.path.isfile(model)):
        raise CometError(
            f"COMET={model}: no such file; give the model.ckpt of a model that is here, none is downloaded"
        )


def comet(model: str, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The mean score of detokenised lines by a model of COMET on this machine.

    Its command is called, not its package, which wants a numpy and a torch of its own.

    Raises:
        CometError: it failed, or its package or this model is missing here.
    """
    import torch

    check_comet(model)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["comet-score", "--model", os.path.abspath(model), "--quiet", "--only_system", "--gpus"]
        words += ["1" if torch.cuda.is_available() else "0"]
        for option, lines in zip("str", (sources, hypotheses, references)):
            Path(folder, option).write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")
            words += [f"-{option}", os.path.join(folder, option)]
        done = subprocess.run(words, env=offline, capture_output=True, text=True, check=False)
    found = re.search(r"score: (-?[\d.]+)", done.stdout)
    if done.returncode or found is None:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise CometError(f"comet-score failed ({done.returncode}): {last[:300]}")
    return float(found[1])


def main() -> None:
    from corpus import writing  # beside this script; who imports the functions above may have no path to it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of generate.log")
    parser.add_argument("text", type=Path, help="folder of the references")
    parser.add_argument("language")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="what was averaged, to be noted in scores.json")
    parser.add_argument("--lowercase", action="store_true", help="score without regard to case")
    parser.add_argument("--compounds", action="store_true", help="one more score, with compounds split at hyphens")
    parser.add_argument("--comet", metavar="MODEL.ckpt", help="COMET, too, by this model; nothing is downloaded")
    parser.add_argument("--source", metavar="LANGUAGE", help="of the text that was translated, which COMET reads")
    args = parser.parse_args()
    if args.comet and not args.source:
        parser.error("--comet needs --source")

    def text(kind: str, language: str) -> list[str]:
        path = args.text / f"{kind}.test.{language}"
        return path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]

    texts = {f"references{name}.txt": text(kind, args.language) for name, kind in ((".tok", "tok"), ("", "raw"))}
    log = (args.out / "generate.log").read_bytes().decode("utf-8")
    messages = (args.out / "generate.err").read_bytes().decode("utf-8", errors="replace")
    texts["hypotheses.tok.txt"] = hypotheses(log, len(texts["references.tok.txt"]), messages)
    detokenizer = MosesDetokenizer(lang=args.language)
    texts["hypotheses.txt"] = [detokenizer.detokenize(line.split()) for line in texts["hypotheses.tok.txt"]]
    scores = score(
        texts["hypotheses.tok.txt"],
        texts["references.tok.txt"],
        texts["hypotheses.txt"],
        texts["references.txt"],
        args.lowercase,
        args.compounds,
    )
    failure = None
    if args.comet:
        try:
            found = comet(args.comet, text("raw", args.source), texts["hypotheses.txt"], texts["references.txt"])
            scores["COMET"] = {"score": found, "signature": args.comet, "details": ""}
        except CometError as error:
            failure = f"error: {error}; the other scores are complete"
    texts["scores.json"] = [json.dumps({"checkpoints": args.checkpoints, **scores}, indent=1)]
    for name, lines in texts.items():
        with writing(args.out / name) as (out,):
            out.writelines(line + "\n" for line in lines)
    for name, result in scores.items():
        print(f"{name:32} {result['score']:{'6.4f' if name == 'COMET' else '6.2f'}}   {result['signature']}")
    print(f"details in {args.out / 'scores.json'}")
    sys.exit(failure)


if __name__ == "__main__":
    main()
