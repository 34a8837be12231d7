"""benchmarks.speed, on models of two layers."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from fairseq import criterions
from helpers import needs_stock_translation

pytest.importorskip("matplotlib", reason="matplotlib is not there: pip install '.[demo]'")

from admin_fairseq import AdminError
from benchmarks import speed, worker

SMALL = "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
TINY = ["--max-tokens", "150", "--vocabulary", "200", "--rounds", "2", "--threads", "1", "--", *SMALL.split()]


def in_this_process(setting):
    return worker.answer(setting)


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


def test_language_models_in_bf16_by_updates_of_two_batches(tmp_path):
    argv = ["--depths", "1-2", "--methods", "lm_postln,lm_admin:all/bf16", "--no-memory", "--out", str(tmp_path)]
    small = "--decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2 --update-freq 2"
    stock, admin = speed.main([*argv, *TINY[: TINY.index("--") + 1], *small.split()], in_this_process)
    assert (stock["dtype"], admin["dtype"]) == ("fp32", "bf16")
    for row in (stock, admin):
        assert 200 < row["tokens_per_s"] * row["step_s"] < 300
        assert sum(row[part] for part in (*worker.PARTS, "Python")) == pytest.approx(1)
        assert min(row[part] for part in worker.PARTS if part != "random numbers") > 0
        assert "generation_s" not in row
    assert "| 1-2 | lm_admin:all/bf16 |" in (tmp_path / "record.md").read_text()


def test_ratios_are_medians_of_the_rounds(tmp_path):
    """A round in which the machine was busy weighs no more than another."""
    seconds = {"postln": [1.0, 2.0, 100.0], "admin": [0.9, 1.8, 90.0]}
    found = {
        method: [
            {**dict.fromkeys(("forward", "backward", "optimizer", "step"), s), "tokens": 10, "flops": 5} for s in each
        ]
        for method, each in seconds.items()
    }
    answer = {"rounds": found, "parameters": dict.fromkeys(found, 7), "prepass": {}, "generation": {}, "parts": {}}
    answer["matmul"] = dict.fromkeys(found, 10.0)
    setting = {"depth": "6-6", "max_tokens": 10, "dtype": "fp32"}
    _, admin = speed.rows(answer, {"postln": 200.0, "admin": 100.0}, setting)
    assert admin["step_ratio"] == pytest.approx(0.9)
    assert admin["memory_ratio"] == 0.5
    assert admin["tokens_per_s"] == pytest.approx(10 / 1.8)
    assert admin["flops_share"] == pytest.approx(5 / 1.8 / 10)


@pytest.mark.parametrize("is_lm", [False, True])
def test_flops_are_those_of_the_matrix_products(build, build_lm, batch, is_lm):
    """Without padding, against torch's own count of a forward and a backward pass."""
    counters = pytest.importorskip("torch.utils.flop_counter", reason="torch before 2.1 counts no FLOPs")
    kernels = pytest.importorskip("torch.nn.attention", reason="torch before 2.3 cannot choose how to attend")
    if is_lm:
        model, task, cfg = build_lm("transformer_lm_postln", "--dropout", "0")
        words = torch.randint(4, len(task.target_dictionary), (6, 12))
        sample = {"net_input": {"src_tokens": words, "src_lengths": None}, "target": words, "ntokens": words.numel()}
    else:
        model, task, cfg = build("transformer", "--share-all-embeddings", "--dropout", "0")
        sample = batch(6, same_length=True)
    criterion = criterions.build_criterion(cfg.criterion, task)
    with counters.FlopCounterMode(display=False) as counter, kernels.sdpa_kernel(kernels.SDPBackend.MATH):
        criterion(model, sample)[0].backward()
    counted = worker.counts([sample], SimpleNamespace(cfg=cfg, task=task))
    assert counted["flops"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["tokens"] == sample["ntokens"]
    twice = worker.counts([sample, sample], SimpleNamespace(cfg=cfg, task=task))
    assert twice == {name: 2 * count for name, count in counted.items()}


def test_search_stops_where_memory_or_the_data_does():
    asked = []

    def measure_at(tokens, room, data):
        asked.append(tokens)
        if tokens > room:
            raise AdminError("out of memory")
        return {"rounds": {"admin": [{"tokens": min(tokens, data)}]}}

    assert speed.search(lambda tokens: measure_at(tokens, 5000, 10**9), 1000) == "8000: out of memory"
    assert asked == [1000, 2000, 4000, 8000]
    assert speed.search(lambda tokens: measure_at(tokens, 10**9, 3000), 1000) == "8000: no larger batch in the data"


def pretend(setting):
    """A worker with room for 4096 tokens, fastest at 2048, Admin twice as fast as stock; not for stock's 100-100."""
    tokens, (method,), extra = setting["max_tokens"], setting["methods"], setting["extra"]
    if tokens > 4096 or (setting["depth"], extra) == ("100-100", []):
        return {"out of memory": True}
    if extra[-1:] == ["off"] and tokens > 1024:
        raise AdminError("measuring failed (1): something else")
    step = (0.5 if tokens == 2048 else 2.0) * (1 + (method == "postln"))
    rounds = [{"forward": 0.1, "backward": 0.2, "optimizer": 0.1, "step": step, "tokens": tokens, "flops": 1e12}]
    common = {"prepass": {}, "generation": {}, "matmul": {method: 4e12}, "parts": {}, "memory_mb": 100 + tokens / 1024}
    common["updates_an_epoch"] = 2**20 / tokens
    return {"rounds": {method: rounds}, "parameters": {method: 1}, **common}


@pytest.fixture
def report(tmp_path, monkeypatch):
    """report(worker) -> the rows of --gpu-report with a worker that only pretends."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return lambda worker: speed.main(
        ["DATA-BIN", "--gpu-report", "--max-tokens", "1024", "--out", str(tmp_path)], worker
    )


def test_gpu_report(report, capsys):
    """The fastest batch, the largest, memory a token between the two largest, tokens a second beside stock."""
    stock, admin, failed, _, checkpointed, *deep = table = report(pretend)
    assert [row["depth"] for row in table] == 5 * ["60-12"] + 5 * ["100-100"]
    assert [(row["method"], row["dtype"]) for row in table] == 2 * [line[:2] for line in speed.PLAN]
    assert (stock["tokens_ratio"], admin["tokens_ratio"], failed["tokens_ratio"]) == pytest.approx((1, 2, 0.25))
    for row in (stock, admin, checkpointed):
        assert (row["max_tokens"], row["largest_max_tokens"]) == (2048, 4096)
        assert row["kb_per_token"] == pytest.approx(1)
        assert row["ended_at"] == "8192: out of memory"
        assert not {"step_ratio", "memory_ratio"} & row.keys()
    assert admin["flops_share"] == pytest.approx(0.5)
    assert (failed["max_tokens"], failed["ended_at"]) == (1024, "2048: measuring failed (1): something else")
    assert [("step_s" in row, row["ended_at"]) for row in deep] == [
        (False, "1024: out of memory"),
        (True, "8192: out of memory"),
        (True, "2048: measuring failed (1): something else"),
        (False, "1024: out of memory"),
        (True, "8192: out of memory"),
    ]
    assert "tokens_ratio" not in deep[-1]
    out, err = capsys.readouterr()
    assert "--checkpoint-activations" in out and "fp16" in out and "a sub-layer" not in out
    assert "postln 100-100 fp16: ended at --max-tokens 1024: out of memory\n" in err
    assert "admin 60-12 bf16 --admin-fast all, --max-tokens 2048: 256 s an epoch, 4096 tokens a second, 50% of" in err


def test_gpu_report_is_written_line_by_line(report, tmp_path):
    def interrupted(setting):
        if setting["methods"] == ["admin"]:
            raise KeyboardInterrupt
        return pretend(setting)

    with pytest.raises(KeyboardInterrupt):
        report(interrupted)
    assert (tmp_path / "speed.csv").read_text().count("postln") == 1
    assert "postln" in (tmp_path / "record.md").read_text()


def test_a_depth_that_fails_does_not_end_the_others(tmp_path, capsys):
    def worker(setting):
        if setting["depth"] == "2-1":
            raise AdminError("measuring failed")
        return pretend({**setting, "depth": ""})

    argv = ["--methods", "postln", "--max-tokens", "64", "--vocabulary", "9", "--out", str(tmp_path)]
    (row,) = speed.main([*argv, "--depths", "2-1,1-1"], worker)
    assert row["depth"] == "1-1"
    assert "2-1, --max-tokens 64: measuring failed\n" in capsys.readouterr().err
    with pytest.raises(AdminError, match="nothing was measured"):
        speed.main([*argv, "--depths", "2-1"], worker)


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])
def test_out_of_memory_is_an_answer(monkeypatch, message):
    def full(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(worker, "compare_methods", full)
    assert worker.answer({"threads": 0}) == {"out of memory": True}


@pytest.mark.parametrize("joined", [True, False])
def test_embeddings_are_shared_where_the_dictionaries_are_one(tmp_path, joined):
    data = speed.write_synthetic(tmp_path, 20, 10)
    if not joined:
        with (tmp_path / "dict.en.txt").open("a") as file:
            file.write("another 1\n")
    setting = {"depth": "1-1", "max_tokens": 150, "dtype": "fp32", "device": "cpu", "extra": SMALL.split()}
    model = worker.make_trainer("postln", {**setting, "data": data, "folder": str(tmp_path)}).get_model()
    assert (model.encoder.embed_tokens is model.decoder.embed_tokens) == joined


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [["--gpu-report"], ["--device", "cuda"]])
def test_without_a_gpu_says_so_in_a_line(tmp_path, flags):
    with pytest.raises(AdminError, match="no GPU here"):
        speed.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_process_keeps_its_models_while_batches_alone_differ(tmp_path, capfd):
    """One more update each, on other batches; a setting that fails is named, and the next is measured anew."""
    base = {"depth": "1-1", "methods": ["admin:loss+adam"], "dtype": "fp32", "device": "cpu", "extra": SMALL.split()}
    base.update({"data": speed.write_synthetic(tmp_path, 200, 60), "folder": str(tmp_path), "threads": 1, "rounds": 1})
    base.update({"prepass": False, "generate": False, "matmul": True, "beam": 1, "length": 1})
    process = speed.Process()
    small = process({**base, "max_tokens": 100})
    running = process.running
    large = process({**base, "max_tokens": 300})
    assert process.running is running
    small, large = (answer["rounds"]["admin:loss+adam"][0]["tokens"] for answer in (small, large))
    assert 0 < small <= 100 < large <= 300
    with pytest.raises(AdminError, match=r"measuring admin:loss\+adam 1-1 failed \(1\): .*no-such-option"):
        process({**base, "max_tokens": 100, "extra": ["--no-such-option"]})
    assert running.poll() is not None and process.running is None
    process.close()


def test_what_a_method_says_is_on(monkeypatch):
    monkeypatch.setattr(worker, "MEASURED", {"loss": frozenset(), "adam": frozenset(), "beams": frozenset()})

    monkeypatch.setattr(worker, "AS_IT_IS", {"loss": frozenset(), "adam": frozenset({"cpu"}), "beams": frozenset()})

    def on(method):
        worker.use(worker.Variant.of(method, {"dtype": "fp32"}))
        return {name for name, devices in worker.MEASURED.items() if "cpu" in devices}

    assert on("admin:off") == set()
    assert on("admin:loss+beams/bf16") == {"loss", "beams"}
    assert on("admin:all") == {"loss", "adam", "beams"}
    assert on("admin/bf16") == on("postln") == {"adam"}  # as it is
    assert {"attention+one projection", "sub-layer", "off"} < set(speed.features("cpu", True))


@pytest.mark.slow
def test_one_process_for_each_model_and_round(tmp_path):
    argv = ["--depths", "1-1", "--methods", "postln,admin", "--no-generate", "--one-at-a-time", "--out", str(tmp_path)]
    stock, admin = speed.main([*argv, *TINY])
    assert stock["memory_mb"] > 100
    assert admin["memory_ratio"] == pytest.approx(1, abs=0.1)
    assert admin["prepass_forwards"] > 0
