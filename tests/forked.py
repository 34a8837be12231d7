"""fairseq's console commands in processes forked from one that has imported fairseq: seconds less each.

What runs is the command's own entry point in a process of its own, with the arguments, environment and working
directory it would have; user dirs and this plugin are imported anew. The tests in recipes/ start the commands from a
shell instead.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from pathlib import Path

ENTRY = {
    "fairseq-train": "fairseq_cli.train",
    "fairseq-hydra-train": "fairseq_cli.hydra_train",
    "fairseq-generate": "fairseq_cli.generate",
    "fairseq-validate": "fairseq_cli.validate",
    "fairseq-preprocess": "fairseq_cli.preprocess",
    "fairseq-eval-lm": "fairseq_cli.eval_lm",
    "admin-fairseq": "admin_fairseq.cli",
}

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        *("fairseq", "fairseq.trainer", "fairseq.checkpoint_utils", "fairseq.sequence_generator"),
        "torch._dynamo",  # which every first optimizer imports: half of a tiny training's time
    ]
)


def run_forked(command: str, arguments: list[str], cwd: Path, environment: dict[str, str], out: Path) -> int:
    """Run a command with its output in a file; returns its exit code."""
    process = _forks.Process(target=_main, args=(command, arguments, str(cwd), environment, str(out)))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{command} {' '.join(arguments)}")
    return process.exitcode


def _main(command: str, arguments: list[str], cwd: str, environment: dict[str, str], out: str) -> None:
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [command, *arguments]
    logging.root.handlers.clear()  # importing fairseq set some up before the command could
    logging.root.setLevel(logging.WARNING)
    try:
        module = importlib.import_module(ENTRY[command])
        getattr(module, "main" if command == "admin-fairseq" else "cli_main")()
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
