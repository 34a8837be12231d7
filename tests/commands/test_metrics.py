"""omega in fairseq's metrics: what TensorBoard gets, what the log does not, and checkpoints."""

import json
import re

import pytest
import torch
from fairseq.logging import progress_bar
from helpers import ROOT, checkpoint, train_here

from admin_fairseq.metrics import statistics

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


@pytest.fixture
def log(caplog):
    """log() -> what the progress bar has logged since, without times and speeds."""
    caplog.set_level("INFO", logger="fairseq.logging.progress_bar")

    def log():
        lines = [record.getMessage() for record in caplog.records if record.name in ("train", "train_inner")]
        caplog.clear()
        rows = [json.loads(line) for line in lines]
        return [{key: row[key] for key in row if not re.search("w(p|all)|ups|ub|gb|wall", key)} for row in rows]

    return log


def scalars(folder):
    """{metric: {update: value}} of a folder of event files."""
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_omega_and_nothing_else_does(data, tmp_path, log, monkeypatch):
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
    flags = "--log-interval 2 --save-interval-updates 2 --max-update 4"
    train_here("transformer_admin", data, tmp_path / "plain", flags)
    plain = log()
    logged = f"{flags} --tensorboard-logdir {tmp_path / 'events'}"
    train_here("transformer_admin", data, tmp_path / "logged", logged)
    assert log() == plain
    assert plain

    events = scalars(tmp_path / "events/train_inner")
    for update in (2, 4):
        weights = checkpoint(tmp_path / f"logged/checkpoint_1_{update}.pt")["model"]
        omegas = {name: weight for name, weight in weights.items() if name.endswith("_layer_norm.omega")}
        assert len(omegas) == 6 + 6
        for name, omega in omegas.items():
            name = name[: -len("_layer_norm.omega")].replace("final", "ffn")
            assert events[f"omega_mean/{name}"][update] == pytest.approx(omega.mean().item(), abs=1e-6)
            assert events[f"omega_std/{name}"][update] == pytest.approx(omega.std(unbiased=False).item(), abs=1e-6)
    assert events["omega_std/decoder.layers.1.ffn"][4] > 0
    epoch = scalars(tmp_path / "events/train")
    assert epoch["omega_mean/encoder.layers.2.ffn"][4] == events["omega_mean/encoder.layers.2.ffn"][4]
    assert "omega_" not in str(checkpoint(tmp_path / "logged/checkpoint_1_4.pt")["extra_state"]["metrics"])

    # a run that was started without it logs from where it resumes
    resumed = flags.replace("4", "6") + f" --tensorboard-logdir {tmp_path / 'later'}"
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
    train_here("transformer_admin", data, tmp_path / "plain", resumed)
    assert list(scalars(tmp_path / "later/train_inner")["omega_mean/encoder.layers.0.ffn"]) == [6]


def test_without_the_package_a_line_says_so(tmp_path, monkeypatch, caplog):
    """fairseq says it; an extra of this plugin brings the package."""
    monkeypatch.setattr(progress_bar, "SummaryWriter", None)
    progress_bar.progress_bar([], log_format="simple", tensorboard_logdir=str(tmp_path))
    assert "tensorboard not found, please install with: pip install tensorboard" in caplog.text
    extras = (ROOT / "pyproject.toml").read_text()
    assert '\ntensorboard = ["tensorboard"]\n' in extras


def test_statistics(build):
    model, _, _ = build("transformer_admin", "--decoder-embed-dim", "16", "--decoder-output-dim", "16")
    omega = model.decoder.layers[1].encoder_attn_layer_norm.omega
    omega.data = torch.arange(16.0).half()
    found = statistics(model)
    assert len(found) == 2 * (6 + 6)
    assert found["omega_mean/decoder.layers.1.encoder_attn"] == 7.5
    assert found["omega_std/decoder.layers.1.encoder_attn"] == pytest.approx(21.25**0.5)
    assert found["omega_mean/encoder.layers.0.self_attn"] == 1
    assert found["omega_std/encoder.layers.0.self_attn"] == 0


def test_text_bars_leave_them_out():
    stats = {"loss": 1.5, "omega_mean/encoder.layers.0.ffn": 2.0, "omega_std/encoder.layers.0.ffn": 0.0}
    assert progress_bar.SimpleProgressBar([])._format_stats(stats) == {"loss": "1.5"}
    assert progress_bar.JsonProgressBar([])._format_stats(stats) == {"loss": "1.5"}
