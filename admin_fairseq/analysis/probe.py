"""Every sub-layer of any of fairseq's Transformers in one forward pass: what its shortcut and its branch add up to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn

from admin_fairseq.errors import AdminError
from admin_fairseq.norm import OmegaLayerNorm
from admin_fairseq.omega import observed
from admin_fairseq.profile_file import sub_layer_name
from admin_fairseq.profiling import Sample
from admin_fairseq.rules import stacks


@dataclass
class SubLayer:
    """A sub-layer and what passed through it.

    The sum that it computes is ``scale(x)`` + ``branch``; ``norm`` follows it (``pre_ln`` False) or stands in front of
    the branch, and then ``norm_out`` may follow. ``x`` and ``branch`` are (positions, d), without padding and dropout.
    """

    stack: str
    layer: int
    name: str
    norm: nn.Module
    pre_ln: bool
    scale: Callable[[Tensor], Tensor]
    x: Tensor
    branch: Tensor
    norm_out: nn.Module | None = None

    def variances(self) -> tuple[float, float, float]:
        """(Var[shortcut], Var[branch], Var[their sum]), over all positions and dimensions."""
        shortcut, branch = self.scale(self.x).double(), self.branch.double()
        return tuple(part.var(unbiased=False).item() for part in (shortcut, branch, shortcut + branch))


def norms_of(layer: nn.Module) -> dict[str, nn.Module]:
    """A layer's sub-layers in forward order, "self_attn", "encoder_attn" and "ffn", with their LayerNorms."""
    return {sub_layer_name(name): norm for name, norm in layer.named_children() if name.endswith("_layer_norm")}


def observe(model: nn.Module, sample: Sample, seen: Callable[[SubLayer], None]) -> None:
    """Run the model on a batch, in eval mode and without gradients, and report each sub-layer in forward order.

    Raises:
        AdminError: the model's method has paths across sub-layers, which no sum of two parts describes.
    """
    was_training = model.training
    with contextlib.ExitStack() as undo, torch.no_grad():
        undo.callback(model.train, was_training)
        model.eval()
        for stack, module in stacks(model).items():
            keep = sample.tokens(stack).ne(module.padding_idx).t()  # (time, batch)
            for number, layer in enumerate(module.layers.children()):
                undo.enter_context(_watched(layer, partial(_report, seen, stack, number, keep)))
        model(**sample.net_input, features_only=True)


def _report(seen: Callable[[SubLayer], None], stack: str, number: int, keep: Tensor, *parts: Any) -> None:
    name, norm, pre_ln, scale, x, branch, *norm_out = parts
    seen(SubLayer(stack, number, name, norm, pre_ln, scale, x[keep], branch[keep], *norm_out))


@contextlib.contextmanager
def _watched(layer: nn.Module, report: Callable[..., None]) -> Iterator[None]:
    """``report(name, norm, pre_ln, scale, x, branch, norm_out)`` of every sub-layer of a layer.

    x and branch are (time, batch, d), norm_out the LayerNorm that a Pre-LN layer puts behind the sum, if it does.
    """
    if getattr(layer, "crosses_sub_layers", False):
        raise AdminError(
            f"{type(layer).__name__} layers have paths across sub-layers; this analysis takes methods in which each"
            " sub-layer adds a branch to its shortcut"
        )
    norms = norms_of(layer)
    if all(isinstance(norm, OmegaLayerNorm) for norm in norms.values()):
        observers = {
            norm: partial(report, name, norm, False, partial(torch.mul, norm.omega)) for name, norm in norms.items()
        }
        with observed(observers):
            yield
        return
    rule, calls = layer.residual_connection, iter(norms.items())
    add = getattr(layer, "add", rule)  # without the LayerNorm behind the sum

    def residual_connection(f: Tensor, x: Tensor) -> Tensor:
        name, norm = next(calls)

        def scale(part: Tensor) -> Tensor:
            nothing = torch.zeros_like(part)
            return add(nothing, part) - add(nothing, nothing)  # a LayerNorm on the branch has a bias

        norm_out = layer.norm_out if hasattr(layer, "add") else None
        report(name, norm, layer.normalize_before, scale, x, add(f, x) - scale(x), norm_out)
        return rule(f, x)

    layer.residual_connection = residual_connection
    try:
        yield
    finally:
        del layer.residual_connection
