"""What the models of all our architectures share: fairseq's Transformer, with options of its own."""

from __future__ import annotations

import logging
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, ClassVar, Mapping

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from torch import nn

from admin_fairseq import weights
from admin_fairseq.config import POSITIONS, as_namespace
from admin_fairseq.errors import AdminError

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")


class FamilyModel(nn.Module):
    """A Transformer of one of our architectures; mixed in before fairseq's model class."""

    method: ClassVar[str]  # its name, as in the architectures'
    own_options: ClassVar[dict[str, Any]] = {"init_weights": None}  # and their defaults; None is for settle

    @staticmethod
    def add_own_args(parser: ArgumentParser) -> None:
        """Add what ``own_options`` lists to the command line."""
        parser.add_argument(
            "--init-weights",
            choices=[*weights.STARTS],
            help="how weights start: as fairseq draws them, or as the authors' fairseq did, with feed-forward networks"
            " from Xavier's uniform distribution and biases 0 (default: authors where Admin's omega is profiled, else"
            " fairseq)",
        )

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        super().add_args(parser)
        cls.add_own_args(parser)

    @classmethod
    def check(cls, args: Namespace) -> None:
        """Refuse options that the method cannot honour, before anything is read or written.

        Raises:
            AdminError: it cannot.
        """
        refuse_other(args, {"init_weights": weights.STARTS})

    @classmethod
    def settle(cls, args: Namespace) -> None:
        """Fill in the defaults that depend on other options, so that a checkpoint says what it began from."""
        args.init_weights = args.init_weights or "fairseq"

    @classmethod
    def build_model(cls, args: Any, task: Any) -> FamilyModel:
        args = Namespace(**{**cls.own_options, **vars(as_namespace(args))})  # a checkpoint may be older than an option
        config = task.args if task.cfg is None else task.cfg  # of a legacy task, and of any other
        for limit in POSITIONS:
            if not hasattr(args, limit):  # hydra's model section does not repeat what the task knows
                setattr(args, limit, getattr(config, limit, None))
        model = super().build_model(args, task)
        for module in model.modules():
            module.can_use_fastpath = False  # fairseq 0.12.2's own encoder, which fails with torch 1.13 and newer
        weights.STARTS[args.init_weights](model)
        model.finish(args)
        return model

    def finish(self, args: Namespace) -> None:
        """Make of a stock model that was just built one of this method."""

    def prepare_for_inference_(self, cfg: Any) -> None:
        """As in fairseq, whose fairseq-generate takes --bf16 and does nothing about it.

        A checkpoint's own settings, which fairseq passes where no command runs, say how it was trained.
        """
        super().prepare_for_inference_(cfg)
        is_command = cfg.common_eval.path is not None
        if is_command and cfg.common.bf16 and not cfg.common.fp16:
            warn_where_bf16_is_slow(cfg.common)
            self.bfloat16()


def warn_where_bf16_is_slow(common: Any) -> None:
    """By fairseq's section of that name, and by what Linux says of this processor; elsewhere nothing is known."""
    if not common.bf16 or (torch.cuda.is_available() and not common.cpu):
        return
    if CPUINFO.exists() and not re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", CPUINFO.read_text()):
        logger.warning("--bf16: this processor has no bf16 instructions (avx512_bf16, amx_bf16); fp32 may be faster")


class FamilyLanguageModel(FamilyModel):
    """A decoder-only one; mixed in before fairseq's class."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, TransformerLanguageModelConfig(), delete_default=True)
        cls.add_own_args(parser)


def refuse_other(args: Namespace, choices: Mapping[str, Any], hint: str = "") -> None:
    """hydra does not check choices.

    Raises:
        AdminError: an option has a value that is none of its ``choices``.
    """
    for option, known in choices.items():
        if getattr(args, option) not in known:
            *others, last = known
            name = option.replace("_", "-")
            raise AdminError(f"--{name} {getattr(args, option)}: choose {', '.join(others)} or {last}{hint}")
