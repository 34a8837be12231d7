"""How much each sub-layer depends on its residual branch, and on every earlier one.

A stack's stream is a sum: of its input (embedding and position) and of every branch so far, each scaled by what it has
passed since: the shortcut's scale (omega) and the LayerNorms. Here each of these contributions is carried along on its
own, exactly: LayerNorm centres each, divides all by the standard deviation that the token's sum has, and multiplies by
its gain. LayerNorm's biases are one more contribution. Row i holds what the sub-layer after i reads (in Pre-LN: behind
its LayerNorm), column j how much of it is due to branch j, column 0 the input:

    beta_ij^2 = Var[contribution j] / sum of all contributions' Var

with Var over the dimensions of a token, averaged over tokens. Rows of beta^2 sum to 1, as the paper's do. Where
contributions are uncorrelated the sum is the variance of what is read; the ratio of the two is ``correlation``. The
share of a sub-layer's own branch, Var[f]/Var[x + f], is the paper's dependency and takes no decomposition.

Source: Liu et al. 2020, section 4.1, figure 6 and their code (Transformer-Clinic, --plot-variance), which averages
standard deviations over tokens: the figures here show beta, as theirs do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from admin_fairseq.analysis.figures import Page, pyplot, style, write
from admin_fairseq.analysis.probe import SubLayer, observe
from admin_fairseq.analysis.subject import AFTER, BEFORE, DEFAULT_ARCHS, subjects
from admin_fairseq.errors import AdminError
from admin_fairseq.rules import stacks

REFERENCES = [
    ["what", "the authors' figure"],
    ["Post-LN 6-6 at initialisation, diagonal of beta", "about 0.55"],
    ["Pre-LN 6-6 at initialisation, diagonal of beta", "at most 0.40 to 0.45, falling with depth"],
    ["Admin 18-18, by the paper's rule", "looks like Pre-LN at initialisation, and exceeds it after training"],
]
SHARE = "Share of each sub-layer's own branch, Var[f]/Var[x + f], by layer and kind of sub-layer."
PALETTE = "viridis"  # even in lightness: it reads the same in grey and for colour-blind readers


def residual_dependency(model: nn.Module, sample: Any, positions: int) -> dict[str, dict[str, Any]]:
    """By stack: names, share, beta2 (a row a sub-layer), bias and correlation, as the module's docstring says.

    The map is computed on ``positions`` token positions spread evenly over the batch, the shares on all.

    Raises:
        AdminError: the method has paths across sub-layers.
    """
    seen: dict[str, list[SubLayer]] = {}
    result: dict[str, dict[str, Any]] = {}

    def collect(sub_layer: SubLayer) -> None:
        stack = result.setdefault(sub_layer.stack, {"sub_layers": [], "share": [], "branch": [], "sum": []})
        _, branch, total = sub_layer.variances()
        stack["sub_layers"].append(f"{sub_layer.layer} {sub_layer.name}")
        stack["share"].append(branch / total)
        stack["branch"].append(branch)
        stack["sum"].append(total)
        count = len(sub_layer.x)
        chosen = torch.linspace(0, count - 1, min(count, positions), device=sub_layer.x.device).long()
        sub_layer.x, sub_layer.branch = sub_layer.x[chosen], sub_layer.branch[chosen]
        seen.setdefault(sub_layer.stack, []).append(sub_layer)

    observe(model, sample, collect)
    for stack, module in stacks(model).items():
        result[stack].update(dependency_map(seen[stack], module.layer_norm))
    return result


@torch.no_grad()
def dependency_map(sub_layers: list[SubLayer], final_norm: nn.Module | None) -> dict[str, Any]:
    """beta2 of a stack, its last row of the stack's output; ``final_norm`` is the one behind a Pre-LN stack."""
    parts = sub_layers[0].x[None]  # (contributions, positions, d): the input and every branch so far
    bias = torch.zeros_like(parts[0])
    result: dict[str, Any] = {"beta2": [], "bias": [], "correlation": []}
    for i, sub_layer in enumerate(tqdm(sub_layers, desc="dependency map", unit="sub-layer", delay=3, leave=False)):
        parts = torch.cat([sub_layer.scale(parts), sub_layer.branch[None]])
        bias = sub_layer.scale(bias)
        parts, bias = _normalised(sub_layer.norm_out if sub_layer.pre_ln else sub_layer.norm, parts, bias)
        last = i + 1 == len(sub_layers)
        norm = final_norm if last else sub_layers[i + 1].norm if sub_layers[i + 1].pre_ln else None
        read, read_bias = _normalised(norm, parts, bias)
        own, offset = _variance(read), _variance(read_bias[None])
        total = (own.sum() + offset.sum()).item()
        result["beta2"].append((own / total).tolist())
        result["bias"].append(offset.item() / total)
        result["correlation"].append(_variance((read.sum(0) + read_bias)[None]).item() / total)
    return result


