"""benchmarks/gpu.sh without a GPU: its rehearsal, and what it says where something is missing."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import ROOT


def script(root: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(root / "benchmarks/gpu.sh"), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )


@pytest.mark.parametrize(
    "parts", ["kernels loss scale", pytest.param("batches features search", marks=pytest.mark.slow)]
)
def test_rehearsal(tmp_path, parts):
    """All parts but the tests, which run by themselves: each leaves its figures; what is printed is in gpu.log."""
    pytest.importorskip("triton", reason="Triton is not installed")
    settings = {"REHEARSE": "1", "PARTS": parts, "SECONDS_LEFT": "800"}
    done = script(ROOT, tmp_path, **settings, TORCHDYNAMO_DISABLE="1")  # g++ takes half a minute
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "gpu.log").read_text() == done.stdout
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == (5 if "scale" in parts else 8)

    def table(name):
        with (tmp_path / name).open() as file:
            return list(csv.DictReader(file))

    if "scale" in parts:
        assert '5 "loss_scale": "128"\n' in done.stdout
        computed = {row["computed"] for row in table("kernel/kernel.csv")}
        assert computed == {"stock", "eager", "fused", "torch.compile"}
        return
    stock, admin = table("batches/speed.csv")
    assert (stock["method"], admin["method"]) == ("postln", "admin")
    assert float(admin["tokens_ratio"]) > 0 and "no larger batch" in admin["ended_at"]
    off, *_, everything = [row["method"] for row in table("features/speed.csv")][1:]
    assert (off, everything) == ("admin:off", "admin:all")


@pytest.fixture
def bare(tmp_path):
    """The script in a folder of its own, and a Python that has nothing."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("gpu.sh", "ready.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"

    def add(package):
        (next(tmp_path.glob("venv/lib/python*/site-packages")) / f"{package}.py").touch()

    return lambda: script(tmp_path, "out", PYTHON=str(python)), add


def test_what_is_missing_is_said_in_a_line(bare):
    run, add = bare
    expected = ["has no fairseq; .*benchmarks/gpu.sh wheels$", "lacks torch, .*; pip install torch .*pytest-xdist$"]
    for said in expected:
        done = run()
        assert done.returncode == 2, done.stdout
        (line,) = done.stdout.splitlines()
        assert re.search(said, line), line
        add("fairseq")
