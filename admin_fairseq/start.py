"""omega's first value in a trainer of fairseq: from a checkpoint, a file, a closed form, or the profiling pre-pass.

The pre-pass sees the batches of the first updates, on every worker, and leaves the data iterator and all random states
as it found them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import random
import time
from dataclasses import asdict
from typing import Any, Callable, Iterator

import fairseq
import numpy as np
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from admin_fairseq.errors import AdminError
from admin_fairseq.model import AdminModel
from admin_fairseq.omega import sub_layers
from admin_fairseq.profile_file import Profile, read_profile
from admin_fairseq.profiling import Sample, profile
from admin_fairseq.weights import STARTS

logger = logging.getLogger(__name__)


def start_omega(trainer: Trainer) -> None:
    """Give omega its first value, unless a checkpoint or the architecture already did; say which in the log."""
    model = trainer.get_model()
    if model.omega_source == "unset":
        file = model.admin_profile
        if file is not None:
            found = Profile(**from_first_worker(trainer, lambda: asdict(_read(file, model))))
            found.apply(model)
            model.omega_source = f"{file} (margin {found.margin:g})"
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
    profile = read_profile(file, depth.get("encoder", 0), depth["decoder"])
    weights = profile.settings.get("init_weights")
    if weights in [*STARTS] and weights != model.init_weights:
        logger.warning(f"{file} was profiled with --init-weights {weights}, and this model starts otherwise: add that")
    return profile if model.admin_margin is None else profile.with_margin(model.admin_margin)


def from_first_worker(trainer: Trainer, work: Callable[[], Any]) -> Any:
    """What ``work`` returns on the first worker (anything but text): each machine may have files of its own.

    Raises:
        AdminError: on every worker, what the first one met.
    """
    if trainer.data_parallel_world_size == 1:
        return work()
    outcome: Any = None
    if trainer.is_data_parallel_master:
        try:
            outcome = work()
        except AdminError as error:
            outcome = str(error)
    outcome = distributed_utils.broadcast_object(
        outcome, src_rank=0, group=trainer.data_parallel_process_group, dist_device=trainer.device
    )
    if isinstance(outcome, str):
        raise AdminError(outcome)
    return outcome


def profile_batches(trainer: Trainer, samples: list[Sample], progress: bool = False) -> Profile:
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
        "init_weights": model.init_weights,
        "world_size": trainer.data_parallel_world_size,
        "seed": cfg.common.seed,
        "dtype": str(next(model.parameters()).dtype).replace("torch.", ""),
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
    }
    return result


def _profile(trainer: Trainer) -> None:
    """The pre-pass on the first training batches of every worker, reported in the log and left in the run's folder."""
    model, cfg = trainer.get_model(), trainer.cfg
    started = time.time()
    with _random_state_kept(trainer.device):
        samples = first_samples(trainer, model.admin_profile_batches or 1)
        result = profile_batches(trainer, samples, trainer.is_data_parallel_master)
    counts = {stack: f"{len(getattr(result, stack))} {stack}" for stack in model.stacks()}
    tokens = [f"{result.tokens[stack]:,} {'source' if stack == 'encoder' else 'target'}" for stack in counts]
    line = (
        f"Admin: profiled {' and '.join(counts.values())} sub-layers on {' and '.join(tokens)} tokens"
        f" in {time.time() - started:.1f} s; margin {result.margin:g}, {_first_and_last(model)}"
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
