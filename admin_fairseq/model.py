"""Admin Transformers: fairseq's own layers, stacks and models, with an omega in every Post-LN sub-layer.

``residual_connection`` hands on the pair (f, x), and the sub-layer's norm computes the equation of
:mod:`admin_fairseq.norm`. Parameter names stay fairseq's; omega is ``<stack>.layers.<n>.<sub-layer>_layer_norm.omega``.
"""

from __future__ import annotations

import logging
import math
import re
from argparse import ArgumentParser, Namespace
from typing import Any, ClassVar

import torch
from fairseq.models import register_model
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import Tensor, nn

from admin_fairseq import fast
from admin_fairseq.architectures import register_family
from admin_fairseq.errors import AdminError
from admin_fairseq.family import FamilyLanguageModel, refuse_other
from admin_fairseq.norm import OmegaLayerNorm
from admin_fairseq.omega import CLOSED_FORMS, MARGIN, closed_form, depends_on_depth, set_omega, sub_layers
from admin_fairseq.rules import FAST_PATH_COPIES, Rule, RuledModel

logger = logging.getLogger(__name__)


class AdminRule(Rule):
    """LN(omega x + f), with a trainable omega that starts from measured variances.

    Draws no random number: from the same seed and start of weights, every weight shared with the stock layer is its
    to the bit.
    """

    dropout_module: nn.Module

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        for name in self.norm_names():
            setattr(self, name, OmegaLayerNorm(self.embed_dim, self.dropout_module))
        self.dropout_module = nn.Identity()  # the norms own it now

    @staticmethod
    def set_up_stacks(stacks: dict[str, nn.Module]) -> None:
        # The first omega of a stack would only rescale embeddings against fixed positions: it stays 1.
        for stack in stacks.values():
            for norm in list(sub_layers(stack).values())[:1]:
                norm.omega.requires_grad_(False)

    def residual_connection(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


class AdminModel(RuledModel):
    """What Admin models share; mixed in before fairseq's model class.

    ``omega_source`` says where omega's present values come from. While it is "unset" the model still is a
    plain Post-LN Transformer (omega 1), waiting for the profiling pre-pass.
    """

    method = "admin"
    rule = AdminRule
    own_options: ClassVar = {
        **RuledModel.own_options,
        "admin_init": "profile",
        "admin_profile": None,
        "admin_profile_batches": None,
        "admin_margin": None,
        "admin_omega": "vector",
        "admin_fast": "measured",
    }
    omega_source = "unset"
    init_weights: str
    admin_init: str
    admin_profile: str | None
    admin_profile_batches: int | None
    admin_margin: float | None
    admin_fast: str

    @staticmethod
    def add_own_args(parser: ArgumentParser) -> None:
        RuledModel.add_own_args(parser)
        forms = (
            f"{name}: {(form.__doc__ or 'a closed form').strip().splitlines()[0]}"
            for name, form in CLOSED_FORMS.items()
        )
        parser.add_argument(
            "--admin-init",
            choices=["profile", *CLOSED_FORMS],
            help="how omega starts. profile: from a profiling pre-pass over the first training batches (default);"
            f" {'; '.join(forms)}",
        )
        parser.add_argument(
            "--admin-margin",
            type=float,
            metavar="K",
            help="how far the pre-pass keeps from Post-LN: omega_i^2 = 1 + K times the sum of Var[f_j] over the"
            f" sub-layers before (default: {MARGIN:g}; the paper's: 1; with --admin-profile: that of the profile)",
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
            choices=fast.MODES,
            help="which of the faster computations of the same values to use: those that were measured to help on this"
            " kind of device (measured, default), those too that were not measured there (all), or none (off)",
        )

    @classmethod
    def check(cls, args: Namespace) -> None:
        super().check(args)
        init, profile, batches = args.admin_init, args.admin_profile, args.admin_profile_batches
        margin = args.admin_margin
        refuse_other(args, {"admin_omega": ("vector", "scalar", "fixed"), "admin_fast": fast.MODES})
        starts = {"admin_init": ("profile", *CLOSED_FORMS)}
        refuse_other(args, starts, hint="; one of your own needs its folder as --user-dir")
        if profile is not None and init != "profile":
            raise AdminError(f"--admin-profile and --admin-init {init} exclude each other; give one of them")
        if batches is not None and (profile is not None or init != "profile"):
            given = "--admin-profile" if profile is not None else f"--admin-init {init}"
            raise AdminError(f"--admin-profile-batches has no effect with {given}, which does not profile; drop it")
        if batches is not None and batches < 1:
            raise AdminError(f"--admin-profile-batches must be at least 1, not {batches}")
        if margin is not None and init != "profile":
            raise AdminError(f"--admin-margin has no effect with --admin-init {init}, which does not profile; drop it")
        if margin is not None and not 0 < margin < math.inf:
            raise AdminError(f"--admin-margin must be a positive number, not {margin}")

    @classmethod
    def settle(cls, args: Namespace) -> None:
        """The authors' weights for a profiled omega; a closed form does not see how large branches are."""
        if args.admin_init == "profile":
            args.init_weights = args.init_weights or "authors"
            if args.admin_profile is None and args.admin_margin is None:
                args.admin_margin = MARGIN
        super().settle(args)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> AdminModel:
        model = super().build_model(args, task)
        config = task.args if task.cfg is None else task.cfg
        model.decoder.aligns = getattr(config, "load_alignments", False)
        return model

    def finish(self, args: Namespace) -> None:
        super().finish(args)
        for option in (
            "init_weights",
            "admin_init",
            "admin_profile",
            "admin_profile_batches",
            "admin_margin",
            "admin_fast",
        ):
            setattr(self, option, getattr(args, option))
        fast.apply(self.stacks(), self.admin_fast)
        for stack in self.stacks().values():
            norms = list(sub_layers(stack).values())
            for norm in norms:
                if args.admin_omega == "scalar":
                    norm.omega = nn.Parameter(norm.omega[:1].clone(), norm.omega.requires_grad)
                elif args.admin_omega == "fixed":
                    norm.omega.requires_grad_(False)
            if args.admin_init != "profile":
                set_omega(norms, closed_form(args.admin_init, len(norms)))
                self.omega_source = f"--admin-init {args.admin_init}"

    @property
    def margin(self) -> float:
        """K, of a pre-pass."""
        return MARGIN if self.admin_margin is None else self.admin_margin

    def depth_dependent_start(self) -> str | None:
        form = CLOSED_FORMS.get(self.admin_init)
        return f"--admin-init {self.admin_init}" if form and depends_on_depth(form) else None

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
class AdminLanguageModel(AdminModel, FamilyLanguageModel, TransformerLanguageModel):
    """Decoder-only language model with Admin."""


register_family("admin")
register_family("admin_logn", "admin", admin_init="logn")
register_family("admin_sqrt", "admin", admin_init="sqrt")
register_family("admin_fixed", "admin", admin_omega="fixed")
register_family("admin_scalar", "admin", admin_omega="scalar")


def _warn_if_unset(model: AdminModel, _: Any) -> None:
    """A training loop other than fairseq's Trainer never runs the pre-pass; do not let it go unnoticed."""
    if model.omega_source == "unset" and model.training and torch.is_grad_enabled():
        logger.warning("omega was never initialised: training a plain Post-LN Transformer (call admin_fairseq.profile)")
        model.omega_source = "nowhere"
