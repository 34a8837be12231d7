"""benchmarks.compare: its verdicts on loss curves, and one comparison from training to table and figures."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq.scoring.bleu import BleuConfig, Scorer
from helpers import ROOT, WIDTHS

from admin_fairseq import AdminError
from admin_fairseq.analysis.figures import COLOURS, DASHES
from benchmarks import compare, figures, logs
from benchmarks.divergence import context_free_perplexities, judge
from benchmarks.figures import panels
from benchmarks.logs import RunError

UNIGRAM, POSITIONAL = 288.0, 174.0


def curve(function: Any, updates: int = 800, noise: float = 0.03) -> list[tuple[int, float]]:
    """A training's log, 100 lines long; ``function`` gives the perplexity by the share of training that is over."""
    draw = random.Random(1)
    return [
        (update, math.log(function(update / updates)) + draw.gauss(0, noise))
        for update in range(updates // 100, updates + 1, updates // 100)
    ]


def decay(start: float, end: float, pace: float) -> Any:
    return lambda share: end * (start / end) ** math.exp(-share * pace)


def test_context_free_perplexities_equal_counts_by_hand():
    draw = random.Random(3)
    sentences = [[draw.randint(4, 9 + i) for i in range(draw.randint(1, 12))] + [2] for _ in range(500)]

    def entropy(items: list[Any]) -> float:
        return -sum(n / len(items) * math.log(n / len(items)) for n in Counter(items).values())

    words = [word for sentence in sentences for word in sentence]
    placed = [pair for sentence in sentences for pair in enumerate(sentence)]
    expected = entropy(words), entropy(placed) - entropy([place for place, _ in placed])
    found = context_free_perplexities((np.array(sentence) for sentence in sentences), 40)
    assert found == pytest.approx([math.exp(value) for value in expected], rel=1e-12)
    assert context_free_perplexities([np.array([5, 2])] * 3, 9) == pytest.approx((2, 1))
    assert context_free_perplexities([np.full(1000, 5)], 9) == pytest.approx((1, 1))  # longer than it keeps positions


@pytest.mark.parametrize(
    ("verdict", "at", "function"),
    [
        ("trained", None, decay(8000, 20, 8)),
        ("trained", None, lambda share: 290 if share < 0.8 else 60),  # it got away late
        ("plateau", (170, 260), lambda share: 300 if share > 0.25 else 8000 ** (1 - share)),
        ("plateau", (1, 400), decay(8000, 290, 12)),  # falls to the unigram level as any model does, and stays
        ("plateau", (1, 80), lambda share: 2000),  # far above it, and no longer falling
        ("slow", None, decay(8000, 100, 2)),
        ("slow", None, lambda share: 290 if share < 0.85 else 290 - 600 * (share - 0.85)),  # just getting away
        ("collapsed", (470, 520), lambda share: decay(8000, 20, 12)(share) if share < 0.6 else 290),
        (
            "exploded",
            (48, 80),
            lambda share: decay(8000, 1500, 20)(share) if share < 0.1 else 10 ** (300 - 50 * share),
        ),  # still falling
        ("exploded", (100, 200), lambda share: decay(8000, 180, 40)(share) if share < 0.2 else 300),
        ("slow", None, lambda share: 290 if share < 0.94 else 290 * 0.83 ** (100 * share - 94)),  # steep at the end
        ("trained", None, lambda share: 400 if 0.4 < share < 0.5 else decay(8000, 20, 12)(share)),  # a spike heals
    ],
)
def test_verdict_on_a_curve(verdict: str, at: Any, function: Any):
    found, update = judge(curve(function), POSITIONAL)
    assert found == verdict
    assert (at is None) == (update is None)
    assert at is None or at[0] <= update <= at[1]


def test_verdict_on_a_stop():
    good = curve(decay(8000, 20, 8))[:30]
    assert judge([*good, (248, math.nan), (256, 3.0)], POSITIONAL) == ("non-finite", 240)
    assert judge([*good, (248, math.inf)], POSITIONAL) == ("non-finite", 240)
    assert judge(good, POSITIONAL, "gradients are Nan/Inf") == ("non-finite", 240)
    assert judge([], POSITIONAL, "gradients are Nan/Inf") == ("non-finite", 0)
    scale = "Minimum loss scale reached (0.0001). Your loss is probably exploding."
    assert judge(good, POSITIONAL, scale) == ("loss-scale", 240)


def test_too_few_points_are_no_plateau():
    assert judge([(update, 7.0) for update in range(1, 20)], POSITIONAL) == ("slow", None)
    assert judge([(update, 7.0) for update in range(1, 21)], POSITIONAL)[0] == "plateau"


def log_lines(seconds: float, **rows: Any) -> list[tuple[float, str]]:
    return [(seconds, f"2026-01-01 00:00:00 | INFO | {kind} | {json.dumps(row)}\n") for kind, row in rows.items()]


def test_a_log_is_read():
    lines = [(0.0, "rank 0: capabilities = 9.0 ; total memory = 79.250 GB ; name = NVIDIA\n")]
    lines += [(0.0, "x | INFO | fairseq_cli.train | num. shared model params: 1,234 (num. trained: 1,234)\n")]
    for step in range(1, 11):
        row = {"loss": "9.9", "nll_loss": "3", "num_updates": str(step * 2), "gb_free": str(70 - step % 3)}
        lines += log_lines(step + 5.0 * (step > 5), train_inner=row)  # one interval of 6 seconds
    lines += log_lines(99, valid={"valid_loss": "5", "valid_nll_loss": "4"})
    result = logs.read_log(lines, 100.0, POSITIONAL, 20)
    assert (result["verdict"], result["parameters"], result["ms_per_update"]) == ("trained", 1234, 500)
    assert (result["train_ppl"], result["valid_ppl"]) == pytest.approx((8, 16))
    assert result["memory_mb"] == pytest.approx(11.25 * 1024)  # on a GPU its own, not the process's
    stopped = logs.read_log([(0.0, "FloatingPointError: gradients are Nan/Inf\n")], 100.0, POSITIONAL, 20)
    ours = "admin_fairseq: error: update 9: omega of encoder.layers.0.ffn is not finite (Nan/Inf); try a lower --lr\n"
    assert logs.read_log([(0.0, ours)], 100.0, POSITIONAL, 20)["verdict"] == stopped["verdict"]
    assert (stopped["verdict"], stopped["update"], stopped["valid_ppl"], stopped["memory_mb"]) == (
        *("non-finite", 0, None, 100),
    )
    rows = {"train_inner": {"loss": "2", "num_updates": "1"}, "valid": {"valid_loss": "2"}}
    without_smoothing = logs.read_log(log_lines(1, **rows), 1, POSITIONAL, 1)
    assert without_smoothing["train_ppl"] == pytest.approx(4)


def test_a_run_that_ended_early_failed():
    steps = log_lines(1, train_inner={"loss": "2", "num_updates": "8"})
    valid = log_lines(2, valid={"valid_loss": "5", "valid_num_updates": "9"})

    def read(lines, updates):
        return logs.read_log(lines, 1, POSITIONAL, updates)

    read([*steps, *valid], 9)
    read([*steps, (2, "FloatingPointError: gradients are Nan/Inf\n")], 9)
    with pytest.raises(RunError, match="ended after 9 of 10 updates"):
        read([*steps, *valid], 10)
    with pytest.raises(RunError, match="ended after 0 of 10 updates"):
        read([], 10)
    with pytest.raises(RunError, match="no validation"):
        read(steps, 8)


def test_bleu_is_fairseqs():
    words, scorer = Dictionary(), Scorer(BleuConfig(pad=1, eos=2, unk=3))
    draw, log = random.Random(5), ""
    for number in (2, 0, 1):
        reference = [draw.choice("abcdef") for _ in range(30)]
        hypothesis = reference[2:20] + reference[24:]
        log += f"S-{number}\tx\nT-{number}\t{' '.join(reference)}\nH-{number}\t-0.5\t{' '.join(hypothesis)}\n"
        log += f"D-{number}\t-0.5\tsomething else\nP-{number}\t-0.1\n"
        encode = [words.encode_line(" ".join(line), add_if_not_exist=True) for line in (reference, hypothesis)]
        scorer.add(*encode)
    assert 40 < scorer.score() < 90
    assert logs.bleu(log) == pytest.approx(scorer.score(), abs=0.01)


def result(verdict: str = "trained", update: int | None = None, valid_ppl: float | None = 10.0) -> dict[str, Any]:
    return {
        "settings": {},
        "verdict": verdict,
        "update": update,
        "train_ppl": 9.0,
        "valid_ppl": valid_ppl,
        "bleu": None,
        "ms_per_update": 100.0,
        "memory_mb": 500.0,
        "parameters": 7,
        "seconds": 1,
        "environment": "here",
        "curve": [(1, 5.0), (2, 4.0)],
    }


def test_the_best_is_that_of_the_mean_over_seeds():
    results = {
        compare.Run("admin", "6-6", 1e-3, 200, 1): result(valid_ppl=10),
        compare.Run("admin", "6-6", 1e-3, 200, 2): result(valid_ppl=16),
        compare.Run("admin", "6-6", 2e-3, 200, 1): result(valid_ppl=12),
        compare.Run("admin", "6-6", 2e-3, 200, 2): result(valid_ppl=13),
        compare.Run("admin", "6-6", 4e-3, 200, 1): result(valid_ppl=1),
        compare.Run("admin", "6-6", 4e-3, 200, 2): result("non-finite", 7, valid_ppl=None),
    }
    assert [run.lr for run in compare.best(results)["admin", "6-6"]] == [2e-3, 2e-3]
    assert compare.by_rate(results) == {("6-6 layers", "admin"): ([1e-3, 2e-3], [13, 12.5])}
    assert compare.spread([12, 13]) == "12.5 ± 0.7"
    both = [result("plateau", 40), result(), result("slow")]
    assert compare.divergences(both) == "1 of 3: plateau at 40, slow"


def test_a_mean_of_fewer_seeds_is_not_compared():
    """A run of the rate that looks best failed, so it has one seed of two."""
    results = {
        compare.Run("admin", "6-6", 1e-3, 200, 1): result(valid_ppl=10),
        compare.Run("admin", "6-6", 1e-3, 200, 2): result(valid_ppl=16),
        compare.Run("admin", "6-6", 2e-3, 200, 1): result(valid_ppl=9),
    }
    assert [(run.lr, run.seed) for run in compare.best(results)["admin", "6-6"]] == [(1e-3, 1), (1e-3, 2)]
    assert compare.by_rate(results) == {("6-6 layers", "admin"): ([1e-3], [13])}


@pytest.mark.parametrize(("rate", "edge"), [(1e-3, True), (2e-3, False), (4e-3, True)])
def test_notes_below_the_table(rate: float, edge: bool, data: Path):
    results = {
        compare.Run("admin", "6-6", lr, 200, 1): result(valid_ppl=9 if lr == rate else 10) for lr in (1e-3, 2e-3, 4e-3)
    }
    words = ["DATA", "--methods", "admin", "--depths", "6-6", "--updates", "9", "--out", "OUT", "--lr"]
    grid, levels = compare.parse([*words, "1e-3,2e-3,4e-3", "--jobs", "2"]), compare.Data(data, [])
    text = compare.table(results, grid, levels)
    assert (f"| {rate:g} (edge) |" in text) == ("a better one may lie beyond it" in text) == edge
    assert "ms/update is wall time, with up to 2 runs at work at once" in text
    more = compare.parse([*words, "1e-3", "--methods", "admin,postln,b2t"])
    assert "No run finished: postln 6-6, b2t 6-6." in compare.table(results, more, levels)
    alone = compare.table(dict([next(iter(results.items()))]), compare.parse([*words, "1e-3"]), levels)
    assert "edge" not in alone and "wall time" not in alone and "No run" not in alone


def test_numbers_that_are_no_use():
    """Losses of hundreds of nats: neither an overflow nor hundreds of digits."""
    exploded = {**result("exploded", 1), "curve": [(1, 5.0), (2, 800.0), (3, None), (4, 2349.0)]}
    assert compare.training_curves({compare.Run("postln", "6-6", 1e-3, 200, 1): exploded}) == {
        ("6-6 layers", "postln"): ([1, 2, 3, 4], [pytest.approx(math.exp(5)), math.inf, math.inf, math.inf])
    }
    assert [compare.number(value) for value in (None, 9.96, 123456.0, 1e120)] == ["-", "10.0", "123456", "1e+120"]
    valid = logs.read_log(
        [*log_lines(1, train_inner={"loss": "2", "num_updates": "1"}), *log_lines(2, valid={"valid_loss": "900"})],
        *(1, POSITIONAL, 1),
    )
    assert valid["valid_ppl"] is None
    assert compare.spread([math.exp(349), 10.0])


def test_every_method_has_a_line_of_its_own():
    methods, n = list(compare.METHODS), len(COLOURS)
    looks = {(COLOURS[i % n], DASHES[(i % n + i // n) % len(DASHES)]) for i in range(len(methods))}
    assert len(looks) == len(methods) >= 13
    lines = {(depth, method): ([1e-3, 2e-3], [9, 8 + i]) for depth in "ab" for i, method in enumerate(methods)}
    assert panels({**lines, ("a", "none"): ([], [])}, UNIGRAM, "x", "y", ticks=[1e-3, 2e-3]).startswith(b"\x89PNG")


def test_panels_show_lost_runs_and_tick_labels_with_room(monkeypatch: pytest.MonkeyPatch):
    kept: list[Any] = []
    monkeypatch.setattr(figures, "_png", kept.append)
    panels({("a", "sgd"): ([1e-3, 2e-3, 0.1], [9, math.inf, 8])}, UNIGRAM, "x", "y", ticks=[1e-3, 2e-3, 0.1])
    (axis,) = kept[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.001", "", "0.1"]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "x"] == [2e-3]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--methods", "admin,postnl"], "'postnl' is no method; there are admin,"),
        (["--depths", "6"], "'6' is no depth such as 6-6"),
        (["--lr", "1e-3,0.0"], "'0.0' is no learning rate"),
        (["--warmup", "0"], "--warmup 0 needs another scheduler"),
        (["--updates", "0"], "--updates must be at least 1"),
        (["--", "--lr", "1"], "--lr is set by this script and cannot follow --"),
        (["--", "--max-update=5"], "--max-update is set by this script"),
        (["--lr", "1e999"], "--lr: a learning rate must be finite"),
        (["--", "--valid-subset", "test"], "--valid-subset cannot follow --: the best runs are"),
        (["--", "--no-save"], "--no-save cannot follow --: the best runs translate"),
        (["--", "--disable-validation"], "--disable-validation cannot follow --: the best runs are"),
        (["--", "--encoder-normalize-before"], "--encoder-normalize-before cannot follow --: it would make every"),
        (["--baselines", "postln"], "--baselines: postln is not among --methods"),
        (["--methods", "admin sqrt"], "'admin sqrt' is no method; there are admin,"),
        (["--methods", "admin,preln --lr 1"], "--lr is set by this script and cannot follow preln"),
        (["--methods", "admin --no-save"], "--no-save cannot follow admin: the best runs translate"),
        (["--methods", "admin --lr-scheduler fixed,preln", "--warmup", "0"], "--warmup 0 needs another scheduler"),
    ],
)
def test_bad_options(capsys: Any, arguments: list[str], line: str):
    good = ["DATA", "--methods", "admin", "--depths", "6-6", "--updates", "9", "--out", "OUT"]
    with pytest.raises(SystemExit) as stopped:
        compare.parse([*good, *arguments])
    assert stopped.value.code == 2 and line in capsys.readouterr().err.splitlines()[-1]


def test_methods_with_options_of_their_own(data: Path, tmp_path: Path):
    args = runner(data, tmp_path, "--updates", "9", "--methods", "postln, admin  --admin-init sqrt,admin").args
    assert args.methods == ["postln", "admin --admin-init sqrt", "admin"]
    run = compare.Run(args.methods[1], "6-6", 1e-3, 200, 1)
    assert run.name == "admin_--admin-init_sqrt_6-6_lr0.001_w200_s1"
    assert run.base_method == "admin"
    assert compare.Run("admin --admin-profile a/b.json", "6-6", 1e-3, 200, 1).name.startswith(
        "admin_--admin-profile_a_b.json_6-6"
    )


def test_a_folder_without_data(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(AdminError, match="has no binarised training targets; DATA-BIN is the folder that"):
            compare.Data(folder, [])


def test_a_missing_test_set_is_said_before_training(data: Path, tmp_path: Path, monkeypatch: Any):
    copied = shutil.copytree(data, tmp_path / "bin", ignore=lambda *_: ["test.de-en.en.idx"])
    words = command(copied, tmp_path / "out", "--methods", "admin", "--updates", 9)
    monkeypatch.setattr(sys, "argv", words[2:])
    with pytest.raises(AdminError, match="has no binarised test set to translate; give --no-bleu"):
        compare.main()
    assert not (tmp_path / "out").exists()


def command(data: Path, out: Path, *arguments: Any) -> list[str]:
    words = [data, "--depths", "1-1", "--warmup", 20, "--out", out, "--jobs", 2, *arguments]
    return [sys.executable, "-m", "benchmarks.compare", *map(str, words), "--", *WIDTHS]


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """Two methods at one learning rate."""
    out = tmp_path_factory.mktemp("compare") / "out"
    words = command(data, out, "--methods", "postln,admin", "--lr", "5e-3", "--updates", 80)
    return out, subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "compare.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_comparison(first: Any, data: Path):
    out, finished = first
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [(row["method"], row["verdict"], row["best"]) for row in rows(out)] == [
        ("postln", "trained", "yes"),
        ("admin", "trained", "yes"),
    ]
    levels = compare.Data(data, [])
    for row in rows(out):
        assert 1 < float(row["train_ppl"]) < levels.positional
        assert 1 < float(row["valid_ppl"]) < levels.unigram
        assert 5 < float(row["ms_per_update"]) < 5000
        assert 150 < float(row["memory_mb"]) < 3000
        log = (out / f"{row['method']}_1-1_lr0.005_w20_s1/generate.log").read_text(encoding="utf-8")
        scored = float(log.split("BLEU4 = ")[1].split(",")[0])  # by fairseq's own scorer
        assert float(row["bleu"]) == pytest.approx(scored, abs=0.01)
    postln, admin = (json.loads((out / f"{m}_1-1_lr0.005_w20_s1/result.json").read_text()) for m in ("postln", "admin"))
    assert [update for update, _ in admin["curve"]] == list(range(1, 81))
    assert admin["parameters"] - postln["parameters"] == 5 * 32  # omega of five sub-layers
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in finished.stdout
    assert "| admin  | 1-1   | 0.005 | 20 " in table and "| 0 of 1   |" in table
    assert f"{levels.unigram:.1f} (unigram)" in table and "--methods postln,admin" in table and "fairseq 0.12" in table
    # Admin's translations against the one baseline there is
    (row,) = csv.DictReader((out / "significance.csv").read_text(encoding="utf-8").splitlines())
    assert (row["method"], row["baseline"], row["seed"]) == ("admin", "postln", "1")
    bleus = {row["method"]: float(row["bleu"]) for row in rows(out)}
    assert float(row["above"]) == pytest.approx(bleus["admin"] - bleus["postln"], abs=0.01)
    assert "| against |" in table and f"| {float(row['above']):+.1f} " in table and "Paired bootstrap" in table
    for figure in ("compare.png", "lr.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*/*.tmp")) and not list(out.glob("*/checkpoint_best.pt"))


def test_going_on_with_a_rate_that_diverges(first: Any, data: Path, monkeypatch: Any, capsys: Any):
    out, _ = first
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*.log")}
    words = command(data, out, "--methods", "admin", "--lr", "5e-3,1e30", "--updates", 80)
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    compare.main()
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    trained, diverged = rows(out)
    assert (trained["verdict"], trained["best"]) == ("trained", "yes")
    assert (diverged["verdict"], diverged["best"], diverged["bleu"]) == ("non-finite", "no", "")
    assert 0 <= int(diverged["update"]) < 5
    assert "| 1 of 2 " in (out / "table.md").read_text(encoding="utf-8")


def test_only_whole_translations_are_tested(first: Any, data: Path, tmp_path: Path):
    """One that was cut off has no score yet; its log is left alone."""
    out = shutil.copytree(first[0], tmp_path / "out")
    words = command(data, out, "--methods", "postln,admin", "--lr", "5e-3", "--updates", 80)
    args = compare.parse(words[3:])
    runs = [compare.Run(method, "1-1", 5e-3, 20, 1) for method in ("postln", "admin")]
    results = {run: json.loads((out / run.name / "result.json").read_text(encoding="utf-8")) for run in runs}
    assert [row["method"] for row in compare.tests(results, args)] == ["admin"]
    deeper = {compare.Run("admin", "2-2", 5e-3, 20, 1): result()}  # not translated
    args.depths += ["2-2"]
    assert [row["method"] for row in compare.tests({**results, **deeper}, args)] == ["admin"]
    log = out / runs[1].name / "generate.log"
    whole = log.read_text(encoding="utf-8")
    log.write_text(whole[: whole.index("H-") + 40], encoding="utf-8")
    results[runs[1]]["bleu"] = None
    assert compare.tests(results, args) == []


def test_a_finished_comparison_is_scored_by_comet(first: Any, data: Path, comet_models: Path, monkeypatch: Any):
    """Without training or decoding; nothing begins where the model is not there."""
    out = first[0]
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*.log")}
    (out / "significance.csv").unlink()
    monkeypatch.setattr(
        sys, "argv", command(data, out, "--methods", "postln,admin", "--lr", "5e-3", "--updates", 80)[2:]
    )
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setenv("COMET", str(comet_models / "none.ckpt"))
    with pytest.raises(AdminError, match=r"none\.ckpt: no such file"):
        compare.main()
    assert not (out / "significance.csv").exists()
    monkeypatch.setenv("COMET", str(comet_models / "broken.ckpt"))
    with pytest.raises(AdminError, match="not a model of COMET; without COMET the same command goes on"):
        compare.main()
    monkeypatch.setenv("COMET", str(comet_models / "model.ckpt"))
    compare.main()
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*.log")} == before
    assert (out / "significance.csv").exists()
    assert all(0 <= float(row["comet"]) <= 1 for row in rows(out) if row["bleu"])
    assert "| COMET x 100 |" in (out / "table.md").read_text(encoding="utf-8")
    (comet_models / "bin/comet-score").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    compare.main()  # this model has scored them


OWN_METHOD = """
from admin_fairseq import Rule, register_method


@register_method("mine")
class Mine(Rule):
    pass
"""


@pytest.mark.slow  # commands/test_extending.py has both in a comparison, too
def test_own_methods_and_variants_beside_what_is_finished(first: Any, data: Path, tmp_path: Path):
    """A method of a folder outside the package, and a default that a variant replaces."""
    out = shutil.copytree(first[0], tmp_path / "out")
    own = tmp_path / "my methods/own"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text(OWN_METHOD, encoding="utf-8")
    variant = "admin --admin-init sqrt --optimizer radam"
    words = command(data, out, "--methods", f"admin,mine,{variant}", "--lr", "5e-3", "--updates", 80)
    words[3:3] = ["--user-dir", str(own)]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "3 runs, 1 finished before" in finished.stdout
    assert [(row["method"], row["bleu"] != "") for row in rows(out)] == [("admin", 1), ("mine", 1), (variant, 1)]
    folder = out / "admin_--admin-init_sqrt_--optimizer_radam_1-1_lr0.005_w20_s1"
    trained = (folder / "train.log").read_text(encoding="utf-8").splitlines()[0]
    assert "--cpu --admin-init sqrt --optimizer radam --user-dir" in trained and "adam-betas" not in trained
    (own / "__init__.py").write_text(OWN_METHOD + "# another version of it\n", encoding="utf-8")
    later = runner(data, out, "--updates", "80")
    later.args.user_dir = own
    with pytest.raises(AdminError, match=r"mine_1-1_lr0\.005_w20_s1 was run with user-dir: "):
        later.stored(compare.Run("mine", "1-1", 5e-3, 20, 1))


def test_a_user_dir_that_is_not_there(tmp_path: Path):
    with pytest.raises(AdminError, match="none is no folder; give the one whose __init__"):
        compare.parse(["DATA", "--methods", "mine", "--user-dir", str(tmp_path / "none")])


def runner(data: Path, out: Path, *arguments: str) -> compare.Runner:
    args = compare.parse(command(data, out, "--methods", "admin", "--lr", "5e-3", *arguments)[3:])
    return compare.Runner(args, compare.Data(data, args.extra), (out / "lock").open("w"))


def test_other_settings_are_not_mixed(first: Any, data: Path, tmp_path: Path):
    out, _ = first
    admin = compare.Run("admin", "1-1", 5e-3, 20, 1)
    assert runner(data, out, "--updates", "80").stored(admin)["verdict"] == "trained"
    with pytest.raises(AdminError, match=r"was run with updates: 80; this is 90\. Choose another --out"):
        runner(data, out, "--updates", "90").stored(admin)
    other = runner(data, out, "--updates", "80")
    other.args.extra = [*WIDTHS, "--dropout", "0"]
    with pytest.raises(AdminError, match=r"options: --encoder-embed-dim 32 .* --cpu; this is .* --cpu --dropout 0\."):
        other.stored(admin)
    copied = shutil.copytree(data, tmp_path / "bin")
    assert runner(copied, out, "--updates", "80").stored(admin)  # the same data at another place
    for side in ("bin", "idx"):
        shutil.copy(copied / f"valid.de-en.en.{side}", copied / f"train.de-en.en.{side}")
    with pytest.raises(AdminError, match="was run with data: "):
        runner(copied, out, "--updates", "80").stored(admin)


def test_unusable_folders_and_results(data: Path, tmp_path: Path, monkeypatch: Any):
    admin = compare.Run("admin", "1-1", 5e-3, 20, 1)
    (tmp_path / admin.name).mkdir()
    (tmp_path / admin.name / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdminError, match=r"result\.json is no result of this script; remove it"):
        runner(data, tmp_path, "--updates", "9").stored(admin)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", command(data, file, "--methods", "admin", "--updates", 9)[2:])
    with pytest.raises(AdminError, match=r"--out .*file cannot be made a folder \(File exists\)"):
        compare.main()


def test_a_misspelt_option_is_one_line(data: Path, tmp_path: Path):
    misspelt = runner(data, tmp_path, "--updates", "9")
    misspelt.args.extra = ["--dropuot", "0"]
    with pytest.raises(RunError) as error:
        misspelt.train(compare.Run("admin", "1-1", 5e-3, 20, 1))
    line = "exit code 1: admin_fairseq: error: --dropuot: no option of this fairseq; the nearest: --dropout (all"
    assert line in str(error.value)
    assert not list(tmp_path.glob("*/result.json"))


def test_an_interruption_ends_the_runs(data: Path, tmp_path: Path, monkeypatch: Any):
    words = command(data, tmp_path, "--methods", "admin", "--lr", "5e-3", "--updates", 100000)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "admin_1-1_lr0.005_w20_s1/train.log"
        deadline = time.time() + 120
        while not (log.exists() and len(log.read_text().splitlines()) > 1):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.1)
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(AdminError, match="is at work in"):
            compare.main()
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.splitlines()[-1] == "interrupted; the same command goes on"
    running = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    assert not any(str(tmp_path) in file.read_text() for file in running if file.exists())
    assert not (log.parent / "result.json").exists()
