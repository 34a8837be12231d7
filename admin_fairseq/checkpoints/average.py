"""The mean of several checkpoints' weights, as fairseq's scripts/average_checkpoints.py computes it."""

from __future__ import annotations

import os
import re
from typing import Iterable

import torch

from admin_fairseq.checkpoints.files import State
from admin_fairseq.errors import AdminError


def average(states: Iterable[tuple[str, State]]) -> State:
    """One checkpoint with the mean of all weights and everything else of the first one.

    Sums are taken in float64; half-precision weights come out in float32. Numbers that are not weights
    (counters) and all settings are the first checkpoint's. The optimizer's state has no mean and is left out.

    Args:
        states: each checkpoint with its name for messages; one is held at a time, beside the sums.

    Raises:
        AdminError: the models differ.
    """
    first: State | None = None
    count = 0
    for name, state in states:
        count += 1
        state.pop("last_optimizer_state", None)
        weights = state.pop("model")
        shapes = {key: weight.shape for key, weight in weights.items()}
        if first is None:
            first, first_name, averaged, expected = state, name, weights, shapes
            sums = {
                key: torch.zeros_like(weight, dtype=torch.float64)
                for key, weight in weights.items()
                if weight.is_floating_point()
            }
        elif shapes != expected:
            different = min(key for key in {*shapes, *expected} if shapes.get(key) != expected.get(key))
            raise AdminError(f"{name} is of another model than {first_name}: they differ in {different}")
        for key, total in sums.items():
            total += weights[key]
    if first is None:
        raise AdminError("there is no checkpoint to average")
    for key, total in sums.items():
        dtype = torch.promote_types(averaged[key].dtype, torch.float32)
        averaged[key] = (total / count).to(dtype)
    return {**first, "model": averaged}


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
