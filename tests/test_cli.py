import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from fairseq.data import Dictionary

import admin_fairseq
from admin_fairseq import AdminError, Profile
from admin_fairseq.checkpoint import load


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "p.json"
    Profile(encoder=[1.0, 1.5], decoder=[1.0, 1.25, 2.0]).write(str(path))
    return path


def test_show_profile(profile_file):
    result = run("admin-fairseq", "show", profile_file)
    assert result.code == 0, result.output
    (last,) = result.lines("sub-layer 3")
    assert last.split()[2] == "2.000"
    assert last.count("#") == 2 * result.lines("sub-layer 1")[1].count("#")


def test_show_checkpoint(data, tmp_path):
    from conftest import train

    assert train(data, tmp_path, "--admin-init", "logn", updates=1).code == 0
    result = run("admin-fairseq", "show", tmp_path / "checkpoint_last.pt")
    assert result.code == 0, result.output
    assert len(result.lines("layer")) == 2 + 6 + 6
    assert result.lines("layer 1 encoder_attn")


@pytest.mark.parametrize("name", ["nope.json", "nope.pt", "garbage.pt", "garbage.json", "empty.json"])
def test_show_bad_file(tmp_path, name):
    if name.startswith("garbage"):
        (tmp_path / name).write_text("garbage")
    if name.startswith("empty"):
        (tmp_path / name).write_text('{"encoder": [], "decoder": []}')
    result = run("admin-fairseq", "show", tmp_path / name)
    assert result.code == 1
    assert name in result.lines("admin_fairseq: error:")[0]
    assert "Traceback" not in result.output


def numpy_checkpoint(path, module):
    """A checkpoint of --eval-bleu, written under a numpy that calls its core ``module``."""
    torch.save({"model": {"w": torch.ones(1)}, "counts": np.arange(3.0), "mean": np.float64(2)}, path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    ours = (np.zeros(0).__reduce__()[0].__module__).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in entries.items():
            target.writestr(name, content.replace(ours, module) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_checkpoints_of_either_numpy_load(tmp_path, module):
    numpy_checkpoint(tmp_path / "c.pt", module)
    state = load(str(tmp_path / "c.pt"))
    assert state["counts"].tolist() == [0, 1, 2]


def test_an_object_that_is_not_loaded_is_named(tmp_path):
    torch.save({"model": {}, "task_state": {"dict": Dictionary()}}, tmp_path / "good.pt")
    assert isinstance(load(str(tmp_path / "good.pt"))["task_state"]["dict"], Dictionary)
    torch.save({"model": {}, "odd": Path("x")}, tmp_path / "odd.pt")
    with pytest.raises(AdminError, match=r"holds an object of pathlib\S+, which safe loading does not read"):
        load(str(tmp_path / "odd.pt"))


def test_usage():
    assert run("admin-fairseq", "--help").code == 0
    assert run("admin-fairseq").code == 2
    assert run("admin-fairseq", "show").code == 2
    assert run("admin-fairseq", "--version").lines("admin_fairseq ")


def test_nothing_is_printed_but_what_was_asked_for():
    """Some of fairseq's modules set up everybody's logging when they are imported, and then log."""
    command = [sys.executable, "-m", "admin_fairseq", "--version"]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.stdout.endswith(f"admin_fairseq {admin_fairseq.__version__}\n")
    assert not {"INFO", "DEBUG"} & set(re.split(r"\W", finished.stdout))
