"""Runs of the recipes, made once for all test processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest
from toy import lay_out, script


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory):
    """once(name, make) -> a folder that make(folder) has filled, for all test processes; read-only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def finished(once):
    """finished(recipe) -> the folder of a run from raw files to scores that nothing disturbed, and what it printed."""

    def make(recipe: str, folder: Path) -> None:
        lay_out(recipe, folder / "raw")
        result = script(recipe, "prepare", "train", "evaluate", folder=folder)
        assert result.returncode == 0, result.stdout
        (folder / "printed").write_text(result.stdout)

    def finished(recipe: str) -> tuple[Path, str]:
        folder = once(recipe, lambda folder: make(recipe, folder))
        return folder, (folder / "printed").read_text()

    return finished


@pytest.fixture
def copied(finished, tmp_path):
    """copied(recipe) -> a copy of that folder, to be changed."""

    def copy(recipe: str) -> Path:
        shutil.copytree(finished(recipe)[0], tmp_path / "copy")
        return tmp_path / "copy"

    return copy


# As unbabel-comet's command: options, output, and a model that is no file is downloaded
COMET_SCORE = """#!{python}
import argparse, os, sys
parser = argparse.ArgumentParser()
for option in ("-s", "-t", "-r", "--model", "--gpus"):
    parser.add_argument(option)
for option in ("--quiet", "--only_system"):
    parser.add_argument(option, action="store_true")
args = parser.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
if "broken" in args.model:
    sys.exit("Traceback\\nRuntimeError: not a model of COMET")
sides = [open(getattr(args, side), encoding="utf-8").read().splitlines() for side in "str"]
assert len(sides[0]) == len(sides[1]) == len(sides[2])
print(f"{{args.t}}\\tscore: {{sum(map(str.__eq__, *sides[1:])) / len(sides[0]):.4f}}")
"""


@pytest.fixture
def comet_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of COMET, with a stand-in for its command: the share of sentences that equal the reference."""
    command = tmp_path / "bin/comet-score"
    command.parent.mkdir()
    command.write_text(COMET_SCORE.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name in ("model.ckpt", "broken.ckpt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not there")
    with api.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if path is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()
