"""The same values, computed faster: --admin-fast. What helps where is one table (:mod:`admin_fairseq.fast.measured`).

Layers, stacks, criterion and optimizer keep fairseq's classes as bases, parameters and states, and fall back to
fairseq's own computation wherever the faster one does not serve.
"""

from __future__ import annotations

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.trainer import Trainer
from torch import nn

from admin_fairseq.fast import adam, attention, dropout, loss
from admin_fairseq.fast.measured import MODES, wanted
from admin_fairseq.fast.norm import FastOmegaLayerNorm
from admin_fairseq.omega import sub_layers

__all__ = ["MODES", "apply", "apply_to_trainer"]


def apply(stacks: dict[str, nn.Module], mode: str) -> None:
    """Let the stacks of an Admin model use what --admin-fast ``mode`` asks for, in place."""
    if mode == "off":
        return
    for stack in stacks.values():
        for norm in sub_layers(stack).values():
            norm.__class__ = FastOmegaLayerNorm
            norm.mode = mode
    attention.speed_up(stacks, mode)
    dropout.speed_up(stacks, mode)


def apply_to_trainer(trainer: Trainer, mode: str) -> None:
    """Put the faster loss and optimizer into a trainer that has its optimizer."""
    criterion = trainer.get_criterion()
    is_stock = type(criterion) is LabelSmoothedCrossEntropyCriterion  # not what is derived from it
    if is_stock and wanted("loss", trainer.device, mode):
        loss.speed_up(criterion)
    if wanted("adam", trainer.device, mode):
        adam.fuse(trainer.optimizer)
