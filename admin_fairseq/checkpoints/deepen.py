"""A deeper Admin model out of a trained one, whose outputs it nearly keeps.

After each layer come copies of it, as many as the new depth asks for. A copy's sub-layers compute

    x_i = LN(omega_i * x_{i-1} + f_i(x_{i-1}))

with LayerNorm weight 1 and bias 0; those of the LayerNorm in front of the copies move behind them. So x_{i-1} is
normalised already, and x_i = x_{i-1} where f_i is nothing beside omega_i * x_{i-1}. One forward pass measures Var[f_i]
of the copies and sets

    omega_i = sqrt(n Var[f_i] / c)

for n new sub-layers in a stack, so that a new branch has about c / n of its sub-layer's variance and all of them
together about c of the stack's output. Copying trained layers is progressive stacking (Gong et al. 2019, "Efficient
Training of BERT by Progressively Stacking"); omega in proportion to the measured standard deviation is Admin's rule
(Liu et al. 2020, section 4.3).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from admin_fairseq.checkpoints.checks import Weights
from admin_fairseq.checkpoints.files import State, settings
from admin_fairseq.checkpoints.fold import STOCK, finished, model_name
from admin_fairseq.checkpoints.verify import first_batches, load_data, load_model
from admin_fairseq.errors import AdminError
from admin_fairseq.norm import OmegaLayerNorm
from admin_fairseq.omega import observed, sub_layers
from admin_fairseq.profiling import Sample

MEASURED = 200  # sentences


class Change(NamedTuple):
    """A stack's number of layers before and after, and the variance of its output's change over its output's."""

    old: int
    new: int
    share: float


def deepen(state: State, data: str, layers: dict[str, int], change: float = 0.1) -> tuple[State, dict[str, Change]]:
    """The checkpoint of a model with more layers, without optimizer state, and what it changes.

    Args:
        data: a data-bin; the first sentences of its training split are measured.
        layers: the new number of layers of "encoder" and "decoder".
        change: c above.

    Returns:
        The checkpoint, and by stack what it changes.

    Raises:
        AdminError: it is not of an Admin model, or not deeper than it.
    """
    args = settings(state)
    if model_name(args) not in STOCK:
        raise AdminError(
            f"it is of architecture {args.arch}, not of an Admin model (unfold makes one of a Post-LN model)"
        )
    if not 0 < change < 1:
        raise AdminError(f"the change must lie between 0 and 1, not be {change}")
    weights, inserted, depths = dict(state["model"]), set(), {}
    for stack in ("encoder", "decoder"):
        old = len({name.split(".")[2] for name in weights if name.startswith(f"{stack}.layers.")})
        new = old if layers.get(stack) is None else layers[stack]
        if new < old:
            raise AdminError(f"it has {old} {stack} layers, more than {new}")
        if new > old == 0:
            raise AdminError(f"it has no {stack}")
        if old == 0:
            continue
        weights, names = _copied(weights, stack, old, new)
        inserted |= names
        depths[stack] = old, new
        setattr(args, f"{stack}_layers", new)
    if not inserted:
        raise AdminError("it has as many layers already; ask for more by --encoder-layers or --decoder-layers")

    task, dataset = load_data(args, data, "train")
    before, after = (load_model(part, task) for part in (state, {"args": args, "model": weights}))
    (batch,) = first_batches(dataset, task, after, MEASURED, size=MEASURED)
    shares = _set_omega(before, after, Sample(batch["net_input"]), inserted, change)
    changes = {stack: Change(*depths[stack], share) for stack, share in shares.items()}
    omegas = {name: weight for name, weight in after.state_dict().items() if name.endswith(".omega")}
    weights = {name: omegas[name].to(weight.dtype) if name in omegas else weight for name, weight in weights.items()}
    extra = {"train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}}
    return finished({**state, "model": weights, "extra_state": extra}, args, None), changes


def _copied(weights: Weights, stack: str, old: int, new: int) -> tuple[Weights, set[str]]:
    """The weights with a stack of ``new`` layers, and the names of the new layers' norms."""
    sources = [number * old // new for number in range(new)]
    deeper = {name: weight for name, weight in weights.items() if not name.startswith(f"{stack}.layers.")}
    inserted = set()
    for number, source in enumerate(sources):
        is_copy = source in sources[:number]
        is_followed = source in sources[number + 1 :]
        for name, weight in weights.items():
            part = re.fullmatch(rf"{stack}\.layers\.{source}\.(.+)", name)
            if not part:
                continue
            norm = re.fullmatch(r"(\w+)_layer_norm\.(weight|bias)", part[1])
            ends_layer = norm is not None and norm[1] == "final"
            if norm and (is_followed if ends_layer else is_copy):
                weight = torch.full_like(weight, 1 if norm[2] == "weight" else 0)
            deeper[f"{stack}.layers.{number}.{part[1]}"] = weight
            if is_copy and norm:
                inserted.add(f"{stack}.layers.{number}.{norm[1]}_layer_norm")
    return deeper, inserted


def _set_omega(before: Any, after: Any, sample: Sample, inserted: set[str], change: float) -> dict[str, float]:
    """Set the new sub-layers' omegas on one batch; returns what that changes of each stack's output."""
    outputs: dict[tuple[nn.Module, str], Tensor] = {}

    def keep(stack: str) -> Tensor:
        return sample.tokens(stack).ne(after.stacks()[stack].padding_idx).t()  # (time, batch)

    def observe(stack: str, count: int, norm: OmegaLayerNorm, x: Tensor, f: Tensor) -> None:
        norm.omega.fill_((count * f[keep(stack)].var() / change).sqrt())

    def record(key: tuple[nn.Module, str], _module: nn.Module, _inputs: Any, x: Tensor) -> None:
        outputs[key] = x[keep(key[1])]

    observers = {}
    for name, stack in after.stacks().items():
        own = [norm for path, norm in sub_layers(stack).items() if f"{name}.{path}" in inserted]
        observers.update({norm: partial(observe, name, len(own), norm) for norm in own})
    for model in (before, after):
        for name, stack in model.stacks().items():
            list(sub_layers(stack).values())[-1].register_forward_hook(partial(record, (model, name)))
    with torch.no_grad(), observed(observers):
        for model in (before, after):
            model(**sample.net_input, features_only=True)
    return {
        name: ((outputs[after, name] - outputs[before, name]).var() / outputs[before, name].var()).item()
        for name in after.stacks()
    }
