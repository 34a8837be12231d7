"""Bad input ends in one clear line on stderr and a non-zero exit, not in a traceback."""

from __future__ import annotations

import re
import sys
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
        if isinstance(error, FileNotFoundError):
            missing = f"no such file or folder: {error.filename}" if error.filename else text
            return f"{missing} ({DATA_HINT})"
        if text.startswith("Could not infer language pair"):
            return f"no training data found; give --source-lang and --target-lang, or check DATA ({DATA_HINT})"
        if text.startswith("The dataset is empty"):
            return (
                "the training set is empty: train.* in DATA holds no usable pair"
                " (none at all, or all are longer than --max-tokens or the maximum positions)"
            )
        error = error.__cause__ or error.__context__
    return None


def install_excepthook() -> None:
    """Print :func:`explain`'s line instead of a traceback when such an error ends the process."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        line = explain(error)
        if line is None:
            previous(kind, error, traceback)
        else:
            print(f"admin_fairseq: error: {line}", file=sys.stderr)

    sys.excepthook = excepthook
