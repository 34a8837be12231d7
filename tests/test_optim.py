"""--optimizer radam and novograd."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import train
from test_train import assert_refused, assert_same_checkpoint

from admin_fairseq import AdminError
from admin_fairseq.optim import RAdam

HAS_DECOUPLED_DECAY = torch.__version__ >= "2.2"


def config(**values):
    return SimpleNamespace(
        **{"lr": [0.02], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.0, **values}
    )


@pytest.mark.skipif(not HAS_DECOUPLED_DECAY, reason="torch before 2.2 cannot decouple the decay")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_radam_is_the_papers_algorithm(decay):
    """Algorithm 2 of Liu et al. 2020 with decoupled weight decay, in plain numbers."""
    b1, b2, lr, eps = 0.9, 0.98, 0.02, 1e-8
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = RAdam(config(weight_decay=decay), [weight])
    w, m, v, rho_inf = 1.0, 0.0, 0.0, 2 / (1 - b2) - 1
    for t, gradient in enumerate(torch.randn(20).tolist(), start=1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        w -= lr * decay * w
        step, rho = lr * m / (1 - b1**t), rho_inf - 2 * t * b2**t / (1 - b2**t)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            step *= r * math.sqrt(1 - b2**t) / (math.sqrt(v) + eps)
        w -= step
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(w, rel=1e-12)


@pytest.mark.skipif(HAS_DECOUPLED_DECAY, reason="this torch can")
def test_radam_without_decoupled_decay_is_refused():
    with pytest.raises(AdminError, match=r"needs torch 2\.2"):
        RAdam(config(weight_decay=0.1), [torch.nn.Parameter(torch.ones(1))])


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
