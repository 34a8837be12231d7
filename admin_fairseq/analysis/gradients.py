"""Gradients and updates by sub-layer, in a real training by fairseq's own trainer, criterion and optimizers.

Gradients are those of the loss with respect to sub-layer outputs x_i, as in the paper's figure 3: what a sub-layer
hands to the next, behind its LayerNorm in Post-LN and Admin, the sum x + f in Pre-LN. Norms are over a whole batch and
relative to the largest of the network at that update. The factor of a sub-layer is the norm at its input over that at
its output: gradients vanish where it stays below 1.

Of each weight matrix W of a layer: the norm of its gradient, relative to the largest of the network, and |dW| / |W| of
one update (the paper's figure 5 takes the change over an epoch).

Source: Liu et al. 2020, "Understanding the Difficulty of Training Transformers", section 3.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from argparse import Namespace
from functools import partial
from typing import Any, Iterator, Sequence

import torch
from fairseq.trainer import Trainer
from torch import Tensor, nn
from tqdm import tqdm

from admin_fairseq.analysis.figures import Page, pyplot, style, write
from admin_fairseq.analysis.probe import norms_of
from admin_fairseq.analysis.subject import AFTER, BEFORE, DEFAULT_ARCHS, Subject, subjects
from admin_fairseq.errors import AdminError
from admin_fairseq.files import aligned
from admin_fairseq.profile_file import STACKS
from admin_fairseq.rules import stacks

MOMENTS = 4  # in a histogram; more are hard to tell apart
LEARNING_RATE = {"adam": "1e-4", "sgd": "0.1"}  # unless --lr is given


def main(args: Namespace) -> None:
    """``admin-fairseq analyze gradients``.

    Raises:
        AdminError: bad input.
    """
    if min(args.updates) < 1:
        raise AdminError(f"--updates must be at least 1, not {min(args.updates)}")
    records, last = [], max(args.updates)
    trainings = len(args.path) * (last + 1) or len(args.arch or DEFAULT_ARCHS) * last
    bar = tqdm(total=len(args.optimizers) * trainings, desc="gradients", unit="update", delay=3)
    for optimizer in args.optimizers:
        defaults = ["--lr", LEARNING_RATE[optimizer], "--num-workers", "0"]
        if not any(argument.startswith("--lr-scheduler") for argument in args.rest):
            defaults += ["--lr-scheduler", "fixed", "--warmup-updates", "0"]  # a checkpoint's warmup would go on
        rest = [*defaults, *(args.rest if optimizer == "adam" else without_adam(args.rest)), "--optimizer", optimizer]
        for subject in subjects(args.path, args.arch, rest):
            updates = sorted(set(args.updates)) if subject.when == BEFORE else [1]
            bar.set_postfix_str(f"{subject.label}, {optimizer}", refresh=False)
            records += [{"optimizer": optimizer, **record} for record in record_gradients(subject, updates, bar)]
    bar.close()
    _report(args, records)


def without_adam(rest: Sequence[str]) -> list[str]:
    """The options of a training command without those of Adam, which another optimizer's parser refuses."""
    kept, arguments = [], iter(rest)
    for argument in arguments:
        if argument in ("--adam-betas", "--adam-eps"):
            next(arguments, None)
        elif not re.match("--adam-(betas|eps)=", argument):
            kept.append(argument)
    return kept


def record_gradients(subject: Subject, updates: Sequence[int], bar: tqdm) -> list[dict[str, Any]]:
    """Train for as many updates as the last of ``updates`` says and measure at each of these.

    Returns:
        A record an update, in front of which its gradients are taken: ``outputs`` by stack, the sub-layers' names and
        relative norms of their outputs' gradients; ``matrices``, by name of the weight, ``kind``, relative ``gradient``
        and relative ``update``. It ends before an update whose gradients are not finite.
    """
    trainer, records = subject.trainer, []
    trainer.begin_epoch(1)
    batches = _batches(trainer)
    for update in range(1, updates[-1] + 1):
        bar.update()
        try:
            if update not in updates:
                trainer.train_step([next(batches)])
                continue
            with _output_gradients(subject.model) as outputs, _weight_changes(subject.model) as matrices:
                trainer.train_step([next(batches)])
        except FloatingPointError:
            bar.update(updates[-1] - update)
            break
        records.append({"method": subject.method, "when": subject.when, "update": update})
        records[-1].update(outputs=outputs, matrices=matrices)
    return records


