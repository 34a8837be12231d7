"""Reading and writing fairseq's checkpoint files."""

from __future__ import annotations

import argparse
import os
import re
from typing import IO, Any, Callable, Dict

import torch
from omegaconf import DictConfig, OmegaConf

from admin_fairseq.checkpoints import unpickling
from admin_fairseq.checkpoints.guard import FORGOTTEN, checked
from admin_fairseq.config import as_namespace
from admin_fairseq.errors import AdminError
from admin_fairseq.files import writing

Weights = Dict[str, torch.Tensor]
State = Dict[str, Any]  # of a checkpoint


def load(path: str) -> State:
    """The checkpoint as fairseq's dictionary, on the CPU; no code that the file names is run.

    Raises:
        AdminError: the file is missing or not a fairseq checkpoint, or holds other than tensors and plain data.
    """
    if not os.path.isfile(path):
        raise AdminError(f"{path} is a folder, not a checkpoint" if os.path.isdir(path) else f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            return read(file)
    except OSError as error:
        raise AdminError(f"cannot read {path}: {error.strerror}") from error


def read(file: IO[bytes], torch_load: Callable[..., Any] = torch.load, forgets: bool = False) -> State:
    """The same of an open file; fairseq's own commands get theirs by it.

    Args:
        torch_load: torch's own, where ours stands in its place.
        forgets: as in :func:`admin_fairseq.checkpoints.guard.checked`.

    Raises:
        AdminError: as above.
    """
    try:
        state = unpickling.read(file, torch_load)
        if not isinstance(state["model"], dict):
            raise TypeError("its weights are not a dictionary")
        if not all(isinstance(name, str) for name in state["model"]):
            raise TypeError("a weight's name is not text")
    except Exception as error:  # bytes that are no checkpoint end in any of a dozen errors
        refused = re.search(r"(?i)unsupported (?:global: GLOBAL|global|class) (\S+)", str(error))
        if refused:
            raise AdminError(
                f"{file.name} holds an object of {refused[1]}, which safe loading does not read; nothing in the file"
                " was run"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason:  # torch's advice is to read it by running what it names
            reason = "it is not made of tensors and plain data"
        raise AdminError(f"{file.name} is not a fairseq checkpoint ({reason[:200]})") from error
    try:
        for name in ("args", "cfg"):
            if state.get(name) is not None:
                state[name] = checked(state[name], forgets)
    except AdminError as error:
        raise AdminError(f"{file.name}: {error}") from error
    return state


def settings(state: State) -> argparse.Namespace:
    """A checkpoint's settings as one flat namespace, from any of the forms in which fairseq has kept them.

    They name nothing that would be imported, opened or written when something is built from them.

    Raises:
        AdminError: there are none, or their names are not text.
    """
    args, cfg = state.get("args"), state.get("cfg")
    if isinstance(args, (dict, argparse.Namespace)):
        return _namespace(args if isinstance(args, dict) else vars(args))
    if not isinstance(cfg, (dict, DictConfig)):
        raise AdminError("it holds no settings")
    options: dict[str, Any] = {}
    names = {}
    for section, values in cfg.items():
        if isinstance(values, (dict, DictConfig)):
            values = as_namespace(OmegaConf.create(values)) if section == "model" else _namespace(values)
        if isinstance(values, argparse.Namespace):
            options.update(vars(values))
            if "_name" in options:
                names["arch" if section == "model" else section] = options.pop("_name")
    return _namespace({**options, **names})


def _namespace(options: Any) -> argparse.Namespace:
    if not all(isinstance(name, str) for name in options):
        raise AdminError("its settings have names that are not text")
    return argparse.Namespace(**{**options, **{name: FORGOTTEN[name] for name in FORGOTTEN if name in options}})


def save(state: State, path: str) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
        AdminError: it cannot be written.
    """
    with writing(path) as out:
        torch.save(state, out)
