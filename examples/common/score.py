"""Scores of a fairseq-generate log, by sacrebleu: the papers' tokenised BLEU, detokenised BLEU and chrF.

    python score.py OUT TEXT LANGUAGE [--lowercase] [--compounds]

Reads OUT/generate.log and the references TEXT/{raw,tok}.test.LANGUAGE; writes OUT/{hypotheses,references}{,.tok}.txt
and OUT/scores.json. With --lowercase the detokenised scores ignore case, as the translations have none.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

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
            f"note: {len(missing):,} of {count:,} sentences, or their references, have more than"
            f" {int(left_out[2]) - 1:,} tokens; an empty line stands for their translation: line"
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


def main() -> None:
    from corpus import writing  # beside this script; who imports the functions above may have no path to it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of generate.log")
    parser.add_argument("text", type=Path, help="folder of the references")
    parser.add_argument("language")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="what was averaged, to be noted in scores.json")
    parser.add_argument("--lowercase", action="store_true", help="score without regard to case")
    parser.add_argument("--compounds", action="store_true", help="one more score, with compounds split at hyphens")
    args = parser.parse_args()

    def reference(kind: str) -> list[str]:
        path = args.text / f"{kind}.test.{args.language}"
        return path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]

    texts = {"references.tok.txt": reference("tok"), "references.txt": reference("raw")}
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
    texts["scores.json"] = [json.dumps({"checkpoints": args.checkpoints, **scores}, indent=1)]
    for name, lines in texts.items():
        with writing(args.out / name) as (out,):
            out.writelines(line + "\n" for line in lines)
    for name, result in scores.items():
        print(f"{name:32} {result['score']:6.2f}   {result['signature']}")
    print(f"details in {args.out / 'scores.json'}")


if __name__ == "__main__":
    main()
