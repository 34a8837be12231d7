"""What a report's analyses say together: which starts lean too hard on their branches, and what to do about it.

Two signs, each of a model at initialisation:

- the shares of a stack's branches, Var[f]/Var[x + f], add up to more than ``SHARES``. By the paper's Theorem 2 their
  sum says how far a change of all weights moves the output;
- the gradient of some sub-layer's output is smaller than ``GRADIENT`` of the network's largest.

The thresholds are rules of thumb from width 64 and 128 on Multi30k: see docs/analyze.md.
"""

from __future__ import annotations

from typing import Any, Dict

from admin_fairseq.analysis.subject import AFTER, BEFORE
from admin_fairseq.omega import MARGIN

SHARES, GRADIENT = 5.0, 0.05
LOW_OMEGA, DEEP = 2.0, 24  # a profiled start whose first quarter of omegas is lower, in a stack of so many sub-layers
THRESHOLDS = (
    "There are two signs of trouble, both at initialisation. The shares Var[f]/Var[x + f] of a stack's branches add"
    f" up to more than {SHARES:g}: by the paper's Theorem 2 their sum says how far a change of the weights moves the"
    " output, and of Post-LN models on Multi30k (width 64) one with 3.8, at 6-6, trained, and one with 8.4, at"
    f" 12-12, did not. Or the gradient of a sub-layer's output is below {GRADIENT:g} of the largest: Post-LN's falls"
    " to 0.03 at 18-18, Pre-LN's and Admin's, by the paper's rule, to 0.24. These are rules of thumb from small"
    " models: they say what to try first, not how a training ends."
)
Data = Dict[str, Dict[str, Any]]  # by analysis, its JSON file


def verdict(data: Data) -> list[str]:
    """Paragraphs: what these models show, what to do, and by which thresholds; none where nothing was measured."""
    signs = signs_of(data)
    if not signs:
        return []
    bad = {name: found for name, found in signs.items() if found}
    good = [name for name in signs if name not in bad]
    shown = [
        f"{name} shows signs that it will not train well as it is: {', and '.join(found)}."
        for name, found in bad.items()
    ]
    if good:
        shown.append(
            f"{_and(good)} {'shows' if len(good) == 1 else 'show'} no {'such sign' if bad else 'sign of trouble'}."
        )
    return [
        " ".join([*shown, *_after_training(data)]),
        f"What to do: {' '.join([_advice(good, bad), *_omega(data)])}",
        THRESHOLDS,
    ]


def signs_of(data: Data) -> dict[str, list[str]]:
    """By model at initialisation, its signs in words."""
    signs: dict[str, list[str]] = {}
    for model in data.get("dependency", {}).get("models", []):
        if model["when"] == BEFORE:
            sums = {stack: sum(stats["share"]) for stack, stats in model["stacks"].items()}
            high = [f"{value:.1f} in the {stack}" for stack, value in sums.items() if value > SHARES]
            found = signs.setdefault(model["method"], [])
            found += [f"its shares add up to {_and(high)}"] if high else []
    records = [record for record in data.get("gradients", {}).get("records", []) if record["when"] == BEFORE]
    start = min((record["update"] for record in records), default=0)
    for record in {record["method"]: record for record in records if record["update"] == start}.values():
        least = {stack: min(values["gradient"]) for stack, values in record["outputs"].items()}
        low = [f"{value:.2g} in the {stack}" for stack, value in least.items() if value < GRADIENT]
        found = signs.setdefault(record["method"], [])
        found += [f"its gradients fall to {_and(low)}"] if low else []
    return signs


def _after_training(data: Data) -> list[str]:
    models = data.get("dependency", {}).get("models", [])
    before = {model["method"]: model for model in models if model["when"] == BEFORE}
    return [
        f"Training took the sum of {model['method']}'s shares from {_sums(before[model['method']])} to {_sums(model)}."
        for model in models
        if model["when"] == AFTER
    ]


def _sums(model: dict[str, Any]) -> str:
    return _and([f"{sum(stats['share']):.1f} ({stack})" for stack, stats in model["stacks"].items()])


def _advice(good: list[str], bad: dict[str, list[str]]) -> str:
    compare = "Which of them ends best only training says: benchmarks.compare trains them side by side."
    if not bad:
        return "nothing seen here speaks against training " + (f"any of these. {compare}" if len(good) > 1 else "it.")
    if good:
        return f"train {' or '.join(good)} instead of {_and(list(bad))}, or take fewer layers. " + compare * (
            len(good) > 1
        )
    return (
        "take fewer layers, or at this depth a method that starts steadily: --arch transformer_admin_E_D, or"
        " transformer_preln_E_D, with E encoder and D decoder layers."
    )


def _omega(data: Data) -> list[str]:
    """Advice on starts that are lower than those that learned fast here."""
    slow = []
    for record in data.get("omega", {}).get("records", []):
        starts = {stack: values["mean"] for stack, values in record.items() if isinstance(values, dict)}
        means = {stack: _mean(omega[1 : len(omega) // 4]) for stack, omega in starts.items() if len(omega) >= DEEP}
        low = [f"{value:.1f} in the {stack}" for stack, value in means.items() if value < LOW_OMEGA]
        if record["update"] == 0 and low:
            slow.append(f"{record['label']}, whose first quarter of omega has a mean of {_and(low)}")
    return [
        f"For trainings of some thousand updates start {name}, with a larger --admin-margin (default {MARGIN:g}):"
        f" starts below {LOW_OMEGA:g} learned slowly in ours."
        for name in slow
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _and(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
