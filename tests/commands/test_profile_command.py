"""``admin-fairseq profile``, in this process."""

import csv
import json

import pytest
import torch
from fairseq.trainer import Trainer
from helpers import TINY, TRAIN

from admin_fairseq import AdminError
from admin_fairseq.analysis import spread
from admin_fairseq.cli import main
from admin_fairseq.profile_file import Profile, read_profile


@pytest.fixture
def command(data, tmp_path):
    """command(*options) -> the folder that ``admin-fairseq profile`` wrote."""

    def command(*options, arch="transformer_admin"):
        main(["profile", str(data), "--arch", arch, "--out", str(tmp_path / "out"), *TINY, *TRAIN, *options])
        return tmp_path / "out"

    return command


def test_writes_what_training_would_profile(command, build, tmp_path):
    options = ["--dropout", "0.2", "--admin-profile-batches", "3"]
    out = command(*options, "--batches", "1", "--seeds", "1")
    model, task, cfg = build("transformer_admin", *options, "--save-dir", str(tmp_path))
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    trainer.get_train_iterator(epoch=1)
    trainer.optimizer  # noqa: B018  (profiles, then builds it)
    assert (out / "admin_profile.json").read_text() == (tmp_path / "admin_profile.json").read_text()
    assert [path.name for path in out.iterdir()] == ["admin_profile.json"]
    assert len(read_profile(str(out / "admin_profile.json"), 6, 6).encoder) == 6


def test_spread_over_batches_and_seeds(command, capsys):
    out = command("--max-tokens", "150", "--batches", "8", "--seeds", "2")
    assert {path.name for path in out.iterdir()} == {
        "admin_profile.json",
        *(f"spread.{x}" for x in ("csv", "json", "svg")),
    }
    found = json.loads((out / "spread.json").read_text())["spread"]
    assert [(s["over"], s["pooled"], s["draws"]) for s in found] == [
        ("batches", 1, 8),
        ("batches", 2, 4),
        ("seeds", 1, 2),
    ]
    rows = list(csv.DictReader((out / "spread.csv").open()))
    assert [float(row["decoder"]) for row in rows] == [s["spread"]["decoder"] for s in found]
    assert all(s["spread"][stack] > 0 for s in found for stack in ("encoder", "decoder"))
    printed = capsys.readouterr().out
    assert "2 seeds" in printed
    assert "omega less than another seed" in printed or "pool more" in printed


def test_fewer_batches_than_asked_for(command, capsys, tmp_path):
    command("--max-tokens", "150", "--batches", "1000")
    assert "batches, of 1000 asked for" in capsys.readouterr().err
    with pytest.raises(AdminError, match=r"[1-3] batches show no spread"):
        command("--max-tokens", "4000", "--batch-size", "1000", "--batches", "1000")


def test_spread_is_the_standard_deviation_over_the_mean():
    drawn = torch.tensor([[1.0, 2.0, 4.0], [1.0, 4.0, 4.0]])  # 0, then sqrt(2) / 3, then 0
    one = spread._spread("seeds", 1, [Profile(encoder=[], decoder=row) for row in drawn.tolist()])
    assert one.spread == {"decoder": pytest.approx((2 / 9 / 2) ** 0.5)}


def test_how_many_are_enough():
    def spreads(*numbers):
        rows = [spread.Spread("batches", 2**n, 4, {"decoder": number}) for n, number in enumerate(numbers)]
        return [*rows, spread.Spread("seeds", 1, 5, {"decoder": 0.1})]

    assert spread._answer(spreads(0.09, 0.05)).startswith("1 batch moves")
    assert spread._answer(spreads(0.3, 0.2, 0.1)).startswith("4 pooled batches move")
    assert spread._answer(spreads(0.3, 0.2)).startswith("Even 2 pooled batches move omega more than")
    assert spread._answer(spreads(0.3)).startswith("Even 1 batch moves omega more than")


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("transformer", [], "not an Admin architecture"),
        ("transformer_admin", ["--admin-init", "logn"], "omega comes from --admin-init logn"),
        ("transformer_admin", ["--admin-profile", "x.json"], "omega comes from --admin-profile x.json"),
        ("transformer_admin", ["--batches", "3"], "at least 4"),
        ("transformer_admin", ["--no-such-option"], "--no-such-option"),
    ],
)
def test_refused(command, tmp_path, arch, options, message):
    with pytest.raises(AdminError, match=message):
        command(*options, arch=arch)
    assert not list(tmp_path.iterdir())
