"""How much a small change of all weights changes the output of a stack, by the number N of its sub-layers.

    |F(x, W) - F(x, W*)|^2,   summed over the dimensions and averaged over the token positions of a batch

F is the stack of the first N sub-layers, in Pre-LN with the LayerNorm behind them; x is fixed. W* is W plus Gaussian
noise of a given share of each weight tensor's own standard deviation, or W after one update of Adam. Only the stack's
own weights change. Tensors that start constant (biases at 0, gains and omega) have no standard deviation and get no
noise.

In eval mode a stack's first layers compute what they would on their own, and a sub-layer's omega depends on earlier
ones only. So all N come from two passes through one deep stack, layer by layer.

Source: Liu et al. 2020, Theorem 2 and Corollaries 1 and 2 (Post-LN grows as N, Pre-LN and Admin as log N), figure 4.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationTask
from torch import Tensor, nn
from tqdm import tqdm

from admin_fairseq.analysis.figures import MARKERS, Page, pyplot, style, write
from admin_fairseq.analysis.probe import norms_of
from admin_fairseq.analysis.subject import (
    DEFAULT_ARCHS,
    check_layers,
    configure,
    has_data,
    method_name,
    parse,
    subjects,
)
from admin_fairseq.errors import DATA_HINT, AdminError
from admin_fairseq.files import aligned
from admin_fairseq.model import AdminModel
from admin_fairseq.profiling import Sample, profile
from admin_fairseq.rules import RuledModel, stacks

LR = 1e-5  # of the one update; at 1e-4 Post-LN is already as far off as unrelated outputs
PER_LAYER = {"encoder": 2, "decoder": 3}
AUTHORS = {"postln": "2,150 to 2,200", "preln": "165", "admin": "155"}  # read off their figure, at N = 200
SENTENCES, LENGTH, WORDS = 4, 32, 1000  # of the random batch
DRAWS = 3  # of noise, for a stack: in Post-LN one differs from another by a third


@dataclass
class Case:
    """A model of which one stack is measured, on a batch of fairseq's; ``name`` is its method, and when."""

    name: str
    stack: str
    model: nn.Module
    criterion: nn.Module
    batch: dict[str, Any]

    @property
    def module(self) -> nn.Module:
        return stacks(self.model)[self.stack]

    def outputs(self) -> list[Tensor]:
        """F of the first 1, 2, ... layers: (positions, d) each, without padding."""
        taken: list[Tensor] = []
        sample = Sample(self.batch["net_input"])
        keep = sample.tokens(self.stack).ne(self.module.padding_idx).t()
        norm = self.module.layer_norm or nn.Identity()

        def take(_: nn.Module, __: Any, out: Any) -> None:
            taken.append(norm(out[0] if isinstance(out, tuple) else out)[keep])

        with contextlib.ExitStack() as undo, torch.no_grad():
            for layer in self.module.layers.children():
                undo.callback(layer.register_forward_hook(take).remove)
            self.model(**sample.net_input, features_only=True)
        return taken


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """|F - F*|^2, summed over dimensions and averaged over positions, of each pair."""
    return [(one - two).double().square().sum(-1).mean().item() for one, two in zip(before, after)]


def by_noise(case: Case, share: float, seed: int) -> list[float]:
    """The change by depth, layer by layer, under Gaussian noise of ``share`` of each weight tensor's deviation."""
    before = case.outputs()
    with _kept(case.module.layers) as weights, torch.no_grad():
        generator = torch.Generator(weights[0].device).manual_seed(seed)
        for weight in weights:
            noise = torch.empty_like(weight).normal_(generator=generator)
            weight.add_(noise, alpha=share * weight.std(unbiased=False).item())
        return change(before, case.outputs())


