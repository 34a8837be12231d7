"""The command ``admin-fairseq`` (also ``python -m admin_fairseq``): what reads, writes and prints."""

from __future__ import annotations

import argparse
import signal
import warnings

import admin_fairseq
from admin_fairseq.analysis.cli import add_parser as add_analyze
from admin_fairseq.arguments import Parser, ending_with
from admin_fairseq.errors import install_excepthook


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    warnings.simplefilter("ignore")  # what torch and fairseq say of each other's deprecations
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if args.rest and not getattr(args, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    if argv is None:
        install_excepthook("admin_fairseq")
    from admin_fairseq import plugin  # noqa: F401  (with fairseq, for seconds: --help has been answered by now)

    # isort: split
    from admin_fairseq import commands as run

    getattr(run, f"run_{args.command}")(args)


def make_parser() -> argparse.ArgumentParser:
    """Its help ends with an example, and so does each sub-command's."""
    parser = Parser(
        prog="admin-fairseq",
        description="Tools around Admin checkpoints and profiles. COMMAND --help says more of each.",
        **ending_with("admin-fairseq show checkpoints/checkpoint_best.pt"),
    )
    parser.add_argument("--version", action="version", version=f"admin_fairseq {admin_fairseq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "show",
        help="print omega by sub-layer, of a run, a checkpoint or a profile",
        description="Print omega by sub-layer in forward order, what is known of its start, and a bar of its length.",
        **ending_with("admin-fairseq show checkpoints", "admin-fairseq show checkpoints/checkpoint_best.pt --json"),
    )
    command.add_argument(
        "file",
        metavar="FILE",
        help="a run's folder, a checkpoint (*.pt), an admin_profile.json or a profile.ratio.init",
    )
    command.add_argument("--json", action="store_true", help="print JSON")

    command = commands.add_parser(
        "profile",
        help="the profiling pre-pass alone, and how much omega varies with batches and seeds",
        description="Write the admin_profile.json that fairseq-train would from the same options in one process, and"
        " if asked the spread of omega over batches and over initialisation seeds. Nothing is trained.",
        usage="admin-fairseq profile DATA --arch ARCH --out DIR [--batches N] [--seeds N] [fairseq-train's options]",
        allow_abbrev=False,
        **ending_with("admin-fairseq profile data-bin --arch transformer_admin_18_18 --out profile --batches 16 --cpu"),
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
    command.set_defaults(takes_rest=True)

    command = commands.add_parser(
        "average",
        help="average the weights of checkpoints",
        description="Write one checkpoint with the mean of several checkpoints' weights, without optimizer state.",
        **ending_with("admin-fairseq average --inputs checkpoints --num-epoch-checkpoints 5 --output average.pt"),
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

    command = commands.add_parser(
        "import",
        help="turn a checkpoint of the authors' code into one of this plugin",
        description="Turn a checkpoint of Transformer-Clinic, deepnmt or admin-torch into one of transformer_admin"
        " that computes the same.",
        **ending_with("admin-fairseq import theirs.pt ours.pt"),
    )
    _add_files(command)

    command = commands.add_parser(
        "fold",
        help="turn an Admin checkpoint into one of the stock Transformer",
        description="Write a checkpoint of the stock transformer or transformer_lm that computes the same: omega moves"
        " into the weights around it. It needs no plugin.",
        **ending_with("admin-fairseq fold checkpoints/checkpoint_best.pt stock.pt --verify data-bin"),
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

    command = commands.add_parser(
        "unfold",
        help="turn a stock Post-LN checkpoint into an Admin one with omega 1",
        description="Write a checkpoint of transformer_admin or transformer_lm_admin with omega 1, which computes what"
        " the stock Post-LN model computes and continues to train with Admin.",
        **ending_with("admin-fairseq unfold stock.pt admin.pt"),
    )
    _add_files(command)
    _add_keep_optimizer(command)

    command = commands.add_parser(
        "deepen",
        help="insert layers into a trained Admin model",
        description="Write a checkpoint of a deeper model with nearly the outputs of IN.pt: copies of its layers in"
        " between, with omega measured on the first training sentences. Train it by --finetune-from-model.",
        **ending_with("admin-fairseq deepen checkpoints/checkpoint_best.pt deeper.pt data-bin --encoder-layers 12"),
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

    command = commands.add_parser(
        "archs",
        help="list the architectures for --arch, which fairseq-train --help cannot",
        description="List the methods and their architectures' names; of those whose names hold NAME also the sizes.",
        **ending_with("admin-fairseq archs transformer_admin", "admin-fairseq archs --user-dir my_methods"),
    )
    command.add_argument("name", nargs="?", metavar="NAME", help="part of a name")
    command.add_argument("--user-dir", metavar="DIR", help="a folder with methods of your own")

    command = commands.add_parser(
        "options",
        help="list the options of an architecture, which fairseq-train --help cannot",
        description="List the options that fairseq-train takes with --arch ARCH, with the values they have by default.",
        **ending_with("admin-fairseq options transformer_admin_18_18"),
    )
    command.add_argument(
        "arch", nargs="?", default="transformer_admin", metavar="ARCH", help="default: transformer_admin"
    )
    command.add_argument("--user-dir", metavar="DIR", help="a folder with methods of your own")

    add_analyze(commands)
    return parser


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", metavar="IN.pt", help="the checkpoint to read")
    command.add_argument("output", metavar="OUT.pt", help="the checkpoint to write")


def _add_keep_optimizer(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--keep-optimizer", action="store_true", help="keep the state of --optimizer adam (default: leave it out)"
    )
