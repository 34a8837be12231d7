"""docs/python.md: its blocks run one after the other, on models of this test."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT, train_here

from admin_fairseq import AdminTransformer, sub_layers

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S)


def test_blocks_run(data, text, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data-bin").symlink_to(data)
    (tmp_path / "lm-bin").symlink_to(text)
    train_here("transformer_admin", data, "checkpoints", "")
    train_here("transformer_lm_admin", text, "lm-checkpoints", "--task language_modeling --tokens-per-sample 32")
    (tmp_path / "codes").write_text("#version: 0.2\nd a\n")
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert len(BLOCKS) == 4
    keywords = {"bpe": "subword_nmt", "bpe_codes": "codes", "tokenizer": "moses"}
    plain = AdminTransformer.from_pretrained("checkpoints", "checkpoint_best.pt", "data-bin", **keywords)
    assert "@@" not in plain.translate("das haus.", beam=1, max_len_b=5)
    out = capsys.readouterr().out
    assert re.search(r"^the old .*\nperplexity \d", out, re.M)
    assert (tmp_path / "omega.png").stat().st_size > 1000
    assert names["model"].omega_source == "profiling"
    assert len(names["found"].encoder) == 12
    assert all(norm.omega.grad is not None for norm in [*sub_layers(names["model"].encoder).values()][1:])
