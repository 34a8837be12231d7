"""Two workers of a training on one machine, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from helpers import ROOT, TINY, TRAIN

WORKER = Path(__file__).with_name("train_worker.py")


class Group:
    """Two running workers. ``launcher`` is "separate" (one command a worker), "torchrun" or "spawn"."""

    def __init__(self, launcher: str, data: Path, folder: Path, *options: object, on_gpu: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        common = [
            *(str(WORKER), str(data), "--user-dir", str(ROOT / "admin_fairseq"), "--arch", "transformer_admin"),
            *(*TINY, *TRAIN, "--distributed-backend", "gloo", *map(str, options)),
        ]
        if on_gpu:
            common.remove("--cpu")
        address = ["--distributed-init-method", f"tcp://localhost:{port}", "--distributed-world-size", "2"]
        if launcher == "separate":
            # folders of their own show who writes what
            commands = [
                [
                    *(part.replace("{rank}", rank) for part in common),
                    *(*address, "--distributed-rank", rank, "--distributed-no-spawn", "--save-dir", folder / rank),
                ]
                for rank in ("0", "1")
            ]
        elif launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
            commands = [[*torchrun, *common, "--save-dir", folder / "0"]]
        else:
            commands = [[*common, *address, "--save-dir", folder / "0"]]
        environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore", OMEGAS=str(folder))
        self.logs = [folder / f"log{number}" for number in range(len(commands))]
        self.workers = []
        for command, log in zip(commands, self.logs):
            with log.open("w") as out:
                self.workers.append(
                    subprocess.Popen([sys.executable, *map(str, command)], env=environment, stdout=out, stderr=out)
                )

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def finish(self) -> str:
        """The log of the first command, once all have ended well."""
        codes = [worker.wait(timeout=300) for worker in self.workers]
        text = self.logs[0].read_text()
        assert set(codes) == {0}, "\n".join(log.read_text() for log in self.logs)
        assert "training on 2 devices" in text
        return text

    def omegas(self) -> list[dict[str, torch.Tensor]]:
        return [torch.load(self.folder / f"{rank}.pt") for rank in (0, 1)]
