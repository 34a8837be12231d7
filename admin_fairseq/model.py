"""Admin Transformers: fairseq's own layers, stacks and model, with an omega in every Post-LN sub-layer.

No ``forward`` is copied from fairseq. Its layers call ``residual_connection(f, x)`` and then, in Post-LN,
the sub-layer's LayerNorm; here the first hands on the pair and the second computes the equation of
:mod:`admin_fairseq.norm`. Parameter names stay fairseq's; omega is ``<stack>.layers.<n>.<sub-layer>_layer_norm.omega``.
"""

from __future__ import annotations

import logging
import math
import re
from argparse import ArgumentParser, Namespace
from typing import Any, Iterable, Sequence

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
)
from fairseq.models.transformer import transformer_legacy as stock
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn

from admin_fairseq.errors import AdminError
from admin_fairseq.norm import OmegaLayerNorm

logger = logging.getLogger(__name__)

# fairseq 0.12.2 registers these copies of an encoder layer's weights for an inference-only fast path that
# knows nothing of omega; they never get a gradient.
FAST_PATH_COPIES = tuple(f"{m}_{p}" for m in ("in_proj", "out_proj", "fc1", "fc2") for p in ("weight", "bias"))


class AdminLayer(nn.Module):
    """What an encoder and a decoder layer share; mixed in before fairseq's layer class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, _norm in list(self.named_children()):
            if name.endswith("_layer_norm"):
                setattr(self, name, OmegaLayerNorm(self.embed_dim, self.dropout_module))
        self.dropout_module = nn.Identity()  # the norms own it now

    def residual_connection(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


class AdminEncoderLayer(AdminLayer, TransformerEncoderLayerBase):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.can_use_fastpath = False
        for name in FAST_PATH_COPIES:
            self._parameters.pop(name, None)

    # 0.12.2 fills the copies here
    _load_from_state_dict = nn.Module._load_from_state_dict


class AdminDecoderLayer(AdminLayer, TransformerDecoderLayerBase):
    pass


def _wrap(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """Activation checkpointing and FSDP as fairseq's stacks apply them to their layers."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


class AdminEncoder(TransformerEncoderBase):
    def build_encoder_layer(self, cfg: TransformerConfig) -> nn.Module:
        return _wrap(AdminEncoderLayer(cfg, return_fc=self.return_fc), cfg)


class AdminDecoder(TransformerDecoderBase):
    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        return _wrap(AdminDecoderLayer(cfg, no_encoder_attn), cfg)


def sub_layers(stack: nn.Module) -> dict[str, OmegaLayerNorm]:
    """The omegas' owners in forward order, by name: two an encoder layer, three a decoder layer."""
    return {name: module for name, module in stack.named_modules() if isinstance(module, OmegaLayerNorm)}


def logn_omega(sub_layers: int) -> float:
    """omega of a stack of N sub-layers for an O(log N) output change, without profiling.

    sqrt((N + 1) / ln(N + 1) - 1), from microsoft/admin-torch (Liu et al. 2020, Corollary 2).
    """
    return math.sqrt((sub_layers + 1) / math.log(sub_layers + 1) - 1)


