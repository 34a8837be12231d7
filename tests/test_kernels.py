"""The Triton kernels without a GPU: their values in Triton's interpreter, and what the compiler makes of them."""

from __future__ import annotations

import pytest
import torch
from conftest import run_alone

from admin_fairseq import fused
from admin_fairseq.norm import OmegaLayerNorm

triton = pytest.importorskip("triton", reason="Triton is not installed")
if int(triton.__version__.split(".")[0]) < 3:
    pytest.skip(f"needs Triton 3, not {triton.__version__}", allow_module_level=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the same cases on the GPU")
def test_values_in_the_interpreter(tmp_path):
    pytest_options = ["-m", "pytest", "kernel_cases.py", "--noconftest", "-p", "no:cacheprovider", "-q"]
    run_alone(tmp_path, *pytest_options, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiles_for_a_gpu_without_spilling(tmp_path):
    """The compiler needs no GPU: 16-byte accesses, and no register in local memory, at the usual widths."""
    run_alone(tmp_path, "compile_kernels.py", TRITON_INTERPRET="0")


def test_switch_on_a_gpu(monkeypatch):
    """The kernels where all is asked for, and with "measured" where they were measured; one line where they cannot."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fused, "_kernel", lambda *_: "the kernels")
    x, norm = torch.zeros(2, 6).as_subclass(OnGpu), OmegaLayerNorm(6, torch.nn.Identity())
    arguments = (x, x, norm.omega, norm.weight, 0.0)
    assert fused.choose("all", *arguments) == "the kernels"
    assert fused.choose("off", *arguments) is None
    monkeypatch.setattr(fused, "MEASURED_GPUS", frozenset())
    assert fused.choose("measured", *arguments) is None
    monkeypatch.setattr(fused, "MEASURED_GPUS", frozenset({"Some GPU"}))
    assert fused.choose("measured", *arguments) == "the kernels"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fused.choose("all", *arguments) is None
