"""Files that appear whole or not at all, and tables and results as text for them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from typing import IO, Any, Iterable, Iterator, Sequence

from admin_fairseq.errors import AdminError


@contextlib.contextmanager
def writing(path: str, name: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, renamed to ``path`` once all is well; ``name`` is what messages call it.

    Raises:
        AdminError: it cannot be written.
    """
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as out:
            yield out
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise AdminError(f"cannot write {name or path}: {getattr(error, 'strerror', None) or error}") from error


def refuse_output(source: str, path: str) -> None:
    """Say before a long conversion what would go wrong after it.

    Raises:
        AdminError: ``path`` is the file that is read, or cannot be written.
    """
    if os.path.realpath(source) == os.path.realpath(path):
        raise AdminError(f"{path} is the file to read; give another name to write to")
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise AdminError(f"cannot write {path}: it must be a file in a folder that exists and can be written to")


def json_text(data: Any) -> str:
    """Data as JSON that other readers take too: a number that is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(data), indent=1, allow_nan=False) + "\n"


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """A table of text, each head over its column."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "".join(indent + "  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


def as_csv(rows: Sequence[dict[str, Any]], columns: Iterable[str] | None = None) -> str:
    """Rows as a CSV table, by default with every column that one of them has."""
    out = io.StringIO()
    names = dict.fromkeys(key for row in rows for key in row) if columns is None else columns
    table = csv.DictWriter(out, list(names), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return out.getvalue()
