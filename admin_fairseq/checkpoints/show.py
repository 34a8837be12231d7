"""omega by sub-layer as a terminal table, from a checkpoint's weights or a profile."""

from __future__ import annotations

import math
from typing import Any, Dict, List

import torch

from admin_fairseq.profile_file import STACKS, Profile, sub_layer_name

Row = Dict[str, Any]  # int, str or float, by column
Table = Dict[str, List[Row]]  # by stack

COLUMNS = {  # of numbers: their heads, and what they say
    "omega": (
        "omega",
        "the weight of the shortcut in LN(omega x + f), its mean over the d dimensions; the bar is as long",
    ),
    "std": (
        "std over d",
        "omega's standard deviation over the dimensions: 0 at the start, and where one number is trained",
    ),
    "start": ("at start", "omega before training, from the admin_profile.json beside the checkpoint"),
    "branch_variance": ("Var[f]", "the variance of the residual branch f, measured before training"),
    "share": ("share of f", "Var[f] in percent of Var[omega x] + Var[f]: how much the sub-layer leans on its branch"),
}


def from_weights(weights: dict[str, torch.Tensor], start: Profile | None = None) -> Table:
    """omega's mean and population standard deviation over dimensions, and where it started, if that is known."""
    table: Table = {}
    for key, value in weights.items():
        if key.endswith("_layer_norm.omega"):
            stack, name = key[: -len(".omega")].split(".layers.")
            layer, norm = name.split(".")
            std, mean = value.float().std(unbiased=False).item(), value.float().mean().item()
            row: Row = {"layer": int(layer), "sub_layer": sub_layer_name(norm), "omega": mean, "std": std}
            table.setdefault(stack, []).append(row)
    first = {} if start is None else from_profile(start)
    if [*map(len, first.values())] == [*map(len, table.values())]:
        for stack, rows in table.items():
            for row, old in zip(rows, first[stack]):
                row["start"] = old["omega"]
    return table


def problems(weights: dict[str, torch.Tensor]) -> list[str]:
    """A line for each omega that no training should have."""
    lines = []
    for key, value in weights.items():
        if key.endswith("_layer_norm.omega"):
            name, size = sub_layer_name(key[: -len(".omega")]), value.numel()
            broken, low = (~torch.isfinite(value)).sum().item(), (value <= 0).sum().item()
            if broken:
                lines.append(
                    f"{name}: omega is not finite in {broken} of {size} dimensions; take an earlier checkpoint"
                )
            elif low:
                lines.append(f"{name}: omega is zero or negative in {low} of {size} places")
    return lines


def from_profile(profile: Profile) -> Table:
    """omega, and where it is recorded Var[f] and the share of the branch (:meth:`Profile.shares`)."""
    table: Table = {}
    for stack in STACKS:
        omegas, shares = getattr(profile, stack), profile.shares(stack)
        has_attention_to_encoder = stack == "decoder" and profile.encoder and len(omegas) % 3 == 0
        kinds = ["self_attn", *(["encoder_attn"] if has_attention_to_encoder else []), "ffn"]
        for number, omega in enumerate(omegas):
            row: Row = {"layer": number // len(kinds), "sub_layer": kinds[number % len(kinds)], "omega": omega}
            if profile.branch_variance.get(stack):
                row["branch_variance"] = profile.branch_variance[stack][number]
            if shares:
                row["share"] = shares[number]
            table.setdefault(stack, []).append(row)
    return table


def text(table: Table, margin: float | None = None) -> str:
    """Every sub-layer with its numbers and a bar as long as omega, and below what the columns say.

    ``margin`` is that of the pre-pass, if known.
    """
    finite = [row["omega"] for rows in table.values() for row in rows if math.isfinite(row["omega"])]
    longest = max([0.0, *finite]) or 1.0
    lines: list[str] = []
    shown: dict[str, str] = {}
    for stack, rows in table.items():
        columns = [column for column in COLUMNS if column in rows[0]]
        shown.update(COLUMNS[column] for column in columns)
        lines.append(f"{stack}: {len(rows)} sub-layers" + (f", margin {margin:g}" if margin is not None else ""))
        lines.append("  layer  sub-layer   " + "".join(f"{COLUMNS[column][0]:>12}" for column in columns))
        for row in rows:
            numbers = "".join(
                f"{row[column]:>12.{1 if column == 'share' else 3}{'%' if column == 'share' else 'f'}}"
                for column in columns
            )
            bar = "#" * max(round(30 * row["omega"] / longest), 0) if math.isfinite(row["omega"]) else ""
            lines.append(f"  {row['layer']:>5}  {row['sub_layer']:12}{numbers}  {bar}")
    lines += ["", *(f"  {head:10}  {meaning}" for head, meaning in shown.items())]
    return "".join(line + "\n" for line in lines)
