"""The mean of several checkpoints' weights, as fairseq's scripts/average_checkpoints.py computes it."""

from __future__ import annotations

import os
import re
from typing import Any, Sequence

import torch
from tqdm import tqdm

from admin_fairseq import checkpoint
from admin_fairseq.errors import AdminError


def average(paths: Sequence[str], output: str) -> None:
    """Write one checkpoint with the mean of all weights and everything else of the first one.

    Sums are taken in float64; half-precision weights come out in float32. Numbers that are not weights
    (counters) and all settings are the first checkpoint's. The optimizer's state has no mean and is left out.

    Raises:
        AdminError: a file is missing or no checkpoint, or the models differ.
    """
    first: dict[str, Any] | None = None
    for path in tqdm(paths, desc="averaging", unit="checkpoint", delay=3):
        state = checkpoint.load(path)
        state.pop("last_optimizer_state", None)
        weights = state.pop("model")
        shapes = {name: weight.shape for name, weight in weights.items()}
        if first is None:
            first, averaged, expected = state, weights, shapes
            floating = [name for name, weight in weights.items() if weight.is_floating_point()]
            sums = {name: torch.zeros_like(weights[name], dtype=torch.float64) for name in floating}
        elif shapes != expected:
            different = min(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
            raise AdminError(f"{path} is of another model than {paths[0]}: they differ in {different}")
        for name in floating:
            sums[name] += weights[name]
    for name in floating:
        dtype = torch.promote_types(averaged[name].dtype, torch.float32)
        averaged[name] = (sums[name] / len(paths)).to(dtype)
    checkpoint.save({**first, "model": averaged}, output)


def select(folder: str, count: int, by_update: bool, upper_bound: int | None = None) -> list[str]:
    """The newest ``count`` checkpoints of a folder, newest first.

    Args:
        by_update: take ``checkpoint_<epoch>_<update>.pt`` instead of ``checkpoint<epoch>.pt``.
        upper_bound: leave out later epochs (or updates) than this one.

    Raises:
        AdminError: the folder is missing or holds too few of them.
    """
    pattern = re.compile(r"checkpoint_\d+_(\d+)\.pt" if by_update else r"checkpoint(\d+)\.pt")
    try:
        found = [(int(match[1]), match[0]) for match in map(pattern.fullmatch, os.listdir(folder)) if match]
    except OSError as error:
        raise AdminError(f"{error.strerror}: {folder} (expected a folder of checkpoints)") from error
    chosen = sorted((entry for entry in found if upper_bound is None or entry[0] <= upper_bound), reverse=True)[:count]
    if len(chosen) < count:
        kind = "checkpoint_<epoch>_<update>.pt" if by_update else "checkpoint<epoch>.pt"
        limit = "" if upper_bound is None else f" up to {upper_bound}"
        raise AdminError(f"{folder} holds {len(chosen)} files {kind}{limit}, not {count}")
    return [os.path.join(folder, name) for _, name in chosen]
