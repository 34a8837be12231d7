"""The command ``admin-fairseq`` (also ``python -m admin_fairseq``): what reads, writes and prints."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
import zipfile

from tqdm import tqdm

import admin_fairseq
from admin_fairseq.analysis import spread
from admin_fairseq.analysis.cli import add_parser as add_analyze
from admin_fairseq.checkpoints import files, show
from admin_fairseq.checkpoints.authors import convert
from admin_fairseq.checkpoints.average import average, select
from admin_fairseq.checkpoints.deepen import deepen
from admin_fairseq.checkpoints.fold import fold, unfold
from admin_fairseq.checkpoints.verify import compare
from admin_fairseq.errors import AdminError
from admin_fairseq.files import json_text, refuse_output
from admin_fairseq.profile_file import read_profile


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    warnings.simplefilter("ignore")  # what torch and fairseq say of each other's deprecations
    parser = argparse.ArgumentParser(prog="admin-fairseq", description="Tools around Admin checkpoints and profiles.")
    parser.add_argument("--version", action="version", version=f"admin_fairseq {admin_fairseq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser("show", help="print omega by sub-layer, from a checkpoint or a profile")
    command.add_argument("file", help="a checkpoint (*.pt), an admin_profile.json or a profile.ratio.init")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_show)

    command = commands.add_parser(
        "profile",
        help="the profiling pre-pass alone, and how much omega varies with batches and seeds",
        description="Write the admin_profile.json that fairseq-train would from the same options in one process, and"
        " if asked the spread of omega over batches and over initialisation seeds. Nothing is trained.",
        usage="admin-fairseq profile DATA --arch ARCH --out DIR [--batches N] [--seeds N] [fairseq-train's options]",
        allow_abbrev=False,
    )
    command.add_argument("--arch", required=True, metavar="ARCH", help="an Admin architecture")
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    command.add_argument(
        "--batches",
        type=int,
        default=1,
        metavar="N",
        help="with 4 or more: the spread over the first N batches, one by one and pooled (default: 1)",
    )
    command.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="with 2 or more: the spread over N initialisations (default: 1)",
    )
    command.add_argument("--format", choices=["svg", "png"], default="svg", help="of the figure (default: svg)")
    command.set_defaults(run=spread.main, takes_rest=True)

    command = commands.add_parser(
        "average",
        help="average the weights of checkpoints",
        description="Write one checkpoint with the mean of several checkpoints' weights, without optimizer state.",
    )
    command.add_argument("--inputs", nargs="+", required=True, metavar="PATH", help="checkpoints, or one folder")
    command.add_argument("--output", required=True, metavar="FILE", help="the checkpoint to write")
    newest = command.add_mutually_exclusive_group()
    newest.add_argument(
        "--num-epoch-checkpoints", type=int, metavar="N", help="average the folder's newest N checkpoint<epoch>.pt"
    )
    newest.add_argument(
        "--num-update-checkpoints",
        type=int,
        metavar="N",
        help="average the folder's newest N checkpoint_<epoch>_<update>.pt",
    )
    command.add_argument(
        "--checkpoint-upper-bound", type=int, metavar="N", help="of these, leave out later epochs or updates than N"
    )
    command.set_defaults(run=_average)

    command = commands.add_parser(
        "import",
        help="turn a checkpoint of the authors' code into one of this plugin",
        description="Turn a checkpoint of Transformer-Clinic, deepnmt or admin-torch into one of transformer_admin"
        " that computes the same.",
    )
    _add_files(command)
    command.set_defaults(run=_import)

    command = commands.add_parser(
        "fold",
        help="turn an Admin checkpoint into one of the stock Transformer",
        description="Write a checkpoint of the stock transformer or transformer_lm that computes the same: omega moves"
        " into the weights around it. It needs no plugin.",
    )
    _add_files(command)
    _add_keep_optimizer(command)
    command.add_argument(
        "--untie",
        action="store_true",
        help="where the first omega of a stack is not 1: give that stack its own embeddings and learned positions",
    )
    command.add_argument(
        "--verify", metavar="DATA", help="first compare both models on the test split of this data-bin, or valid"
    )
    command.add_argument(
        "--sentences", type=int, default=200, metavar="N", help="compare on the first N sentences (default: 200)"
    )
    command.set_defaults(run=_fold)

    command = commands.add_parser(
        "unfold",
        help="turn a stock Post-LN checkpoint into an Admin one with omega 1",
        description="Write a checkpoint of transformer_admin or transformer_lm_admin with omega 1, which computes what"
        " the stock Post-LN model computes and continues to train with Admin.",
    )
    _add_files(command)
    _add_keep_optimizer(command)
    command.set_defaults(run=_unfold)

    command = commands.add_parser(
        "deepen",
        help="insert layers into a trained Admin model",
        description="Write a checkpoint of a deeper model with nearly the outputs of IN.pt: copies of its layers in"
        " between, with omega measured on the first training sentences. Train it by --finetune-from-model.",
    )
    _add_files(command)
    command.add_argument("data", metavar="DATA", help="the data-bin to measure on")
    command.add_argument("--encoder-layers", type=int, metavar="N", help="new depth (default: as it is)")
    command.add_argument("--decoder-layers", type=int, metavar="N", help="new depth (default: as it is)")
    command.add_argument(
        "--change",
        type=float,
        default=0.1,
        metavar="C",
        help="how much of a stack's output the new layers may change, as a share of its variance (default: 0.1)",
    )
    command.set_defaults(run=_deepen)

    add_analyze(commands)

    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if args.rest and not getattr(args, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    args.run(args)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", metavar="IN.pt", help="the checkpoint to read")
    command.add_argument("output", metavar="OUT.pt", help="the checkpoint to write")


def _add_keep_optimizer(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep-optimizer", action="store_true", help="keep the state of --optimizer adam (default: leave it out)"
    )


def _show(args: argparse.Namespace) -> None:
    """Of a checkpoint also the first omega, if the profile still lies in its folder."""
    if args.file.endswith(".pt") or zipfile.is_zipfile(args.file):  # torch.save writes zip archives
        profile = os.path.join(os.path.dirname(args.file), "admin_profile.json")
        weights = files.load(args.file)["model"]
        table = show.from_weights(weights, read_profile(profile) if os.path.exists(profile) else None)
        for line in show.problems(weights):
            print(f"warning: {line}", file=sys.stderr)
    else:
        table = show.from_profile(read_profile(args.file))
    if not table:
        raise AdminError(f"{args.file} holds no omega: it is not of an Admin model")
    print(json_text(table) if args.json else show.text(table), end="")


def _import(args: argparse.Namespace) -> None:
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


def _fold(args: argparse.Namespace) -> None:
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
    print(f"{args.output}: {args.input} as a stock {folded['args'].arch}")


def _unfold(args: argparse.Namespace) -> None:
    refuse_output(args.input, args.output)
    state = files.load(args.input, finite=True)
    with files.naming(args.input):
        unfolded = unfold(state, args.keep_optimizer)
    files.save(unfolded, args.output)
    print(f"{args.output}: {args.input} as a {unfolded['args'].arch} with omega 1")


def _deepen(args: argparse.Namespace) -> None:
    refuse_output(args.input, args.output)
    state = files.load(args.input, finite=True)
    layers = {"encoder": args.encoder_layers, "decoder": args.decoder_layers}
    with files.naming(args.input):
        deeper, changes = deepen(state, args.data, layers, args.change)
    files.save(deeper, args.output)
    depths = [f"{stack} {change.old} to {change.new} layers" for stack, change in changes.items()]
    shares = [f"{stack} {change.share:.3f}" for stack, change in changes.items()]
    print(f"{args.output}: {', '.join(depths)}; change of the outputs' variance: {', '.join(shares)}")


def _average(args: argparse.Namespace) -> None:
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
    read = tqdm(paths, desc="averaging", unit="checkpoint", delay=3)
    files.save(average((path, files.load(path, finite=True)) for path in read), args.output)
    print(f"{args.output}: the average of {', '.join(paths)}")
