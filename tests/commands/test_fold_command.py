"""admin-fairseq fold and unfold, and what a fairseq without the plugin does with a folded checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import sys
import zipfile

import pytest
import torch
from helpers import TINY, TRAIN, checkpoint, needs_stock_translation, output_of, run, train

from admin_fairseq import AdminError
from admin_fairseq.checkpoints.files import load
from admin_fairseq.cli import main
from admin_fairseq.errors import explain

SHARED = ["--share-all-embeddings"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A model trained for a few updates with the metrics that --eval-bleu leaves in its checkpoint, and its fold."""
    folder = tmp_path_factory.mktemp("fold")
    options = [*SHARED, "--eval-bleu", "--eval-bleu-args", '{"max_len_b": 10}', "--validate-interval-updates", "6"]
    result = train(data, folder, *options, "--save-interval-updates", "6", updates=8)
    assert result.code == 0, result.output
    before = (folder / "checkpoint_last.pt").read_bytes()
    arguments = [folder / "checkpoint_last.pt", folder / "folded.pt", "--keep-optimizer", "--verify", data]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["fold", *map(str, arguments)])
    assert (folder / "checkpoint_last.pt").read_bytes() == before
    assert "30 of 30 translations are the same" in printed.getvalue()
    return folder


def without_plugin(folder, command, *arguments):
    """A fairseq command in a process that cannot import the plugin."""
    (folder / "without" / "admin_fairseq").mkdir(parents=True, exist_ok=True)
    (folder / "without" / "admin_fairseq" / "__init__.py").write_text("raise ImportError('no plugin here')\n")
    environment = dict(os.environ, PYTHONPATH=str(folder / "without"), PYTHONWARNINGS="ignore")
    program = os.path.join(os.path.dirname(sys.executable), command)
    return output_of([program, *arguments], env=environment, cwd=folder, timeout=300)


def translations(output):
    rows = [line.split("\t") for line in output.splitlines() if line.startswith("H-")]
    return [(row[0], row[2]) for row in rows]


def test_holds_no_classes(trained):
    """torch's safe loading reads it in a process that lists no classes, such as a stock fairseq."""
    with zipfile.ZipFile(trained / "folded.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        pickle = archive.read(name)
    found = {argument.split()[0] for code, argument, _ in pickletools.genops(pickle) if code.name == "GLOBAL"}
    assert found == {"collections", "torch", "torch._utils"}
    assert b"admin" not in pickle


def test_translates_without_the_plugin(trained, data):
    options = [data, "--cpu", "--beam", "5", "--max-len-b", "20", "--required-batch-size-multiple", "1"]
    ours = run("fairseq-generate", *options, "--path", trained / "checkpoint_last.pt")
    # fairseq 0.12.2's own encoder does not run with torch 1.13 and newer, but for this
    override = ["--model-overrides", "{'checkpoint_activations': True}"]
    theirs = without_plugin(trained, "fairseq-generate", *options, "--path", trained / "folded.pt", *override)
    assert len(translations(ours.output)) == 30
    assert translations(theirs) == translations(ours.output)


@needs_stock_translation
def test_resumes_without_the_plugin(trained, data, tmp_path):
    output = without_plugin(
        trained,
        *("fairseq-train", data, "--arch", "transformer", *TINY, *TRAIN, *SHARED, "--max-update", "9"),
        *("--restore-file", trained / "folded.pt", "--save-dir", tmp_path),
    )
    assert "folded.pt (epoch 2 @ 8 updates)" in output
    assert checkpoint(tmp_path / "checkpoint_last.pt")["last_optimizer_state"]["state"][0]["step"] == 9


def test_unfolded_resumes(trained, data, tmp_path):
    main(["unfold", str(trained / "folded.pt"), str(tmp_path / "in.pt"), "--keep-optimizer"])
    resumed = train(data, tmp_path, *SHARED, "--restore-file", tmp_path / "in.pt", updates=9)
    assert resumed.code == 0, resumed.output
    assert resumed.lines("omega from the checkpoint; encoder omega 1.000 to 1.000")
    assert list(resumed.losses()) == [9]
    again = load(str(tmp_path / "checkpoint_last.pt"))["model"]
    assert not torch.all(again["encoder.layers.2.final_layer_norm.omega"] == 1)


@pytest.mark.parametrize("command", ["fold", "unfold", "deepen"])
def test_nothing_is_overwritten(tmp_path, command):
    file = tmp_path / "in.pt"
    torch.save({"model": {}, "cfg": None}, file)
    data = [str(tmp_path)] * (command == "deepen")
    (tmp_path / "link.pt").symlink_to(file)
    for out, message in (("in.pt", "the file to read"), ("link.pt", "the file to read"), ("no/out.pt", "cannot write")):
        with pytest.raises(AdminError, match=message):
            main([command, str(file), str(tmp_path / out), *data])
    with pytest.raises(AdminError, match="is a folder, not a checkpoint"):
        main([command, str(tmp_path), str(tmp_path / "out.pt"), *data])


@pytest.mark.parametrize("command", ["fold", "unfold"])
def test_bad_input(tmp_path, command):
    torch.save({"model": {}, "cfg": None}, tmp_path / "empty.pt")
    for name in ("empty.pt", "nope.pt"):
        with pytest.raises(AdminError, match=name):
            main([command, str(tmp_path / name), str(tmp_path / "out.pt")])
    assert os.listdir(tmp_path) == ["empty.pt"]


def test_verify_needs_data(trained, tmp_path):
    files = [str(trained / "checkpoint_last.pt"), str(tmp_path / "out.pt")]
    with pytest.raises(FileNotFoundError) as raised:
        main(["fold", *files, "--verify", str(tmp_path / "nope")])
    assert "DATA is the folder" in explain(raised.value)
    assert not os.listdir(tmp_path)