def by_update(case: Case, layers: int, lr: float) -> float:
    """The change of the stack cut to its first layers by one update of Adam, from this batch's loss."""
    module, everything = case.module, case.module.layers
    module.layers = nn.ModuleList(list(everything.children())[:layers])
    try:
        before = case.outputs()[-1:]
        case.model.zero_grad(set_to_none=True)
        case.criterion(case.model, case.batch)[0].backward()
        with _kept(module.layers) as weights:
            for weight in weights:  # one by one: no more than one weight's moments need memory
                torch.optim.Adam([weight], lr=lr, betas=(0.9, 0.98)).step()
                weight.grad = None
            return change(before, case.outputs()[-1:])[0]
    finally:
        module.layers = everything
        case.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """A module's trainable weights, put back afterwards."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    copies = [weight.detach().clone() for weight in weights]
    try:
        yield weights
    finally:
        with torch.no_grad():
            for weight, copied in zip(weights, copies):
                weight.copy_(copied)


def fits(depths: Sequence[int], changes: Sequence[float]) -> dict[str, Any]:
    """Least squares: a + b N, a + b log N, a log(1 + c N), with R^2 (1 - residual / total sum of squares) of each.

    None where two parameters fit everything: fewer than three points, or no variation.
    """
    n, y = np.array(depths, dtype=float), np.array(changes)
    if len(y) < 3 or not y.var() > 0:
        return {"r2_linear": None, "r2_log": None, "r2_log1p": None, "fits": {}}

    def solve(columns: list[np.ndarray]) -> tuple[list[float], float]:
        matrix = np.stack(columns, axis=1)
        solution = np.linalg.lstsq(matrix, y, rcond=None)[0]
        return solution.tolist(), float(1 - np.square(y - matrix @ solution).sum() / np.square(y - y.mean()).sum())

    linear, r2_linear = solve([np.ones_like(n), n])
    log, r2_log = solve([np.ones_like(n), np.log(n)])
    scales = {c: solve([np.log1p(c * n)]) for c in np.geomspace(1e-5, 1e3, 801).tolist()}
    c = max(scales, key=lambda c: scales[c][1])
    return {
        **{"r2_linear": r2_linear, "r2_log": r2_log, "r2_log1p": scales[c][1]},
        "fits": {"linear": linear, "log": log, "log1p": [scales[c][0][0], c]},
    }


def random_case(arch: str, stack: str, seed: int, args: argparse.Namespace) -> Case:
    """A deep stack of an architecture, on sentences of random words; the other stack has one layer.

    Raises:
        AdminError: fairseq knows no such architecture or option.
    """
    other = "decoder" if stack == "encoder" else "encoder"
    depth = [f"--{stack}-layers", str(args.sub_layers // PER_LAYER[stack]), f"--{other}-layers", "1"]
    try:
        options = parse(arch, ["no-data", "--share-all-embeddings", *args.rest, *depth])
    except AdminError as error:
        parse(arch, ["no-data", *args.rest])  # fails if the mistake is the user's own
        raise AdminError(f"--arch {arch} cannot read random words: give DATA, in front ({DATA_HINT})") from error
    seed += options.seed - 1  # stacks are numbered from the user's --seed, by default 1
    cfg = configure(argparse.Namespace(**{**vars(options), "seed": seed}))
    words = Dictionary()
    for number in range(WORDS - len(words)):
        words.add_symbol(f"word{number}")
    utils.set_torch_seed(seed)
    task = TranslationTask(cfg.task, words, words)
    model = task.build_model(cfg.model)
    check_layers(model)
    device = "cuda" if torch.cuda.is_available() and not cfg.common.cpu else "cpu"
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(words.nspecial, len(words), (3, SENTENCES, LENGTH), generator=generator).to(device)
    lengths = torch.full((SENTENCES,), LENGTH, device=device)
    net_input = {"src_tokens": draw[0], "src_lengths": lengths, "prev_output_tokens": draw[1]}
    batch = {"net_input": net_input, "target": draw[2], "ntokens": draw[2].numel()}
    model = model.to(device)
    if isinstance(model, AdminModel) and model.omega_source == "unset":
        profile(model, [Sample(net_input, seed=seed)])
    return Case(method_name(arch), stack, model.eval(), task.build_criterion(cfg.criterion), batch)


def is_given(args: argparse.Namespace) -> bool:
    """Whether the command line names models or data of its own; without, deep stacks read random words."""
    return bool(args.path) or has_data(args.rest)


def check_depth(model: nn.Module) -> None:
    """Raises:
    AdminError: the model's start depends on its depth, so the first layers of a deep stack are not a shallow one.
    """
    name = model.depth_dependent_start() if isinstance(model, RuledModel) else None
    if name:
        raise AdminError(f"{name}: its start depends on the depth, a deep stack's first layers are no shallow one")


def cases(args: argparse.Namespace) -> Iterator[tuple[Case, list[int]]]:
    """What to measure, each with the seeds of its noise: of one model many, of each random stack a few."""
    if is_given(args):
        seeds = list(range(1, DRAWS * args.seeds + 1))
        models = subjects(args.path, args.arch, args.rest)
        count = 2 * len(args.path) or len(args.arch or DEFAULT_ARCHS)
        for subject in tqdm(models, desc="amplification", total=count, unit="model", delay=3):
            name = subject.label if args.path else subject.method
            batches = subject.trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=True)
            batch, _ = subject.trainer._prepare_sample(next(batches))
            for stack in stacks(subject.model):
                yield Case(name, stack, subject.model.eval(), subject.trainer.criterion, batch), seeds
    else:
        drawn = list(itertools.product(args.arch or DEFAULT_ARCHS, PER_LAYER, range(1, args.seeds + 1)))
        for arch, stack, seed in tqdm(drawn, desc="amplification", unit="stack", delay=3):
            yield random_case(arch, stack, seed, args), [DRAWS * seed + draw for draw in range(DRAWS)]


def main(args: argparse.Namespace) -> None:
    """``admin-fairseq analyze amplification``.

    Raises:
        AdminError: bad input.
    """
    if args.seeds < 1 or args.sub_layers < 6 or not args.noise > 0:
        raise AdminError("--seeds must be at least 1, --sub-layers at least 6, and --noise positive")
    noise: dict[tuple[str, str], list[list[float]]] = {}
    updates: dict[tuple[str, str], dict[int, float]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for case, seeds in cases(args):
        check_depth(case.model)
        key = (case.name, case.stack)
        noise.setdefault(key, []).extend(by_noise(case, args.noise, seed) for seed in _shown(seeds, case, "noise"))
        if key not in updates:
            deepest = len(list(case.module.layers.children()))
            per_layer = len(norms_of(case.module.layers[0]))
            updates[key] = {n * per_layer: by_update(case, n, LR) for n in _shown(_few(deepest), case, "updates")}
        sizes[case.stack] = {"width": case.module.layers[0].embed_dim, "positions": _positions(case)}
    settings = {"noise": args.noise, "lr": LR, "seeds": args.seeds, "draws": DRAWS, "options": args.rest}
    data = {"settings": {**settings, "stacks": sizes, "random_words": not is_given(args)}}
    for (name, stack), runs in noise.items():
        per_layer = min(updates[name, stack])
        points = [[n * per_layer, float(np.mean([r[n - 1] for r in runs]))] for n in range(1, len(runs[0]) + 1)]
        entry = {
            **{"points": points, "deepest": [r[-1] for r in runs]},
            **fits(*zip(*points)),
            "update": {
                "points": sorted(updates[name, stack].items()),
                **fits(*zip(*sorted(updates[name, stack].items()))),
            },
        }
        data.setdefault(name, {}).update(entry if stack == "encoder" else {stack: entry})
    rows = [
        {"method": name, "stack": stack, "kind": kind, "sub_layers": n, "change": value}
        for name, stack, entry in _entries(data)
        for kind, points in (("noise", entry["points"]), ("update", entry["update"]["points"]))
        for n, value in points
    ]
    print(aligned(_table(data)), end="")
    write(args.out, "amplification", data, rows, page(data), args.format)


def _shown(work: list[int], case: Case, what: str) -> Iterable[int]:
    """With progress of its own, since a deep stack alone may take minutes."""
    return tqdm(work, desc=f"{case.name} {case.stack}, {what}", leave=False, delay=3)


def _positions(case: Case) -> int:
    return int(Sample(case.batch["net_input"]).tokens(case.stack).ne(case.module.padding_idx).sum())


def _few(layers: int) -> list[int]:
    """Fewer depths, because each update takes passes of its own."""
    return sorted({max(round(layers * part), 1) for part in (0.01, 0.03, 0.06, 0.12, 0.24, 0.5, 1)})


def _entries(data: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(method, stack, what was measured) of amplification.json."""
    found = []
    for name, entry in data.items():
        if name not in ("settings", "page"):
            found += [(name, "encoder", entry)] if "points" in entry else []
            found += [(name, "decoder", entry["decoder"])] if "decoder" in entry else []
    return found


