"""Reading and writing fairseq's checkpoint files."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from typing import IO, Any, Dict, Iterator

import torch
from omegaconf import DictConfig, OmegaConf

from admin_fairseq.checkpoints import checks, guard, unpickling
from admin_fairseq.config import as_namespace
from admin_fairseq.errors import AdminError
from admin_fairseq.files import writing

State = Dict[str, Any]  # of a checkpoint


def load(path: str, finite: bool = False, checked: bool = True) -> State:
    """The checkpoint as fairseq's dictionary, on the CPU; no code that the file names is run.

    Args:
        finite: with finite weights only.
        checked: it is of a Transformer of this fairseq, with weights and settings that agree.

    Raises:
        AdminError: the file is missing or not such a checkpoint, or holds other than tensors and plain data.
    """
    if not os.path.isfile(path):
        raise AdminError(missing(path))
    try:
        with open(path, "rb") as file:
            state = read(file)
    except OSError as error:
        raise AdminError(f"cannot read {path}: {error.strerror}") from error
    with naming(path):
        if checked:
            has_settings = state.get("args") is not None or state.get("cfg") is not None
            checks.check(state, settings(state) if has_settings else None)
        if finite:
            checks.check_finite(state)
    return state


def missing(path: str) -> str:
    """What to say of a checkpoint's path where no file is; of a folder, which files are in it."""
    if not os.path.isdir(path):
        return f"no such file: {path}"
    names = [os.path.join(path, f"checkpoint_{name}.pt") for name in ("best", "last")]
    held = " or ".join(name for name in names if os.path.isfile(name))
    return f"{path} is a folder, not a checkpoint" + f"; give {held}" * bool(held)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of functions that do not know the file's name get it."""
    try:
        yield
    except AdminError as error:
        raise AdminError(f"{path}: {error}") from error


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Whatever fairseq raises when it builds something from a checkpoint's settings is an AdminError."""
    try:
        yield
    except (AdminError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise AdminError(f"no {what} can be built from its settings ({reason})") from error


def read(file: IO[bytes], forgets: bool = False) -> State:
    """The same of an open file; fairseq's own commands get theirs by it.

    Args:
        forgets: as in :func:`admin_fairseq.checkpoints.guard.checked`.

    Raises:
        AdminError: as above.
    """
    try:
        state = unpickling.read(file)
        if not isinstance(state["model"], dict):
            raise TypeError("its weights are not a dictionary")
        if not all(isinstance(name, str) and name.isprintable() for name in state["model"]):
            raise TypeError("a weight's name is not text")
    except Exception as error:  # bytes that are no checkpoint end in any of a dozen errors
        refused = re.search(r"(?i)unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error))
        if refused:
            raise AdminError(
                f"{file.name} holds an object of {refused[1]}, which safe loading does not read; nothing in the file"
                " was run"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        shown = "".join(character if character.isprintable() else "?" for character in reason[:200])
        raise AdminError(f"{file.name} is not a fairseq checkpoint ({shown})") from error
    with naming(file.name):
        for name in ("args", "cfg"):
            if state.get(name) is not None:
                state[name] = guard.checked(state[name], forgets)
        if forgets:
            _check_sizes(state)
            checks.check_progress(state)
    return state


def _check_sizes(state: State) -> None:
    """Of what fairseq is about to build, if it is a Transformer."""
    if state.get("args") is not None or state.get("cfg") is not None:
        args = settings(state)
        if checks.is_transformer(args.arch):
            checks.check_settings(args, state["model"], checks.check_weights(state["model"]))


def settings(state: State) -> argparse.Namespace:
    """A checkpoint's settings as one flat namespace, from any of the forms in which fairseq has kept them.

    They name nothing that would be imported, opened or written when something is built from them.

    Raises:
        AdminError: there are none, or their names are not text.
    """
    with building("model"):  # of whatever shape its sections are
        return _settings(state)


def _settings(state: State) -> argparse.Namespace:
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
    return argparse.Namespace(
        **{"arch": None, **options, **{name: value for name, value in guard.FORGOTTEN.items() if name in options}}
    )


def save(state: State, path: str) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
        AdminError: it cannot be written.
    """
    with writing(path) as out:
        torch.save(state, out)