@register_model("transformer_admin")
class AdminTransformer(TransformerModel):
    """Encoder-decoder Transformer with Admin in both stacks.

    ``omega_source`` says where omega's present values come from. While it is "unset" the model still is a
    plain Post-LN Transformer (omega 1), waiting for the profiling pre-pass.
    """

    omega_source = "unset"

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        super().add_args(parser)
        parser.add_argument(
            "--admin-init",
            choices=["profile", "logn", "unit"],
            help="how omega starts: from a profiling pre-pass over the first training batches (default), from"
            " the closed form sqrt((N+1)/ln(N+1)-1) for N sub-layers, or at 1 (plain Post-LN)",
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

    @classmethod
    def build_model(cls, args: Namespace, task: Any) -> AdminTransformer:
        model = super().build_model(args, task)
        if args.admin_init != "profile":
            for stack in model.stacks().values():
                norms = sub_layers(stack).values()
                value = logn_omega(len(norms)) if args.admin_init == "logn" else 1.0
                set_omega(norms, [1.0] + [value] * (len(norms) - 1))
            model.omega_source = f"--admin-init {args.admin_init}"
        return model

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: nn.Module) -> AdminEncoder:
        return AdminEncoder(TransformerConfig.from_namespace(args), src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Any, embed_tokens: nn.Module) -> AdminDecoder:
        cfg = TransformerConfig.from_namespace(args)
        return AdminDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def __init__(self, args: Any, encoder: AdminEncoder, decoder: AdminDecoder) -> None:
        super().__init__(args, encoder, decoder)
        for stack in self.stacks().values():
            # The first omega of a stack would only rescale embeddings against fixed positions: it stays 1.
            for norm in list(sub_layers(stack).values())[:1]:
                norm.omega.requires_grad_(False)
        self.register_forward_pre_hook(_warn_if_unset)

    def stacks(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "decoder": self.decoder}

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
            layer = re.fullmatch(r"((?:en|de)coder\.layers\.\d+)\.(\w+)(\.weight)?", key)
            if layer and layer[2] in FAST_PATH_COPIES:
                del state_dict[key]
            elif layer and layer[2].endswith("_layer_norm") and f"{layer[1]}.{layer[2]}.omega" not in state_dict:
                state_dict[f"{layer[1]}.{layer[2]}.omega"] = torch.ones_like(state_dict[key])
                self.omega_source = "a stock Post-LN checkpoint (omega 1)"


def _warn_if_unset(model: AdminTransformer, _: Any) -> None:
    """A training loop other than fairseq's Trainer never runs the pre-pass; do not let it go unnoticed."""
    if model.omega_source == "unset" and model.training and torch.is_grad_enabled():
        logger.warning("omega was never initialised: training a plain Post-LN Transformer (call admin_fairseq.profile)")
        model.omega_source = "nowhere"


def set_omega(norms: Iterable[OmegaLayerNorm], values: Sequence[float]) -> None:
    """Fill each sub-layer's omega vector with one number, in forward order."""
    with torch.no_grad():
        for norm, value in zip(norms, values):
            norm.omega.fill_(value)


def _check(args: Any) -> None:
    """Refuse options that Admin cannot honour, before anything is read or written."""
    for stack in ("encoder", "decoder"):
        if getattr(args, f"{stack}_normalize_before", False):
            raise AdminError(
                f"--{stack}-normalize-before: Admin is a Post-LN method; drop the flag,"
                " or use --arch transformer for a Pre-LN model"
            )
    init, profile, batches = args.admin_init, args.admin_profile, args.admin_profile_batches
    if init not in ("profile", "logn", "unit"):
        raise AdminError(f"--admin-init {init}: choose profile, logn or unit")
    if profile is not None and init != "profile":
        raise AdminError(f"--admin-profile and --admin-init {init} exclude each other; give one of them")
    if batches is not None and (profile is not None or init != "profile"):
        given = "--admin-profile" if profile is not None else f"--admin-init {init}"
        raise AdminError(f"--admin-profile-batches has no effect with {given}, which does not profile; drop it")
    if batches is not None and batches < 1:
        raise AdminError(f"--admin-profile-batches must be at least 1, not {batches}")


def _register(name: str, base: Any, **defaults: int) -> None:
    """Register an architecture: a stock one with other defaults, and Admin's options."""

    @register_model_architecture("transformer_admin", name)
    def architecture(args: Any) -> None:
        for key, value in defaults.items():
            setattr(args, key, getattr(args, key, value))
        args.admin_init = getattr(args, "admin_init", "profile")
        args.admin_profile = getattr(args, "admin_profile", None)
        args.admin_profile_batches = getattr(args, "admin_profile_batches", None)
        base(args)
        _check(args)


_register("transformer_admin", stock.base_architecture)
for _encoder, _decoder in ((6, 6), (12, 12), (18, 18), (60, 12), (100, 100)):
    _depth = {"encoder_layers": _encoder, "decoder_layers": _decoder}
    _register(f"transformer_admin_{_encoder}_{_decoder}", stock.base_architecture, **_depth)
_register("transformer_admin_72", stock.base_architecture, encoder_layers=60, decoder_layers=12)
_register("transformer_admin_200", stock.base_architecture, encoder_layers=100, decoder_layers=100)
for _name in ("iwslt_de_en", "wmt_en_de", "wmt_en_de_big"):
    _register(f"transformer_admin_{_name}", getattr(stock, f"transformer_{_name}"))
