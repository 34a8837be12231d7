"""Makes the run in a folder fit to be resumed: a kill in the middle of a copy leaves half a checkpoint_last.pt.

    python checkpoints.py RUN

fairseq writes a checkpoint under a temporary name, but then copies it to checkpoint_last.pt in place.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path


def main() -> None:
    run = Path(sys.argv[1])
    last = run / "checkpoint_last.pt"
    for left_over in run.glob("*.tmp"):
        left_over.unlink()
    whole = [path for path in run.glob("checkpoint*.pt") if zipfile.is_zipfile(path)]  # its directory is written last
    for path in set(run.glob("checkpoint*.pt")) - set(whole):
        print(f"{path} is half a checkpoint, left by a kill; removing it")
        path.unlink()
    if whole and not last.exists():
        newest = max(whole, key=lambda path: path.stat().st_mtime)
        print(f"going on from {newest}")
        partial = last.with_suffix(".tmp")
        shutil.copy(newest, partial)
        os.replace(partial, last)


if __name__ == "__main__":
    main()
