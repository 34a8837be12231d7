"""One training at a time in a --save-dir: two would overwrite each other's checkpoints.

A training leaves a mark there, holds a lock on it and moves its time as long as it lives. The lock ends with the
process, whatever ended it, and most network file systems know it on every machine. Where they do not, the mark's time
tells: it stands still once its training has been killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
from typing import IO, Any, Callable

from admin_fairseq.errors import AdminError

logger = logging.getLogger(__name__)

MARK = ".admin_training"
BEAT = 5.0  # seconds between two signs of life
PATIENCE = 4 * BEAT  # without one, the training is taken for dead

_held: set[str] = set()  # by this process, which may train several models, one after the other or side by side


def claim(folder: str) -> Callable[[], None]:
    """Mark a folder as that of this process's training; returns what takes the mark away.

    Nothing happens where this process has marked it already, or where there is no such folder.

    Raises:
        AdminError: another training is at work there.
    """
    path = os.path.join(os.path.realpath(folder), MARK)
    if path in _held or not os.path.isdir(folder):
        return lambda: None
    try:
        mark, is_locked = _open(path, folder)
    except OSError as error:
        raise AdminError(f"cannot write to {folder}: {error.strerror}") from error
    before, this_machine = _read(mark), _machine()
    if before and (not is_locked or before.get("machine") != this_machine):
        logger.info(f"{folder} has the mark of {_who(before)}: looking up to {PATIENCE:.0f} s whether it is at work")
        if _moves(path):
            mark.close()
            raise AdminError(_occupied(folder, before))
    owner = {"machine": this_machine, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    mark.truncate(0)
    mark.write(json.dumps(owner).encode())
    mark.flush()
    _held.add(path)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()

    def release() -> None:
        ended.set()
        if path in _held:
            _held.remove(path)
            with contextlib.suppress(OSError):
                os.remove(path)  # while it is locked: who opened it before sees that it is gone
            mark.close()

    return release


def _open(path: str, folder: str) -> tuple[IO[bytes], bool]:
    """The mark, made if need be, and whether it could be locked.

    The kind of lock matters: it is not the data loaders', which may live on for seconds after a kill.
    """
    while True:
        # held until the training ends; not through a link, whose target would be overwritten
        mark = open(path, "a+b", buffering=0, opener=_open_no_link)  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(mark.fileno()).st_mode):
            mark.close()
            raise AdminError(f"{path} is no regular file; remove it")
        try:
            fcntl.lockf(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with mark:
                raise AdminError(_occupied(folder, _read(mark))) from None
        except OSError:  # a file system without locks
            return mark, False
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(mark.fileno()), os.stat(path)):
                return mark, True
        mark.close()  # its owner has just taken it away


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _read(mark: IO[bytes]) -> dict[str, Any]:
    try:
        mark.seek(0)
        content = json.loads(mark.read())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _machine() -> str:
    """Its name, and what tells two of one name apart."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        return f"{socket.gethostname()} {boot.read().strip()}"
    return socket.gethostname()


def _who(owner: dict[str, Any]) -> str:
    host = str(owner.get("machine", "?")).split(" ")[0]
    return f"process {owner.get('pid', '?')} on {host}, begun at {owner.get('since', '?')}"


def _occupied(folder: str, owner: dict[str, Any]) -> str:
    return f"another training is at work in {folder} ({_who(owner)}); stop it, or give another --save-dir"


def _moves(path: str) -> bool:
    """Whether a mark's time changes. (To open and close it would end our lock.)"""
    with contextlib.suppress(OSError):
        first, until = os.stat(path).st_mtime_ns, time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(BEAT / 5)
            if os.stat(path).st_mtime_ns != first:
                return True
    return False


def _beat(path: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # the next one may succeed
            os.utime(path)
