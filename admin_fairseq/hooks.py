"""Every patch of fairseq. docs/fairseq.md lists what else of fairseq's inside this plugin relies on.

omega gets its value when a trainer is about to build its optimizer. That is the last moment at which it can:
half-precision optimizers then copy every parameter to fp32 masters. And it is the first at which everything else is
there: the train split is loaded, the model is on its device and in its dtype, the process group is up, and a
checkpoint, if any, has been restored.
"""

from __future__ import annotations

import functools
import os
from argparse import ArgumentParser
from multiprocessing.util import Finalize
from typing import Any, Callable, Sequence

import torch
from fairseq import checkpoint_utils, hub_utils, models, options
from fairseq.logging import progress_bar
from fairseq.sequence_generator import EnsembleModelWithAlignment
from fairseq.trainer import Trainer

from admin_fairseq import fast, hints, old_numpy, save_dir
from admin_fairseq.checkpoints.files import read
from admin_fairseq.checkpoints.guard import guard_fairseq
from admin_fairseq.checkpoints.unpickling import SAFE_GLOBALS, SENT_GLOBALS
from admin_fairseq.errors import AdminError, NotFiniteError
from admin_fairseq.family import warn_where_bf16_is_slow
from admin_fairseq.metrics import log_omega, without_omega
from admin_fairseq.model import AdminModel
from admin_fairseq.rules import FULLY_SHARDED, RuledModel
from admin_fairseq.start import from_first_worker, start_omega
from admin_fairseq.watch import explain_numbers, newest_checkpoint, saving, watch_omega


def install() -> None:
    """Wrap what of fairseq has to know of Admin, and let its code run with newer torch and numpy."""
    if hasattr(Trainer._build_optimizer, "starts_omega"):  # a copy of this package under another name is a user dir too
        return
    _wrap(Trainer, "_build_optimizer", _start_omega_then_build_optimizer)
    Trainer._build_optimizer.starts_omega = True
    _wrap(Trainer, "train_step", _train_step_and_watch)
    _wrap(Trainer, "begin_epoch", _log_omega_then_begin_epoch)
    _wrap(EnsembleModelWithAlignment, "__init__", _wrap_models_and_align)
    for bar in (progress_bar.BaseProgressBar, progress_bar.JsonProgressBar):
        _wrap(bar, "_format_stats", _format_without_omega)

    _wrap(checkpoint_utils, "load_checkpoint_to_cpu", _load_as_data)
    _wrap(checkpoint_utils, "save_checkpoint", _save_or_say_why)
    guard_fairseq()
    _wrap(options, "parse_args_and_arch", _parse_with_hints)
    _wrap(models, "build_model", _build_known_model)
    _wrap(hub_utils, "from_pretrained", _load_from_folder)
    old_numpy.install()
    if torch.__version__ >= "2.6":
        # from here on torch.load refuses classes that are not listed
        listed = {**SAFE_GLOBALS, **SENT_GLOBALS}
        torch.serialization.add_safe_globals([(kind, name) for name, kind in listed.items()])


