"""omega by sub-layer as a terminal table, from a checkpoint or a profile."""

from __future__ import annotations

import math
import os
import zipfile
from typing import Dict, List, Union

import torch

from admin_fairseq import checkpoint
from admin_fairseq.errors import AdminError
from admin_fairseq.files import json_text
from admin_fairseq.profiling import STACKS, Profile, read_profile

Row = Dict[str, Union[int, str, float]]
Table = Dict[str, List[Row]]  # by stack

HEADS = {  # of the columns of numbers
    "omega": "omega",
    "std": "std over d",
    "start": "at start",
    "branch_variance": "Var[f]",
    "share": "share of f",
}


def show(path: str, as_json: bool = False) -> None:
    """Print omega for every sub-layer, with a bar.

    From a checkpoint: mean and standard deviation over dimensions, and the first omega, if the profile still lies in
    the checkpoint's folder. From a profile: omega, and where it is recorded Var[f] and the share of the residual
    branch in the sub-layer's sum (see :meth:`~admin_fairseq.profiling.Profile.shares`).

    Raises:
        AdminError: the file is missing, or neither a profile nor a checkpoint with omegas.
    """
    is_checkpoint = path.endswith(".pt") or zipfile.is_zipfile(path)  # torch.save writes zip archives
    table = _from_checkpoint(path) if is_checkpoint else _from_profile(read_profile(path))
    if not table:
        raise AdminError(f"{path} holds no omega: it is not of an Admin model")
    if as_json:
        print(json_text(table), end="")
        return
    finite = [row["omega"] for rows in table.values() for row in rows if math.isfinite(row["omega"])]
    longest = max(finite, default=1.0)
    for stack, rows in table.items():
        columns = [column for column in HEADS if column in rows[0]]
        print(f"{stack}: {len(rows)} sub-layers")
        print("  layer  sub-layer   " + "".join(f"{HEADS[column]:>12}" for column in columns))
        for row in rows:
            numbers = "".join(
                f"{row[column]:>12.{1 if column == 'share' else 3}{'%' if column == 'share' else 'f'}}"
                for column in columns
            )
            bar = "#" * max(round(30 * row["omega"] / longest), 0) if math.isfinite(row["omega"]) else ""
            print(f"  {row['layer']:>5}  {row['sub_layer']:12}{numbers}  {bar}")


def _from_profile(profile: Profile) -> Table:
    table: Table = {}
    for stack in STACKS:
        omegas, shares = getattr(profile, stack), profile.shares(stack)
        has_attention_to_encoder = stack == "decoder" and profile.encoder and len(omegas) % 3 == 0
        kinds = ["self_attn", *(["encoder_attn"] if has_attention_to_encoder else []), "final"]
        for number, omega in enumerate(omegas):
            row: Row = {"layer": number // len(kinds), "sub_layer": kinds[number % len(kinds)], "omega": omega}
            if shares:
                row.update(branch_variance=profile.branch_variance[stack][number], share=shares[number])
            table.setdefault(stack, []).append(row)
    return table


def of_weights(weights: dict[str, torch.Tensor]) -> Table:
    """omega's mean and population standard deviation over dimensions, of a checkpoint's weights."""
    table: Table = {}
    for key, value in weights.items():
        if key.endswith("_layer_norm.omega"):
            stack, name = key[: -len("_layer_norm.omega")].split(".layers.")
            layer, kind = name.split(".")
            std, mean = (number.item() for number in torch.std_mean(value.float(), unbiased=False))
            row: Row = {"layer": int(layer), "sub_layer": kind, "omega": mean, "std": std}
            table.setdefault(stack, []).append(row)
    return table


def _from_checkpoint(path: str) -> Table:
    table = of_weights(checkpoint.load(path)["model"])
    start = os.path.join(os.path.dirname(path), "admin_profile.json")
    first = _from_profile(read_profile(start)) if os.path.exists(start) else {}
    if [*map(len, first.values())] == [*map(len, table.values())]:
        for stack, rows in table.items():
            for row, old in zip(rows, first[stack]):
                row["start"] = old["omega"]
    return table
