import torch
from helpers import norm_with_values
from torch import nn

from admin_fairseq.norm import OmegaLayerNorm


def test_equation():
    """x_i = LN(omega * x + f), written out."""
    norm = norm_with_values()
    f, x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    b = norm.omega * x + f
    mean = b.mean(-1, keepdim=True)
    deviation = ((b - mean) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(norm((f, x)), norm.weight * (b - mean) / deviation + norm.bias)


def test_dropout_is_on_the_branch_only():
    norm = norm_with_values(dropout=nn.Dropout(1.0))
    f, x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(norm((f, x)), norm((torch.zeros_like(f), x)))
    norm.eval()
    assert not torch.equal(norm((f, x)), norm((torch.zeros_like(f), x)))


def test_gradients_reach_every_parameter():
    norm = norm_with_values()
    f, x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)

    def call(f, x, omega, weight, bias):
        return torch.func.functional_call(norm, {"omega": omega, "weight": weight, "bias": bias}, ((f, x),))

    if hasattr(torch, "func"):
        assert torch.autograd.gradcheck(call, (f, x, norm.omega, norm.weight, norm.bias))


def test_starts_as_stock_layer_norm_without_drawing_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    norm = OmegaLayerNorm(6, nn.Identity())
    assert torch.equal(torch.rand(3), expected)
    f, x = torch.randn(2, 5, 6)
    assert torch.equal(norm((f, x)), nn.LayerNorm(6)(x + f))
