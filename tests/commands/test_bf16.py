"""Training on a CPU with --bf16 and with every faster computation."""

from __future__ import annotations

import logging

import pytest
import torch
from fairseq import tasks
from helpers import Result, assert_same_checkpoint, checkpoint, generate, hypotheses, train, train_here

from admin_fairseq import family

ALL = ("--admin-fast", "all", "--dropout", "0.1", "--attention-dropout", "0.1", "--activation-dropout", "0.1")


def test_trains_as_fp32(data, tmp_path):
    losses = {}
    for name, flags in (("fp32", []), ("bf16", ["--bf16", "--save-interval-updates", "3"])):
        result = train(data, tmp_path / name, *ALL, *flags, updates=7)
        assert result.code == 0, result.output
        losses[name] = by_update(result)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    state = checkpoint(tmp_path / "bf16/checkpoint_last.pt")
    moments = [moment for each in state["last_optimizer_state"]["state"].values() for moment in each.values()]
    assert {moment.dtype for moment in moments if torch.is_tensor(moment) and moment.numel() > 1} == {torch.float32}
    (tmp_path / "parts").mkdir()
    (tmp_path / "bf16/checkpoint_1_3.pt").rename(tmp_path / "parts/checkpoint_last.pt")
    parts = by_update(train(data, tmp_path / "parts", *ALL, "--bf16", updates=7))
    assert list(parts) == [4, 5, 6, 7]
    # from the same weights, but fairseq's checkpoints have none of the bits that bf16 lacks
    assert parts[4] == losses["bf16"][4]
    assert parts == pytest.approx({update: losses["bf16"][update] for update in parts}, rel=0.01)


@pytest.mark.slow
def test_generates_nearly_as_in_fp32(data, tmp_path):
    assert train(data, tmp_path, *ALL).code == 0
    path, scores = tmp_path / "checkpoint_last.pt", []
    for flags in ([], ["--bf16"]):
        best = hypotheses(generate(data, path, *flags))
        scores.append({line.split("\t")[0]: float(line.split("\t")[1]) for line in best})
    fp32, bf16 = scores
    assert bf16 == pytest.approx(fp32, abs=0.1) and bf16 != fp32


@pytest.mark.slow
def test_resumes_bit_identically_with_every_faster_computation(data, tmp_path):
    options = [*ALL, "--save-interval-updates", "3"]
    whole = train(data, tmp_path / "whole", *options, updates=7)
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole/checkpoint_1_3.pt").rename(tmp_path / "parts/checkpoint_last.pt")
    parts = train(data, tmp_path / "parts", *options, updates=7)
    assert parts.losses() == {update: loss for update, loss in whole.losses().items() if update > 3}
    assert_same_checkpoint(*(tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts")))


def by_update(result: Result) -> dict[int, float]:
    return {update: float(loss.split()[0]) for update, loss in result.losses().items()}


@pytest.mark.parametrize(
    ("flags", "is_slow", "method"),
    [("fpu avx512f", True, "preln"), ("fpu amx_bf16", False, "admin"), ("asimd bf16", False, "admin")],
)
def test_a_line_where_the_processor_lacks_bf16(data, tmp_path, monkeypatch, caplog, flags, is_slow, method):
    monkeypatch.setattr(family, "CPUINFO", tmp_path / "cpuinfo")
    family.CPUINFO.write_text(f"processor : 0\nflags : {flags} sse2\n")
    with caplog.at_level(logging.WARNING):
        cfg = train_here(f"transformer_{method}", data, tmp_path / "run", "--bf16")
    assert caplog.text.count("has no bf16 instructions") == is_slow
    cfg.common_eval.path = "a checkpoint"  # as fairseq-generate
    with caplog.at_level(logging.WARNING):
        tasks.setup_task(cfg.task).build_model(cfg.model).prepare_for_inference_(cfg)
    assert caplog.text.count("has no bf16 instructions") == 2 * is_slow
