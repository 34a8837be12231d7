"""Files that appear whole or not at all, and tables and results as text for them."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import glob
import io
import json
import math
import os
import secrets
import stat
from typing import IO, Any, Iterable, Iterator, Sequence

from admin_fairseq.errors import AdminError


@contextlib.contextmanager
def writing(path: str, name: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write to, renamed to ``path`` once all is well; ``name`` is what messages call it.

    Until then it has a name of its own beside ``path``: of several writers each writes a whole file, and the last one's
    stays. Where ``path`` is a symbolic link, what it points to is replaced; a file that is replaced keeps its mode.

    Raises:
        AdminError: it cannot be written.
    """
    target, partial = os.path.realpath(path), None
    try:
        fault = _fault(target)
        if fault:
            raise AdminError(f"cannot write {name or path}: {fault}")
        _remove_left_overs(target)
        partial, out = _open_partial(target)
        with out:
            if os.path.exists(target):
                os.fchmod(out.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            yield out
            out.flush()
            os.fsync(out.fileno())  # or a loss of power could leave the name and no content
            os.replace(partial, target)
        partial = None
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise AdminError(f"cannot write {name or path}: {reason(error)}") from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.remove(partial)


def reason(error: BaseException) -> str:
    """Why something could not be written: the system's word for it, also where torch has wrapped that."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return " ".join(str(error).split())[:200]


def _open_partial(target: str) -> tuple[str, IO[bytes]]:
    """A new file beside ``target``, locked as long as its writer lives."""
    while True:
        partial = f"{target}.{secrets.token_hex(4)}.tmp"
        out = os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")
        is_taken = False  # by another writer, for a left-over, before it was locked
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # who is about to remove it
            is_taken = True
        except OSError:  # a file system without locks
            pass
        if not is_taken and os.path.exists(partial):
            return partial, out
        out.close()


def _remove_left_overs(target: str) -> None:
    """Remove what writers of ``target`` left that were killed: nobody holds a lock on it."""
    for partial in glob.glob(f"{glob.escape(target)}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError), open(partial, "r+b") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(partial)


def _fault(target: str) -> str | None:
    """Why a file of this name cannot be written, if that can be told before."""
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        return "it is a folder"
    if os.path.exists(target) and not os.path.isfile(target):
        return "it is a device, pipe or socket, not a file"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if not os.access(folder, os.W_OK) or (os.path.exists(target) and not os.access(target, os.W_OK)):
        return "it is write-protected"
    return None


def refuse_output(source: str, path: str) -> None:
    """Say before a long conversion what would go wrong after it.

    Raises:
        AdminError: ``path`` is the file that is read, or cannot be written.
    """
    if os.path.realpath(source) == os.path.realpath(path):
        raise AdminError(f"{path} is the file to read; give another name to write to")
    fault = _fault(os.path.realpath(path))
    if fault:
        raise AdminError(f"cannot write {path}: {fault}")


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
