"""What only a GPU shows. Skipped without one; run ``pytest tests/commands/test_gpu.py`` wherever there is one.

With REHEARSE=1 they run on a CPU, as far as they can: three minutes that show whether the tests themselves are right.
"""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, TRAIN, checkpoint, profile_in, run, run_alone
from two_workers import Group

REHEARSED = bool(os.environ.get("REHEARSE")) and not torch.cuda.is_available()  # on the CPU: do the tests run?
pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not REHEARSED, reason="needs a GPU")
not_rehearsed = pytest.mark.skipif(REHEARSED, reason="needs a GPU")

# fairseq's flat gradients ask for a GPU
ON_GPU = [*TRAIN, "--fp16-no-flatten-grads"] if REHEARSED else [flag for flag in TRAIN if flag != "--cpu"]


def train(data, save_dir, *arguments, updates=3):
    return run(
        *("fairseq-train", data, "--arch", "transformer_admin", "--save-dir", save_dir),
        *(*TINY, *ON_GPU, "--max-update", updates, *arguments),
    )


def means(path):
    return [w.float().mean().item() for name, w in checkpoint(path)["model"].items() if name.endswith(".omega")]


def profiled(folder):
    profile = profile_in(folder)
    return profile, profile["encoder"] + profile["decoder"]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("", "float32"),
        ("--fp16", "float16"),
        ("--fp16 --fp16-no-flatten-grads", "float16"),
        ("--memory-efficient-fp16", "float16"),
        ("--amp", "float32"),
        ("--bf16", "bfloat16"),
        ("--memory-efficient-bf16", "bfloat16"),
    ],
)
def test_precision(data, tmp_path, flags, dtype):
    """omega survives the first updates in every precision, so no master copy was made before it was set."""
    result = train(data, tmp_path, *flags.split(), "--fp16-init-scale", "4")
    assert result.code == 0, result.output
    assert "NVIDIA" in result.output or "CUDA" in result.output or REHEARSED
    profile, omegas = profiled(tmp_path)
    assert profile["settings"]["dtype"] == dtype
    assert means(tmp_path / "checkpoint_last.pt") == pytest.approx(omegas, abs=0.02)
    assert all(math.isfinite(float(loss.split()[0])) for loss in result.losses().values())
    reference = train(data, tmp_path / "cpu", "--cpu", updates=1)
    assert reference.code == 0, reference.output
    assert omegas == pytest.approx(profiled(tmp_path / "cpu")[1], rel=0.03)  # other dropout masks


def test_cuda_random_state_is_left_alone(data, tmp_path):
    """A run that reads its omega from a file draws the same dropout masks as the one that profiled."""
    first = train(data, tmp_path / "first", "--dropout", "0.3")
    second = train(
        data, tmp_path / "second", "--dropout", "0.3", "--admin-profile", tmp_path / "first/admin_profile.json"
    )
    assert (first.code, second.code) == (0, 0), second.output
    assert first.losses() == second.losses()


@pytest.mark.parametrize("flags", ["", "--bf16", "--fp16"])
def test_fast_computations_are_the_plain_ones(data, tmp_path, flags):
    """To rounding, all at once."""
    losses = {}
    for fast in ("off", "all"):
        result = train(data, tmp_path / fast, "--dropout", "0", "--admin-fast", fast, *flags.split(), updates=5)
        assert result.code == 0, result.output
        assert "fairseq's own Adam is used" not in result.output
        assert "the loss cannot be compiled" not in result.output or REHEARSED
        losses[fast] = [float(loss.split()[0]) for loss in result.losses().values()]
    assert losses["all"] == pytest.approx(losses["off"], rel=1e-4 if not flags else 1e-2)


def test_two_workers_on_one_gpu(data, tmp_path):
    """gloo, since nccl wants a GPU a worker: the model is on its device only once fairseq has wrapped it."""
    options = ["--ddp-backend", "legacy_ddp", "--dropout", "0.3", "--max-update", "2", "--device-id", "0"]
    with Group("separate", data, tmp_path / "two", *options, on_gpu=True) as group:
        group.finish()
    first, second = group.omegas()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = train(data, tmp_path / "one", "--admin-profile-batches", "2", "--dropout", "0.3", updates=1)
    assert one.code == 0, one.output
    assert profiled(tmp_path / "two" / "0")[1] == pytest.approx(profiled(tmp_path / "one")[1], rel=1e-5)


@not_rehearsed
def test_kernels(tmp_path):
    """The cases that test_kernels.py interprets on a CPU."""
    pytest.importorskip("triton")
    options = ["-m", "pytest", "kernel_cases.py", "--noconftest", "-p", "no:cacheprovider", "-q"]
    run_alone(tmp_path, *options, TRITON_INTERPRET="0")


@not_rehearsed
def test_kernels_beyond_2_31_elements():
    """Offsets need 64 bits; the last rows show it. Uses 26 GB."""
    kernels = pytest.importorskip("admin_fairseq.fast.kernels")
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    torch.manual_seed(1)
    shape = (2**21 + 8, 1024)
    f, x = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    omega, weight, bias = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    y = kernels.omega_layer_norm(f, x, omega, weight, bias, 1e-5, 0.0)
    y.backward(f.detach())
    tail = [t[-16:].detach().double().requires_grad_() for t in (f, x)]
    expected = F.layer_norm(tail[1] * omega + tail[0], (1024,), weight.double(), bias.double(), 1e-5)
    expected.backward(tail[0].detach())
    for got, other in ((y, expected), (f.grad, tail[0].grad), (x.grad, tail[1].grad)):
        assert (got[-16:].double() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("flags", ["", "--fp16", "--amp", "--bf16", "--checkpoint-activations"])
def test_training_with_kernels(data, tmp_path, flags):
    """--admin-fast all trains as eager does; without dropout, whose masks are others."""
    pytest.importorskip("triton")
    losses = []
    for fast in ("all", "off"):
        options = [*flags.split(), "--dropout", "0", "--admin-init", "logn", "--no-save", "--admin-fast", fast]
        result = train(data, tmp_path / fast, *options, "--fp16-init-scale", "4")
        assert result.code == 0 and "computed eagerly" not in result.output, result.output
        losses.append([float(loss.split()[0]) for loss in result.losses().values()])
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if flags else 1e-3)


@pytest.mark.slow
def test_loss_scale_holds_at_60_12(data, tmp_path):
    result = train(
        *(data, tmp_path, "--fp16", "--encoder-layers", "60", "--decoder-layers", "12", "--encoder-embed-dim", "512"),
        *("--encoder-ffn-embed-dim", "2048", "--lr", "1e-3", "--warmup-updates", "200", "--no-save"),
        updates=200,
    )
    assert result.code == 0, result.output
    scales = [float(json.loads(line[line.index("{") :])["loss_scale"]) for line in result.lines("train_inner")]
    assert min(scales) >= 1
    assert math.isfinite(float(result.losses()[200].split()[0]))