def _table(data: dict[str, Any]) -> list[list[str]]:
    rows = [["method", "stack", "N", "change", "R2 a+bN", "R2 a+b log N", "R2 a log(1+cN)"]]
    for name, stack, entry in _entries(data):
        n, value = entry["points"][-1]
        r2 = [f"{entry[key]:.3f}" if entry[key] is not None else "" for key in ("r2_linear", "r2_log", "r2_log1p")]
        rows.append([name, stack, str(n), f"{value:.3g}", *r2])
    return rows


def page(data: dict[str, Any]) -> Page:
    """The figures, and what a reader should know of them."""
    settings = data["settings"]
    text = [
        f"All weights of a stack change a little, by Gaussian noise of {settings['noise']:.1%} of each weight tensor's"
        " standard deviation, and the figure shows how far its output moves: the squared distance, summed over the"
        f" dimensions, averaged over token positions and {settings['seeds']} x {settings['draws']} draws. A straight"
        " line on the left means growth as N; on the right, where N is logarithmic, growth as log N; that panel has the"
        " scale of the slow curves, and Post-LN leaves it.",
        "The paper predicts N for Post-LN, and log N for Pre-LN and Admin, log(1 + cN) more exactly. R2 says which part"
        " of the variation over all depths the fit explains.",
        f"The last figure shows the same after one real update by Adam at learning rate {settings['lr']:g}, from the"
        " loss of this batch. Adam's first update moves every weight that has a gradient by the learning rate.",
    ]
    ends = {name: entry["points"][-1] for name, stack, entry in _entries(data) if stack == "encoder"}
    last = {name: change for name, (_, change) in ends.items()}
    tables = [("Fits, under noise", _table(data))]
    is_theirs = settings["random_words"] and settings["noise"] == 0.02 and {n for n, _ in ends.values()} == {200}
    if is_theirs and settings["stacks"]["encoder"]["width"] == 512 and {"postln", "preln", "admin"} <= set(last):
        rows = [["encoder, N = 200", "authors' figure (sum)", "ours (a position)", "positions for their sum"]]
        middle = {"postln": 2175, "preln": 165, "admin": 155}
        rows += [[n, AUTHORS[n], f"{last[n]:.3g}", f"{middle[n] / last[n]:.0f}"] for n in middle]
        ours, theirs = last["postln"] / last["preln"], middle["postln"] / middle["preln"]
        rows.append(["postln / preln", f"{theirs:.1f}", f"{ours:.1f}", ""])
        tables.append(("Beside the authors' figure, whose sum runs over all positions of their batch", rows))
    figures = [
        (
            "_noise",
            _figure(data, lambda entry: entry["points"]),
            "Output change under noise, by depth; the right panel has a scale of its own.",
        ),
        (
            "_update",
            _figure(data, lambda entry: entry["update"]["points"]),
            "Output change after one update of Adam; the right panel has a scale of its own.",
        ),
    ]
    return Page("Amplification", text, figures, tables)


