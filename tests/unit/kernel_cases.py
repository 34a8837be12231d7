"""What test_kernels.py runs in Triton's interpreter on a CPU, and test_gpu.py on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from admin_fairseq.fast.kernels import omega_layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scalar: bool = False) -> list[Tensor]:
    """f, x, omega, weight, bias."""
    torch.manual_seed(2)
    sizes = [shape, shape, (1,) if scalar else shape[-1:], shape[-1:], shape[-1:]]
    return [torch.randn(size, device=DEVICE, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def eager(f: Tensor, x: Tensor, omega: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x * omega + f, weight.shape, weight, bias, EPS)


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(0, 50, y.numel(), device=DEVICE).sin().view(y.shape).bfloat16()  # the same number in any dtype
    return list(torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy.to(y.dtype), retain_graph=True))


def assert_near(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    assert len(got) == len(expected)
    for number, (one, other) in enumerate(zip(got, expected)):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= bound * other.norm(), number


@pytest.mark.parametrize("width", [2, 33, 512, 1000, 8192])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_output_and_gradients(width, dtype, bound):
    """Against the equation in fp64. Width 2 is ill-conditioned: what is left of its gradients is rounding."""
    if width == 8192 and dtype != torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter is slow")
    shape = (7, 3, width) if width < 512 else (3, 1, width)
    tensors = inputs(shape, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = omega_layer_norm(*tensors, EPS, 0.0), eager(*exact)
    assert y.dtype == dtype
    assert_near([y], [expected], bound)
    assert_near(gradients(y, tensors), gradients(expected, exact), bound if width > 2 else 0.1)


def test_width_one():
    """Every deviation from the mean is 0, but for a rounding of the backward pass that 1 / sqrt(EPS) multiplies."""
    tensors = inputs((5, 1), torch.float32)
    y = omega_layer_norm(*tensors, EPS, 0.0)
    assert torch.equal(y, tensors[4].expand(5, 1))
    df, dx, domega, dweight, _ = gradients(y, tensors)
    assert all(t.abs().max() < 1e-3 for t in (df, dx, domega, dweight))


def test_more_rows_than_programs():
    """Each program of the backward goes over several tiles, the last of them not full."""
    tensors = inputs((4 * 4 * 132 * 64 + 5 if DEVICE == "cuda" else 267, 16), torch.float64)
    y, expected = omega_layer_norm(*tensors, EPS, 0.0), eager(*tensors)
    assert_near([y, *gradients(y, tensors)], [expected, *gradients(expected, tensors)], 1e-10)


@pytest.mark.parametrize("omega", ["scalar", "frozen", "alone"])
def test_what_is_trained_of_omega(omega):
    tensors = inputs((6, 33), torch.float64, scalar=omega == "scalar")
    tensors[2].requires_grad_(omega != "frozen")
    if omega == "alone":
        tensors = [t.detach().requires_grad_(number == 2) for number, t in enumerate(tensors)]
    y, expected = omega_layer_norm(*tensors, EPS, 0.0), eager(*tensors)
    assert_near(gradients(y, tensors), gradients(expected, tensors), 1e-11)


def test_gradcheck():
    assert torch.autograd.gradcheck(
        lambda *tensors: omega_layer_norm(*tensors, EPS, 0.0), inputs((2, 3), torch.float64)
    )


def test_layout_of_the_inputs():
    f, x = torch.randn(2, 9, 5, 4, device=DEVICE, dtype=torch.float64).permute(0, 3, 2, 1)
    _, _, *rest = inputs((9,), torch.float64)
    tensors = [f.requires_grad_(), x.requires_grad_(), *rest]
    y, expected = omega_layer_norm(*tensors, EPS, 0.0), eager(*tensors)
    assert_near([y, *gradients(y, tensors)], [expected, *gradients(expected, tensors)], 1e-11)
    spread = torch.autograd.grad(y.sum(), x)[0]  # its gradient is one number, expanded
    assert spread.shape == x.shape


def test_empty_batch():
    tensors = inputs((3, 0, 33), torch.float32)
    y = omega_layer_norm(*tensors, EPS, 0.1)
    assert y.shape == (3, 0, 33)
    assert not any(gradient.any() for gradient in gradients(y, tensors))


def test_dtypes_are_those_of_eager():
    """Mixed dtypes promote; under autocast the result is fp32, as autocast's layer_norm."""
    f, x, omega, weight, bias = inputs((4, 33), torch.float32)
    half = f.detach().bfloat16().requires_grad_()
    y = omega_layer_norm(half, x, omega, weight, bias, EPS, 0.0)
    df, dx = torch.autograd.grad(y.sum(), [half, x])
    assert (y.dtype, df.dtype, dx.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    lower = [t.detach().bfloat16() for t in (f, x, omega, weight, bias)]
    assert omega_layer_norm(*lower, EPS, 0.0).dtype == torch.bfloat16
    torch.set_autocast_enabled(True)
    try:
        assert omega_layer_norm(*lower, EPS, 0.0).dtype == torch.float32
    finally:
        torch.set_autocast_enabled(False)


def masks(count: int, p: float) -> Tensor:
    """Which of 64 x 250 elements a forward pass keeps, seen in the gradient of f; ``count`` passes."""
    f, x, omega, weight, bias = inputs((64, 250), torch.float32)
    kept = []
    for _ in range(count):
        y = omega_layer_norm(f, x, omega, weight, bias, EPS, p)
        kept.append(gradients(y, [f])[0] != 0)
    return torch.stack(kept).float()


def test_dropout_statistics():
    """The rate, over all and by row and column; neighbours, and passes, are independent. Bounds: 5 deviations."""
    p = 0.1
    torch.manual_seed(3)
    kept = masks(2, p)
    assert not torch.equal(kept[0], kept[1])
    centred, variance = kept - (1 - p), p * (1 - p)
    for axes in ((0, 1, 2), (0, 1), (0, 2)):
        mean = centred.mean(axes)
        assert mean.abs().max() < 5 * (variance / (kept.numel() / mean.numel())) ** 0.5
    for product in (
        centred[0] * centred[1],
        centred[:, 1:] * centred[:, :-1],
        centred[..., 1:] * centred[..., :-1],
        centred[..., 2:] * centred[..., :-2],
    ):
        assert product.mean().abs() < 5 * variance / product.numel() ** 0.5


def test_dropout_is_scaled_and_the_same_in_backward():
    """Kept elements are divided by 1 - p: the equation with the mask that backward used."""
    tensors = inputs((6, 33), torch.float64)
    y = omega_layer_norm(*tensors, EPS, 0.25)
    got = gradients(y, tensors)
    kept = got[0] != 0
    assert 0 < kept.double().mean() < 1
    f, *rest = tensors
    expected = eager(f * kept / 0.75, *rest)
    assert_near([y, *got], [expected, *gradients(expected, tensors)], 1e-11)


class SubLayer(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return omega_layer_norm(*tensors, EPS, 0.5)


def test_mask_follows_torchs_seed_and_is_replayed():
    """By fairseq's --checkpoint-activations, whose forward runs once more in backward."""
    tensors = inputs((6, 33), torch.float32)
    torch.manual_seed(5)
    first = omega_layer_norm(*tensors, EPS, 0.5)
    second = omega_layer_norm(*tensors, EPS, 0.5)
    torch.manual_seed(5)
    again = omega_layer_norm(*tensors, EPS, 0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(5)
    replayed = checkpoint_wrapper(SubLayer())(*tensors)
    torch.manual_seed(6)  # where training goes on
    assert torch.equal(first, replayed)
    assert_near(gradients(first, tensors), gradients(again, tensors), 0.0)
    replayed.backward(torch.ones_like(replayed))
    for tensor, gradient in zip(tensors, torch.autograd.grad(first, tensors, torch.ones_like(first))):
        assert torch.equal(tensor.grad, gradient)


def test_evaluation_draws_nothing():
    tensors = inputs((6, 33), torch.float32)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert not omega_layer_norm(*tensors, EPS, 0.0).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_cannot_be_differentiated():
    tensors = inputs((2, 16), torch.float32)
    y = omega_layer_norm(*tensors, EPS, 0.0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)[0].sum().backward()
