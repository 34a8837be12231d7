"""Commands at work, to be killed or to find a full disk: admin-fairseq's, and a recipe of the smallest size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("recipes", "commands")]

import forked
from helpers import ROOT, TINY, TRAIN
from toy import EXAMPLES, environment


def commands(data: Path, inputs: Path, out: Path) -> dict[str, list]:
    """The arguments of admin-fairseq by command; what it writes is out.pt in the folder, or admin_profile.json."""
    one, two = inputs / "run/checkpoint_1_2.pt", inputs / "run/checkpoint_1_4.pt"
    return {
        "profile": [data, "--arch", "transformer_admin", "--out", out, *TINY, *TRAIN],
        "average": ["--inputs", one, two, "--output", out / "out.pt"],
        "fold": [two, out / "out.pt"],
        "import": [inputs / "theirs.pt", out / "out.pt"],
        "deepen": [two, out / "out.pt", data, "--encoder-layers", "4"],
    }


class Command:
    """admin-fairseq in a process forked from one that has imported fairseq."""

    def __init__(self, arguments: list, log: Path) -> None:
        argv, environment = [*map(str, arguments)], dict(os.environ, PYTHONPATH=str(ROOT))
        self.process = forked._forks.Process(
            target=forked._main, args=("admin-fairseq", argv, str(ROOT), environment, str(log))
        )
        self.process.start()

    def is_over(self) -> bool:
        return not self.process.is_alive()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> int:
        self.process.join(600)
        return self.process.exitcode


SMALL = {
    **{
        "BPE": "60",
        "EPOCHS": "3",
        "SAVE_UPDATES": "2",
        "BEAM": "1",
        "WORKERS": "1",
        "DEPTH": "1-1",
        "MAX_TOKENS": "800",
    },
    "EXTRA": "--encoder-embed-dim 16 --encoder-ffn-embed-dim 16 --encoder-attention-heads 2 --decoder-attention-heads 2"
    " --decoder-embed-dim 16 --decoder-output-dim 16 --num-workers 0 --required-batch-size-multiple 1",
}
STEPS = ["prepare", "train", "evaluate"]


def start(name: str, folder: Path) -> subprocess.Popen:
    with (folder / f"{name}.log").open("w") as out:
        return subprocess.Popen(
            ["bash", EXAMPLES / "multi30k_de_en" / f"{name}.sh"],
            env=environment(folder, **SMALL),
            cwd=folder,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
