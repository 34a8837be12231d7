"""Masks from few random bits, and what is computed with them."""

from __future__ import annotations

import pytest
import torch
from fairseq.modules import FairseqDropout
from helpers import loss_and_gradients, norm_with_values
from torch import nn

from admin_fairseq.fast import dropout
from admin_fairseq.fast.dropout import DroppedAttention, FastDropout, from_few_bits
from admin_fairseq.fast.norm import few_passes

DROPOUTS = ("--dropout", "0.2", "--attention-dropout", "0.3", "--activation-dropout", "0.1")


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.3, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("shape", [(1000, 1001), (3,), (0, 4)])
def test_masks(p, shape):
    """As many are dropped as asked for, neighbours are independent, and the expectation is x."""
    torch.manual_seed(1)
    kept, scale = from_few_bits(torch.empty(shape), p)
    assert kept.shape == shape
    assert set(kept.unique().tolist()) <= {0, -1}
    dropped = 1 - 1 / scale
    assert abs(dropped - p) <= 2**-16
    if kept.numel() > 1000:
        share, count = kept.ne(0).double(), kept.numel()
        deviation = (dropped * (1 - dropped) / count) ** 0.5
        assert abs(1 - share.mean() - dropped) < 5 * deviation
        centred = share.flatten() - (1 - dropped)
        for lag in (1, 2, 3, 4, 8):
            assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 * deviation**2 * count**0.5


def test_a_seed_gives_one_mask():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(from_few_bits(torch.empty(50, 3), 0.5)[0])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def module(p: float, mode: str = "all") -> FairseqDropout:
    stack = nn.ModuleList([FairseqDropout(p, module_name="here")])
    dropout.speed_up({"encoder": stack}, mode)
    return stack[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradient(dtype):
    x = torch.randn(7, 5, 3).to(dtype).transpose(0, 1).requires_grad_()  # not contiguous
    torch.manual_seed(3)
    kept, scale = from_few_bits(x, 0.3)
    torch.manual_seed(3)
    y = module(0.3)(x)
    y.backward(torch.full_like(y, 2))
    factor = torch.where(kept.ne(0), torch.tensor(scale, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(y, (x.double() * factor).to(dtype))
    torch.testing.assert_close(x.grad, (2 * factor).to(dtype))


def test_what_is_dropped_is_nothing_whatever_it_was():
    x = torch.full((400,), float("inf"))
    assert set(module(0.5)(x).unique().tolist()) == {0.0, float("inf")}


def test_off_in_evaluation_and_where_it_cannot_serve():
    x = torch.randn(40)
    assert module(0.5).eval()(x) is x
    stays_on = module(0.5).eval()
    stays_on.apply_during_inference = True  # --retain-dropout
    assert stays_on(x).eq(0).any()
    assert module(0.0)(x) is x
    assert module(1.0)(x).eq(0).all()
    for mode, ours in (("all", True), ("measured", False)):
        torch.manual_seed(3)
        expected = FairseqDropout(0.5)(x)
        torch.manual_seed(3)
        assert torch.equal(module(0.5, mode)(x), expected) != ours
    traced = torch.jit.trace(module(0.5), (x,), check_trace=False)
    assert "PythonOp" not in str(traced.graph)


@pytest.mark.parametrize("omega", ["vector", "scalar", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sub_layer(omega, dtype):
    """The equation with the module's mask."""
    norm = norm_with_values(33, module(0.3)).to(dtype)
    if omega == "scalar":
        norm.omega = nn.Parameter(norm.omega[:1].detach().clone())
    norm.omega.requires_grad_(omega != "frozen")
    inputs = [torch.randn(7, 4, 33, dtype=dtype).requires_grad_() for _ in range(2)]
    parameters = [p for p in (norm.omega, norm.weight, norm.bias) if p.requires_grad]
    torch.manual_seed(3)
    expected = norm(tuple(inputs))
    torch.manual_seed(3)
    actual = few_passes(*inputs, norm.omega, norm.weight, norm.bias, norm.eps, 0.3, few_bits=True)
    weight = torch.randn(expected.shape, dtype=dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual, expected, **tolerance)
    each = (torch.autograd.grad((y * weight).sum(), [*inputs, *parameters]) for y in (actual, expected))
    for got, want in zip(*each):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention(mask, dtype):
    """softmax(q k^T / sqrt(d)) with dropped weights, times v, and its three gradients."""
    heads = [torch.randn(6, 2, 3, 4, dtype=torch.float64).to(dtype).permute(1, 2, 0, 3) for _ in range(3)]
    q, k, v = (each.detach().requires_grad_() for each in heads)  # (batch, heads, time, d_head), not contiguous
    hidden = {
        "none": None,
        "causal": torch.ones(6, 6, dtype=torch.bool).triu(1),
        "padded": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])[:, None, None],
    }[mask]
    torch.manual_seed(3)
    actual = DroppedAttention.apply(q, k, v, hidden, 0.3)
    weight = torch.randn(actual.shape)
    of_actual = torch.autograd.grad((actual * weight).sum(), (q, k, v))

    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(-2, -1) / 2
    weights = torch.softmax(scores if hidden is None else scores.masked_fill(hidden, float("-inf")), -1)
    torch.manual_seed(3)
    kept, scale = from_few_bits(weights, 0.3)
    expected = (weights * kept.ne(0) * scale) @ exact[2]
    of_expected = torch.autograd.grad((expected * weight).sum(), exact)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.03, "atol": 0.05}
    for got, want in zip((actual, *of_actual), (expected, *of_expected)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_attention_under_autocast():
    q, k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = DroppedAttention.apply(q, k, v, None, 0.3)
    y.sum().backward()
    assert q.grad.shape == q.shape


def test_checkpointed_activations_draw_the_masks_again(build, batch):
    results = []
    for options in ((), ("--checkpoint-activations",)):
        torch.manual_seed(4)
        model, task, cfg = build("transformer_admin", "--admin-fast", "all", *DROPOUTS, *options)
        assert {type(each) for each in model.modules() if isinstance(each, FairseqDropout)} == {FastDropout}
        results.append(loss_and_gradients(model, task, cfg, batch()))
    (loss, gradients), (again, of_again) = results
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == of_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_again[name], gradient)
