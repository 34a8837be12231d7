"""The faster computations against the equation as it is written in norm.py."""

from __future__ import annotations

import copy
import csv
import logging
import sys

import pytest
import torch
from fairseq.modules import FairseqDropout
from helpers import norm_with_values
from torch import nn

from admin_fairseq import AdminError
from admin_fairseq.fast import norm as fast_norm
from admin_fairseq.fast.measured import MEASURED
from admin_fairseq.fast.norm import FastOmegaLayerNorm
from admin_fairseq.norm import OmegaLayerNorm
from benchmarks import kernel


def gradients(norm: OmegaLayerNorm, f: torch.Tensor, x: torch.Tensor, fast: str) -> list[torch.Tensor]:
    """Output and all five gradients, from the same seed."""
    norm, inputs = copy.deepcopy(norm), [f.detach().requires_grad_(), x.detach().requires_grad_()]
    if fast != "off":
        norm.__class__ = FastOmegaLayerNorm
    torch.manual_seed(1)
    y = norm(tuple(inputs))
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).sin().bfloat16().to(y.dtype))
    return [y, *(tensor.grad for tensor in (*inputs, norm.omega, norm.weight, norm.bias))]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("omega", ["vector", "scalar", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_eager_to_rounding(p, omega, dtype):
    norm = norm_with_values(33, nn.Dropout(p)).to(dtype)
    if omega == "scalar":
        norm.omega = nn.Parameter(norm.omega[:1].detach().clone())
    norm.omega.requires_grad_(omega != "frozen")
    f, x = torch.randn(2, 33, 4, 7, dtype=dtype).permute(0, 2, 3, 1)  # not contiguous
    if torch.__version__.startswith("1."):  # draws in another order then, and no branch of fairseq's is like that
        f = f.contiguous()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for got, expected in zip(gradients(norm, f, x, "measured"), gradients(norm, f, x, "off")):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch before 2.0 mixes no precisions in LayerNorm")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bf16_is_within_its_eight_bits(p):
    """Of fp64, also over many tokens, where torch's own LayerNorm adds bf16 numbers in bf16."""
    norm = norm_with_values(64, nn.Dropout(p)).to(torch.bfloat16)
    f, x = torch.randn(2, 9000, 64).to(torch.bfloat16)
    torch.manual_seed(1)
    mask = torch.empty_like(f).bernoulli_(1 - p)
    exact = gradients(norm_in_fp64(norm, mask / (1 - p)), f.double(), x.double(), "off")
    for got, expected in zip(gradients(norm, f, x, "measured"), exact):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() <= 0.006 * expected.norm()


def norm_in_fp64(norm: OmegaLayerNorm, mask: torch.Tensor) -> OmegaLayerNorm:
    class Masked(nn.Module):
        def forward(self, f: torch.Tensor) -> torch.Tensor:
            return f * mask.double()

    exact = copy.deepcopy(norm).double()
    exact.dropout = Masked()
    return exact


def test_evaluation_needs_no_autograd_function(monkeypatch):
    norm = norm_with_values(dropout=nn.Dropout(0.5)).eval()
    f, x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = norm((f, x))
    norm.__class__ = FastOmegaLayerNorm
    monkeypatch.setattr(fast_norm, "_FewerPasses", None)
    with torch.no_grad():
        torch.testing.assert_close(norm((f, x)), expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p):
    def call(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return fast_norm.few_passes(*inputs, 1e-5, p)

    f, x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        call, [t.requires_grad_() for t in (f, x, *torch.randn(3, 6, dtype=torch.float64) + 2)]
    )


def test_empty_batch_and_second_backward():
    norm = norm_with_values(dropout=nn.Dropout(0.5))
    empty = torch.zeros(2, 0, 5, 6, dtype=torch.float64)
    for got, expected in zip(gradients(norm, *empty, "measured"), gradients(norm, *empty, "off")):
        assert torch.equal(got, expected)
    norm.__class__ = FastOmegaLayerNorm
    loss = norm(tuple(torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_())).sum()
    loss.backward(retain_graph=True)
    first = norm.omega.grad.clone()
    loss.backward()
    torch.testing.assert_close(norm.omega.grad, 2 * first)


def test_switch(build):
    """A fairseq model has the option's value in every sub-layer."""
    f = torch.zeros(2, 6)
    norm = OmegaLayerNorm(6, nn.Identity())
    for option, kind in (("measured", FastOmegaLayerNorm), ("all", FastOmegaLayerNorm), ("off", OmegaLayerNorm)):
        model, _, _ = build("transformer_admin", "--admin-fast", option)
        norms = [module for module in model.modules() if isinstance(module, OmegaLayerNorm)]
        assert {type(norm) for norm in norms} == {kind}
        assert {getattr(norm, "mode", "off") for norm in norms} == {option}
    for option in ("measured", "all"):
        compute = fast_norm.choose(option, f, f, norm.omega, norm.weight, 0.0)
        assert (compute.func, compute.keywords) == (fast_norm.few_passes, {"few_bits": option == "all"})


def test_stays_eager_where_it_must(caplog):
    f, norm = torch.zeros(2, 6), OmegaLayerNorm(6, nn.Identity())
    half = f.half()
    assert fast_norm.choose("measured", f, f, norm.omega, norm.weight, 1.0) is None  # 1 / (1 - p)
    assert fast_norm.choose("measured", half, half, norm.omega.half(), norm.weight.half(), 0.0) is None
    assert fast_norm.choose("measured", f, half, norm.omega, norm.weight, 0.0) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast_norm.few_passes(f, f, norm.omega, norm.weight, norm.bias, 1e-5, 0.1).dtype == norm((f, f)).dtype
    norm.__class__ = FastOmegaLayerNorm
    traced = torch.jit.trace(norm, ((f, f),))
    assert "layer_norm" in str(traced.graph) and "PythonOp" not in str(traced.graph)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fast_norm._kernel(torch.device("cpu"), (torch.complex64,) * 4, 6, 6, 0.0) is None
    assert caplog.text.count("computed eagerly") == 1


def test_dropout_that_stays_on_in_evaluation():
    """fairseq's --retain-dropout."""
    dropout = FairseqDropout(0.5, module_name="here")
    norm = norm_with_values(33, dropout).eval()
    f, x = torch.randn(2, 4, 7, 33, dtype=torch.float64)
    without = gradients(norm, f, x, "measured")[0]
    dropout.apply_during_inference = True
    got, expected = (gradients(norm, f, x, fast) for fast in ("measured", "off"))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[0], without)


def test_switch_on_a_gpu(monkeypatch):
    """The kernels where all is asked for, and with "measured" where they were measured; one line where they cannot."""

    class OnGpu(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:7")  # of which no name is known yet

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fast_norm, "_kernel", lambda *_: "the kernels")
    x, norm = torch.zeros(2, 6).as_subclass(OnGpu), OmegaLayerNorm(6, nn.Identity())
    arguments = (x, x, norm.omega, norm.weight, 0.0)
    assert fast_norm.choose("all", *arguments) == "the kernels"
    assert fast_norm.choose("off", *arguments) is None
    assert fast_norm.choose("measured", *arguments) is None
    monkeypatch.setitem(MEASURED, "sub-layer", frozenset({"Some GPU"}))
    assert fast_norm.choose("measured", *arguments) == "the kernels"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fast_norm.choose("all", *arguments) is None


def test_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernel.py", "--out", str(tmp_path)])
    with pytest.raises(AdminError, match="no GPU"):
        kernel.main()
    assert not list(tmp_path.iterdir())
    small = ["--device", "cpu", "--widths", "8", "--tokens", "16", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *small])
    kernel.main()
    with open(tmp_path / "kernel.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["computed"] for row in rows] == ["stock", "eager", "fused"]
    assert rows[0]["of stock, median of rounds"] == "1.00"
    assert (tmp_path / "kernel.md").read_text().splitlines()[4] in capsys.readouterr().out
