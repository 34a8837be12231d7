"""Admin Transformers: fairseq's own layers, stacks and models, with an omega in every Post-LN sub-layer.

``residual_connection`` hands on the pair (f, x), and the sub-layer's norm computes the equation of
:mod:`admin_fairseq.norm`. Parameter names stay fairseq's; omega is ``<stack>.layers.<n>.<sub-layer>_layer_norm.omega``.
"""

from __future__ import annotations

import logging
import math
import re
from argparse import ArgumentParser, Namespace
from typing import Any, ClassVar, Iterable, Sequence

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from torch import Tensor, nn

from admin_fairseq.attention import speed_up
from admin_fairseq.errors import AdminError
from admin_fairseq.layers import FAST_PATH_COPIES, Rule, RuledModel
from admin_fairseq.norm import OmegaLayerNorm

logger = logging.getLogger(__name__)


class AdminRule(Rule):
    """Draws no random number: from the same seed, every weight shared with the stock layer is its to the bit."""

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        for name in self.norm_names():
            setattr(self, name, OmegaLayerNorm(self.embed_dim, self.dropout_module))
        self.dropout_module = nn.Identity()  # the norms own it now

    @staticmethod
    def set_up_stack(stack: nn.Module) -> None:
        # The first omega of a stack would only rescale embeddings against fixed positions: it stays 1.
        for norm in list(sub_layers(stack).values())[:1]:
            norm.omega.requires_grad_(False)

    def residual_connection(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


def sub_layers(stack: nn.Module) -> dict[str, OmegaLayerNorm]:
    """The omegas' owners in forward order, by name: two an encoder layer, three a decoder layer."""
    return {name: module for name, module in stack.named_modules() if isinstance(module, OmegaLayerNorm)}


def set_omega(norms: Iterable[OmegaLayerNorm], values: Sequence[float]) -> None:
    """Fill each sub-layer's omega with one number, in forward order."""
    with torch.no_grad():
        for norm, value in zip(norms, values):
            norm.omega.fill_(value)


def logn_omega(sub_layers: int) -> float:
    """omega of a stack of N sub-layers for an O(log N) output change, without profiling.

    sqrt((N + 1) / ln(N + 1) - 1), from microsoft/admin-torch (Liu et al. 2020, Corollary 2).
    """
    return math.sqrt((sub_layers + 1) / math.log(sub_layers + 1) - 1)


# --admin-init without profiling: a stack of N sub-layers starts from this omega. As with a profile, the first sub-layer
# keeps omega 1 and the others are trained; admin-torch by default does not train omega, and sets the first one too.
CLOSED_FORMS = {
    "logn": logn_omega,
    "sqrt": math.sqrt,  # microsoft/admin-torch's O(1): the output change does not grow with N
    "unit": lambda sub_layers: 1.0,  # stock Post-LN
}


FAST = ("measured", "all", "off")  # --admin-fast


class AdminModel(RuledModel):
    """What Admin models share; mixed in before fairseq's model class.

    ``omega_source`` says where omega's present values come from. While it is "unset" the model still is a
    plain Post-LN Transformer (omega 1), waiting for the profiling pre-pass.
    """

    rule = AdminRule
    own_options: ClassVar = {
        "admin_init": "profile",
        "admin_profile": None,
        "admin_profile_batches": None,
        "admin_omega": "vector",
        "admin_fast": "measured",
    }
    omega_source = "unset"
    admin_init: str
    admin_profile: str | None
    admin_profile_batches: int | None
    admin_fast: str

    @staticmethod
    def add_own_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--admin-init",
            choices=["profile", *CLOSED_FORMS],
            help="how omega starts: from a profiling pre-pass over the first training batches (default), from"
            " the closed forms sqrt((N+1)/ln(N+1)-1) (logn) or sqrt(N) (sqrt) for N sub-layers, or at 1 (unit: plain"
            " Post-LN)",
        )
        parser.add_argument(
            "--admin-profile",
            metavar="FILE",
            help="start omega from this profile instead of profiling: an admin_profile.json, or the authors'"
            " profile.ratio.init",
        )
        parser.add_argument(
            "--admin-profile-batches",
            type=int,
            metavar="N",
            help="profile on the first N training batches of each worker (default: 1)",
        )
        parser.add_argument(
            "--admin-omega",
            choices=["vector", "scalar", "fixed"],
            help="what is trained of omega: one number a dimension (vector, default), one number a sub-layer (scalar),"
            " or nothing (fixed)",
        )
        parser.add_argument(
            "--admin-fast",
            choices=FAST,
            help="which of the faster computations of the same values to use: those that were measured to help on this"
            " kind of device (measured, default), those too that were not measured there (all), or none (off)",
        )

    @classmethod
    def check(cls, args: Namespace) -> None:
        super().check(args)
        init, profile, batches = args.admin_init, args.admin_profile, args.admin_profile_batches
        if init not in ("profile", *CLOSED_FORMS):
            raise AdminError(f"--admin-init {init}: choose profile, logn, sqrt or unit")
        if args.admin_omega not in ("vector", "scalar", "fixed"):
            raise AdminError(f"--admin-omega {args.admin_omega}: choose vector, scalar or fixed")
        fast = getattr(args, "admin_fast", "measured")
        if fast not in FAST:
            raise AdminError(f"--admin-fast {fast}: choose measured, all or off")
        if profile is not None and init != "profile":
            raise AdminError(f"--admin-profile and --admin-init {init} exclude each other; give one of them")
        if batches is not None and (profile is not None or init != "profile"):
            given = "--admin-profile" if profile is not None else f"--admin-init {init}"
            raise AdminError(f"--admin-profile-batches has no effect with {given}, which does not profile; drop it")
        if batches is not None and batches < 1:
            raise AdminError(f"--admin-profile-batches must be at least 1, not {batches}")

    @classmethod
    def build_model(cls, args: Any, task: Any) -> AdminModel:
        model = super().build_model(args, task)
        config = task.args if task.cfg is None else task.cfg
        model.decoder.aligns = getattr(config, "load_alignments", False)
        return model

    @classmethod
    def finish(cls, model: AdminModel, args: Namespace) -> AdminModel:
        for option in ("admin_init", "admin_profile", "admin_profile_batches"):
            setattr(model, option, getattr(args, option))
        model.admin_fast = getattr(args, "admin_fast", "measured")  # checkpoints of version 0.1.0 lack it
        if model.admin_fast != "off":
            speed_up(model.stacks(), everywhere=model.admin_fast == "all")
        for stack in model.stacks().values():
            norms = list(sub_layers(stack).values())
            for norm in norms:
                norm.fast = model.admin_fast
                if args.admin_omega == "scalar":
                    norm.omega = nn.Parameter(norm.omega[:1].clone(), norm.omega.requires_grad)
                elif args.admin_omega == "fixed":
                    norm.omega.requires_grad_(False)
            if args.admin_init != "profile":
                set_omega(norms[1:], [CLOSED_FORMS[args.admin_init](len(norms))] * len(norms))
                model.omega_source = f"--admin-init {args.admin_init}"
        return model

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_forward_pre_hook(_warn_if_unset)

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Whatever is loaded brings its own omega; a stock Post-LN checkpoint brings omega 1.

        Raises:
            AdminError: the checkpoint is of a Pre-LN model.
        """
        super().upgrade_state_dict_named(state_dict, name)
        if "encoder.layer_norm.weight" in state_dict or "decoder.layer_norm.weight" in state_dict:
            raise AdminError("the checkpoint is of a Pre-LN model; Admin can continue Post-LN models only")
        self.omega_source = "the checkpoint"
        for key in list(state_dict):
            layer = re.fullmatch(r"(?:en|de)coder\.layers\.\d+\.(\w+)(\.weight)?", key)
            if layer and layer[1] in FAST_PATH_COPIES:
                del state_dict[key]
        for stack_name, stack in self.stacks().items():
            for norm_name, norm in sub_layers(stack).items():
                weight, omega = (f"{stack_name}.{norm_name}.{part}" for part in ("weight", "omega"))
                if weight in state_dict and omega not in state_dict:
                    state_dict[omega] = state_dict[weight].new_ones(norm.omega.shape)
                    self.omega_source = "a stock Post-LN checkpoint (omega 1)"


@register_model("transformer_admin")
class AdminTransformer(AdminModel, TransformerModel):
    """Encoder-decoder Transformer with Admin in both stacks."""


@register_model("transformer_lm_admin")
class AdminLanguageModel(AdminModel, TransformerLanguageModel):
    """Decoder-only language model with Admin."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, TransformerLanguageModelConfig(), delete_default=True)
        cls.add_own_args(parser)


def _warn_if_unset(model: AdminModel, _: Any) -> None:
    """A training loop other than fairseq's Trainer never runs the pre-pass; do not let it go unnoticed."""
    if model.omega_source == "unset" and model.training and torch.is_grad_enabled():
        logger.warning("omega was never initialised: training a plain Post-LN Transformer (call admin_fairseq.profile)")
        model.omega_source = "nowhere"