def _figure(data: dict[str, Any], points: Any) -> Any:
    plt = pyplot()
    entries = _entries(data)
    names = list(dict.fromkeys(stack for _, stack, _ in entries))
    methods = list(dict.fromkeys(name for name, _, _ in entries))
    figure, axes = plt.subplots(len(names), 2, figsize=(7.6, 0.5 + 3 * len(names)), squeeze=False)
    for i, stack in enumerate(names):
        for axis, is_log in zip(axes[i], (False, True)):
            for name, own, entry in entries:
                if own == stack:
                    n, y = zip(*points(entry))
                    number = methods.index(name)
                    marker = {"marker": MARKERS[number % len(MARKERS)], "markevery": _marks(n)}
                    axis.plot(n, y, label=name, **style(number), **marker)
            axis.set_xlabel(f"N, {stack} sub-layers" + (" (logarithmic)" if is_log else ""))
            axis.set_ylim(0, None)
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
            if is_log:
                deepest = max(n for _, own, entry in entries if own == stack for n, _ in points(entry))
                axis.set_xscale("log", subs=[])
                axis.set_xticks([n for n in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if n <= deepest])
                axis.xaxis.set_major_formatter("{x:g}")
        if len(methods) > 1:  # the slow ones, which the left panel shows at its foot
            flat = [max(y for _, y in points(entry)) for _, own, entry in entries if own == stack]
            axes[i][1].set_ylim(0, 1.1 * sorted(flat)[-2])
        axes[i][0].set_ylabel("|F(x, W) - F(x, W*)|$^2$\nper position")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _marks(n: Sequence[int]) -> list[int]:
    """Every point of a few; of many, some evenly in log N."""
    return [at - 1 for at in sorted({round(at) for at in np.geomspace(1, len(n), 10)})]
