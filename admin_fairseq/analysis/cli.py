"""The command ``admin-fairseq analyze``: its options. No torch, fairseq or matplotlib is imported here."""

from __future__ import annotations

import argparse
from typing import Any, Callable

from admin_fairseq.arguments import ending_with

USAGE = "admin-fairseq analyze {name} [DATA] --out DIR [options] [fairseq-train's options]"
EXAMPLE = "admin-fairseq analyze {} data-bin --path checkpoints --out analysis --cpu"


def add_parser(commands: Any) -> None:
    """Add ``analyze`` to the sub-commands. What its parsers do not know is fairseq-train's, in ``args.rest``."""
    command = commands.add_parser(
        "analyze",
        help="measure and draw why training is hard: dependency, amplification, gradients, omega",
        description="The paper's analyses on any fairseq Transformer, from checkpoints or at initialisation.",
        **ending_with(EXAMPLE.format("report")),
    )
    analyses = command.add_subparsers(dest="analysis", metavar="ANALYSIS", required=True)
    for name, (text, add) in ANALYSES.items():
        analysis = analyses.add_parser(
            name,
            help=text,
            description=text,
            usage=USAGE.format(name=name),
            allow_abbrev=False,
            **ending_with(EXAMPLE.format(name)),
        )
        _add_common(analysis)
        add(analysis)
        analysis.set_defaults(takes_rest=True)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="of the figures (default: svg)")
    models = parser.add_mutually_exclusive_group()
    models.add_argument(
        "--path",
        nargs="+",
        default=[],
        metavar="CKPT",
        help="checkpoints, each measured before and after its training; of a folder checkpoint_last.pt (omega: all)",
    )
    models.add_argument(
        "--arch",
        nargs="+",
        default=[],
        metavar="ARCH",
        help="architectures at initialisation (default: transformer_postln transformer_preln transformer_admin)",
    )


def _dependency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--positions", type=int, default=256, metavar="N", help="token positions that the map is computed on"
    )


def _amplification(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--noise", type=float, default=0.02, metavar="SHARE", help="of each weight tensor's deviation (default: 0.02)"
    )
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="stacks to average over (default: 4)")
    parser.add_argument("--sub-layers", type=int, default=200, metavar="N", help="without DATA: depth (default: 200)")


def _gradients(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--updates",
        nargs="+",
        type=int,
        default=[1, 10, 100],
        metavar="N",
        help="gradients: train and measure at these updates (default: 1 10 100)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=["adam", "sgd"],
        default=["adam", "sgd"],
        help="gradients: whose updates to compare (default: adam sgd)",
    )


def _omega(parser: argparse.ArgumentParser) -> None:
    pass


def _report(parser: argparse.ArgumentParser) -> None:
    for add in (_dependency, _amplification, _gradients, _omega):
        add(parser)


Add = Callable[[argparse.ArgumentParser], None]
ANALYSES: dict[str, tuple[str, Add]] = {
    "dependency": ("how much each sub-layer depends on its residual branch, and on every earlier one", _dependency),
    "amplification": ("how much a small change of all weights changes the output, by depth", _amplification),
    "gradients": ("gradient norms and relative updates by sub-layer, through training", _gradients),
    "omega": ("omega by depth at initialisation and through training", _omega),
    "report": ("all of these, bound into one HTML file", _report),
}