def _batches(trainer: Trainer) -> Iterator[Any]:
    for epoch in itertools.count(1):
        yield from trainer.get_train_iterator(epoch, load_dataset=False).next_epoch_itr(shuffle=True)


@contextlib.contextmanager
def _output_gradients(model: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """In the backward pass within, fills {stack: {"sub_layers": names, "gradient": relative norms}}."""
    result: dict[str, dict[str, Any]] = {}
    norms: dict[str, list[Any]] = {}
    undo = contextlib.ExitStack()

    def watch(stack: str, number: int, x: Tensor) -> None:
        """x is the output of the sub-layer with this number, (time, batch, d)."""
        x.register_hook(lambda gradient: norms[stack].__setitem__(number, gradient.float().norm()))

    def patch(layer: nn.Module, stack: str, numbers: Iterator[int]) -> None:
        rule = layer.residual_connection

        def residual_connection(f: Tensor, x: Tensor) -> Any:
            number = next(numbers)
            if number > 0:
                watch(stack, number - 1, x)
            return rule(f, x)

        layer.residual_connection = residual_connection
        undo.callback(delattr, layer, "residual_connection")

    with undo:
        for stack, module in stacks(model).items():
            layers, names = list(module.layers.children()), []
            numbers = itertools.count()
            for number, layer in enumerate(layers):
                names += [f"{number} {kind}" for kind in norms_of(layer)]
                patch(layer, stack, numbers)
            norms[stack] = [None] * len(names)
            result[stack] = {"sub_layers": names}
            last = partial(watch, stack, len(names) - 1)
            hook = layers[-1].register_forward_hook(
                lambda _, __, out, last=last: last(out[0] if isinstance(out, tuple) else out)
            )
            undo.callback(hook.remove)
        yield result
    values = torch.stack([norm for each in norms.values() for norm in each])
    values = iter((values / values.max()).tolist())
    for stack, each in norms.items():
        result[stack]["gradient"] = [next(values) for _ in each]


@contextlib.contextmanager
def _weight_changes(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Of the update within, fills [{"name", "kind", "gradient", "update"}] for the layers' weight matrices."""
    result: list[dict[str, Any]] = []
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() > 1 and parameter.requires_grad
    }
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    yield result
    weights = {name: weight for name, weight in weights.items() if weight.grad is not None}
    gradients = torch.stack([weight.grad.float().norm() for weight in weights.values()])
    changes = torch.stack(
        [
            (weight.detach() - before[name]).float().norm() / before[name].float().norm()
            for name, weight in weights.items()
        ]
    )
    columns = (gradients / gradients.max()).tolist(), changes.tolist()
    for name, gradient, change in zip(weights, *columns):
        stack, _, _, module = name.split(".")[:4]
        kind = f"{stack} {module if module.endswith('attn') else 'ffn'}"
        result.append({"name": name, "kind": kind, "gradient": gradient, "update": change})


def factors(outputs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By kind of sub-layer, as "decoder ffn": the norm at the input over that at the output, geometric mean.

    The first sub-layer of a stack is left out: its input is no sub-layer's output.
    """
    logs: dict[str, list[float]] = {}
    for stack, values in outputs.items():
        for name, before, after in zip(values["sub_layers"][1:], values["gradient"], values["gradient"][1:]):
            if before > 0 and after > 0:
                logs.setdefault(f"{stack} {name.split()[1]}", []).append(math.log(before / after))
    return {kind: math.exp(sum(each) / len(each)) for kind, each in logs.items()}


def _report(args: Namespace, records: list[dict[str, Any]]) -> None:
    if not records:
        raise AdminError("no gradient was finite; give a smaller --lr, or --clip-norm")
    start = min(record["update"] for record in records)
    first = [r for r in records if r["update"] == start and r["optimizer"] == args.optimizers[0]]
    trained = [r for r in records if r["when"] == BEFORE]
    last = max(r["update"] for r in records)
    at_last = [r for r in records if r["update"] == last or r["when"] == AFTER]
    tables = [
        (f"Factor of the gradient's norm from a sub-layer's output to its input, update {start}", _factors(first)),
        (f"Smallest relative gradient norm, update {start}", _smallest(first)),
        ("Decades between the 5th and the 95th percentile of weight matrices", _decades(at_last)),
    ]
    for caption, rows in tables:
        print(f"{caption}\n{aligned(rows, indent='  ')}", end="")
    text = [
        "Gradients of the loss with respect to sub-layer outputs, relative to the largest in the same network, as in"
        " the paper's figure 3. There, at 18-18 and width 512, only the Post-LN decoder's vanish, in its"
        " encoder-attention sub-layers. The factor of a sub-layer is the gradient's norm at its input over that at its"
        " output, as geometric mean over the sub-layers of a kind.",
        "Relative updates |dW| / |W| are those of one update of each weight matrix in the layers. The paper finds that"
        " Adam's hardly differ between modules where gradients do, so that vanishing gradients do not explain why"
        " Post-LN is hard to train. The last table says by how many powers of ten each differ here.",
    ]
    figures = [("", _by_depth(first), f"Relative gradient norm of sub-layer outputs by depth, update {start}.")]
    by_one = [r for r in trained if r["optimizer"] == args.optimizers[0]]
    if last > start:
        figures.append(
            ("_training", _through_training(by_one), f"The same through training with {args.optimizers[0]}.")
        )
    caption = (
        "Weight matrices by module through training: relative gradient norm, and relative update by optimizer. Each"
        " histogram is scaled to its tallest bar."
    )
    figures.append(("_updates", _histograms(records), caption))
    page = Page("Gradients", text, figures, tables)
    write(args.out, "gradients", {"records": records}, list(_rows(records)), page, args.format)
    print(f"{args.out}: gradients.json, gradients.csv and {len(figures)} figures")


def _labels(records: list[dict[str, Any]]) -> list[str]:
    both = any(record["when"] == AFTER for record in records)
    return [record["method"] + (f", {record['when']}" if both else "") for record in records]


def _factors(records: list[dict[str, Any]]) -> list[list[str]]:
    found = [factors(record["outputs"]) for record in records]
    kinds = list(dict.fromkeys(kind for each in found for kind in each))
    cells = [[f"{each[kind]:.3f}" if kind in each else "" for kind in kinds] for each in found]
    return [["model", *kinds], *([label, *row] for label, row in zip(_labels(records), cells))]


def _smallest(records: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["model", *STACKS]]
    for label, record in zip(_labels(records), records):
        values = [record["outputs"].get(stack, {}).get("gradient") for stack in STACKS]
        rows.append([label, *(f"{min(each):.2g}" if each else "" for each in values)])
    return rows


def _decades(records: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["model", "optimizer", "gradient", "update"]]
    for record in records:
        logs = [torch.tensor([m[what] for m in record["matrices"]]).log10() for what in ("gradient", "update")]
        cells = []
        for each in (log[log.isfinite()] for log in logs):  # ReZero's first gradients are 0, but for its scalars
            cells.append(f"{each.quantile(0.95) - each.quantile(0.05):.2f}" if len(each) else "")
        rows.append([f"{record['method']}, {_moment(record)}", record["optimizer"], *cells])
    return rows


def _moment(record: dict[str, Any]) -> str:
    return AFTER if record["when"] == AFTER else f"update {record['update']}"


def _rows(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        head = {key: record[key] for key in ("optimizer", "method", "when", "update")}
        for stack, values in record["outputs"].items():
            for name, gradient in zip(values["sub_layers"], values["gradient"]):
                yield {**head, "of": "output", "name": f"{stack} {name}", "relative_gradient": gradient}
        for matrix in record["matrices"]:
            values = {"relative_gradient": matrix["gradient"], "relative_update": matrix["update"]}
            yield {**head, "of": "weight", "name": matrix["name"], **values}


def _by_depth(records: list[dict[str, Any]]) -> Any:
    """Panels encoder and decoder; a line a model; encoder attention marked."""
    names = list(dict.fromkeys(stack for record in records for stack in record["outputs"]))
    figure, panels = pyplot().subplots(1, len(names), figsize=(4 * len(names), 3.2), sharey=True, squeeze=False)
    for axes, stack in zip(panels[0], names):
        for number, (label, record) in enumerate(zip(_labels(records), records)):
            if stack in record["outputs"]:
                _line(axes, record["outputs"][stack], label=label, **style(number))
        axes.set_title(stack)
        axes.set_xlabel("sub-layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_yscale("log")
    panels[0][0].set_ylabel("gradient norm / largest in the network")
    panels[0][-1].plot([], [], "o", color="black", markersize=3, label="output of encoder attention")
    panels[0][-1].legend(fontsize=7)
    return figure


def _line(axes: Any, values: dict[str, Any], **look: Any) -> None:
    numbers = range(1, len(values["gradient"]) + 1)
    axes.plot(numbers, values["gradient"], **look)
    marked = [n for n, name in zip(numbers, values["sub_layers"]) if name.endswith("encoder_attn")]
    axes.plot(marked, [values["gradient"][n - 1] for n in marked], "o", color=look["color"], markersize=2.5)


def _through_training(records: list[dict[str, Any]]) -> Any:
    """A column a model, a row a stack; a line an update."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    names = list(dict.fromkeys(stack for record in records for stack in record["outputs"]))
    updates = sorted({record["update"] for record in records})
    size = (2.6 * len(methods) + 0.6, 2.2 * len(names) + 0.3)
    figure, panels = pyplot().subplots(len(names), len(methods), figsize=size, sharey=True, squeeze=False)
    for record in records:
        for row, stack in enumerate(names):
            axes = panels[row][methods.index(record["method"])]
            look = style(updates.index(record["update"]))
            if stack in record["outputs"]:
                _line(axes, record["outputs"][stack], label=f"update {record['update']}", **look)
    for row, stack in enumerate(names):
        panels[row][0].set_ylabel(f"{stack}: relative norm")
    for column, method in enumerate(methods):
        panels[0][column].set_title(method)
        panels[-1][column].set_xlabel("sub-layer")
        for axes in panels[:, column]:
            axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].set_yscale("log")
    panels[0][-1].legend(fontsize=7)
    return figure


def _histograms(records: list[dict[str, Any]]) -> Any:
    """A column a model; rows: relative gradient, then |dW| / |W| of each optimizer; a histogram a module kind.

    The first moment is filled, later ones are lines: at most MOMENTS, the last among them.
    """
    moments = list(dict.fromkeys(map(_moment, sorted(records, key=lambda r: (r["when"] == AFTER, r["update"])))))
    count = min(MOMENTS, len(moments))
    moments = [moments[round(n * (len(moments) - 1) / max(count - 1, 1))] for n in range(count)]
    looks = [{"fill": True, "color": "#cccccc"}, *({**style(number), "linewidth": 1.1} for number in range(1, count))]
    methods = list(dict.fromkeys(record["method"] for record in records))
    optimizers = list(dict.fromkeys(record["optimizer"] for record in records))
    kinds = list(dict.fromkeys(matrix["kind"] for record in records for matrix in record["matrices"]))[::-1]
    rows = [(optimizers[0], "gradient"), *((optimizer, "update") for optimizer in optimizers)]
    size = (2.4 * len(methods) + 1.4, (0.4 * len(kinds) + 0.6) * len(rows) + 0.6)
    figure, panels = pyplot().subplots(len(rows), len(methods), figsize=size, sharex="row", sharey=True, squeeze=False)
    for axes_row, (optimizer, what) in zip(panels, rows):
        chosen = [r for r in records if r["optimizer"] == optimizer and _moment(r) in moments]
        logs = [math.log10(m[what]) for record in chosen for m in record["matrices"] if m[what] > 0]
        low = math.floor(min(logs, default=-1))
        high = max(math.ceil(max(logs, default=0)), low + 1)
        edges = [low + number / 5 for number in range(5 * (high - low) + 1)]
        for record in chosen:
            axes = axes_row[methods.index(record["method"])]
            for number, kind in enumerate(kinds):
                found = [math.log10(m[what]) for m in record["matrices"] if m["kind"] == kind and m[what] > 0]
                counts = torch.histc(torch.tensor(found), len(edges) - 1, low, high)
                heights = number + 0.85 * counts / counts.max().clamp(min=1)
                heights[counts == 0] = math.nan  # no line along the base
                look = looks[moments.index(_moment(record))]
                axes.stairs(heights.tolist(), edges, baseline=number, **look)
        for axes in axes_row:
            gradient = "relative gradient norm"
            axes.set_xlabel(f"log10 of {gradient if what == 'gradient' else f'|dW| / |W|, {optimizer}'}")
            axes.set_yticks(range(len(kinds)), kinds)
    for axes, method in zip(panels[0], methods):
        axes.set_title(method)
    handles = [axes.stairs([], [0], **look) for look in looks]
    figure.legend(handles, moments, loc="outside upper center", ncols=count)
    return figure
