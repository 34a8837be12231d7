"""The source distribution and the wheel, built from a copy and used from outside the checkout."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import ROOT, TINY, TRAIN, output_of

EVERYWHERE = (".*_cache", ".hypothesis", ".git", ".venv", "__pycache__", "*.egg-info")
AT_THE_TOP = ("build", "dist", "demo", "data", "raw", "runs")


def leave_out(folder: str, names: list[str]) -> set[str]:
    """What git ignores; examples/demo is no output."""
    at_the_top = folder == str(ROOT)
    return shutil.ignore_patterns(*EVERYWHERE, *(AT_THE_TOP if at_the_top else ()))(folder, names)


def run(*command, cwd: Path, **variables: str) -> str:
    """Its output; nothing of the checkout is on Python's path unless it is given."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return output_of(command, cwd=cwd, env={**environment, **variables}, timeout=600)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution's content."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copytree(ROOT, folder / "copy", ignore=leave_out)
    build = "import setuptools.build_meta as build; build.build_sdist('../sdist')"
    run(sys.executable, "-c", build, cwd=folder / "copy")
    (archive,) = (folder / "sdist").iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.replace(".tar.gz", "")


def test_source_distribution(unpacked):
    """It has every file of the checkout, and its tests run in it."""
    copy = unpacked.parent / "copy"
    files = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file() and "egg-info" not in str(path)}
    missing = {str(path) for path in files if not (unpacked / path).is_file()}
    assert missing <= {".gitignore"}
    tests = ["tests/unit/test_norm.py", "tests/unit/test_requirements.py", "tests/unit/test_layout.py"]
    assert " passed" in run(sys.executable, "-m", "pytest", *tests, "-p", "no:cacheprovider", cwd=unpacked)


def test_wheel(unpacked, data, tmp_path):
    """Installed elsewhere it trains, and its command works, by stock fairseq's own program."""
    site = tmp_path / "site"
    build = "import setuptools.build_meta as build; build.build_wheel('../wheel')"
    (unpacked.parent / "wheel").mkdir()
    run(sys.executable, "-c", build, cwd=unpacked)
    (wheel,) = (unpacked.parent / "wheel").iterdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"admin_fairseq", "bin"}
    where = "import admin_fairseq; print(admin_fairseq.__file__)"
    printed = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(site))
    assert printed.splitlines()[-1] == str(site / "admin_fairseq/__init__.py")
    train = [Path(sys.executable).with_name("fairseq-train"), data, "--arch", "transformer_admin", *TINY, *TRAIN]
    printed = run(*train, "--user-dir", site / "admin_fairseq", "--max-update", "1", cwd=tmp_path, PYTHONPATH=str(site))
    assert "Admin: profiled" in printed
    fold = ["fold", "checkpoints/checkpoint_last.pt", "folded.pt"]
    run(sys.executable, site / "bin/admin-fairseq", *fold, cwd=tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "folded.pt").is_file()
