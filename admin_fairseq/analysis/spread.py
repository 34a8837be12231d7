"""The pre-pass alone, and how far its omega depends on the batches it saw and on the seed of the weights.

The spread of a sub-layer's omega is its standard deviation over draws divided by its mean; that of a stack is the
root mean square over its sub-layers, without the first, whose omega is 1. A draw is a disjoint group of k training
batches pooled as --admin-profile-batches k pools them (weights the same, dropout masks not), or a seed of the
initialisation (batches and masks the same).
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Sequence

import torch
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from tqdm import tqdm

from admin_fairseq.analysis.figures import GREY, MARKERS, Page, make_folder, pyplot, style, write
from admin_fairseq.analysis.subject import build_trainer, check_data, parse
from admin_fairseq.errors import AdminError
from admin_fairseq.model import AdminModel
from admin_fairseq.profile_file import STACKS, Profile
from admin_fairseq.profiling import Sample
from admin_fairseq.start import first_samples, profile_batches

DRAWS = 4  # fewer groups of batches say little about a spread


@dataclass
class Spread:
    """What was drawn ("batches" or "seeds"), how many batches each draw pooled, and by stack the spread of omega."""

    over: str
    pooled: int
    draws: int
    spread: dict[str, float]


def main(args: Namespace) -> None:
    """``admin-fairseq profile``: the profile, and with more than one batch or seed the spread.

    Raises:
        AdminError: the options do not profile, or a number makes no sense.
    """
    if args.batches < 1 or 1 < args.batches < DRAWS or args.seeds < 1:
        raise AdminError(f"--batches must be at least {DRAWS}, or 1 for no spread, and --seeds at least 1")
    if args.batches > 1 or args.seeds > 1:
        pyplot()  # missed before the work
    check_data(args.rest)
    options = parse(args.arch, args.rest)
    trainer = _start(options, options.seed)
    make_folder(args.out)
    pooled = trainer.get_model().admin_profile_batches or 1
    samples = first_samples(trainer, max(args.batches, pooled))
    if len(samples) < args.batches:
        print(f"DATA has {len(samples)} batches, of {args.batches} asked for", file=sys.stderr)
        if len(samples) < DRAWS:
            raise AdminError(f"{len(samples)} batches show no spread: have smaller ones (--max-tokens)")
    first = samples[:pooled]
    sizes = [size for size in (2**n for n in range(20)) if args.batches >= DRAWS and len(samples) // size >= DRAWS]
    passes = len(first) * args.seeds + sum(len(samples) // size * size for size in sizes)
    with tqdm(total=passes, desc="pre-pass", unit="batch", delay=3) as bar:
        found = _profiled(trainer, first, bar)
        found.write(os.path.join(args.out, "admin_profile.json"))
        print(f"{args.out}/admin_profile.json: for --admin-profile; {', '.join(_ranges(found))}")
        spreads = []
        for size in sizes:
            groups = [samples[at : at + size] for at in range(0, len(samples) - size + 1, size)]
            spreads.append(_spread("batches", size, [_profiled(trainer, group, bar) for group in groups]))
        if args.seeds > 1:
            profiles = [found]
            for seed in range(options.seed + 1, options.seed + args.seeds):
                trainer = None  # one model at a time
                trainer = _start(options, seed)
                profiles.append(_profiled(trainer, first, bar))
            spreads.append(_spread("seeds", len(first), profiles))
    if spreads:
        _report(args, spreads, found)


def _start(options: Namespace, seed: int) -> Any:
    """A trainer in front of its pre-pass, in one process."""
    options = Namespace(**{**vars(options), "seed": seed, "distributed_world_size": 1, "no_save": True})
    if options.max_tokens is None and options.batch_size is None:
        raise AdminError("give the batches' size, --max-tokens or --batch-size, as to fairseq-train")
    trainer = build_trainer(convert_namespace_to_omegaconf(options))
    model = trainer.get_model()
    if not isinstance(model, AdminModel):
        raise AdminError(f"--arch {options.arch} is not an Admin architecture: there is no omega to profile")
    if model.omega_source != "unset" or model.admin_profile is not None:
        source = f"--admin-profile {model.admin_profile}" if model.admin_profile else model.omega_source
        raise AdminError(f"these options do not profile: omega comes from {source}")
    return trainer


def _profiled(trainer: Any, samples: list[Sample], bar: tqdm) -> Profile:
    found = profile_batches(trainer, samples)
    bar.update(len(samples))
    return found


def _ranges(profile: Profile) -> list[str]:
    omegas = {stack: getattr(profile, stack) for stack in STACKS if getattr(profile, stack)}
    return [f"{stack} omega {omega[0]:.3f} to {omega[-1]:.3f}" for stack, omega in omegas.items()]


def _spread(over: str, pooled: int, profiles: Sequence[Profile]) -> Spread:
    spread = {}
    for stack in STACKS:
        omega = torch.tensor([getattr(profile, stack)[1:] for profile in profiles], dtype=torch.float64)
        if omega.numel():
            spread[stack] = (omega.std(dim=0) / omega.mean(dim=0)).square().mean().sqrt().item()
    return Spread(over, pooled, len(profiles), spread)


def _report(args: Namespace, spreads: list[Spread], found: Profile) -> None:
    """The table, spread.json, spread.csv and the figure."""
    stacks = list(spreads[0].spread)
    rows = [["draws", "of batches pooled", *stacks]]
    rows += [
        [f"{s.draws} {'groups' if s.over == 'batches' else 'seeds'}", str(s.pooled)]
        + [f"{100 * s.spread[stack]:.2f}%" for stack in stacks]
        for s in spreads
    ]
    answer = _answer(spreads)
    print("spread of omega (standard deviation over mean, root mean square over sub-layers)")
    for row in rows:
        print("  " + "".join(f"{cell:>{18 if number else 10}}" for number, cell in enumerate(row)))
    print(answer)
    data = {"arch": args.arch, "settings": found.settings, "tokens": found.tokens}
    data["spread"] = [vars(spread) for spread in spreads]
    table = [{"over": s.over, "pooled": s.pooled, "draws": s.draws, **s.spread} for s in spreads]
    page = Page(
        "How many batches are enough?",
        [
            "The pre-pass was repeated on other batches and on other initialisations, without training. The spread of"
            " omega is its standard deviation over these draws divided by its mean, as root mean square over the"
            " sub-layers of a stack.",
            answer,
        ],
        [("", _figure(spreads, stacks), "Spread of omega by the number of batches pooled, and over seeds.")],
        [(f"Spread of omega, {args.arch}", rows)],
    )
    write(args.out, "spread", data, table, page, args.format)


def _answer(spreads: list[Spread]) -> str:
    seeds = [s for s in spreads if s.over == "seeds"]
    batches = [s for s in spreads if s.over == "batches"]
    if not seeds or not batches:
        return "With both more batches and more seeds than 1 this would say how many batches are enough."
    enough = [s.pooled for s in batches if all(s.spread[stack] <= seeds[0].spread[stack] for stack in s.spread)]
    if not enough:
        return (
            f"Even {_moving(batches[-1].pooled)} omega more than another seed of the initialisation would: pool more."
        )
    return f"{_moving(enough[0])} omega less than another seed of the initialisation would; more need not be pooled."


def _moving(count: int) -> str:
    return "1 batch moves" if count == 1 else f"{count} pooled batches move"


def _figure(spreads: list[Spread], stacks: list[str]) -> Any:
    figure, axes = pyplot().subplots(figsize=(4.5, 3.2))
    batches = [s for s in spreads if s.over == "batches"]
    for number, stack in enumerate(stacks):
        look = {"color": style(number + 1)["color"]}
        if batches:
            points = [s.pooled for s in batches], [100 * s.spread[stack] for s in batches]
            axes.plot(*points, marker=MARKERS[number], label=f"{stack}, over batches", **look)
        for s in spreads[len(batches) :]:
            axes.axhline(100 * s.spread[stack], linestyle=style(number + 1)["linestyle"], **look)
            axes.plot([], [], linestyle=style(number + 1)["linestyle"], label=f"{stack}, over {s.draws} seeds", **look)
    if batches:
        sizes, start = [s.pooled for s in batches], max(batches[0].spread.values())
        axes.plot(sizes, [100 * start / size**0.5 for size in sizes], label="as 1/sqrt(batches)", **GREY)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batches pooled")
    axes.set_ylabel("spread of omega (% of its mean)")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure
