"""What fairseq's parser of the command line does not say, or says in thousands of characters, in one line.

FLAGS and VALUES are the names of other implementations of Admin: Transformer-Clinic's, deepnmt's and admin-torch's.
docs/coming.md has them as a table.
"""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
import re
from argparse import ArgumentParser, Namespace
from typing import Any, Iterable

import torch
from fairseq.file_io import PathManager
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY

from admin_fairseq.arguments import unknown_choice
from admin_fairseq.checkpoints.checks import check_options, is_transformer
from admin_fairseq.checkpoints.files import missing
from admin_fairseq.checkpoints.guard import check_evaluated
from admin_fairseq.config import POSITIONS, as_namespace, unknown_architecture
from admin_fairseq.errors import AdminError

INSIDE = (
    "drop it: the pre-pass runs inside the one training command, with --arch transformer_admin or a depth of it, and"
    " --admin-margin 1 for the paper's rule"
)
FROM_FILE = "drop it and add --admin-margin 1, the paper's rule, or start from their file by --admin-profile FILE"
FLAGS = {
    "--init-type": INSIDE,
    "--admin-init-type": INSIDE,
    "--profiling-path": FROM_FILE,
    "--admin-init-path": FROM_FILE,
    "--output-change-scale": "say --admin-init logn for O(logn), --admin-init sqrt for O(1)",
    "--min-lr": "drop it, or say --stop-min-lr, below which training ends",
    "--adv-opt": "drop it: adversarial training is no part of Admin",
}
VALUES = {
    "adaptive-profiling": INSIDE,
    "adaptive": FROM_FILE,
    "default": "say --arch transformer_postln --init-weights authors",
    "looklinear": "say --arch transformer_looklinear --init-weights authors",
    "rezero": "say --arch transformer_rezero --init-weights authors",
    "rezero_postln": "say --arch transformer_rezero_postln --init-weights authors",
    "deepnet": "say --arch transformer_deepnorm",
    "O(logn)": "say --admin-init logn",
    "O(1)": "say --admin-init sqrt",
    "adv_translation": "say --task translation",
    "adv_label_smoothed_cross_entropy": "say --criterion label_smoothed_cross_entropy",
    "linear": "say --lr-scheduler polynomial_decay --total-num-update N",
}
INITS = ("--init-type", "--admin-init-type")
PAGE = "(docs/coming.md has all names)"


def instead_of(message: str, known: Iterable[str]) -> str | None:
    """One line for an unknown option or choice: the name of another implementation, or the most similar ``known`` ones.

    None for whatever else argparse refuses.
    """
    choice = re.match(r"argument (\S+): invalid choice: '([^']*)'", message)
    if choice and choice[1].startswith("--arch"):
        return unknown_architecture(choice[2])
    if choice and choice[2] in VALUES:
        return f"{choice[1]} {choice[2]}: {VALUES[choice[2]]} {PAGE}"
    if not message.startswith("unrecognized arguments: "):
        return unknown_choice(message)
    words = message.split(": ", 1)[1].replace("=", " ").split()
    lines, page = [], ""
    for number, word in enumerate(words):
        flag = word.replace("_", "-")
        value = words[number + 1] if flag in INITS and number + 1 < len(words) else ""
        if flag in FLAGS:
            lines.append(f"{word} {value}".strip() + f": {VALUES.get(value) or FLAGS[flag]}")
            page = f" {PAGE}"
        elif word.startswith("--"):
            similar = difflib.get_close_matches(flag, known, cutoff=0.75)
            lines.append(f"{word}: no option of this fairseq" + f"; the nearest: {', '.join(similar)}" * bool(similar))
    return "; ".join(lines) + page if lines else message


def give(parser: ArgumentParser) -> None:
    """Have a parser of fairseq's refuse such options in one line."""
    refuse = parser.error

    def error(message: str) -> None:
        line = instead_of(message, parser._option_string_actions)
        if line is not None:
            raise AdminError(line)
        refuse(message)

    parser.error = error  # type: ignore[method-assign,assignment]


