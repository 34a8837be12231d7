"""What goes wrong in a training, in one line: where numbers stop being finite, and what a full disk has left.

Omega is looked at every 100 updates, which costs less than a hundredth of one update.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import zipfile
from functools import partial
from typing import Any, Iterator, Sequence

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from admin_fairseq.errors import AdminError, NotFiniteError
from admin_fairseq.files import reason
from admin_fairseq.model import AdminModel
from admin_fairseq.norm import OmegaLayerNorm
from admin_fairseq.omega import observed, sub_layers
from admin_fairseq.profile_file import sub_layer_name

logger = logging.getLogger(__name__)

EVERY = 100  # updates
REMEDY = "try a lower --lr, a longer --warmup-updates, or --clip-norm"


def norms_of(model: AdminModel) -> dict[str, OmegaLayerNorm]:
    """The omegas' owners by the name that their sub-layer has elsewhere: ``decoder.layers.0.self_attn``."""
    return {
        f"{stack_name}.{sub_layer_name(name)}": norm
        for stack_name, stack in model.stacks().items()
        for name, norm in sub_layers(stack).items()
    }


def watch_omega(trainer: Trainer) -> None:
    """At a process's first update, and now and then, warn once of each sub-layer whose omega has crossed zero.

    Raises:
        NotFiniteError: an omega is not finite.
    """
    model, update = trainer.get_model(), trainer.get_num_updates()
    is_first = "admin_warned" not in vars(trainer)
    if not (is_first or update % EVERY == 1) or not isinstance(model, AdminModel):
        return
    norms = norms_of(model)
    omegas = [norm.omega.detach().float() for norm in norms.values()]
    numbers = torch.stack([torch.stack([omega.min(), omega.sum()]) for omega in omegas]).tolist() if omegas else []
    warned = trainer.__dict__.setdefault("admin_warned", set())
    for name, (lowest, total) in zip(norms, numbers):
        if total - total != 0:
            raise NotFiniteError(f"update {update}: omega of {name} is not finite; {REMEDY}{_or_go_on(trainer)}")
        if lowest <= 0 and name not in warned and trainer.is_data_parallel_master:
            warned.add(name)
            logger.warning(
                f"update {update}: omega of {name} is down to {lowest:.3g}: the sub-layer drops or inverts its shortcut"
                " there; if the loss suffers, try a lower --lr, or --admin-omega fixed"
            )


def explain_numbers(trainer: Trainer, samples: Sequence[Any], error: BaseException) -> NotFiniteError:
    """Which sub-layer fairseq's FloatingPointError comes from, at which update, and what to try."""
    model = trainer.get_model()
    where = f"{' '.join(str(error).split())[:100]}"
    with contextlib.suppress(Exception):  # a diagnosis, of a model that is broken
        found = _first_not_finite(trainer, model, samples)
        where = f"{found} is not finite ({where})" if found else where
    return NotFiniteError(f"update {trainer.get_num_updates() + 1}: {where}; {REMEDY}{_or_go_on(trainer)}")


def _first_not_finite(trainer: Trainer, model: torch.nn.Module, samples: Sequence[Any]) -> str | None:
    """In forward order: of a sub-layer its omega, its input or its branch; else the last parameter's gradient."""
    found: list[str] = []

    def look(name: str, norm: OmegaLayerNorm, x: Tensor, f: Tensor) -> None:
        parts = {"omega": norm.omega, "the shortcut": x, "the residual branch": f}
        found.extend(f"{part} of {name}" for part, value in parts.items() if not torch.isfinite(value).all())

    if isinstance(model, AdminModel):
        with torch.no_grad(), observed({norm: partial(look, name, norm) for name, norm in norms_of(model).items()}):
            for sample in samples:
                sample, is_dummy = trainer._prepare_sample(sample)
                if not found and not is_dummy:
                    model(**sample["net_input"])
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    found += [f"the weight {name}" for name in broken[:1]]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    found += [f"the gradient of {name}" for name in wrong[-1:]]
    return found[0] if found else None


def _or_go_on(trainer: Trainer) -> str:
    newest = newest_checkpoint(trainer.cfg.checkpoint.save_dir)
    return f", and go on by --restore-file {newest}, the newest checkpoint there" if newest else ""


def newest_checkpoint(folder: str, besides: str | None = None) -> str | None:
    """The newest checkpoint in a folder that was written to its end."""
    names = [path for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint*.pt")) if path != besides]
    whole = [path for path in names if _is_whole(path)]
    return max(whole, key=os.path.getmtime, default=None)


def _is_whole(path: str) -> bool:
    """An archive's table is at its end."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


@contextlib.contextmanager
def saving(folder: str) -> Iterator[None]:
    """A full disk while fairseq saves ends in one line, which says what there is to go on from.

    Raises:
        AdminError: a checkpoint cannot be written.
    """
    fairseqs = logging.getLogger("fairseq.checkpoint_utils")
    fairseqs.addFilter(_is_no_traceback)
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of it
        for partial_file in glob.glob(os.path.join(glob.escape(folder), "checkpoint*.pt.tmp")):
            with contextlib.suppress(OSError):
                os.remove(partial_file)
        newest = newest_checkpoint(folder)
        rest = f"; go on from {newest}, the newest that is whole, by --restore-file" if newest else ""
        raise AdminError(f"cannot write a checkpoint to {folder}: {reason(error)}{rest}") from error
    finally:
        fairseqs.removeFilter(_is_no_traceback)


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Traceback")
