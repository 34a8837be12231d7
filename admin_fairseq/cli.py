"""The command ``admin-fairseq`` (also ``python -m admin_fairseq``)."""

from __future__ import annotations

import argparse
import signal

import admin_fairseq
from admin_fairseq.show import show


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    parser = argparse.ArgumentParser(prog="admin-fairseq", description="Tools around Admin checkpoints and profiles.")
    parser.add_argument("--version", action="version", version=f"admin_fairseq {admin_fairseq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser("show", help="print omega by sub-layer, from a checkpoint or a profile")
    command.add_argument("file", help="a checkpoint (*.pt), an admin_profile.json or a profile.ratio.init")
    command.set_defaults(run=lambda args: show(args.file))

    args = parser.parse_args(argv)
    args.run(args)
