"""SIGKILL at any moment: what was there stays or is whole, the command run again ends as if nothing had happened.

KILLS is the number a target: 50 in `make kills`, few in `make test-all`. Half of them come at a random moment of the
whole run, half just after a temporary file has appeared.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Callable

import pytest
from at_work import STEPS, Command, commands, start
from helpers import checkpoint

KILLS = int(os.environ.get("KILLS", "2"))


def wait_for(dice: random.Random, seconds: float, folder: Path, is_over: Callable[[], bool]) -> bool:
    """Let a command run for a while; whether it is still at work."""
    if dice.random() < 0.5:
        until = time.monotonic() + dice.uniform(0, seconds)
        while time.monotonic() < until and not is_over():
            time.sleep(0.005)
    else:
        while not is_over() and not any(name.endswith(".tmp") for name in os.listdir(folder)):
            pass
        time.sleep(dice.choice((0, 0.0005, 0.002)))
    return not is_over()


@pytest.mark.parametrize("name", ["profile", "average", "fold", "import", "deepen"])
def test_a_killed_command(data, inputs, tmp_path, name):
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    for folder in (whole, out):
        folder.mkdir()
    started = time.monotonic()
    assert Command([name, *commands(data, inputs, whole)[name]], log).end() == 0, log.read_text()
    seconds = time.monotonic() - started
    (file,) = os.listdir(whole)
    expected, dice = (whole / file).read_bytes(), random.Random(name)
    kills = tries = 0
    while kills < KILLS:
        tries += 1
        assert tries < 10 * KILLS + 10, "it is over before it can be killed"
        before = b"what was there before"
        if dice.random() < 0.5:
            (out / file).write_bytes(before)
        else:
            (out / file).unlink(missing_ok=True)
            before = None
        command = Command([name, *commands(data, inputs, out)[name]], log)
        if not wait_for(dice, seconds, out, command.is_over):
            assert command.end() == 0, log.read_text()
            assert (out / file).read_bytes() == expected
            continue
        command.kill()
        kills += 1
        found = (out / file).read_bytes() if (out / file).exists() else None
        assert found in (before, expected)
    assert Command([name, *commands(data, inputs, out)[name]], log).end() == 0, log.read_text()
    assert (out / file).read_bytes() == expected
    assert os.listdir(out) == [file]  # the next run has cleared away what the killed ones left
    print(f"{name}: {kills} kills")


# ---- recipes -----------------------------------------------------------------------------------------------------


def contents(folder: Path, step: str) -> dict[str, object]:
    """What a step makes: data by bytes, models by their weights."""
    if step == "prepare":
        files = [path for path in sorted((folder / "data").iterdir()) if path.suffix in (".bin", ".idx", ".txt")]
        return {path.name: path.read_bytes() for path in files}
    if step == "train":
        weights = checkpoint(folder / "run/checkpoint_last.pt")["model"]
        return {name: weight.numpy().tobytes() for name, weight in weights.items()}
    return {name: (folder / "run/test" / name).read_bytes() for name in ("scores.json", "hypotheses.txt")}


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_recipe(whole, tmp_path, step):
    """Killed again and again, it goes on from where it was until it is done, and then begins anew."""
    made, seconds = whole
    expected, dice, folder = contents(made, step), random.Random(step), tmp_path / "copy"
    shutil.copytree(made, folder)
    own = folder / {"prepare": "data", "train": "run", "evaluate": "run/test"}[step]
    kills, begin_anew = 0, True
    while True:
        if begin_anew:
            shutil.rmtree(own)
        begin_anew = False
        process = start(step, folder)
        try:
            process.wait(dice.uniform(0, seconds[step]) if kills < KILLS else 600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, (folder / f"{step}.log").read_text()
        assert contents(folder, step) == expected
        assert not list(own.rglob("*.tmp"))
        if kills >= KILLS:
            break
        begin_anew = True
    print(f"{step}: {kills} kills")
