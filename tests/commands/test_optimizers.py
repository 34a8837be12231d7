"""Training by --optimizer radam, novograd, and adam in one kernel."""

from __future__ import annotations

import importlib.util

import torch
from helpers import assert_refused, assert_same_checkpoint, checkpoint, needs_fused_adam, train, train_here


def test_radam_resumes_bit_identically(data, tmp_path):
    options = ["--optimizer", "radam", "--adam-betas", "(0.9, 0.98)", "--save-interval-updates", "3"]
    whole = train(data, tmp_path / "whole", *options, updates=7)
    assert whole.code == 0, whole.output
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole/checkpoint_1_3.pt").rename(tmp_path / "parts/checkpoint_last.pt")
    parts = train(data, tmp_path / "parts", *options, updates=7)
    assert parts.losses() == {update: loss for update, loss in whole.losses().items() if update > 3}
    assert_same_checkpoint(*(tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts")))


def test_novograd(data, tmp_path):
    result = train(data, tmp_path, "--optimizer", "novograd", "--lr", "1e-2", updates=6)
    if importlib.util.find_spec("pytorch_optimizer") is None:
        assert_refused(result, "pip install pytorch-optimizer", tmp_path / "nothing")
    else:
        assert result.code == 0, result.output
        losses = [float(loss.split()[0]) for loss in result.losses().values()]
        assert losses[-1] < losses[0]


@needs_fused_adam
def test_resumes_from_the_unfused_and_back(data, tmp_path):
    """Clipping, decay, and the optimizer's state of one kind taken on by the other; the loss says it is the same."""
    flags = "--clip-norm 0.5 --weight-decay 0.01 --dropout 0 --admin-fast"
    losses = {}
    for first, second in (("off", "off"), ("off", "all"), ("all", "off")):
        folder = tmp_path / f"{first}-{second}"
        train_here("transformer_admin", data, folder, f"{flags} {first}")
        train_here("transformer_admin", data, folder, f"{flags} {second} --max-update 4")
        last = checkpoint(folder / "checkpoint_last.pt")
        assert last["optimizer_history"][-1]["num_updates"] == 4
        # fairseq 0.12.2 keeps a buffer that it never fills
        weights = [w.flatten() for name, w in last["model"].items() if not name.endswith("_float_tensor")]
        losses[first, second] = torch.cat(weights)
    for weights in losses.values():
        torch.testing.assert_close(weights, losses["off", "off"], rtol=1e-4, atol=1e-5)
