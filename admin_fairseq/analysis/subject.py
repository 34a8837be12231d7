"""What is analysed: models as fairseq-train starts them, or as checkpoints hold them, and the batches to measure on."""

from __future__ import annotations

import copy
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import numpy as np
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.modules import LayerDropModuleList
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from fairseq.trainer import Trainer
from torch import nn

from admin_fairseq.checkpoints import files
from admin_fairseq.checkpoints.verify import load_model
from admin_fairseq.config import unknown_architecture
from admin_fairseq.errors import DATA_HINT, AdminError
from admin_fairseq.model import AdminModel
from admin_fairseq.profiling import Sample
from admin_fairseq.rules import stacks
from admin_fairseq.start import first_samples, start_omega

DEFAULT_ARCHS = ("transformer_postln", "transformer_preln", "transformer_admin")
BEFORE, AFTER = "at initialisation", "after training"


def import_user_dir(rest: Sequence[str]) -> None:
    """Import the folder given as --user-dir among fairseq-train's options, whose methods may be analysed."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--user-dir")
    utils.import_user_module(parser.parse_known_args(rest)[0])


def has_data(rest: Sequence[str]) -> bool:
    """Whether DATA stands among what goes to fairseq-train, in front."""
    return bool(rest) and not rest[0].startswith("-")


def check_data(rest: Sequence[str]) -> None:
    """Raises:
    AdminError: DATA is given, and there is no such folder.
    """
    folders = rest[0].split(os.pathsep) if has_data(rest) else []
    for folder in folders:
        if not os.path.isdir(folder):
            raise AdminError(f"no such folder: {folder} ({DATA_HINT})")


def check_layers(model: nn.Module) -> None:
    """Raises:
    AdminError: the model is no Transformer.
    """
    if not all(hasattr(stack, "layers") for stack in stacks(model).values()):
        raise AdminError(f"{type(model).__name__} is no Transformer: it has no stack of layers to analyse")


def checkpoint_in(path: str) -> str:
    """The file that a --path names.

    Raises:
        AdminError: it is a folder without one.
    """
    file = os.path.join(path, "checkpoint_last.pt") if os.path.isdir(path) else path
    if path != file and not os.path.exists(file):
        raise AdminError(f"{path} holds no checkpoint_last.pt (if it is DATA: that comes first, before --path)")
    return file


@dataclass
class Subject:
    """One model of an analysis.

    ``method`` names it in figures, ``when`` is BEFORE or AFTER. ``trainer`` is fairseq's, on the model's device, with
    the train split loaded and no optimizer built yet; ``samples`` are the batches that training sees first.
    """

    method: str
    when: str
    trainer: Trainer
    samples: list[Sample]

    @property
    def model(self) -> nn.Module:
        return self.trainer.get_model()

    @property
    def label(self) -> str:
        return f"{self.method}, {self.when}"


def parse(arch: str, rest: Sequence[str], only_given: bool = False) -> Namespace:
    """fairseq-train's options, as its own parser reads them; ``only_given``: without defaults.

    Raises:
        AdminError: fairseq knows no such architecture or option.
    """
    import_user_dir(rest)
    if arch not in ARCH_MODEL_REGISTRY:
        raise AdminError(unknown_architecture(arch))
    parser = options.get_training_parser()

    def refuse(message: str) -> None:
        is_data = message.endswith("are required: data")
        raise AdminError(f"give DATA, as the first argument ({DATA_HINT})" if is_data else message)

    parser.error = refuse
    return options.parse_args_and_arch(parser, ["--arch", arch, *rest], suppress_defaults=only_given)


def configure(args: Namespace) -> Any:
    """fairseq's configuration of a run in one process and float32 that leaves no files."""
    args = copy.copy(args)
    if getattr(args, "max_tokens", None) is None and getattr(args, "batch_size", None) is None:
        args.max_tokens = 4096
    args.distributed_world_size, args.no_save = 1, True
    args.fp16 = args.bf16 = args.amp = args.memory_efficient_fp16 = args.memory_efficient_bf16 = False
    return convert_namespace_to_omegaconf(args)


def started(cfg: Any, state: dict[str, Any] | None = None, batches: int = 1) -> tuple[Trainer, list[Sample]]:
    """A trainer as fairseq-train has it in front of the first update, Admin's omega set, and the first batches.

    Without activation checkpointing and LayerDrop, under which not all of a layer can be seen.

    Args:
        state: a checkpoint, whose weights the model gets.

    Raises:
        AdminError: the checkpoint does not fit DATA.
    """
    trainer = build_trainer(cfg, state)
    if state is None and isinstance(trainer.get_model(), AdminModel):
        start_omega(trainer)
    for module in unwrap_checkpoint(trainer.get_model()).modules():  # each layer is run, once, with its graph kept
        if isinstance(module, LayerDropModuleList):
            module.p = 0.0
    return trainer, first_samples(trainer, batches)


def build_trainer(cfg: Any, state: dict[str, Any] | None = None) -> Trainer:
    """The same, before Admin's omega is set."""
    task = tasks.setup_task(cfg.task)
    np.random.seed(cfg.common.seed)
    utils.set_torch_seed(cfg.common.seed)
    model = task.build_model(cfg.model) if state is None else load_model(state, task)
    check_layers(model)
    for module in model.modules():
        module.can_use_fastpath = False  # fairseq 0.12.2's own, which calls no residual_connection
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    trainer.get_train_iterator(epoch=1, load_dataset=True)
    return trainer


def subjects(paths: Sequence[str], archs: Sequence[str], rest: Sequence[str], batches: int = 1) -> Iterator[Subject]:
    """The models of a command line, one after the other, so that only one needs memory at a time.

    Args:
        paths: checkpoints, or folders with a checkpoint_last.pt; each gives its settings, started anew from their
            seed, and itself.
        archs: without paths, architectures; each as fairseq-train starts it.
        rest: DATA and any of fairseq-train's options; with paths they replace the checkpoint's.

    Raises:
        AdminError: an argument cannot be used.
    """
    if paths:
        states = {path: files.load(checkpoint_in(path)) for path in paths}
        settings = {path: files.settings(state) for path, state in states.items()}
        names = [args.arch for args in settings.values()]
        for path, args in settings.items():
            args = merged(args, rest)
            method = method_name(args.arch) + (f" ({path})" if names.count(args.arch) > 1 else "")
            for when, state in ((BEFORE, None), (AFTER, states[path])):
                yield Subject(method, when, *started(configure(args), state, batches))
    else:
        for arch in archs or DEFAULT_ARCHS:
            yield Subject(method_name(arch), BEFORE, *started(configure(parse(arch, rest)), None, batches))


def merged(args: Namespace, rest: Sequence[str]) -> Namespace:
    """A checkpoint's settings, and over them DATA and what options are given.

    Raises:
        AdminError: fairseq knows no such option.
    """
    given = parse(args.arch, ["--task", args.task, *rest], only_given=True)
    return Namespace(**{**vars(args), **vars(given)})


def method_name(arch: str) -> str:
    """``transformer_admin_18_18`` is "admin 18-18"; fairseq's own ``transformer`` keeps its name."""
    _, _, name = arch.partition("transformer_")
    parts = (name or arch).split("_")
    depth = [parts.pop() for _ in range(2) if len(parts) > 1 and parts[-1].isdigit()][::-1]
    return " ".join(["_".join(parts), *(["-".join(depth)] if depth else [])])
