"""The Triton kernels without a GPU: their values in Triton's interpreter, and what the compiler makes of them."""

from __future__ import annotations

import pytest
import torch
from helpers import run_alone

from admin_fairseq.fast import norm as fast_norm

triton = pytest.importorskip("triton", reason="Triton is not installed")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if VERSION < (3, 0):
    pytest.skip(f"needs Triton 3, not {triton.__version__}", allow_module_level=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same cases on the GPU")
@pytest.mark.skipif(VERSION < (3, 2), reason="3.1's interpreter takes no computed bound of arange")
def test_values_in_the_interpreter(tmp_path):
    pytest_options = ["-m", "pytest", "kernel_cases.py", "--noconftest", "-p", "no:cacheprovider", "-q"]
    run_alone(tmp_path, *pytest_options, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiles_for_a_gpu_without_spilling(tmp_path):
    """The compiler needs no GPU: 16-byte accesses, and no register in local memory, at the usual widths."""
    run_alone(tmp_path, "compile_kernels.py", TRITON_INTERPRET="0")


@pytest.mark.parametrize("fails", ["forward", "backward", "nothing"])
def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch, caplog, fails):
    """Found out with what the sub-layer has: dtypes, width, shape of omega, dropout; no random number is drawn."""
    seen = []

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f, x, omega, weight, bias, eps, p):
            seen.append(([t.dtype for t in (f, x, omega, weight)], x.shape[-1], omega.numel(), p))
            torch.rand(())
            if fails == "forward":
                raise RuntimeError("no compiler\nand more")
            return x + f

        @staticmethod
        def backward(ctx, dy):
            if fails == "backward":
                raise RuntimeError("no compiler\nand more")
            return dy.half(), dy, dy[0], dy[0], dy[0], None, None

    monkeypatch.setattr("admin_fairseq.fast.kernels.omega_layer_norm", Kernel.apply)
    fast_norm._say.cache_clear()
    dtypes = (torch.float16, torch.float32, torch.float32, torch.float32)
    state = torch.get_rng_state()
    with torch.no_grad(), caplog.at_level("WARNING"):
        chosen = fast_norm._kernel.__wrapped__(torch.device("cpu"), dtypes, 48, 48, 0.1)
    assert seen == [(list(dtypes), 48, 48, 0.1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert (chosen is None) == (fails != "nothing")
    assert ("cannot run here (no compiler): sub-layers are computed eagerly" in caplog.text) == (chosen is None)
