"""Is a difference in BLEU more than the choice of test sentences? sacrebleu's paired bootstrap on what was translated.

    python -m benchmarks.significance BASELINE RUN [RUN ...]

Each is a folder with fairseq-generate's output as generate.log: a run of benchmarks.compare, or the folder test of a
recipe's run. Nothing is trained or translated again. benchmarks.compare puts the same figures below its table.

p is the share of 1,000 resamples of the test sentences in which the difference moves by more than its own size: how
often two equally good systems come out this far apart. Two-sided, each pair by itself, not corrected for the number of
pairs; and it says nothing about another seed, which is another training.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from pathlib import Path
from typing import Any, NamedTuple, Sequence

from sacrebleu.significance import PairedTest

from admin_fairseq.errors import AdminError
from benchmarks.logs import Translations, translations
from benchmarks.tables import markdown
from examples.common.score import tokenised_bleu

LEVEL = 0.05
logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it says each step of each test


class Difference(NamedTuple):
    """BLEU of a system, how far it is above the baseline's, and p."""

    bleu: float
    above: float
    p: float


def of_folder(folder: Path) -> Translations:
    """What a run translated.

    Raises:
        AdminError: it holds no translations.
    """
    log = folder / "generate.log"
    try:
        found = translations(log.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise AdminError(f"cannot read {log}: {error.strerror}; give folders with a generate.log") from None
    if not found.hypotheses:
        raise AdminError(f"{log} holds no translations; give folders in which fairseq-generate has finished")
    return found


def paired(baseline: Translations, systems: Sequence[Translations]) -> list[Difference]:
    """Each system against the baseline, on the same resamples.

    Raises:
        AdminError: they did not translate the same test set.
    """
    if any(system.references != baseline.references for system in systems):
        raise AdminError("these runs translated different test sets, so their BLEU cannot be compared")
    named = [(str(number), system.hypotheses) for number, system in enumerate([baseline, *systems])]
    test = PairedTest(named, {"BLEU": tokenised_bleu()}, [baseline.references], test_type="bs", n_samples=1000)
    _, found = test()
    first, *others = found["BLEU"]
    # of a system that writes what the baseline writes sacrebleu says p = 1/1001
    return [
        Difference(one.score, one.score - first.score, one.p_value if one.score != first.score else 1.0)
        for one in others
    ]


def verdict(differences: Sequence[Difference]) -> str:
    """For example "better in 2 of 2": of the seeds, at the level."""
    names = {"better": lambda one: one.above > 0, "worse": lambda one: one.above < 0}
    sure = [one for one in differences if one.p < LEVEL]
    parts = [f"{name} in {count}" for name, holds in names.items() if (count := sum(map(holds, sure)))]
    return f"{', '.join(parts) or 'no difference shown in any'} of {len(differences)}"


def against_best(systems: dict[str, dict[int, Translations]], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Each method against the baseline with the highest mean BLEU, seed by seed; ``systems`` is by method and seed.

    A row has the method, the baseline, the seeds that both translated with, and their differences.
    """
    metric = tokenised_bleu()

    def mean(method: str) -> float:
        every = systems[method].values()
        return statistics.fmean(metric.corpus_score(one.hypotheses, [one.references]).score for one in every)

    known = [method for method in baselines if systems.get(method)]
    if not known:
        return []
    baseline = max(known, key=mean)
    found: dict[str, list[tuple[int, Difference]]] = {method: [] for method in systems if method != baseline}
    for seed, first in systems[
        baseline
    ].items():  # all methods of a seed at once: the baseline's resamples cost the same
        others = [method for method in found if seed in systems[method]]
        for method, difference in zip(others, paired(first, [systems[method][seed] for method in others])):
            found[method].append((seed, difference))
    return [
        {
            "method": method,
            "baseline": baseline,
            "seeds": [seed for seed, _ in pairs],
            "differences": [difference for _, difference in pairs],
        }
        for method, pairs in found.items()
        if pairs
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Of what against_best found, each row with its depth; empty without rows."""
    if not rows:
        return ""
    cells = [["method", "depth", "against", "BLEU above it, by seed", "p, by seed", f"p < {LEVEL:g}"]]
    for row in rows:
        above = " ".join(f"{one.above:+.1f}" for one in row["differences"])
        p = " ".join(f"{one.p:.3f}" for one in row["differences"])
        cells.append([row["method"], row["depth"], row["baseline"], above, p, verdict(row["differences"])])
    notes = [
        "Paired bootstrap of the test sentences (sacrebleu, 1,000 resamples) against the baseline with the highest",
        "BLEU, each pair by itself, from the same seed. It says nothing about other seeds: compare those.",
    ]
    return "\n".join([markdown(cells, aligned=True), "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.significance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("baseline", type=Path, metavar="BASELINE", help="the folder that the others are compared with")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders with a generate.log")
    args = parser.parse_args()
    first = of_folder(args.baseline)
    score = tokenised_bleu().corpus_score(first.hypotheses, [first.references]).score
    cells = [["run", "BLEU", "above", "p"], [str(args.baseline), f"{score:.2f}", "baseline", ""]]
    for folder, one in zip(args.runs, paired(first, [of_folder(folder) for folder in args.runs])):
        cells.append([str(folder), f"{one.bleu:.2f}", f"{one.above:+.2f}", f"{one.p:.3f}"])
    print(markdown(cells, aligned=True))


if __name__ == "__main__":
    main()
