"""The README's first command, at toy size, and its corpus."""

import subprocess
import sys

import grammar
from helpers import ROOT, needs_stock_translation


def test_corpus_is_deterministic_and_unambiguous():
    pairs = grammar.corpus(3000, seed=2)
    assert pairs == grammar.corpus(3000, seed=2)
    assert len({source for source, _ in pairs}) == 3000
    more = grammar.corpus(20000, seed=3)
    assert len(dict(more)) == len(set(more))


def test_splits_are_disjoint():
    parts = grammar.splits({"train": 3000, "valid": 200, "test": 200}, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 3000, "valid": 200, "test": 200}
    for held_out in ("valid", "test"):
        for side in (0, 1):
            assert not {p[side] for p in parts[held_out]} & {p[side] for p in parts["train"]}


def test_separable_verbs_and_verb_final_clauses_reorder():
    pairs = grammar.corpus(20000, seed=1)
    apart = [s for s, t in pairs if " call" in t and s.endswith(" an .") and (" ruft " in s or " rufe " in s)]
    joined = [s for s, _ in pairs if "dass" in s and s.endswith(" anruft .")]
    assert apart
    assert joined


@needs_stock_translation
def test_demo_runs_to_its_table_and_picture(tmp_path):
    sizes = ["--layers", "1", "--updates", "4", "--pairs", "300", "--test-pairs", "120"]
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples/demo/demo.py"), "--out", str(tmp_path), *sizes],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    table = finished.stdout[finished.stdout.index("training loss") :]
    for method in ("Post-LN", "Pre-LN", "Admin"):
        row = next(line.split() for line in table.splitlines() if line.startswith(method))
        assert 0 < float(row[1]) < 15
        assert 0 <= float(row[3]) <= 100
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
