"""omega by sub-layer as a terminal table, from a checkpoint's weights or a profile."""

from __future__ import annotations

import math
from typing import Any, Dict, List

import torch

from admin_fairseq.profile_file import STACKS, Profile

Row = Dict[str, Any]  # int, str or float, by column
Table = Dict[str, List[Row]]  # by stack

HEADS = {  # of the columns of numbers
    "omega": "omega",
    "std": "std over d",
    "start": "at start",
    "branch_variance": "Var[f]",
    "share": "share of f",
}


def from_weights(weights: dict[str, torch.Tensor], start: Profile | None = None) -> Table:
    """omega's mean and population standard deviation over dimensions, and where it started, if that is known."""
    table: Table = {}
    for key, value in weights.items():
        if key.endswith("_layer_norm.omega"):
            stack, name = key[: -len("_layer_norm.omega")].split(".layers.")
            layer, kind = name.split(".")
            std, mean = value.float().std(unbiased=False).item(), value.float().mean().item()
            row: Row = {"layer": int(layer), "sub_layer": kind, "omega": mean, "std": std}
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
            name, size = key[: -len("_layer_norm.omega")], value.numel()
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
        kinds = ["self_attn", *(["encoder_attn"] if has_attention_to_encoder else []), "final"]
        for number, omega in enumerate(omegas):
            row: Row = {"layer": number // len(kinds), "sub_layer": kinds[number % len(kinds)], "omega": omega}
            if profile.branch_variance.get(stack):
                row["branch_variance"] = profile.branch_variance[stack][number]
            if shares:
                row["share"] = shares[number]
            table.setdefault(stack, []).append(row)
    return table


def text(table: Table) -> str:
    """Every sub-layer with its numbers and a bar as long as omega."""
    finite = [row["omega"] for rows in table.values() for row in rows if math.isfinite(row["omega"])]
    longest = max(finite, default=1.0)
    lines = []
    for stack, rows in table.items():
        columns = [column for column in HEADS if column in rows[0]]
        lines.append(f"{stack}: {len(rows)} sub-layers")
        lines.append("  layer  sub-layer   " + "".join(f"{HEADS[column]:>12}" for column in columns))
        for row in rows:
            numbers = "".join(
                f"{row[column]:>12.{1 if column == 'share' else 3}{'%' if column == 'share' else 'f'}}"
                for column in columns
            )
            bar = "#" * max(round(30 * row["omega"] / longest), 0) if math.isfinite(row["omega"]) else ""
            lines.append(f"  {row['layer']:>5}  {row['sub_layer']:12}{numbers}  {bar}")
    return "".join(line + "\n" for line in lines)
