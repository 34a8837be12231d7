"""Makes the run in a folder fit to be resumed: a kill in the middle of a copy leaves half a checkpoint_last.pt.

python checkpoints.py RUN [--whole-epochs]

fairseq writes a checkpoint under a temporary name, but then copies it to checkpoint_last.pt in place. With
--whole-epochs the run goes on from the last epoch that ended: within an epoch fairseq cannot resume with batches of
another size or another number of GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path


def is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def age(path: Path) -> tuple[int, float]:
    """checkpoint<epoch>.pt or checkpoint_<epoch>_<update>.pt by (epoch, update); an epoch's own is its last."""
    match = re.fullmatch(r"checkpoint_?(\d+)(?:_(\d+))?\.pt", path.name)
    return int(match[1]), float(match[2] or "inf")


def main() -> None:
    run, whole_epochs = Path(sys.argv[1]), "--whole-epochs" in sys.argv
    last = run / "checkpoint_last.pt"
    for left_over in run.glob("*.pt.tmp"):
        left_over.unlink()
    if last.exists() and not whole_epochs and is_whole(last):
        return
    numbered = [path for path in run.glob("checkpoint*.pt") if re.fullmatch(r"checkpoint_?\d+(_\d+)?\.pt", path.name)]
    for path in sorted(numbered, key=age, reverse=True):
        if whole_epochs and age(path)[1] != float("inf"):
            continue
        if is_whole(path):
            print(f"going on from {path}")
            partial = last.with_name("checkpoint_last.pt.tmp")
            with path.open("rb") as source, partial.open("wb") as copy:
                shutil.copyfileobj(source, copy)
                os.fsync(copy.fileno())
            os.replace(partial, last)
            return
    if last.exists() and whole_epochs:
        sys.exit(
            f"error: {run} has no finished epoch to go on from with another number of GPUs or another MAX_TOKENS; give"
            " those it was begun with, or remove it"
        )
    if last.exists():
        print(f"{last} is half a checkpoint, and there is no other; starting again")
        last.unlink()


if __name__ == "__main__":
    main()
