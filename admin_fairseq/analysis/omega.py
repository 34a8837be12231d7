"""omega by depth, at initialisation and through training, and the dependency that it implies.

A sub-layer sums omega * x and its branch f. Its effective dependency on the branch is the share

    Var[f] / (Var[omega * x] + Var[f])

over positions and dimensions, without padding and without dropout, measured on the first training batch. (The paper's
is Var[f] / Var[omega * x + f], which counts their correlation too: ``analyze dependency``.)

Source: Liu et al. 2020, "Understanding the Difficulty of Training Transformers", sections 4.1 and 4.3.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections import Counter
from typing import Any, Sequence

from torch import Tensor
from tqdm import tqdm

from admin_fairseq.analysis.figures import GREY, Page, pyplot, write
from admin_fairseq.analysis.probe import SubLayer, observe
from admin_fairseq.analysis.subject import configure, has_data, merged, started, subjects
from admin_fairseq.checkpoints import files, show
from admin_fairseq.errors import AdminError
from admin_fairseq.files import aligned
from admin_fairseq.model import AdminModel
from admin_fairseq.profile_file import STACKS, Profile, read_profile
from admin_fairseq.profiling import Sample

FIGURE = (
    "omega by depth, and the share that it leaves to each branch. Attention and feed-forward sub-layers take turns."
)
LINES = 6  # in a panel; more are hard to tell apart
KEYS = {"mean": "omega", "std": "std of omega over dimensions", "share": "share of the branch"}


def main(args: Namespace) -> None:
    """``admin-fairseq analyze omega``: architectures at initialisation, or a run's checkpoints.

    Raises:
        AdminError: bad input, or no model of Admin.
    """
    records = _through_training(args) if args.path else _at_initialisation(args)
    if records:
        _report(args, records)
    else:
        raise AdminError("none of these models has an omega")


def _at_initialisation(args: Namespace) -> list[dict[str, Any]]:
    records = []
    for subject in subjects([], args.arch or ["transformer_admin"], args.rest):
        if isinstance(subject.model, AdminModel):
            shares = branch_shares(subject.model, subject.samples[0])
            margin = subject.model.margin if subject.model.omega_source == "profiling" else None
            record = {"label": subject.method, "update": 0, "margin": margin}
            records.append({**record, **_with(of_model(subject.model), shares)})
    return records


def _through_training(args: Namespace) -> list[dict[str, Any]]:
    """Of each run's folder the profile and each checkpoint, by update; with DATA the checkpoints' shares too."""
    records: dict[tuple[str, int, str], dict[str, Any]] = {}  # by folder, update and, where one was named, file
    paths = [(path, os.path.isdir(given)) for given in args.path for path in _checkpoints(given)]
    for path, is_listed in tqdm(paths, "checkpoints", unit="checkpoint", delay=3):
        state, (folder, file) = files.load(path), os.path.split(path)
        omegas = of_weights(state["model"])
        update = (state.get("optimizer_history") or [{}])[-1].get("num_updates", 0)
        key = (folder, update, "" if is_listed else file)
        if not omegas or key in records:  # checkpoint_last is one of the others
            continue
        first = os.path.join(folder, "admin_profile.json")
        if (folder, 0, "") not in records and os.path.exists(first):
            profile = read_profile(first)
            records[folder, 0, ""] = {"margin": profile.margin, **of_profile(profile)}
        shares: dict[str, list[float]] = {}
        if has_data(args.rest):
            trainer, samples = started(configure(merged(files.settings(state), args.rest)), state)
            shares = branch_shares(trainer.get_model(), samples[0])
        records[key] = _with(omegas, shares)
    several = len({folder for folder, *_ in records}) > 1
    times = Counter(key[:2] for key in records)
    labels = {}
    for folder, update, file in records:
        parts = [*([folder] if several else []), *([file] if times[folder, update] > 1 and file else [])]
        labels[folder, update, file] = ", ".join([*parts, f"update {update}" if update else "at initialisation"])
    return [{"label": labels[key], "update": key[1], **record} for key, record in sorted(records.items())]


def _checkpoints(path: str) -> list[str]:
    """Of a folder, all its checkpoints.

    Raises:
        AdminError: it has none.
    """
    if not os.path.isdir(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if re.fullmatch(r"checkpoint.*\.pt", name))
    if not names:
        raise AdminError(f"{path} holds no checkpoint*.pt")
    return [os.path.join(path, name) for name in names]


def of_weights(weights: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """By stack, "mean" and "std" over dimensions of every sub-layer's omega in forward order."""
    return {
        stack: {"mean": [row["omega"] for row in rows], "std": [row["std"] for row in rows]}
        for stack, rows in show.from_weights(weights).items()
    }


