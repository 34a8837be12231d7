"""Files that attack who reads them: one line, nothing run, nothing written, no memory taken."""

import os
import resource
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from helpers import ROOT, generate, run, train

from admin_fairseq import AdminError
from admin_fairseq.checkpoints.files import load
from admin_fairseq.cli import main

FILES = hostile.files()
COMMANDS = {
    "show": ["show", "bad.pt"],
    "average": ["average", "--inputs", "bad.pt", "--output", "out.pt"],
    "fold": ["fold", "bad.pt", "out.pt"],
    "unfold": ["unfold", "bad.pt", "out.pt"],
    "import": ["import", "bad.pt", "out.pt"],
    "deepen": ["deepen", "bad.pt", "out.pt", "data", "--encoder-layers", "4"],
}
MEMORY = 300_000  # KiB that reading any of them may add to the process


@pytest.mark.parametrize("what", FILES)
def test_is_refused_in_one_line_by_every_command(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    Path("bad.pt").write_bytes(FILES[what]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for command in COMMANDS.values():
        with pytest.raises(AdminError, match=r"bad\.pt") as error:
            main(command)
        assert str(error.value).isprintable()
    with pytest.raises(AdminError, match=r"bad\.pt"):
        checkpoint_utils.load_checkpoint_to_cpu("bad.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    assert os.listdir(tmp_path) == ["bad.pt"]


def test_what_is_like_them_but_good_is_read(tmp_path):
    (tmp_path / "good.pt").write_bytes(hostile.archive(hostile.GOOD))
    (weight,) = load(str(tmp_path / "good.pt"))["model"].values()
    assert weight.tolist() == [0] * 16
    array = hostile.array(hostile.PLAIN, hostile.SHAPE, hostile.raw(np.array([1.5, 2.5]).tobytes()))
    (tmp_path / "good.pt").write_bytes(hostile.archive(hostile.state(array)))
    read = load(str(tmp_path / "good.pt"))["odd"]
    assert read.tolist() == [1.5, 2.5]
    torch.save({"a": read}, tmp_path / "again.pt")  # under numpy's name
    assert b"admin_fairseq" not in (tmp_path / "again.pt").read_bytes()


@pytest.mark.parametrize("value", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))])
def test_arrays_keep_shape_order_and_type(tmp_path, value):
    torch.save({"model": {}, "odd": value, "scalar": value[1, 1]}, tmp_path / "c.pt")
    state = load(str(tmp_path / "c.pt"))
    assert np.array_equal(state["odd"], value)
    assert (state["odd"].dtype, state["odd"].flags.f_contiguous) == (value.dtype, value.flags.f_contiguous)
    assert (state["scalar"], state["scalar"].dtype) == (value[1, 1], value.dtype)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch's own safe loading of these begins there")
def test_torch_loads_the_same_for_workers_who_are_sent_a_state(tmp_path):
    torch.save({"array": np.arange(6).reshape(2, 3), "scalar": np.float64(2.5)}, tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert (state["array"].tolist(), state["scalar"]) == ([[0, 1, 2], [3, 4, 5]], 2.5)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert train(data, folder, "--admin-init", "logn", updates=1).code == 0
    return folder / "checkpoint_last.pt"


def test_fairseqs_own_commands_refuse_settings_that_are_code(data, trained, tmp_path):
    """Before a model is built, and where a training would go on from such a file; of a user_dir nothing is imported."""
    state, proof = torch.load(trained), tmp_path / "proof"
    state["cfg"]["model"].adaptive_softmax_cutoff = f"__import__('os').system('touch {proof}') or [100, 200]"
    torch.save(state, tmp_path / "bad.pt")
    bad = tmp_path / "bad.pt"
    runs = [
        generate(data, bad),
        run("fairseq-validate", data, "--task", "translation", "--path", bad, "--cpu", "--max-tokens", "800"),
        train(data, tmp_path / "out", "--restore-file", bad, updates=2),
        train(data, tmp_path / "out", "--finetune-from-model", bad, updates=2),
    ]
    for result in runs:
        assert result.lines("admin_fairseq: error:"), result.output
        (line,) = result.lines("admin_fairseq: error:")
        assert "its setting adaptive_softmax_cutoff is" in line
        assert "Traceback" not in result.output
        assert result.code == 1
    assert not proof.exists()


def test_half_a_checkpoint_last_is_said_in_one_line(data, trained, tmp_path):
    whole = trained.read_bytes()
    (tmp_path / "checkpoint_1_1.pt").write_bytes(whole)
    (tmp_path / "checkpoint_last.pt").write_bytes(whole[: len(whole) // 2])
    result = train(data, tmp_path, updates=2)
    (line,) = result.lines("admin_fairseq: error:")
    assert line.endswith(f"{tmp_path}/checkpoint_1_1.pt is whole")
    assert "Traceback" not in result.output
    assert result.code == 1


def test_the_readme_and_these_files_are_of_one_mind():
    """docs/security.md gives their number."""
    assert f"{len(FILES)} hostile files" in (ROOT / "docs/security.md").read_text(encoding="utf-8")
