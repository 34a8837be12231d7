"""--optimizer radam, novograd, and adam in one kernel."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.optim.adam import Adam, FairseqAdam, FairseqAdamConfig
from helpers import needs_fused_adam

from admin_fairseq import AdminError
from admin_fairseq.fast.adam import FusedAdam, fuse
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


def adams(dtype, **settings):
    """fairseq's Adam and ours after 20 updates on the same gradients, the second with every third parameter idle."""
    results = []
    for kind in (Adam, FusedAdam):
        random = torch.Generator().manual_seed(0)
        shapes = [(7, 5), (33,), (), (64, 48)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=random, dtype=dtype)) for shape in shapes]
        optimizer = kind(params, lr=0.02, betas=(0.9, 0.98), eps=1e-4, **settings)
        for update in range(20):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + update)
            for i, p in enumerate(params):
                gradient = torch.randn(p.shape, generator=random, dtype=dtype)
                p.grad = None if i == 1 and update % 3 else gradient
            optimizer.step()
        results.append((params, optimizer))
    return results


@needs_fused_adam
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fused_adam_is_fairseqs(dtype, tolerance, decay):
    """The eps of 1e-4 shows on which side of the bias correction it is added."""
    (expected, theirs), (found, ours) = adams(dtype, weight_decay=decay)
    for p, q in zip(expected, found):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
        assert ours.state[q]["step"] == theirs.state[p]["step"]
    states = theirs.state_dict(), ours.state_dict()
    assert [{key: type(value) for key, value in state["state"][0].items()} for state in states] == [
        {"step": int, "exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor}
    ] * 2
    assert states[0]["param_groups"] == states[1]["param_groups"]


@needs_fused_adam
def test_moments_of_a_file_are_never_read_as_others():
    """The kernel asks neither for their shape nor for their strides."""
    weight = torch.nn.Parameter(torch.ones(4, 3))
    found = []
    for kind in (Adam, FusedAdam):
        optimizer, moments = kind([torch.nn.Parameter(weight.detach().clone())]), torch.arange(12.0).view(3, 4)
        state = {0: {"step": 3, "exp_avg": moments.t(), "exp_avg_sq": moments.t() ** 2}}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = torch.ones(4, 3)
        optimizer.step()
        found.append(p)
    torch.testing.assert_close(*found)
    (entry,) = optimizer.state.values()
    assert entry["exp_avg"].is_contiguous()
    groups = optimizer.state_dict()["param_groups"]
    one = torch.ones(1)[-1:].expand(4, 3)  # of the right shape, in one number's memory
    optimizer.load_state_dict({"state": {0: {"step": 1, "exp_avg": one, "exp_avg_sq": one}}, "param_groups": groups})
    assert next(iter(optimizer.state.values()))["exp_avg"].untyped_storage().nbytes() == 48
    for odd in (torch.ones(3), torch.ones(3, 4), 1.0):
        with pytest.raises(AdminError, match="is of another model's weights; --reset-optimizer starts without"):
            optimizer.load_state_dict({"state": {0: {"step": 1, "exp_avg": odd}}, "param_groups": groups})


@needs_fused_adam
@pytest.mark.parametrize("case", ["gradient", "parameter", "slice", "dtypes", "half", "amsgrad", "sparse"])
def test_what_the_kernel_cannot_do_is_left_to_fairseq(case):
    """Memory in another order, several dtypes, another algorithm: to the bit what fairseq computes, or refuses."""
    first = torch.randn(5, 7).bfloat16() if case == "half" else torch.randn(5, 7)
    first = {"parameter": first.t(), "slice": torch.randn(5, 14)[:, ::2]}.get(case, first)
    second = torch.randn(3, dtype=torch.float64 if case == "dtypes" else first.dtype)
    gradient = {"gradient": torch.randn(7, 5).t(), "sparse": first.to_sparse()}.get(case, torch.randn(first.shape))
    found = []
    for kind in (Adam, FusedAdam):
        params = [torch.nn.Parameter(first.clone()), torch.nn.Parameter(second.clone())]  # clone keeps the order
        if case == "slice":
            params[0] = torch.nn.Parameter(torch.zeros(5, 14)[:, ::2].copy_(first))
        optimizer = kind(params, amsgrad=case == "amsgrad")
        for p in params:
            p.grad = (gradient if p is params[0] else second).to(p.dtype)
        if case == "sparse":
            with pytest.raises(RuntimeError, match="does not support sparse gradients"):
                optimizer.step()
        for _ in range(0 if case == "sparse" else 3):
            optimizer.step()
            params[0].grad = params[0].grad * 0.1  # amsgrad differs where gradients shrink
        found.append(params)
    for expected, got in zip(*found):
        assert torch.equal(expected, got)


def test_only_fairseqs_own_adam_is_replaced(monkeypatch, caplog):
    adam = FairseqAdam(adam_config(), [torch.nn.Parameter(torch.ones(2))])
    radam = RAdam(config(), [torch.nn.Parameter(torch.ones(2))])
    fuse(radam)
    assert type(radam.optimizer) is torch.optim.RAdam
    monkeypatch.delattr(torch, "_fused_adamw_", raising=False)  # as with a torch that lacks the kernel
    with caplog.at_level("INFO"):
        fuse(adam)
    assert type(adam.optimizer) is Adam
    assert "fairseq's own Adam is used" in caplog.text


@needs_fused_adam
def test_old_adam_stays_and_a_state_of_apex_is_taken(monkeypatch):
    config = adam_config()
    config.use_old_adam = True
    old = FairseqAdam(config, [torch.nn.Parameter(torch.ones(2))])
    fuse(old)
    assert type(old.optimizer) is Adam
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    ours = FairseqAdam(adam_config(), [p])
    fuse(ours)
    del ours.optimizer.param_groups[0]["amsgrad"]  # as apex writes it
    monkeypatch.setattr(Adam, "step", None)  # fairseq's own would not fail
    ours.step()
    assert not torch.equal(p, torch.ones(2))


@needs_fused_adam
def test_adam_is_fused_also_inside_a_half_precision_wrapper():
    adam = FairseqAdam(adam_config(), [torch.nn.Parameter(torch.ones(2))])
    fuse(SimpleNamespace(fp32_optimizer=adam))
    assert type(adam.optimizer) is FusedAdam


def adam_config():
    return FairseqAdamConfig(lr=[0.02], adam_betas="(0.9, 0.98)", tpu=False)