def _normalised(norm: nn.Module | None, parts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of the sum of all parts and the bias, as it acts on each of them."""
    if norm is None or getattr(norm, "weight", None) is None:  # none at all, or an identity
        return parts, bias
    variance = (parts.sum(0) + bias).var(-1, unbiased=False, keepdim=True)
    gain = norm.weight.detach() / (variance + norm.eps).sqrt()
    parts, bias = ((part - part.mean(-1, keepdim=True)) * gain for part in (parts, bias))
    return parts, bias + norm.bias.detach()


def _variance(parts: Tensor) -> Tensor:
    """Var over the dimensions of a token, averaged over tokens: (contributions, positions, d) to (contributions)."""
    return parts.double().var(-1, unbiased=False).mean(-1)


def main(args: argparse.Namespace) -> None:
    """``admin-fairseq analyze dependency``.

    Raises:
        AdminError: bad input.
    """
    if args.positions < 1:
        raise AdminError(f"--positions must be at least 1, not {args.positions}")
    models = []
    found = subjects(args.path, args.arch, args.rest)
    count = 2 * len(args.path) or len(args.arch or DEFAULT_ARCHS)
    for subject in tqdm(found, desc="dependency", total=count, unit="model", delay=3):
        measured = residual_dependency(subject.model, subject.samples[0], args.positions)
        models.append({"method": subject.method, "when": subject.when, "stacks": measured})
    rows = [
        {
            **{"method": model["method"], "when": model["when"], "stack": stack, "number": i + 1, "sub_layer": name},
            **{"share": stats["share"][i], "beta": stats["beta2"][i][-1] ** 0.5, "var_branch": stats["branch"][i]},
            **{"var_sum": stats["sum"][i], "correlation": stats["correlation"][i]},
        }
        for model in models
        for stack, stats in model["stacks"].items()
        for i, name in enumerate(stats["sub_layers"])
    ]
    write(args.out, "dependency", {"models": models}, rows, page(models), args.format)


def page(models: list[dict[str, Any]]) -> Page:
    """The figures, and what a reader should know of them."""
    names = list(dict.fromkeys(stack for model in models for stack in model["stacks"]))
    text = [
        "Each sub-layer adds its residual branch f to a shortcut x. The share Var[f]/Var[x + f] says how much of the"
        " sum is the branch. A sub-layer with a large share passes on most of any change of its weights; one with a"
        " small share can contribute little.",
        "A heat map shows the same for all earlier branches. Row i is what the sub-layer after i reads, column j how"
        " much of it comes from branch j (column 0: embedding and position), as beta, the square root of its part of"
        " the variance; the squares of a row sum to 1. A bright diagonal means that each sub-layer leans on the one"
        " just before it. An even row means that all earlier branches count alike.",
        "Measured in eval mode, without dropout and padding, on the batch that training sees first.",
    ]
    figures = [("_share", _lines(models, names), SHARE)]
    figures += [(f"_{name}", _maps(models, name), f"beta of the {name}'s sub-layers.") for name in names]
    table = [["model", "stack", "share: first, median, last", "beta on the diagonal: first, median, last"]]
    for model in models:
        for stack, stats in model["stacks"].items():
            diagonal = [row[-1] ** 0.5 for row in stats["beta2"]]
            cells = [f"{v[0]:.2f}, {sorted(v)[len(v) // 2]:.2f}, {v[-1]:.2f}" for v in (stats["share"], diagonal)]
            table.append([f"{model['method']}, {model['when']}", stack, *cells])
    return Page(
        "Residual dependency", text, figures, [("This run", table), ("Read off the published figures", REFERENCES)]
    )


def _lines(models: list[dict[str, Any]], names: list[str]) -> Any:
    """A row a stack, a column a kind of sub-layer (they differ more than layers do), a line a model."""
    methods = list(dict.fromkeys(model["method"] for model in models))
    both = any(model["when"] == AFTER for model in models)
    stats = [stats for model in models for stats in model["stacks"].values()]
    kinds = max(([*dict.fromkeys(name.split()[1] for name in each["sub_layers"])] for each in stats), key=len)
    size = (1 + 2.4 * len(kinds), 0.9 + 2.1 * len(names))
    figure, axes = pyplot().subplots(len(names), len(kinds), figsize=size, sharey=True, squeeze=False)
    for model in models:
        look = style(methods.index(model["method"]))
        if both:
            look["linestyle"] = "-" if model["when"] == AFTER else ":"
        label = f"{model['method']}, {model['when']}" if both else model["method"]
        for stack, stats in model["stacks"].items():
            for axis, kind in zip(axes[names.index(stack)], kinds):
                found = [share for name, share in zip(stats["sub_layers"], stats["share"]) if name.split()[1] == kind]
                if found:
                    axis.plot(range(1, len(found) + 1), found, label=label, marker="o", markersize=2, **look)
                    axis.set_title(f"{stack} {kind}", fontsize=9)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
        axis.set_xlabel("layer, from the input")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for row in axes:
        row[0].set(ylabel="Var[f] / Var[x + f]", ylim=(0, None))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(handles), 3))
    return figure


def _maps(models: list[dict[str, Any]], stack: str) -> Any:
    plt = pyplot()
    models = [model for model in models if stack in model["stacks"]]
    methods = list(dict.fromkeys(model["method"] for model in models))
    whens = [when for when in (BEFORE, AFTER) if any(model["when"] == when for model in models)]
    size = (1.2 + 2.6 * len(methods), 0.5 + 2.6 * len(whens))
    figure, axes = plt.subplots(len(whens), len(methods), figsize=size, squeeze=False)
    for model in models:
        axis = axes[whens.index(model["when"])][methods.index(model["method"])]
        beta2 = model["stacks"][stack]["beta2"]
        n = len(beta2)
        grid = torch.full((n, n + 1), float("nan"))
        for i, row in enumerate(beta2):
            grid[i, : i + 2] = torch.tensor(row).sqrt()
        image = axis.imshow(grid, cmap=PALETTE, vmin=0, vmax=1, extent=(-0.5, n + 0.5, n + 0.5, 0.5))
        axis.set_title(f"{model['method']}\n{model['when']}", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("branch j (0: input)")
    for row in axes:
        row[0].set_ylabel(f"{stack} sub-layer i")
    figure.colorbar(image, ax=axes, label="beta", shrink=0.8)
    return figure
