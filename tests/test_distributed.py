"""Two workers on one machine, over gloo: omega is that of the global batch, on every worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TRAIN, train
from test_train import assert_same_checkpoint

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
                [*common, *address, "--distributed-rank", rank, "--distributed-no-spawn", "--save-dir", folder / rank]
                for rank in ("0", "1")
            ]
        elif launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
            commands = [[*torchrun, *common, "--save-dir", folder / "0"]]
        else:
            commands = [[*common, *address, "--save-dir", folder / "0"]]
        environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore", OMEGAS=str(folder))
        environment["OMP_NUM_THREADS"] = "1"
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


def profile(folder: Path) -> dict:
    return json.loads((folder / "admin_profile.json").read_text())


def assert_same_omega(first: dict, second: dict) -> None:
    assert first["tokens"] == second["tokens"]
    for stack in ("encoder", "decoder"):
        assert first[stack] == pytest.approx(second[stack], rel=1e-6)


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [("separate", "legacy_ddp"), ("separate", "pytorch_ddp"), ("torchrun", "no_c10d"), ("spawn", "c10d")],
)
def test_two_workers_profile_as_one(data, tmp_path, launcher, backend):
    """Two workers' first batches, or one worker's first two: dropout masks included."""
    options = ["--ddp-backend", backend, "--dropout", "0.3", "--max-update", "2"]
    with Group(launcher, data, tmp_path / "two", *options) as group:
        log = group.finish()
    omegas = group.omegas()
    assert omegas[0].keys() == omegas[1].keys()
    for name, omega in omegas[0].items():
        assert torch.equal(omega, omegas[1][name])  # to the bit
    assert log.count("Admin: profiled") == 1
    if launcher == "separate":
        assert not list(tmp_path.glob("two/1/*"))

    one = train(data, tmp_path / "one", "--admin-profile-batches", "2", "--dropout", "0.3", updates=1)
    assert one.code == 0, one.output
    two = profile(tmp_path / "two" / "0")
    assert two["settings"]["world_size"] == 2
    assert_same_omega(two, profile(tmp_path / "one"))
    measured = [value for stack in ("encoder", "decoder") for value in two[stack]]
    applied = [omega.mean().item() for omega in omegas[0].values()]
    assert applied == pytest.approx(measured, rel=1e-6)


def test_worker_with_an_empty_shard(data, tmp_path):
    """One batch for two workers: the second runs fairseq's dummy batch, which does not count."""
    options = ["--ddp-backend", "legacy_ddp", "--max-tokens", "100000", "--max-epoch", "1"]
    with Group("separate", data, tmp_path / "two", *options) as group:
        group.finish()
    first, second = group.omegas()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = train(data, tmp_path / "one", "--max-tokens", "100000", updates=1)
    assert one.code == 0, one.output
    assert_same_omega(profile(tmp_path / "two" / "0"), profile(tmp_path / "one"))


def test_resume_after_a_worker_was_killed(data, tmp_path):
    """kill -9 of one worker in mid-epoch, and the same command again, is the run that nothing happened to."""
    options = ["--ddp-backend", "legacy_ddp", "--max-tokens", "100", "--save-interval-updates", "4", "--max-update"]
    with Group("torchrun", data, tmp_path / "killed", *options, "1000", "--max-epoch", "1") as group:
        checkpoint = group.folder / "0" / "checkpoint_1_4.pt"
        while not checkpoint.exists():
            assert group.workers[0].poll() is None, group.logs[0].read_text()
            time.sleep(0.05)
        children = subprocess.check_output(["pgrep", "-P", str(group.workers[0].pid)], text=True).split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert group.workers[0].wait(timeout=120) != 0
    with Group("torchrun", data, tmp_path / "killed", *options, "12", "--max-epoch", "1") as group:
        log = group.finish()
    assert "omega from the checkpoint" in log
    assert "Admin: profiled" not in log
    with Group("torchrun", data, tmp_path / "whole", *options, "12", "--max-epoch", "1") as group:
        group.finish()
    assert_same_checkpoint(*(tmp_path / name / "0" / "checkpoint_1_12.pt" for name in ("killed", "whole")))
