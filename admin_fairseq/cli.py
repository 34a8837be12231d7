"""The command ``admin-fairseq`` (also ``python -m admin_fairseq``)."""

from __future__ import annotations

import argparse
import os
import signal

import admin_fairseq
from admin_fairseq.average import average, select
from admin_fairseq.errors import AdminError
from admin_fairseq.legacy import import_checkpoint
from admin_fairseq.show import show


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    parser = argparse.ArgumentParser(prog="admin-fairseq", description="Tools around Admin checkpoints and profiles.")
    parser.add_argument("--version", action="version", version=f"admin_fairseq {admin_fairseq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser("show", help="print omega by sub-layer, from a checkpoint or a profile")
    command.add_argument("file", help="a checkpoint (*.pt), an admin_profile.json or a profile.ratio.init")
    command.set_defaults(run=lambda args: show(args.file))

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
    command.add_argument("input", metavar="IN", help="the checkpoint to read")
    command.add_argument("output", metavar="OUT", help="the checkpoint to write")
    command.set_defaults(run=lambda args: print(import_checkpoint(args.input, args.output)))

    args = parser.parse_args(argv)
    args.run(args)


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
    average(paths, args.output)
    print(f"{args.output}: the average of {', '.join(paths)}")
