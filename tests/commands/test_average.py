from __future__ import annotations

import os

import pytest
import torch
from helpers import checkpoint, generate, hypotheses, run, train

from admin_fairseq import AdminError
from admin_fairseq.checkpoints.average import select
from admin_fairseq.cli import main


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Checkpoints of epochs 1 to 3 and of updates 3, 6 and 9."""
    folder = tmp_path_factory.mktemp("average")
    options = ["--batch-size", "100", "--max-tokens", "5000", "--save-interval-updates", "3"]
    result = train(data, folder, *options, "--max-epoch", "3", updates=100)
    assert result.code == 0, result.output
    return folder


def weights(path):
    return checkpoint(path)["model"]


def names(paths):
    return [os.path.basename(path) for path in paths]


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        (["--num-epoch-checkpoints", "2"], ["checkpoint3.pt", "checkpoint2.pt"]),
        (["--num-epoch-checkpoints", "2", "--checkpoint-upper-bound", "2"], ["checkpoint2.pt", "checkpoint1.pt"]),
        (["--num-update-checkpoints", "2"], ["checkpoint_3_9.pt", "checkpoint_2_6.pt"]),
    ],
)
def test_is_the_mean_of_the_selected(folder, tmp_path, options, inputs):
    result = run("admin-fairseq", "average", "--inputs", folder, "--output", tmp_path / "mean.pt", *options)
    assert result.code == 0, result.output
    states = [weights(folder / name) for name in inputs]
    mean = weights(tmp_path / "mean.pt")
    assert mean.keys() == states[0].keys()
    for name, value in mean.items():
        torch.testing.assert_close(value, sum(state[name] for state in states) / len(states))
        assert value.dtype == states[0][name].dtype
    assert [line for line in result.output.splitlines() if all(name in line for name in inputs)]
    assert os.listdir(tmp_path) == ["mean.pt"]


def test_translates_and_finetunes(folder, data, tmp_path):
    inputs = [folder / "checkpoint2.pt", folder / "checkpoint3.pt"]
    assert run("admin-fairseq", "average", "--inputs", *inputs, "--output", tmp_path / "mean.pt").code == 0
    assert len(hypotheses(generate(data, tmp_path / "mean.pt"))) == 30
    tuned = train(data, tmp_path / "tuned", "--finetune-from-model", tmp_path / "mean.pt", updates=1)
    assert tuned.lines("omega from the checkpoint")
    continued = train(
        data,
        tmp_path / "continued",
        "--restore-file",
        tmp_path / "mean.pt",
        "--reset-optimizer",
        "--reset-dataloader",
        "--reset-meters",
        updates=100,
    )
    assert continued.code == 0, continued.output


def test_one_is_itself_and_the_optimizer_is_left_out(folder, tmp_path):
    average([str(folder / "checkpoint1.pt")], str(tmp_path / "one.pt"))
    before, after = checkpoint(folder / "checkpoint1.pt"), checkpoint(tmp_path / "one.pt")
    assert all(torch.equal(before["model"][name], weight) for name, weight in after["model"].items())
    assert set(before) - set(after) == {"last_optimizer_state"}
    assert (tmp_path / "one.pt").stat().st_size < (folder / "checkpoint1.pt").stat().st_size / 2


def average(paths, output):
    main(["average", "--inputs", *paths, "--output", output])


def save(path, **model):
    torch.save({"model": model, "cfg": None}, path)
    return str(path)


def test_half_precision_and_counters(tmp_path):
    """2049 halves cannot be summed in half precision; a counter is the first file's."""
    paths = [
        save(tmp_path / "a.pt", w=torch.tensor([2048.0]).half(), n=torch.tensor(7)),
        save(tmp_path / "b.pt", w=torch.tensor([1.0]).half(), n=torch.tensor(4)),
    ]
    average(paths, str(tmp_path / "out.pt"))
    mean = weights(tmp_path / "out.pt")
    assert (mean["w"].dtype, mean["w"].item(), mean["n"].item()) == (torch.float32, 1024.5, 7)


def test_shared_weights_are_counted_once(tmp_path):
    shared = torch.ones(2, dtype=torch.float64)
    paths = [save(tmp_path / name, a=shared, b=shared) for name in ("a.pt", "b.pt")]
    average(paths, str(tmp_path / "out.pt"))
    assert torch.equal(weights(tmp_path / "out.pt")["a"], shared)


def test_select(tmp_path):
    for name in (
        "checkpoint1.pt",
        "checkpoint9.pt",
        "checkpoint10.pt",
        "checkpoint_2_30.pt",
        "checkpoint_best.pt",
        "checkpoint11.pt.tmp",
        "xcheckpoint12.pt",
    ):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    assert names(select(folder, 2, by_update=False)) == ["checkpoint10.pt", "checkpoint9.pt"]
    assert names(select(folder, 1, by_update=False, upper_bound=8)) == ["checkpoint1.pt"]
    assert names(select(folder, 1, by_update=True)) == ["checkpoint_2_30.pt"]
    with pytest.raises(AdminError, match="holds 1 files"):
        select(folder, 2, by_update=True)
    with pytest.raises(AdminError, match="folder of checkpoints"):
        select(f"{folder}/nope", 2, by_update=True)


def test_different_models_are_refused(tmp_path):
    first = save(tmp_path / "a.pt", w=torch.ones(2))
    for number, other in enumerate(({"w": torch.ones(3)}, {"w": torch.ones(2), "v": torch.ones(1)}, {})):
        with pytest.raises(AdminError, match="another model"):
            average([first, save(tmp_path / f"b{number}.pt", **other)], str(tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["nope.pt"], "no such file: nope.pt"),
        (["garbage.pt"], "garbage.pt is not a fairseq checkpoint"),
        ([".", "--num-epoch-checkpoints", "3"], "holds 0 files"),
        ([".", "--num-epoch-checkpoints", "0"], "at least 1"),
        (["a.pt", "b.pt", "--num-epoch-checkpoints", "1"], "one folder"),
        (["a.pt", "--checkpoint-upper-bound", "1"], "--checkpoint-upper-bound needs"),
        (["."], "is a folder; say which of its checkpoints"),
    ],
)
def test_bad_input(tmp_path, arguments, needle):
    (tmp_path / "garbage.pt").write_text("garbage")
    result = run("admin-fairseq", "average", "--output", "out.pt", "--inputs", *arguments, cwd=tmp_path)
    assert result.code == 1
    assert needle in result.lines("admin_fairseq: error:")[0]
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == ["garbage.pt"]


def test_unwritable_output(folder, tmp_path):
    own = str(folder / "checkpoint1.pt")
    with pytest.raises(AdminError, match="is the file to read"):
        average([own], own)
    with pytest.raises(AdminError, match="cannot write"):
        average([str(folder / "checkpoint1.pt")], str(tmp_path / "missing" / "out.pt"))
