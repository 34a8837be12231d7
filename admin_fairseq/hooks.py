"""The one place that touches fairseq: when a trainer is about to build its optimizer, omega gets its value.

That is the last moment at which it can: half-precision optimizers then copy every parameter to fp32 masters.
And it is the first at which everything else is there: the train split is loaded, the model is on its device
and in its dtype, the process group is up, and a checkpoint, if any, has been restored.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import os
import random
import time
from dataclasses import asdict
from typing import Any, Callable, Iterator, Sequence

import fairseq
import numpy as np
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.distributed import utils as distributed_utils
from fairseq.sequence_generator import EnsembleModelWithAlignment
from fairseq.trainer import Trainer

from admin_fairseq import checkpoint, loss, metrics, optim
from admin_fairseq.errors import AdminError
from admin_fairseq.layers import FULLY_SHARDED, RuledModel
from admin_fairseq.model import AdminModel, sub_layers
from admin_fairseq.profiling import Profile, Sample, profile, read_profile

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap what of fairseq has to know of Admin, and let torch >= 2.6 load the checkpoints that fairseq writes."""
    if hasattr(Trainer._build_optimizer, "starts_omega"):  # a copy of this package under another name is a user dir too
        return
    _wrap(Trainer, "_build_optimizer", _start_omega_then_build_optimizer)
    Trainer._build_optimizer.starts_omega = True
    _wrap(Trainer, "begin_epoch", _log_omega_and_begin_epoch)
    metrics.keep_out_of_text()
    _wrap(EnsembleModelWithAlignment, "__init__", _wrap_models_and_ask)

    if torch.__version__ >= "2.6":
        # from here on torch.load refuses classes that are not listed
        torch.serialization.add_safe_globals([(kind, name) for name, kind in checkpoint.SAFE_GLOBALS.items()])


def _wrap(kind: type, name: str, function: Callable[..., None]) -> None:
    """Call ``function(method, self, ...)`` in the place of ``method(self, ...)``."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapped(*args: Any, **options: Any) -> None:
        function(method, *args, **options)

    setattr(kind, name, wrapped)


def _start_omega_then_build_optimizer(build_optimizer: Callable[[Trainer], None], trainer: Trainer) -> None:
    model = trainer.get_model()
    if isinstance(model, AdminModel):
        trainer.model  # noqa: B018  (with several workers, wrapping is what moves the model to its device)
        start_omega(trainer)
    elif isinstance(getattr(model, "module", None), RuledModel):
        raise AdminError(FULLY_SHARDED)
    build_optimizer(trainer)
    if isinstance(model, AdminModel):
        _speed_up(trainer)


def _log_omega_and_begin_epoch(begin_epoch: Callable[[Trainer, int], None], trainer: Trainer, epoch: int) -> None:
    if isinstance(trainer.get_model(), AdminModel):
        metrics.log_omega(trainer)  # after a checkpoint's metrics, if any, have replaced those of the start
    begin_epoch(trainer, epoch)


def _wrap_models_and_ask(
    wrap_models: Callable[..., None], ensemble: EnsembleModelWithAlignment, models: Sequence[torch.nn.Module]
) -> None:
    wrap_models(ensemble, models)
    for model in models:
        if isinstance(model, AdminModel):  # may have been prepared without --print-alignment
            model.decoder.aligns = True


def _speed_up(trainer: Trainer) -> None:
    """Put the faster loss and optimizer in, as --admin-fast says."""
    model, criterion = trainer.get_model(), trainer.get_criterion()

    def wanted(measured: tuple[str, ...]) -> bool:
        return model.admin_fast == "all" or (model.admin_fast == "measured" and trainer.device.type in measured)

    if wanted(loss.MEASURED) and type(criterion) is LabelSmoothedCrossEntropyCriterion:  # not what is derived from it
        loss.make_blockwise(criterion)
    if wanted(optim.MEASURED):
        optim.fuse(trainer.optimizer)


def start_omega(trainer: Trainer) -> None:
    """Give omega its first value, unless a checkpoint or the architecture already did; say which in the log."""
    model = trainer.get_model()
    if model.omega_source == "unset":
        file = model.admin_profile
        if file is not None:
            _from_first_worker(trainer, lambda: _read(file, model)).apply(model)
            model.omega_source = file
        else:
            _profile(trainer)
            return
    elif model.admin_profile is not None:
        logger.warning(f"--admin-profile {model.admin_profile} is not read: omega comes from {model.omega_source}")
    elif trainer.cfg.checkpoint.finetune_from_model and model.admin_init != "profile":
        logger.warning(f"--admin-init {model.admin_init} has no effect: omega comes from {model.omega_source}")
    logger.info(f"Admin: no profiling, omega from {model.omega_source}; {_first_and_last(model)}")


def _read(file: str, model: AdminModel) -> Profile:
    depth = {name: len(sub_layers(stack)) for name, stack in model.stacks().items()}
    return read_profile(file, depth.get("encoder", 0), depth["decoder"])


def _from_first_worker(trainer: Trainer, read: Callable[[], Profile]) -> Profile:
    """What the first worker reads: each machine may have another file of that name, or none.

    Raises:
        AdminError: on every worker, what the first one met.
    """
    if trainer.data_parallel_world_size == 1:
        return read()
    outcome: Any = None
    if trainer.is_data_parallel_master:
        try:
            outcome = asdict(read())
        except AdminError as error:
            outcome = str(error)
    outcome = distributed_utils.broadcast_object(
        outcome, src_rank=0, group=trainer.data_parallel_process_group, dist_device=trainer.device
    )
    if isinstance(outcome, str):
        raise AdminError(outcome)
    return Profile(**outcome)


def measure(trainer: Trainer, samples: list[Sample], progress: bool = False) -> Profile:
    """The pre-pass on these batches of every worker, which sets omega; the profile says how it was made."""
    model, cfg = trainer.get_model(), trainer.cfg

    def reduce(moments: torch.Tensor) -> torch.Tensor:
        if trainer.data_parallel_world_size > 1:
            distributed_utils.all_reduce(moments, group=trainer.data_parallel_process_group)
        return moments

    with torch.autocast("cuda", enabled=cfg.common.amp and trainer.cuda):
        result = profile(model, samples, reduce, progress)
    result.settings = {
        "arch": getattr(cfg.model, "_name", None),
        "world_size": trainer.data_parallel_world_size,
        "seed": cfg.common.seed,
        "dtype": str(next(model.parameters()).dtype).replace("torch.", ""),
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
    }
    return result


def _profile(trainer: Trainer) -> None:
    """The pre-pass on the first training batches of every worker, told in the log and left in the run's folder."""
    model, cfg = trainer.get_model(), trainer.cfg
    started = time.time()
    with _random_state_kept(trainer.device):
        samples = first_samples(trainer, model.admin_profile_batches or 1)
        result = measure(trainer, samples, trainer.is_data_parallel_master)
    counts = {stack: f"{len(getattr(result, stack))} {stack}" for stack in model.stacks()}
    tokens = [f"{result.tokens[stack]:,} {'source' if stack == 'encoder' else 'target'}" for stack in counts]
    line = (
        f"Admin: profiled {' and '.join(counts.values())} sub-layers on {' and '.join(tokens)} tokens"
        f" in {time.time() - started:.1f} s; {_first_and_last(model)}"
    )
    if trainer.is_data_parallel_master and not cfg.checkpoint.no_save:
        path = os.path.join(cfg.checkpoint.save_dir, "admin_profile.json")
        result.write(path)
        line += f"; written to {path}"
    logger.info(line)


