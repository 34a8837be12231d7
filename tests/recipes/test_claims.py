"""benchmarks.claims: its grids are ones that benchmarks.compare takes, and a small one goes from training to figure."""

import csv
import shlex
import sys

import pytest
from helpers import WIDTHS

from admin_fairseq import AdminError
from benchmarks import claims, compare


@pytest.mark.parametrize("experiment", claims.EXPERIMENTS)
def test_grids(experiment):
    for variant in claims.EXPERIMENTS[experiment]:
        words = ["bin", "--methods", "admin", "--depths", "6-6", "--updates", "9", "--out", "out"]
        options = shlex.split(variant.fairseq.format(updates=9))
        args = compare.parse([*words, *shlex.split(variant.compare), "--", *options])
        assert args.extra == options
        assert len(args.lr) * len(args.warmup) > 1
        # inverse_sqrt ties the decay to the warmup
        assert len(args.warmup) == 1 or "--lr-scheduler polynomial_decay" in " ".join(options)


@pytest.mark.slow
def test_from_training_to_figure(data, tmp_path, monkeypatch, capfd):
    small = [
        claims.Variant("SGD, fast", "--warmup 1 --lr 0.1", "--optimizer sgd --momentum 0.9"),
        claims.Variant("NovoGrad", "--warmup 1 --lr 1e-3", "--optimizer novograd"),
        claims.Variant("Adam", "--warmup 1 --lr 1e-3", claims.ADAM),
    ]
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # not installed
    monkeypatch.setattr(claims, "EXPERIMENTS", {"sgd": small})
    command = ["claims.py", str(data), "--experiment", "sgd", "--methods", "admin", "--depth", "1-1", "--updates", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path), "--", *WIDTHS])
    claims.main()
    with open(tmp_path / "sgd.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["method"], float(row["lr"])) for row in rows] == [
        ("SGD, fast", "admin", 0.1),
        ("Adam", "admin", 0.001),
    ]
    assert (tmp_path / "sgd.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sgd/sgd-fast/table.md").exists()
    out = capfd.readouterr().out
    assert "valid perplexity" in out
    assert out.startswith("NovoGrad is left out, it needs a package: pip install pytorch-optimizer\n")


def test_what_compare_refuses_ends_it(data, tmp_path, monkeypatch):
    command = ["claims.py", str(data), "--experiment", "warmup", "--depth", "six", "--updates", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    with pytest.raises(AdminError, match="Adam: see above"):
        claims.main()
