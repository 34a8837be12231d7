"""What each sub-layer of a stack reads at the start: how much is the stack's input, and how much comes from attention.

    admin-fairseq analyze dependency DATA --out DIR --arch transformer_postln_18_18 ... [fairseq-train's options]
    python -m benchmarks.starts DIR/dependency.json --out FIGURE.png

draws both shares of the variance by depth, a panel each for encoder and decoder and a line a method. The analysis has
them: a row of its map beta^2 says how much of what is read is due to the input (column 0) and to every branch so far.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from admin_fairseq.analysis.figures import pyplot, style
from benchmarks.common import write

SHARES = ("the stack's input", "attention")


def shares(stack: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By sub-layer, the parts of the input and of all attention in what the next one reads."""
    from_attention = ["attn" in name for name in stack["sub_layers"]]
    return [row[0] for row in stack["beta2"]], [
        sum(part for part, is_attention in zip(row[1:], from_attention) if is_attention) for row in stack["beta2"]
    ]


def draw(models: list[dict[str, Any]]) -> Any:
    """A row a share, a column a stack."""
    stacks = list(dict.fromkeys(stack for model in models for stack in model["stacks"]))
    size = (4.4 * len(stacks) + 1.6, 5.4)
    figure, axes = pyplot().subplots(2, len(stacks), figsize=size, sharex="col", sharey="row", squeeze=False)
    for number, model in enumerate(models):
        for column, stack in enumerate(stacks):
            for row, values in enumerate(shares(model["stacks"][stack])):
                label = model["method"].split()[0]
                axes[row][column].plot(range(1, len(values) + 1), values, label=label, **style(number))
    for row, share in enumerate(SHARES):
        axes[row][0].set(ylabel=f"share of {share}", ylim=(0, 1))
    for column, stack in enumerate(stacks):
        axes[0][column].set_title(stack)
        axes[1][column].set_xlabel("sub-layer, from the input")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dependency", metavar="DEPENDENCY.json", help="what admin-fairseq analyze dependency wrote")
    parser.add_argument("--out", required=True, metavar="FIGURE.png")
    args = parser.parse_args()
    with open(args.dependency, encoding="utf-8") as file:
        models = json.load(file)["models"]
    drawn = io.BytesIO()
    draw(models).savefig(drawn, format="png")
    write(Path(args.out), drawn.getvalue())


if __name__ == "__main__":
    main()