def of_profile(profile: Profile) -> dict[str, dict[str, list[float]]]:
    """The same, and "share" where Var[f] is recorded."""
    result: dict[str, dict[str, list[float]]] = {}
    for stack in STACKS:
        omegas, shares = getattr(profile, stack), profile.shares(stack)
        if omegas:
            result[stack] = {"mean": omegas, "std": [0.0] * len(omegas), **({"share": shares} if shares else {})}
    return result


def of_model(model: AdminModel) -> dict[str, dict[str, list[float]]]:
    """The same of a model."""
    return of_weights(dict(model.named_parameters()))


def branch_shares(model: AdminModel, sample: Sample) -> dict[str, list[float]]:
    """By stack, the share of every sub-layer's branch as the module's docstring says."""
    shares: dict[str, list[float]] = {}

    def collect(sub_layer: SubLayer) -> None:
        shortcut, branch, _ = sub_layer.variances()
        shares.setdefault(sub_layer.stack, []).append(branch / (shortcut + branch))

    observe(model, sample, collect)
    return shares


def _with(omegas: dict[str, Any], shares: dict[str, list[float]]) -> dict[str, Any]:
    return {stack: {**each, **({"share": shares[stack]} if stack in shares else {})} for stack, each in omegas.items()}


def _report(args: Namespace, records: list[dict[str, Any]]) -> None:
    names = [stack for stack in STACKS if any(stack in record for record in records)]
    heads = [f"{stack} {what}" for stack in names for what in ("omega, first to last", "mean share of branches")]
    table = [["", "margin", *heads]]
    for record in records:
        row = [record["label"], f"{record['margin']:g}" if record.get("margin") else ""]
        for stack in names:
            mean, share = record.get(stack, {}).get("mean"), record.get(stack, {}).get("share")
            row += [f"{mean[0]:.3f} to {mean[-1]:.3f}" if mean else ""]
            row += [f"{sum(share) / len(share):.3f}" if share else ""]
        table.append(row)
    print(aligned(table), end="")
    text = [
        "omega by sub-layer: its mean over dimensions and, once trained, its standard deviation over them. The share of"
        " a sub-layer's branch is Var[f] / (Var[omega x] + Var[f]): how much of what the sub-layer passes on is new. At"
        " omega 1 it is that of Post-LN."
        + (" Give DATA, as to fairseq-train, for the shares of checkpoints." if not has_data(args.rest) else "")
    ]
    page = Page("omega", text, [("", _figure(records, names), FIGURE)], [("omega", table)])
    lines = []
    for record in records:
        for stack in (stack for stack in names if stack in record):
            for number in range(len(record[stack]["mean"])):
                line = {"label": record["label"], "update": record["update"], "stack": stack, "sub_layer": number + 1}
                lines.append({**line, **{key: values[number] for key, values in record[stack].items()}})
    write(args.out, "omega", {"records": records}, lines, page, args.format)


def _figure(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Any:
    """A row each for omega, its spread and the share; a column a stack; a line a record, later ones lighter."""
    keys = [key for key in KEYS if any(any(r.get(stack, {}).get(key, [])) for r in records for stack in names)]
    size = (3.6 * len(names) + 0.4, 2.1 * len(keys) + 0.4)
    figure, panels = pyplot().subplots(len(keys), len(names), figsize=size, sharex="col", sharey="row", squeeze=False)
    count = min(LINES, len(records))
    chosen = [records[round(n * (len(records) - 1) / max(count - 1, 1))] for n in range(count)]
    colours = pyplot().get_cmap("viridis")
    for row, key in enumerate(keys):
        for column, stack in enumerate(names):
            axes = panels[row][column]
            for number, record in enumerate(chosen):
                values = record.get(stack, {}).get(key)
                if values:
                    look = {"color": colours(0.85 * number / max(count - 1, 1)), "marker": "osv^DP"[number]}
                    axes.plot(range(1, len(values) + 1), values, label=record["label"], markersize=2.5, **look)
            if key == "mean":
                axes.axhline(1, **GREY)
                axes.set_title(stack)
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[row][0].set_ylim(bottom=0)  # once both panels, which share it, are drawn
        panels[row][0].set_ylabel(KEYS[key], fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("sub-layer")
    panels[0][0].legend(fontsize=7)
    return figure
