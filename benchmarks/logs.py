"""What the logs of fairseq-train and fairseq-generate say."""

from __future__ import annotations

import json
import math
import re
import statistics
from typing import Any, Dict, NamedTuple

from benchmarks.divergence import final_loss, judge
from examples.common.score import sentences, tokenised_bleu

Result = Dict[str, Any]  # of a run: what result.json holds


class RunError(Exception):
    """A run failed otherwise than by diverging; the message is one line."""


def perplexity(loss: float) -> float | None:
    """None where it is no use as a number: for NaN, and where its square, as in a standard deviation, overflows."""
    return math.exp(loss) if loss < 350 else None


NOT_FINITE = re.compile(r"^(?:FloatingPointError|admin_fairseq: error: update \d+): (.*)", re.M)  # fairseq's, and ours


def read_log(lines: list[tuple[float, str]], memory: float | None, positional: float, updates: int) -> Result:
    """Verdict, perplexities, speed, memory and loss curve of a run of so many updates, from its lines and their times.

    ``memory`` is the process's peak in MB, ``positional`` the perplexity that divergence.py describes. The log has
    losses in bits, the curve in nats.

    Raises:
        RunError: training ended early, not by diverging, or without a validation.
    """

    def nats(row: Result, prefix: str = "") -> float:  # fairseq logs nll_loss only where it differs from the loss
        return float(row.get(f"{prefix}nll_loss", row[f"{prefix}loss"])) * math.log(2)

    log = "".join(line for _, line in lines)
    rows = [(moment, re.search(r"\| train_inner \| (\{.*\})", line)) for moment, line in lines]
    rows = [(moment, json.loads(found[1])) for moment, found in rows if found]
    curve = [(int(row["num_updates"]), nats(row)) for _, row in rows]
    error = NOT_FINITE.search(log)
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


class Translations(NamedTuple):
    """A test set and what was made of it, tokenised, a line a sentence."""

    sources: list[str]
    references: list[str]
    hypotheses: list[str]


def translations(log: str) -> Translations:
    """From fairseq-generate's output, in the test set's order."""
    sides = [sentences(log, kind) for kind in "STH"]
    return Translations(*([side[number] for number in sorted(sides[-1])] for side in sides))


def bleu(log: str) -> float:
    """Tokenised BLEU of fairseq-generate's output."""
    found = translations(log)
    return tokenised_bleu().corpus_score(found.hypotheses, [found.references]).score
