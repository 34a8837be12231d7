"""Reading and writing fairseq's checkpoint files."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from typing import Any

import torch

from admin_fairseq.errors import AdminError


def load(path: str) -> dict[str, Any]:
    """The checkpoint as fairseq's dictionary, on the CPU.

    Raises:
        AdminError: the file is missing or not a fairseq checkpoint.
    """
    if not os.path.isfile(path):
        raise AdminError(f"no such file: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=torch.__version__ >= "2.6")  # see hooks.install
        if not isinstance(state["model"], dict):
            raise TypeError("its weights are not a dictionary")
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError, OSError) as error:
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused:
            raise AdminError(
                f"{path} holds an object of {refused[1]}, which torch's safe loading does not read; if you trust the"
                f" file, list the class with torch.serialization.add_safe_globals"
            ) from error
        raise AdminError(f"{path} is not a fairseq checkpoint ({str(error).splitlines()[0]})") from error
    return state


def save(state: dict[str, Any], path: str) -> None:
    """Write a checkpoint; the file appears whole or not at all.

    Raises:
        AdminError: it cannot be written.
    """
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as out:
            torch.save(state, out)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise AdminError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
