"""Every way omega starts: the rule of the profiling pre-pass, and closed forms that need none.

    profile:   omega_1 = 1,   omega_{i+1} = sqrt(Var[omega_i * x_{i-1}] + K Var[f_i])      (next_omega)
    others:    omega_i = form(i, N), for sub-layer i = 2, ..., N of a stack                (CLOSED_FORMS)

Both count sub-layers in forward order, each stack for itself; the first omega of a stack stays 1.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from admin_fairseq.errors import AdminError
from admin_fairseq.norm import OmegaLayerNorm

ClosedForm = Callable[[int, int], float]
CLOSED_FORMS: dict[str, ClosedForm] = {}  # by their name for --admin-init
MARGIN = 16.0  # K, of a pre-pass that is told nothing else


def next_omega(shortcut_variance: float, branch_variance: float, margin: float = 1.0) -> float:
    """omega_{i+1} = sqrt(Var[omega_i * x_{i-1}] + K Var[f_i]), with the margin K.

    Behind a LayerNorm Var[x_{i-1}] is 1, so that omega_i is about sqrt(1 + K sum_{j<i} Var[f_j]). K = 1 is the paper's
    rule: omega_{i+1} is the standard deviation of what sub-layer i adds up. The sum over a stack of the branches'
    shares Var[f_i] / (omega_i^2 + Var[f_i]), which bounds how much an update changes the output (theorem 2), is then
    about ln(1 + K S) / K with S the sum of all Var[f_i]: O(log N) for N sub-layers at any K, and less at a larger one.
    Not a number where the variances' sum is not positive.
    Source: Liu et al. 2020, section 4.3, in the form of their code (Transformer-Clinic, transformer_layer.py), for
    K = 1; the margin is ours (docs/reproduction.md).
    """
    total = shortcut_variance + margin * branch_variance
    return math.sqrt(total) if total > 0 else math.nan


def register_start(name: str) -> Callable[[ClosedForm], ClosedForm]:
    """Make a closed form omega_i = form(i, N) known as ``--admin-init NAME``; its docstring's first line is the help.

    i counts the sub-layers of a stack from 1 to N. form(1, N) is never asked for: the first omega stays 1.

    Raises:
        AdminError: there is a start of this name.
    """

    def register(form: ClosedForm) -> ClosedForm:
        if name == "profile" or name in CLOSED_FORMS:
            raise AdminError(f'@register_start("{name}"): there is such a start already; choose another name')
        CLOSED_FORMS[name] = form
        return form

    return register


@register_start("logn")
def logn(i: int, n: int) -> float:
    """sqrt((N+1)/ln(N+1) - 1) for N sub-layers of a stack: its output changes by O(log N) (admin-torch)

    Source: microsoft/admin-torch, after Liu et al. 2020, corollary 2. It trains no omega by default, and sets the first
    one too.
    """
    return math.sqrt((n + 1) / math.log(n + 1) - 1)


@register_start("sqrt")
def sqrt(i: int, n: int) -> float:
    """sqrt(N): the output's change does not grow with N (admin-torch)"""
    return math.sqrt(n)


@register_start("unit")
def unit(i: int, n: int) -> float:
    """1: a plain Post-LN Transformer"""
    return 1.0


def closed_form(name: str, n: int) -> list[float]:
    """omega of every sub-layer of a stack of N.

    Raises:
        AdminError: one is not finite and positive.
    """
    omegas = [1.0, *(float(CLOSED_FORMS[name](i, n)) for i in range(2, n + 1))]
    for i, omega in enumerate(omegas, start=1):
        if not 0 < omega < math.inf:
            raise AdminError(f"--admin-init {name} gives omega {omega} for sub-layer {i} of {n}; it must be positive")
    return omegas


def depends_on_depth(form: ClosedForm) -> bool:
    """Whether a deep stack starts its first sub-layers otherwise than a shallow one does."""
    return any(form(i, 12) != form(i, 24) for i in range(2, 13))


def sub_layers(stack: nn.Module) -> dict[str, OmegaLayerNorm]:
    """The omegas' owners in forward order, by name: two an encoder layer, three a decoder layer."""
    return {name: module for name, module in stack.named_modules() if isinstance(module, OmegaLayerNorm)}


def set_omega(norms: Iterable[OmegaLayerNorm], values: Iterable[float]) -> None:
    """Fill each sub-layer's omega with one number, in forward order.

    Raises:
        AdminError: it is larger than numbers of omega's dtype are.
    """
    for norm, value in zip(norms, values):
        if value > torch.finfo(norm.omega.dtype).max:
            dtype = str(norm.omega.dtype).partition(".")[2]
            raise AdminError(f"an omega of {value:.3g} is more than {dtype} holds; take a smaller --admin-margin")
        with torch.no_grad():
            norm.omega.fill_(value)


@contextlib.contextmanager
def observed(observers: Mapping[OmegaLayerNorm, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Within, each sub-layer shows x and f to its observer before it adds them up, when omega may still be set.

    Both are (time, batch, d): the shortcut before omega, the residual branch after dropout.
    """
    try:
        for norm, observer in observers.items():
            norm.__dict__["add"] = partial(_show_and_add, norm, observer)
        yield
    finally:
        for norm in observers:
            norm.__dict__.pop("add", None)


def _show_and_add(norm: OmegaLayerNorm, observer: Callable[[Tensor, Tensor], None], x: Tensor, f: Tensor) -> Tensor:
    observer(x, f)
    return type(norm).add(norm, x, f)