def check(args: Namespace) -> None:
    """Refuse what fairseq would stumble over later, or end without having trained.

    Raises:
        AdminError: an option cannot be honoured.
    """
    if getattr(args, "write_checkpoints_asynchronously", False) and importlib.util.find_spec("iopath") is None:
        raise AdminError("--write-checkpoints-asynchronously needs a package: pip install iopath; or drop the flag")
    for name, value in vars(args).items():
        check_evaluated(value, name, f"--{name.replace('_', '-')}")
    if hasattr(args, "update_freq"):
        _check_training(args)
    replaces, is_interactive = getattr(args, "replace_unk", None), hasattr(args, "buffer_size")
    if replaces is not None and not is_interactive and getattr(args, "dataset_impl", None) != "raw":
        raise AdminError(
            "--replace-unk needs the raw text: translate by fairseq-interactive --input FILE, or copy the test set to"
            " DATA as test.<source>-<target>.<source> and .<target> and add --dataset-impl raw; its value is a file of"
            ' words, or ""'
        )
    if replaces == "@@ ":  # what the flag means without a value
        raise AdminError(
            "--replace-unk needs a value: --replace-unk FILE, with lines of a source word and its translation, or"
            ' --replace-unk "" to copy the source word'
        )


def _check_training(args: Namespace) -> None:
    check_start(args, args)
    given = vars(args)  # may be without defaults
    if given.get("best_checkpoint_metric") == "bleu" and given.get("eval_bleu") is False:
        raise AdminError("--best-checkpoint-metric bleu needs --eval-bleu")
    if any(int(number) < 1 for number in re.findall(r"-?\d+", str(given["update_freq"]))):
        raise AdminError(f"--update-freq {given['update_freq']}: give a number of at least 1")


def check_start(checkpoint: Any, common: Any) -> None:
    """Of a training, by these sections of fairseq's configuration, or by a command line's options as both.

    Raises:
        AdminError: it would start from nothing, since what it is to start from is no file; or needs a GPU.
    """
    restore_file = getattr(checkpoint, "restore_file", "checkpoint_last.pt")
    finetune_from_model = getattr(checkpoint, "finetune_from_model", None)
    save_dir = getattr(checkpoint, "save_dir", "checkpoints")
    own = os.path.join(save_dir, "checkpoint_last.pt")  # may be named by a script that starts and resumes
    is_own = restore_file == "checkpoint_last.pt" or os.path.abspath(restore_file) == os.path.abspath(own)
    shards = glob.glob(f"{glob.escape(os.path.splitext(restore_file)[0])}-*")
    if not (is_own or shards or PathManager.isfile(restore_file)):
        raise AdminError(f"--restore-file: {missing(restore_file)}; without the flag training goes on from --save-dir")
    resumes = PathManager.exists(own)
    if finetune_from_model and not resumes and not PathManager.isfile(finetune_from_model):
        raise AdminError(f"--finetune-from-model: {missing(finetune_from_model)}")
    is_flat = not any(
        getattr(common, name, False) for name in ("memory_efficient_fp16", "fp16_no_flatten_grads", "tpu")
    )
    has_gpu = torch.cuda.is_available() and not getattr(common, "cpu", False)
    if getattr(common, "fp16", False) and is_flat and not has_gpu:
        raise AdminError("--fp16 needs a GPU; on CPUs take --bf16, or add --fp16-no-flatten-grads")


def check_model(cfg: Any, task: Any) -> None:
    """Of what is about to be built, from whichever of fairseq's commands; what ``--arch`` says may have been checked.

    Raises:
        AdminError: its architecture is none that this fairseq has, or an option is one that no checkpoint may have.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    if isinstance(name, str) and name not in ARCH_MODEL_REGISTRY and name not in MODEL_DATACLASS_REGISTRY:
        raise AdminError(f"{unknown_architecture(name)}; one of your own needs its folder as --user-dir")
    if is_transformer(name):
        known = getattr(task, "cfg", None) or getattr(task, "args", None)
        positions = {limit: getattr(known, limit, None) for limit in POSITIONS}
        check_options({**positions, **vars(as_namespace(cfg))}, lambda option: f"--{option.replace('_', '-')}")


def check_folders(
    model_name_or_path: str,
    checkpoint_file: str = "model.pt",
    data_name_or_path: str = ".",
    archive_map: Any = None,
    **_: Any,
) -> None:
    """Of ``from_pretrained``, whose arguments these are; archives and models to be downloaded are left to fairseq.

    Raises:
        AdminError: a checkpoint or the folder of the data is not there.
    """
    folder, data = model_name_or_path, data_name_or_path
    if folder in (archive_map or {}) or "://" in folder or os.path.isfile(folder):
        return
    for name in checkpoint_file.split(os.pathsep):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise AdminError(
                f'{path}: no such file; for example from_pretrained("checkpoints", "checkpoint_best.pt", "data-bin")'
            )
    is_inside = data.startswith(".")
    if not os.path.isdir(os.path.join(folder, data) if is_inside else data):
        where = f" in {folder}, where a name that begins with a dot is looked for" if is_inside else ""
        raise AdminError(f"{data}: no such folder{where}; give what fairseq-preprocess wrote")
