"""benchmarks/speed.py, on models of two layers."""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, needs_stock_translation
from fairseq import criterions

pytest.importorskip("matplotlib", reason="matplotlib is not there: pip install '.[demo]'")
sys.path.insert(0, str(ROOT))

from admin_fairseq import AdminError
from benchmarks import speed

SMALL = "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
TINY = ["--max-tokens", "150", "--vocabulary", "200", "--rounds", "2", "--threads", "1", "--", *SMALL.split()]


def in_this_process(setting):
    return speed.measure(setting)


@needs_stock_translation
def test_tiny_run(tmp_path, capsys):
    """Every column of every method has a figure; what the methods differ in, and the arithmetic between columns."""
    argv = ["--depths", "2-1", "--methods", "postln,admin", "--length", "4", "--out", str(tmp_path), *TINY]
    speed.main(argv, in_this_process)
    with (tmp_path / "speed.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == ["postln", "admin"]
    stock, admin = table
    for row in table:
        parts = [float(row[f"{part}_s"]) for part in ("forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert max(parts) < float(row["step_s"])
        assert all(float(row[name]) > 0 for name in ("tokens_per_s", "flops_share", "memory_mb", "generation_s"))
    assert {stock[name] for name in ("step_ratio", "memory_ratio", "generation_ratio")} == {"1.0"}
    assert stock["prepass_forwards"] == ""
    assert 0 < float(admin["prepass_forwards"]) < 100
    assert int(admin["sub_layers"]) == 7
    assert int(admin["parameters"]) - int(stock["parameters"]) == 7 * 32
    record = (tmp_path / "record.md").read_text()
    assert capsys.readouterr().out == record + "\n"
    assert "torch " + torch.__version__ in record
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_medians_of_the_rounds(tmp_path):
    """A round in which the machine was busy weighs no more than another."""
    seconds = {"postln": [1.0, 2.0, 100.0], "admin": [0.9, 1.8, 90.0]}
    found = {
        method: [
            {**dict.fromkeys(("forward", "backward", "optimizer", "step"), s), "tokens": 10, "flops": 5} for s in each
        ]
        for method, each in seconds.items()
    }
    answer = {"rounds": found, "parameters": dict.fromkeys(found, 7), "prepass": {}, "generation": {}, "matmul": 10.0}
    setting = {"depth": "6-6", "max_tokens": 10, "dtype": "fp32"}
    _, admin = speed.rows(answer, {"postln": 200.0, "admin": 100.0}, setting)
    assert admin["step_ratio"] == pytest.approx(0.9)
    assert admin["memory_ratio"] == 0.5
    assert admin["tokens_per_s"] == pytest.approx(10 / 1.8)
    assert admin["flops_share"] == pytest.approx(5 / 1.8 / 10)


def test_flops_are_those_of_the_matrix_products(build, batch):
    """Without padding, against torch's own count of a forward and a backward pass."""
    counters = pytest.importorskip("torch.utils.flop_counter", reason="torch before 2.1 counts no FLOPs")
    kernels = pytest.importorskip("torch.nn.attention", reason="torch before 2.3 cannot choose how to attend")
    model, task, cfg = build("transformer", "--share-all-embeddings", "--dropout", "0")
    sample = batch(6, same_length=True)
    criterion = criterions.build_criterion(cfg.criterion, task)
    with counters.FlopCounterMode(display=False) as counter, kernels.sdpa_kernel(kernels.SDPBackend.MATH):
        criterion(model, sample)[0].backward()
    counted = speed.counts(sample, SimpleNamespace(cfg=cfg, task=task))["flops"]
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_search_stops_where_memory_does():
    room = 5000
    asked = []

    def measure_at(tokens):
        asked.append(tokens)
        return {"out of memory": True} if tokens > room else {"rounds": {}}

    assert [answer["max_tokens"] for answer in speed.search(measure_at, 1000)] == [1000, 2000, 4000]
    assert asked == [1000, 2000, 4000, 8000]


def test_gpu_report(tmp_path, monkeypatch, capsys):
    """With a worker that only pretends: the fastest batch, the largest, and memory a token between the two largest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def worker(setting):
        tokens, (method,) = setting["max_tokens"], setting["methods"]
        if tokens > 4096:
            return {"out of memory": True}
        step = 0.5 if tokens == 2048 else 2.0
        rounds = [{"forward": 0.1, "backward": 0.2, "optimizer": 0.1, "step": step, "tokens": tokens, "flops": 1e12}]
        common = {"prepass": {}, "generation": {}, "matmul": 4e12, "memory_mb": 100 + tokens / 1024}
        return {"rounds": {method: rounds}, "parameters": {method: 1}, **common}

    table = speed.main(["DATA-BIN", "--gpu-report", "--max-tokens", "1024", "--out", str(tmp_path)], worker)
    assert len(table) == len(speed.PLAN)
    for row in table:
        assert (row["max_tokens"], row["largest_max_tokens"]) == (2048, 4096)
        assert row["kb_per_token"] == pytest.approx(1)
        assert row["flops_share"] == pytest.approx(0.5)
    assert "--checkpoint-activations" in capsys.readouterr().out


def test_out_of_memory_is_an_answer(monkeypatch):
    def full(setting):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(speed, "_measure", full)
    assert speed.measure({"threads": 0}) == {"out of memory": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [["--gpu-report"], ["--device", "cuda"]])
def test_without_a_gpu_says_so_in_a_line(tmp_path, flags):
    with pytest.raises(AdminError, match="no GPU here"):
        speed.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_process_for_each_model_and_round(tmp_path):
    argv = ["--depths", "1-1", "--methods", "postln,admin", "--no-generate", "--one-at-a-time", "--out", str(tmp_path)]
    stock, admin = speed.main([*argv, *TINY])
    assert stock["memory_mb"] > 100
    assert admin["memory_ratio"] == pytest.approx(1, abs=0.1)
    assert admin["prepass_forwards"] > 0
