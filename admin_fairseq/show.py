"""omega by sub-layer as a terminal table, from a checkpoint or a profile."""

from __future__ import annotations

import zipfile
from typing import Dict, List, Tuple

import torch

from admin_fairseq import checkpoint
from admin_fairseq.errors import AdminError
from admin_fairseq.profiling import STACKS, read_profile

# by stack: (sub-layer, mean over dimensions, standard deviation over dimensions)
Table = Dict[str, List[Tuple[str, float, float]]]


def show(path: str) -> None:
    """Print omega's mean and standard deviation over dimensions for every sub-layer, with a bar.

    Raises:
        AdminError: the file is missing, or neither a profile nor a checkpoint with omegas.
    """
    is_checkpoint = path.endswith(".pt") or zipfile.is_zipfile(path)  # torch.save writes zip archives
    table = _from_checkpoint(path) if is_checkpoint else _from_profile(path)
    if not table:
        raise AdminError(f"{path} holds no omega: it is not of an Admin model")
    longest = max(mean for rows in table.values() for _, mean, _ in rows)
    for stack, rows in table.items():
        width = max(len(name) for name, _, _ in rows)
        print(f"{stack}: omega of {len(rows)} sub-layers (mean, standard deviation over dimensions)")
        for name, mean, deviation in rows:
            print(f"  {name:{width}} {mean:8.3f} {deviation:7.3f}  {'#' * max(round(40 * mean / longest), 0)}")


def _from_profile(path: str) -> Table:
    profile = read_profile(path)
    return {
        stack: [(f"sub-layer {number}", omega, 0.0) for number, omega in enumerate(getattr(profile, stack), start=1)]
        for stack in STACKS
        if getattr(profile, stack)
    }


def _from_checkpoint(path: str) -> Table:
    weights = checkpoint.load(path)["model"]
    table: Table = {}
    for key, value in weights.items():
        if key.endswith("_layer_norm.omega"):
            stack, name = key[: -len("_layer_norm.omega")].split(".layers.")
            deviation, mean = torch.std_mean(value.float(), unbiased=False)
            table.setdefault(stack, []).append((f"layer {name.replace('.', ' ')}", mean.item(), deviation.item()))
    return table
