"""Whether all is here that benchmarks/gpu.sh needs, and its data. What is missing is named in one line.

python benchmarks/ready.py DATA-BIN      (a file, not a module: the package benchmarks itself imports fairseq)
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Iterable, NoReturn

WHEELS = ("fairseq", "hydra", "omegaconf", "antlr4", "bitarray")
OTHERS = (
    "torch",
    "triton",
    "numpy",
    "regex",
    "sacrebleu",
    "sklearn",
    "tqdm",
    "packaging",
    "matplotlib",
    "pytest",
    "xdist",
)
NAMES = {"sklearn": "scikit-learn", "xdist": "pytest-xdist"}  # the others are called as they are imported


def end(what: str, command: str) -> NoReturn:
    sys.exit(f"benchmarks/gpu.sh: {what}; {command}")


def missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def check_machine(rehearsed: bool) -> None:
    others = [NAMES.get(name, name) for name in missing(OTHERS)]
    if others:
        end(f"{sys.executable} lacks {', '.join(others)}", f"pip install {' '.join(others)}")
    if missing(WHEELS):
        end(f"{', '.join(missing(WHEELS))} missing", "where there is a network: benchmarks/gpu.sh wheels")
    import torch

    if rehearsed:
        return
    if not torch.cuda.is_available():
        end(
            f"torch {torch.__version__} sees no GPU",
            "nvidia-smi shows the driver; REHEARSE=1 benchmarks/gpu.sh needs none",
        )
    if not any(map(shutil.which, [os.environ.get("CC") or "gcc", "clang"])):
        end("Triton needs a C compiler", "apt-get install gcc")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        end("Triton needs Python.h", "apt-get install python{}.{}-dev".format(*sys.version_info))
    if not shutil.which("g++"):
        print("g++ is missing: torch.compile may not run")


def check_kernels() -> None:
    import torch

    from admin_fairseq.fast.kernels import omega_layer_norm

    f, x = torch.randn(2, 3, 64, device="cuda").requires_grad_()
    omega, weight, bias = torch.randn(3, 64, device="cuda")
    try:
        omega_layer_norm(f, x, omega, weight, bias, 1e-5, 0.1).sum().backward()
    except Exception as error:
        end(
            f"Triton's kernels do not run: {' '.join(str(error).split())[-300:]}",
            "CC and ldconfig -p say what it finds",
        )


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    rehearsed = bool(os.environ.get("REHEARSE"))
    check_machine(rehearsed)
    from benchmarks.common import versions_and_hardware
    from benchmarks.speed import write_synthetic

    if not rehearsed:
        check_kernels()
    vocabulary, pairs = (200, 60) if rehearsed else (32768, 100_000)
    Path(sys.argv[1]).mkdir()
    write_synthetic(Path(sys.argv[1]), vocabulary, pairs)
    print(versions_and_hardware(rehearsed, 1, os.cpu_count() or 1))
