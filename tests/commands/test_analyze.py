"""admin-fairseq analyze dependency, amplification and report, on tiny models in this process."""

from __future__ import annotations

import csv
import json
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import TINY, train_here

from admin_fairseq import AdminError, cli
from admin_fairseq.analysis import report
from admin_fairseq.analysis.figures import Page, write

pytest.importorskip("matplotlib")


SIZE = "3-2 layers, width 32, feed-forward 64, heads 2"  # of train_here's models


@pytest.fixture
def analyze(monkeypatch):
    """The command in this process, which it does not end."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda *arguments: cli.main(["analyze", *map(str, arguments)])


def test_commands(analyze, data, tmp_path, capsys, bars):
    common = ["--cpu", "--format", "png", "--out", tmp_path / "out", *TINY[:8]]
    archs = ["--arch", "transformer_preln", "transformer_admin"]
    analyze("dependency", data, *archs, *common, *TINY[8:], "--max-tokens", "300")
    analyze("amplification", "--arch", "transformer_admin", *common, "--sub-layers", "12", "--seeds", "1")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {"dependency_share.png", "dependency_encoder.png", "dependency_decoder.png"}
    figures |= {"amplification_noise.png", "amplification_update.png"}
    tables = {f"{name}.{kind}" for name in ("dependency", "amplification") for kind in ("json", "csv")}
    assert written == figures | tables
    measured = json.loads((tmp_path / "out" / "dependency.json").read_text())
    assert [model["method"] for model in measured["models"]] == ["preln", "admin"]
    decoder = measured["models"][1]["stacks"]["decoder"]
    with open(tmp_path / "out" / "dependency.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["stack"]) == ("admin", "decoder")]
    own = [decoder["beta2"][i][i + 1] ** 0.5 for i in range(6)]
    assert [float(row["beta"]) for row in rows] == pytest.approx(own)
    amplified = json.loads((tmp_path / "out" / "amplification.json").read_text())
    for entry in (amplified["admin"], amplified["admin"]["decoder"]):
        assert {"r2_linear", "r2_log", "r2_log1p"} <= set(entry)
        assert entry["points"][-1][0] == 12
        assert all(value > 0 for _, value in entry["points"])
        assert entry["points"][-1][1] == pytest.approx(sum(entry["deepest"]) / len(entry["deepest"]))
    table = capsys.readouterr().out.splitlines()
    head = next(line for line in table if "R2 a+bN" in line)
    row = table[table.index(head) + 1]
    for name, entry in (("stack", "encoder"), ("R2 a+bN", f"{amplified['admin']['r2_linear']:.3f}")):
        assert head.index(name) == row.index(entry)  # heads stand over their columns
    left = [bar for bar in bars if bar.leave]
    assert [bar.desc for bar in left] == ["dependency", "amplification"]  # each leaves one line
    assert all(bar.n == bar.total > 0 for bar in bars)
    page = Path(report.bind(str(tmp_path / "out"))).read_text()
    assert page.count("<img") == len(figures) and 'src="data:image/png;base64,' in page
    assert page.count("http") == 0


def test_a_checkpoint_is_measured_before_and_after(analyze, data, tmp_path):
    train_here("transformer_admin", data, tmp_path, "")
    path = tmp_path / "checkpoint_last.pt"
    analyze("dependency", data, "--cpu", "--out", tmp_path / "out", "--path", path)
    models = json.loads((tmp_path / "out" / "dependency.json").read_text())["models"]
    assert [model["when"] for model in models] == ["at initialisation", "after training"]
    before, after = (model["stacks"]["encoder"]["share"] for model in models)
    assert before == pytest.approx(after, rel=0.3) and before != after
    assert "<svg" in (tmp_path / "out" / "dependency_share.svg").read_text()
    facts = report.run_facts(Namespace(path=[str(path), str(tmp_path)], arch=[], rest=[str(data), "--seed", "9"]))
    assert facts["Models"] == f"{path}: {SIZE}; {tmp_path}: {SIZE}" and facts["Seed"] == "9"
    with pytest.raises(AdminError, match=r"holds no checkpoint_last\.pt"):
        report.run_facts(Namespace(path=[str(tmp_path / "out")], arch=[], rest=[str(data)]))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["dependency", "--cpu"], "give DATA"),
        (["dependency", "DATA", "--arch", "transformer_nope"], "transformer_nope: no such architecture"),
        (["dependency", "DATA", "--encoder-layer-s", "3"], "--encoder-layer-s: no option .* nearest: --encoder-layers"),
        (["dependency", "DATA", "--path", "nope.pt"], "no such file: nope.pt"),
        (["dependency", "DATA", "--positions", "0"], "--positions must be at least 1, not 0"),
        (["amplification", "--seeds", "0"], "--seeds must be at least 1"),
        (
            ["amplification", "--arch", "transformer_deepnorm", "--sub-layers", "6", *TINY[:4]],
            "deepnorm: its start dep",
        ),
        (["amplification", "--arch", "transformer_b2t", "--sub-layers", "6", *TINY[:4]], "b2t: its start depends"),
        (
            ["amplification", "--arch", "transformer_admin_logn", "--sub-layers", "6", *TINY[:4]],
            "--admin-init logn: its",
        ),
        (
            ["amplification", "--arch", "transformer_lm_admin"],
            "transformer_lm_admin cannot read random words: give DATA",
        ),
        (["amplification", "--arch", "transformer_lm_admin", "--nope"], "--nope: no option of this fairseq"),
        (["dependency", "DATA", "--arch", "lstm", "--max-tokens", "300", "--cpu"], "LSTMModel is no Transformer"),
        (["dependency", "--path", "DATA"], "holds no checkpoint_last.pt .if it is DATA: that comes first"),
    ],
)
def test_bad_input(analyze, data, tmp_path, arguments, line):
    arguments = [str(data) if argument == "DATA" else argument for argument in arguments]
    with pytest.raises(AdminError, match=line):
        analyze(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(analyze, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdminError, match="not a folder"):
        analyze("dependency", data, "--out", tmp_path / "file")
    with pytest.raises(AdminError, match="cannot write"):
        write(str(tmp_path / "file" / "out"), "x", {}, [], Page("x"))
    with pytest.raises(AdminError, match="no results"):
        report.bind(str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AdminError, match=r"pip install 'admin_fairseq\[analyze\]'"):
        analyze("dependency", data, "--out", tmp_path / "out")


@pytest.mark.slow
def test_amplification_at_the_papers_width(analyze, tmp_path):
    """Corollaries 1 and 2, over N = 2..200 at width 512, by the default command, within 10 minutes on idle cores."""
    start = time.time()
    analyze("amplification", "--cpu", "--out", tmp_path)
    assert time.time() - start < 600
    found = json.loads((tmp_path / "amplification.json").read_text())
    assert found["postln"]["r2_linear"] >= 0.98
    for method in ("preln", "admin"):
        assert found[method]["r2_log"] >= 0.95
        assert found[method]["r2_log"] > found[method]["r2_linear"]
    assert 5 < found["postln"]["points"][-1][1] / found["preln"]["points"][-1][1] < 18
