"""Bad input ends in one clear line on stderr and a non-zero exit, not in a traceback."""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType

DATA_HINT = "DATA is the folder that fairseq-preprocess wrote (its --destdir), with dict.<lang>.txt, train and valid"


class AdminError(Exception):
    """The user's input cannot be used; the message says what is wrong and what to do."""


def explain(error: BaseException | None) -> str | None:
    """One line for an error that the user's input caused, None for any other (a bug keeps its traceback)."""
    while error is not None:
        text = str(error)
        if isinstance(error, AdminError) or text.startswith("admin_fairseq needs"):
            return text
        # fairseq spawns one process a GPU; the parent sees the child's traceback as text
        spawned = re.search(r"AdminError: (.+)", text)
        if spawned:
            return spawned.group(1)
        line = _explain_fairseq(error)
        if line is not None:
            return line
        error = error.__cause__ or error.__context__
    return None


def _explain_fairseq(error: BaseException) -> str | None:
    """What fairseq itself raises when DATA is not what it should be."""
    text, frames = str(error), traceback.extract_tb(error.__traceback__)
    if not any(f"{os.sep}fairseq{os.sep}" in frame.filename for frame in frames):
        return None
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        missing = f"no such file or folder: {error.filename}" if error.filename else text
        return f"{missing} ({DATA_HINT})"
    if text.startswith("Could not infer language pair"):
        return f"no training data found; give --source-lang and --target-lang, or check DATA ({DATA_HINT})"
    if text.startswith(("The dataset is empty", "cannot mmap an empty file")) or (
        isinstance(error, IndexError) and frames[-1].name == "batch_by_size"
    ):
        return (
            "a data set is empty: train or valid in DATA holds no pair at all, or none that fits --max-tokens and"
            " the maximum positions, or fewer pairs than --required-batch-size-multiple"
        )
    return None


def install_excepthook() -> None:
    """Print :func:`explain`'s line instead of a traceback when such an error ends the process."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = explain(error)
        if line is None:
            previous(kind, error, trace)
        else:
            print(f"admin_fairseq: error: {line}", file=sys.stderr)
            sys.unraisablehook = lambda _: None  # destructors of half-built objects would print tracebacks below it

    sys.excepthook = excepthook
