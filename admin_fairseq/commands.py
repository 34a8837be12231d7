"""What the sub-commands of ``admin-fairseq`` do, as run_<sub-command>; :mod:`admin_fairseq.cli` has their options."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import zipfile

from fairseq.utils import import_user_module
from tqdm import tqdm

from admin_fairseq import listing
from admin_fairseq.analysis import spread
from admin_fairseq.analysis.figures import pyplot
from admin_fairseq.analysis.subject import check_data
from admin_fairseq.checkpoints import files, show
from admin_fairseq.checkpoints.authors import convert
from admin_fairseq.checkpoints.average import average, select
from admin_fairseq.checkpoints.deepen import deepen
from admin_fairseq.checkpoints.fold import fold, unfold
from admin_fairseq.checkpoints.verify import compare
from admin_fairseq.errors import AdminError
from admin_fairseq.files import json_text, refuse_output
from admin_fairseq.profile_file import Profile, read_profile

PROFILE = "admin_profile.json"  # in a run's folder

run_profile = spread.main


def run_archs(args: argparse.Namespace) -> None:
    import_user_module(args)
    print(listing.archs(args.name), end="")


def run_options(args: argparse.Namespace) -> None:
    import_user_module(args)
    print(listing.options(args.arch), end="")


def run_analyze(args: argparse.Namespace) -> None:
    """Raises:
    AdminError: bad input.
    """
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise AdminError(f"--out {args.out}: not a folder")
    check_data(args.rest)
    pyplot()  # matplotlib is missed before the work
    importlib.import_module(f"admin_fairseq.analysis.{args.analysis}").main(args)


def run_show(args: argparse.Namespace) -> None:
    """Of a checkpoint also the first omega, if the profile still lies in its folder."""
    start: Profile | None
    if not os.path.exists(args.file):
        raise AdminError(f"no such file: {args.file}")
    file = _in_run(args.file) if os.path.isdir(args.file) else args.file
    if file.endswith(".pt") or zipfile.is_zipfile(file):  # torch.save writes zip archives
        profile = os.path.join(os.path.dirname(file), PROFILE)
        weights = files.load(file)["model"]
        start = read_profile(profile) if os.path.exists(profile) else None
        table = show.from_weights(weights, start)
        for line in show.problems(weights):
            print(f"warning: {line}", file=sys.stderr)
    else:
        start = read_profile(file)
        table = show.from_profile(start)
    if not table:
        raise AdminError(f"{file} holds no omega: it is not of an Admin model")
    margin = {} if start is None else {"margin": start.margin}
    if args.json:
        print(json_text({**margin, **table}), end="")
    else:
        print(f"{file}\n" * (file != args.file) + show.text(table, **margin), end="")


def _in_run(folder: str) -> str:
    """What ``analyze`` takes of a run's folder too, the last checkpoint; before there is one, the profile."""
    for name in ("checkpoint_last.pt", PROFILE):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise AdminError(f"{folder} holds no checkpoint_last.pt and no {PROFILE}; give the folder of a run, or a file")


def run_import(args: argparse.Namespace) -> None:
    refuse_output(args.input, args.output)
    state = files.load(args.input, checked=False)
    try:
        state = convert(state)
    except AdminError as error:
        raise AdminError(f"cannot import {args.input}: {error}") from error
    files.save(state, args.output)
    ranges = []
    for stack, rows in show.from_weights(state["model"]).items():
        omegas = [row["omega"] for row in rows]
        ranges.append(f"{len(omegas)} {stack} omegas from {min(omegas):.3f} to {max(omegas):.3f}")
    print(f"{args.output}: a checkpoint of transformer_admin with {' and '.join(ranges)}, without optimizer state")


def run_fold(args: argparse.Namespace) -> None:
    refuse_output(args.input, args.output)
    state = files.load(args.input, finite=True)
    with files.naming(args.input):
        folded = fold(state, args.untie, args.keep_optimizer)
    if args.verify is not None:
        found = compare(state, folded, args.verify, args.sentences, args.untie)
        print("\n".join(found.lines))
        if found.failures:
            raise AdminError("the fold does not compute the same: " + "; ".join(found.failures))
    files.save(folded, args.output)
    arch = folded["args"].arch
    old = "; without the plugin fairseq samples and scores with it by numpy before 2.0 only"
    print(f"{args.output}: {args.input} as a stock {arch}" + old * arch.startswith("transformer_lm"))


def run_unfold(args: argparse.Namespace) -> None:
    refuse_output(args.input, args.output)
    state = files.load(args.input, finite=True)
    with files.naming(args.input):
        unfolded = unfold(state, args.keep_optimizer)
    files.save(unfolded, args.output)
    print(f"{args.output}: {args.input} as a {unfolded['args'].arch} with omega 1")


def run_deepen(args: argparse.Namespace) -> None:
    refuse_output(args.input, args.output)
    state = files.load(args.input, finite=True)
    layers = {"encoder": args.encoder_layers, "decoder": args.decoder_layers}
    with files.naming(args.input):
        deeper, changes = deepen(state, args.data, layers, args.change)
    files.save(deeper, args.output)
    depths = [f"{stack} {change.old} to {change.new} layers" for stack, change in changes.items()]
    shares = [f"{stack} {change.share:.3f}" for stack, change in changes.items()]
    print(f"{args.output}: {', '.join(depths)}; change of the outputs' variance: {', '.join(shares)}")


def run_average(args: argparse.Namespace) -> None:
    paths, by_update = args.inputs, args.num_update_checkpoints is not None
    count = args.num_update_checkpoints if by_update else args.num_epoch_checkpoints
    if count is None:
        if os.path.isdir(paths[0]):
            raise AdminError(f"{paths[0]} is a folder; say which of its checkpoints by --num-epoch-checkpoints N")
        if args.checkpoint_upper_bound is not None:
            raise AdminError("--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints")
    elif count < 1:
        raise AdminError(f"cannot average {count} checkpoints; give a number of at least 1")
    elif len(paths) > 1:
        raise AdminError("--num-epoch-checkpoints and --num-update-checkpoints select from one folder; give one input")
    else:
        paths = select(paths[0], count, by_update, args.checkpoint_upper_bound)
    for path in paths:
        refuse_output(path, args.output)
    read = tqdm(paths, desc="averaging", unit="checkpoint", delay=3)
    files.save(average((path, files.load(path, finite=True)) for path in read), args.output)
    print(f"{args.output}: the average of {', '.join(paths)}")
