"""benchmarks.significance, and COMET beside BLEU: on translations that are there, without training or decoding."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import script

from admin_fairseq import AdminError
from benchmarks import significance
from benchmarks.logs import Translations, translations
from benchmarks.significance import Difference, against_best, paired, verdict
from examples.common.score import CometError, comet, tokenised_bleu

WORDS = ("the", "a", "dog", "cat", "man", "woman", "runs", "sits", "on", "in", "grass", "red", "blue", "ball", "with")


def translated(share: float, seed: int = 1, count: int = 200) -> Translations:
    """A test set, and a system that gets this share of the words wrong."""
    draw, system = random.Random(7), random.Random(seed)
    references = [[draw.choice(WORDS) for _ in range(12)] for _ in range(count)]
    lines = [[system.choice(WORDS) if system.random() < share else word for word in line] for line in references]
    return Translations(["quelle"] * count, *([" ".join(line) for line in side] for side in (references, lines)))


def log(found: Translations) -> str:
    """As fairseq-generate prints it: sorted by length, not by number."""
    blocks = [
        f"S-{i}\t{found.sources[i]}\nT-{i}\t{found.references[i]}\nH-{i}\t-0.5\t{found.hypotheses[i]}\n"
        for i in range(len(found.references))
    ]
    random.Random(3).shuffle(blocks)
    return "".join(blocks)


def test_p_tells_a_real_difference_from_none():
    good, as_good, bad = translated(0.2, 1), translated(0.2, 8), translated(0.3, 3)
    same, equal, worse = paired(good, [good, as_good, bad])
    assert same == Difference(same.bleu, 0, 1)  # sacrebleu itself says p = 0.001 of equal translations
    assert equal.p > 0.1 and abs(equal.above) < 3
    assert worse.p < 0.01 and worse.above < -5
    score = tokenised_bleu().corpus_score(bad.hypotheses, [bad.references]).score
    assert worse.bleu == pytest.approx(score)
    assert verdict([worse, worse, equal]) == "worse in 2 of 3"
    assert verdict([equal]) == "no difference shown in any of 1"
    with pytest.raises(AdminError, match="different test sets"):
        paired(good, [translated(0.2, 1, count=199)])


def test_each_method_meets_the_best_baseline_seed_by_seed():
    systems = {
        "postln": {1: translated(0.5, 1), 2: translated(0.5, 2)},
        "preln": {1: translated(0.3, 3), 2: translated(0.3, 4)},
        "admin": {2: translated(0.1, 5), 3: translated(0.1, 6)},  # 3 has no partner
        "lost": {},
    }
    rows = against_best(systems, ["postln", "preln", "lost"])
    assert [(row["method"], row["baseline"], row["seeds"]) for row in rows] == [
        ("postln", "preln", [1, 2]),
        ("admin", "preln", [2]),
    ]
    text = significance.table([{"depth": "6-6", **row} for row in rows])
    assert "worse in 2 of 2" in text and "better in 1 of 1" in text and "0.001 0.001" in text
    assert against_best(systems, []) == [] and significance.table([]) == ""


def test_the_command_reads_what_was_translated(tmp_path: Path, capsys: Any, monkeypatch: Any):
    for name, share in (("preln", 0.3), ("admin", 0.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generate.log").write_text(log(translated(share)), encoding="utf-8")
    assert translations(log(translated(0.3))) == translated(0.3)

    def compare(*names: str) -> str:
        monkeypatch.setattr(sys, "argv", ["significance", *(str(tmp_path / name) for name in names)])
        significance.main()
        return capsys.readouterr().out

    first, second = compare("preln", "admin").splitlines()[2:]
    assert "baseline" in first and "| 0.001 |" in second and "+" in second
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdminError, match=r"cannot read .*empty/generate\.log: No such file"):
        compare("preln", "empty")
    (tmp_path / "empty/generate.log").write_text("Killed\n", encoding="utf-8")
    with pytest.raises(AdminError, match="holds no translations"):
        compare("preln", "empty")


def test_comet(comet_models: Path, monkeypatch: Any):
    lines = (["ein Hund", "eine\u2028Katze"], ["a dog", "a  cat\r"], ["a dog", "the cat"])
    assert comet(str(comet_models / "model.ckpt"), *lines) == 0.5
    with pytest.raises(CometError, match=r"comet-score failed \(1\): RuntimeError: not a model of COMET"):
        comet(str(comet_models / "broken.ckpt"), *lines)
    with pytest.raises(CometError, match=r"COMET=Unbabel/wmt22-comet-da: no such file; give the model\.ckpt"):
        comet("Unbabel/wmt22-comet-da", *lines)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(CometError, match=r"comet-score on PATH: pip install unbabel-comet"):
        comet(str(comet_models / "model.ckpt"), *lines)


def test_evaluate_adds_comet_to_a_finished_run(copied: Any, comet_models: Path):
    folder = copied("multi30k_de_en")
    broken = script("multi30k_de_en", "evaluate", folder=folder, COMET=str(comet_models / "broken.ckpt"))
    assert broken.returncode != 0 and "chrF" in broken.stdout
    assert "not a model of COMET; the other scores are complete" in broken.stdout
    scored = script("multi30k_de_en", "evaluate", folder=folder, COMET=str(comet_models / "model.ckpt"))
    assert scored.returncode == 0, scored.stdout
    assert "translate the test set (beam 2, length penalty 1): already done" in scored.stdout
    scores = json.loads((folder / "run/test/scores.json").read_text())
    assert 0 <= scores["COMET"]["score"] <= 1 and scores["COMET"]["signature"].endswith("model.ckpt")