def _first_and_last(model: AdminModel) -> str:
    parts = []
    for name, stack in model.stacks().items():
        norms = list(sub_layers(stack).values())
        if norms:
            first, last = (norm.omega.float().mean().item() for norm in (norms[0], norms[-1]))
            parts.append(f"{name} omega {first:.3f} to {last:.3f}")
    return ", ".join(parts)


def first_samples(trainer: Trainer, count: int) -> list[Sample]:
    """The batches that this worker's first ``count`` updates will see, without consuming them."""
    cfg, model = trainer.cfg, trainer.get_model()
    epoch_itr = trainer.get_train_iterator(
        epoch=1, load_dataset=False, disable_iterator_cache=trainer.task.has_sharded_data("train")
    )
    epoch_itr = copy.copy(epoch_itr)  # the trainer's own may be cached and must not move
    epoch_itr.num_workers = epoch_itr.buffer_size = 0
    epoch_itr.persistent_workers = False
    batches = epoch_itr.next_epoch_itr(
        shuffle=epoch_itr.next_epoch_idx > cfg.dataset.curriculum,
        fix_batches_to_gpus=cfg.distributed_training.fix_batches_to_gpus,
    )
    needed = {"src_tokens", "prev_output_tokens"} if hasattr(model, "encoder") else {"src_tokens"}
    samples = []
    for number, batch in enumerate(itertools.islice(batches, count)):
        # a worker whose shard has run out runs fairseq's dummy batch, which does not count
        sample, is_dummy = trainer._prepare_sample(batch)
        if not needed <= set(sample.get("net_input", ())):
            raise AdminError(
                f"the batches of task {cfg.task._name} have no net_input with {' and '.join(sorted(needed))} to"
                " profile on; train with --admin-init logn, or on a translation or language_modeling task"
            )
        # Masks by the batch's place in the global order, so that workers draw what one process would;
        # the first are those of the first update.
        place = number * trainer.data_parallel_world_size + trainer.data_parallel_rank
        samples.append(Sample(sample["net_input"], not is_dummy, cfg.common.seed + place))
    if len(samples) < count:
        logger.warning(f"an epoch has only {len(samples)} batches, not {count}; profiling on those")
    return samples


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        yield
    np.random.set_state(numpy_state)
    random.setstate(python_state)