def _wrap(kind: Any, name: str, function: Callable[..., Any]) -> None:
    """Call ``function(method, self, ...)`` in the place of ``method(self, ...)``."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **options: Any) -> Any:
        return function(method, *args, **options)

    setattr(kind, name, wrapped)


def _load_as_data(load_checkpoint_to_cpu: Callable[..., Any], path: str, *args: Any, **options: Any) -> Any:
    """fairseq's loading, with a checkpoint's settings checked before it evaluates any; with any torch, as data."""
    torch_load = torch.load
    torch.load = lambda file, **_: read(file, forgets=True)
    try:
        return load_checkpoint_to_cpu(path, *args, **options)
    except AdminError as error:
        newest = newest_checkpoint(os.path.dirname(path), besides=path)
        raise AdminError(f"{error}; {newest} is whole" if newest else str(error)) from error
    except OSError:
        raise
    except Exception as error:  # of whatever is missing in what fairseq upgrades
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise AdminError(f"{path} is not a checkpoint that this fairseq reads ({what})") from error
    finally:
        torch.load = torch_load


def _parse_with_hints(parse: Callable[..., Any], parser: ArgumentParser, *args: Any, **arguments: Any) -> Any:
    hints.give(parser)
    parsed = parse(parser, *args, **arguments)
    hints.check(parsed[0] if isinstance(parsed, tuple) else parsed)
    return parsed


def _build_known_model(build_model: Callable[..., Any], cfg: Any, task: Any, *args: Any, **options: Any) -> Any:
    hints.check_model(cfg, task)
    return build_model(cfg, task, *args, **options)


def _load_from_folder(from_pretrained: Callable[..., Any], *args: Any, **options: Any) -> Any:
    hints.check_folders(*args, **options)
    return from_pretrained(*args, **options)


def _save_or_say_why(save_checkpoint: Callable[..., Any], cfg: Any, *args: Any, **options: Any) -> Any:
    with saving(cfg.save_dir):
        return save_checkpoint(cfg, *args, **options)


def _train_step_and_watch(
    train_step: Callable[..., Any], trainer: Trainer, samples: Sequence[Any], *args: Any, **options: Any
) -> Any:
    try:
        result = train_step(trainer, samples, *args, **options)
    except NotFiniteError:
        raise
    except Exception as error:  # fairseq looks for the layer by hooks that fail, with newer torch, in one of their own
        first: BaseException | None = error
        while first is not None and not isinstance(first, FloatingPointError):
            first = first.__context__
        if first is None:
            raise
        raise explain_numbers(trainer, samples, first) from error
    watch_omega(trainer)
    return result


def _start_omega_then_build_optimizer(build_optimizer: Callable[[Trainer], None], trainer: Trainer) -> None:
    hints.check_start(trainer.cfg.checkpoint, trainer.cfg.common)  # hydra's, too
    _claim_save_dir(trainer)
    warn_where_bf16_is_slow(trainer.cfg.common)
    model = trainer.get_model()
    if isinstance(model, AdminModel):
        trainer.model  # noqa: B018  (with several workers, wrapping is what moves the model to its device)
        start_omega(trainer)
    elif isinstance(getattr(model, "module", None), RuledModel):
        raise AdminError(FULLY_SHARDED)
    build_optimizer(trainer)
    if isinstance(model, AdminModel):
        fast.apply_to_trainer(trainer, model.admin_fast)


def _claim_save_dir(trainer: Trainer) -> None:
    """Before anything is written there; given back when the trainer goes, or its process ends."""
    checkpoint = trainer.cfg.checkpoint
    if checkpoint.no_save or hasattr(trainer, "has_claimed_save_dir"):
        return
    trainer.has_claimed_save_dir = True

    def claim() -> None:
        Finalize(trainer, save_dir.claim(checkpoint.save_dir), exitpriority=0)

    from_first_worker(trainer, claim)


def _log_omega_then_begin_epoch(begin_epoch: Callable[[Trainer, int], None], trainer: Trainer, epoch: int) -> None:
    if isinstance(trainer.get_model(), AdminModel):
        log_omega(trainer)  # after a checkpoint's metrics, if any, have replaced those of the start
    begin_epoch(trainer, epoch)


def _wrap_models_and_align(
    wrap_models: Callable[..., None], ensemble: EnsembleModelWithAlignment, models: Sequence[torch.nn.Module]
) -> None:
    wrap_models(ensemble, models)
    for model in models:
        if isinstance(model, AdminModel):  # may have been prepared without --print-alignment
            model.decoder.aligns = True


def _format_without_omega(
    format_stats: Callable[..., Any],
    bar: progress_bar.BaseProgressBar,
    stats: dict[str, Any],
    *args: Any,
    **options: Any,
) -> Any:
    return format_stats(bar, without_omega(stats), *args, **options)
