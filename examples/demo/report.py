"""What the demo prints and draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch

from admin_fairseq.checkpoints.files import load

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe-Ito colours with different dashes: readable in print and by colour-blind readers
STYLES = {"Post-LN": ("#D55E00", "--"), "Pre-LN": ("#0072B2", "-."), "Admin": ("#009E73", "-")}


def final_loss(result: dict[str, Any]) -> float:
    """Mean over the last tenth of training."""
    curve = [loss for _, loss in result["curve"]]
    tail = curve[-max(len(curve) // 10, 1) :]
    return sum(tail) / len(tail)


def table(results: dict[str, Any], unigram: float) -> None:
    print(f"\n{'method':9}{'training loss':>15}{'perplexity':>12}{'BLEU':>7}{'seconds':>9}")
    for method, result in results.items():
        loss = final_loss(result)
        print(f"{method:9}{loss:15.3f}{math.exp(loss):12.1f}{result['bleu']:7.1f}{result['seconds']:9.0f}")
    print(f"{'unigrams':9}{math.log(unigram):15.3f}{unigram:12.1f}")


def translations(results: dict[str, Any], source: list[str], reference: list[str], count: int) -> None:
    print("\nThe first test sentences:")
    for number in range(min(count, len(source))):
        print(f"\n  {'source':10}{source[number]}\n  {'reference':10}{reference[number]}")
        for method, result in results.items():
            print(f"  {method:10}{result['hypotheses'][number]}")


def draw(results: dict[str, Any], unigram: float, layers: int, path: Path) -> None:
    """Loss curves, and omega by depth before and after training."""
    figure, (loss_axis, omega_axis) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method, result in results.items():
        updates, losses = zip(*result["curve"])
        colour, dashes = STYLES[method]
        label = f"{method} (BLEU {result['bleu']:.1f})"
        loss_axis.plot(updates, [math.exp(loss) for loss in losses], dashes, color=colour, label=label)
    loss_axis.axhline(unigram, color="grey", linewidth=1, linestyle=":", label="word frequencies only")
    loss_axis.set(
        title=f"{layers} encoder and {layers} decoder layers, same seed and budget",
        xlabel="update",
        ylabel="training perplexity",
        yscale="log",
    )
    for axis in (loss_axis.yaxis, omega_axis.yaxis):
        axis.set_major_formatter("{x:g}")
    loss_axis.yaxis.set_minor_formatter("")
    loss_axis.legend()

    folder = results["Admin"]["folder"]
    profile = json.loads((folder / "admin_profile.json").read_text(encoding="utf-8"))
    weights = load(str(folder / "checkpoint_last.pt"))["model"]
    for stack, colour in (("encoder", "#009E73"), ("decoder", "#CC79A7")):
        trained = torch.stack(
            [weight for name, weight in weights.items() if name.startswith(stack) and name.endswith(".omega")]
        )
        depth = range(1, len(trained) + 1)
        after = f"{stack}, after training (mean, std)"
        omega_axis.plot(depth, trained.mean(1), color=colour, linewidth=5, alpha=0.4, label=after)
        # on top: in so few updates omega may hardly move
        omega_axis.plot(depth, profile[stack], "--", color=colour, label=f"{stack}, from the pre-pass")
        low, high = trained.mean(1) - trained.std(1), trained.mean(1) + trained.std(1)
        omega_axis.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0)
    omega_axis.set(title="Admin's omega by depth", xlabel="sub-layer of the stack", ylabel="omega")
    omega_axis.legend()
    figure.savefig(path, dpi=150)
