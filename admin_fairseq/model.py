"""Admin Transformers: fairseq's own layers, stacks and models, with an omega in every Post-LN sub-layer.

No ``forward`` is copied from fairseq. Its layers call ``residual_connection(f, x)`` and then, in Post-LN,
the sub-layer's LayerNorm; here the first hands on the pair and the second computes the equation of
:mod:`admin_fairseq.norm`. Parameter names stay fairseq's; omega is ``<stack>.layers.<n>.<sub-layer>_layer_norm.omega``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import logging
import math
import re
from argparse import ArgumentParser, Namespace
from typing import Any, Callable, Iterable, Sequence

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import MODEL_REGISTRY, register_model, register_model_architecture, transformer_lm
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer import transformer_legacy as transformer
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from omegaconf import OmegaConf
from torch import Tensor, nn

from admin_fairseq.errors import AdminError
from admin_fairseq.norm import OmegaLayerNorm

logger = logging.getLogger(__name__)

# fairseq 0.12.2 registers these copies of an encoder layer's weights for an inference-only fast path that
# knows nothing of omega; they never get a gradient.
FAST_PATH_COPIES = tuple(f"{m}_{p}" for m in ("in_proj", "out_proj", "fc1", "fc2") for p in ("weight", "bias"))


POSITIONS = ("max_source_positions", "max_target_positions", "tokens_per_sample")  # options of the task


class AdminLayer(nn.Module):
    """What makes one of fairseq's Post-LN layers an Admin layer; mixed in before its class."""

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        """Turn a finished stock layer into one of this class, in place and without drawing a random number.

        In place, because fairseq builds its layers in several ways (stacks, language models, activation
        checkpointing), all of which then serve Admin as they are.
        """
        layer.__class__ = cls
        for name, _norm in list(layer.named_children()):
            if name.endswith("_layer_norm"):
                setattr(layer, name, OmegaLayerNorm(layer.embed_dim, layer.dropout_module))
        layer.dropout_module = nn.Identity()  # the norms own it now

    def residual_connection(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


class AdminEncoderLayer(AdminLayer, TransformerEncoderLayerBase):
    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        super().adopt(layer)
        layer.can_use_fastpath = False
        for name in FAST_PATH_COPIES:
            layer._parameters.pop(name, None)

    # 0.12.2 fills the copies here
    _load_from_state_dict = nn.Module._load_from_state_dict


class AdminDecoderLayer(AdminLayer, TransformerDecoderLayerBase):
    pass


def sub_layers(stack: nn.Module) -> dict[str, OmegaLayerNorm]:
    """The omegas' owners in forward order, by name: two an encoder layer, three a decoder layer."""
    return {name: module for name, module in stack.named_modules() if isinstance(module, OmegaLayerNorm)}


def logn_omega(sub_layers: int) -> float:
    """omega of a stack of N sub-layers for an O(log N) output change, without profiling.

    sqrt((N + 1) / ln(N + 1) - 1), from microsoft/admin-torch (Liu et al. 2020, Corollary 2).
    """
    return math.sqrt((sub_layers + 1) / math.log(sub_layers + 1) - 1)


class AdminModel(nn.Module):
    """What Admin models share; mixed in before fairseq's model class.

    ``omega_source`` says where omega's present values come from. While it is "unset" the model still is a
    plain Post-LN Transformer (omega 1), waiting for the profiling pre-pass.
    """

    omega_source = "unset"
    admin_init: str
    admin_profile: str | None
    admin_profile_batches: int | None

    @staticmethod
    def add_admin_args(parser: ArgumentParser) -> None:
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
    def build_model(cls, args: Any, task: Any) -> AdminModel:
        args = _flat(args)
        config = task.args if task.cfg is None else task.cfg  # of a legacy task, and of any other
        for limit in POSITIONS:
            if not hasattr(args, limit):  # hydra's model section does not repeat what the task knows
                setattr(args, limit, getattr(config, limit, None))
        model = super().build_model(args, task)
        for option in ("admin_init", "admin_profile", "admin_profile_batches"):
            setattr(model, option, getattr(args, option))
        if args.admin_init != "profile":
            for stack in model.stacks().values():
                norms = sub_layers(stack).values()
                value = logn_omega(len(norms)) if args.admin_init == "logn" else 1.0
                set_omega(norms, [1.0] + [value] * (len(norms) - 1))
            model.omega_source = f"--admin-init {args.admin_init}"
        return model

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for stack in self.stacks().values():
            for layer in stack.layers.children():  # to iterate over the list itself drops layers at random
                is_encoder_layer = isinstance(layer, TransformerEncoderLayerBase)
                (AdminEncoderLayer if is_encoder_layer else AdminDecoderLayer).adopt(layer)
            # The first omega of a stack would only rescale embeddings against fixed positions: it stays 1.
            for norm in list(sub_layers(stack).values())[:1]:
                norm.omega.requires_grad_(False)
        self.register_forward_pre_hook(_warn_if_unset)

    def stacks(self) -> dict[str, nn.Module]:
        """ "encoder" and "decoder", or "decoder" alone."""
        return {name: getattr(self, name) for name in ("encoder", "decoder") if hasattr(self, name)}

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


@register_model("transformer_admin")
class AdminTransformer(AdminModel, TransformerModel):
    """Encoder-decoder Transformer with Admin in both stacks."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        TransformerModel.add_args(parser)
        cls.add_admin_args(parser)


@register_model("transformer_lm_admin")
class AdminLanguageModel(AdminModel, TransformerLanguageModel):
    """Decoder-only language model with Admin."""

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, TransformerLanguageModelConfig(), delete_default=True)
        cls.add_admin_args(parser)


def _warn_if_unset(model: AdminModel, _: Any) -> None:
    """A training loop other than fairseq's Trainer never runs the pre-pass; do not let it go unnoticed."""
    if model.omega_source == "unset" and model.training and torch.is_grad_enabled():
        logger.warning("omega was never initialised: training a plain Post-LN Transformer (call admin_fairseq.profile)")
        model.omega_source = "nowhere"


def set_omega(norms: Iterable[OmegaLayerNorm], values: Sequence[float]) -> None:
    """Fill each sub-layer's omega vector with one number, in forward order."""
    with torch.no_grad():
        for norm, value in zip(norms, values):
            norm.omega.fill_(value)


def _flat(args: Any) -> Namespace:
    """fairseq-train's flat namespace; from hydra's config with ``encoder: {layers: 6}`` or ``encoder_layers: 6``."""
    if isinstance(args, Namespace):
        return args
    flat = {}
    for key, value in (OmegaConf.to_container(args) if OmegaConf.is_config(args) else vars(args)).items():
        nested = value if key in ("encoder", "decoder", "quant_noise") else None
        parts = {key: value} if nested is None else {f"{key}_{name}": part for name, part in nested.items()}
        for name, part in parts.items():
            if None not in (flat.get(name), part) and flat[name] != part:
                raise AdminError(f"the model section gives {name} twice, as {flat[name]} and as {part}; drop one")
            if flat.get(name) is None:
                flat[name] = part
    return Namespace(**flat)


def _check(args: Namespace) -> None:
    """Refuse options that Admin cannot honour, before anything is read or written."""
    for stack in ("encoder", "decoder"):
        if getattr(args, f"{stack}_normalize_before", False):
            raise AdminError(
                f"--{stack}-normalize-before: Admin is a Post-LN method; drop the flag,"
                " or use a stock architecture for a Pre-LN model"
            )
        layers = getattr(args, f"{stack}_layers", None)
        if layers is not None and layers < 1:
            raise AdminError(f"--{stack}-layers must be at least 1, not {layers}")
    if getattr(args, "base_layers", 0):
        raise AdminError("--base-layers: BASE layers have no Post-LN sub-layers and hence no omega; drop the flag")
    if getattr(args, "ddp_backend", None) == "fully_sharded":
        raise AdminError(FULLY_SHARDED)
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


FULLY_SHARDED = (
    "--ddp-backend fully_sharded splits the layers before omega can be set; use another --ddp-backend, and"
    " --checkpoint-activations or --memory-efficient-fp16 to save memory"
)


def _register(model: str, name: str, base: Callable[[Any], None], **defaults: int) -> None:
    """Register an architecture: a stock one with other defaults, and Admin's options."""

    @register_model_architecture(model, name)
    def architecture(args: Any) -> None:
        flat = _flat(args)
        if flat is not args:
            _refuse_unknown(flat, model, base)
            for key in [key for key, value in vars(flat).items() if value is None]:  # null: as the architecture says
                delattr(flat, key)
        # base_layers: fairseq 0.12.2 looks for it in hydra's config
        own = {"admin_init": "profile", "admin_profile": None, "admin_profile_batches": None, "base_layers": 0}
        for key, value in own.items():
            setattr(flat, key, getattr(flat, key, value))
        _check(flat)
        for key, value in defaults.items():
            setattr(flat, key, getattr(flat, key, value))
        base(flat)
        if getattr(flat, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
            flat.tpu = False  # fairseq-train takes --bf16 for a wish for TPUs; GPUs know bf16 too
        if flat is not args:  # hydra's config, from which fairseq builds the model and which it saves
            for key, value in vars(flat).items():
                args[key] = value


def _refuse_unknown(flat: Namespace, model: str, base: Callable[[Any], None]) -> None:
    """hydra checks what a config file says against a dataclass, which this model has not (see :func:`_flat`)."""
    parser, defaults = ArgumentParser(), Namespace()
    MODEL_REGISTRY[model].add_args(parser)
    base(defaults)
    known = {action.dest for action in parser._actions} | set(vars(defaults))
    for key in vars(flat):
        if key not in known and not key.startswith("_") and key not in POSITIONS:
            similar = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean model.{similar[0]}?" if similar else ""
            raise AdminError(f"model.{key} is no option of {model}{hint}")


def _post_ln_lm(args: Namespace) -> None:
    """Stock base language model, but Post-LN."""
    transformer_lm.base_lm_architecture(args)
    args.decoder_normalize_before = False
    for field in dataclasses.fields(TransformerLanguageModelConfig):
        is_interpolation = str(field.default).startswith("${")  # of another section: task, common
        if not hasattr(args, field.name) and not is_interpolation:
            setattr(args, field.name, field.default)


_base = transformer.base_architecture
_register("transformer_admin", "transformer_admin", _base)
for _encoder, _decoder in ((6, 6), (12, 12), (18, 18), (60, 12), (100, 100)):
    _depth = {"encoder_layers": _encoder, "decoder_layers": _decoder}
    _register("transformer_admin", f"transformer_admin_{_encoder}_{_decoder}", _base, **_depth)
_register("transformer_admin", "transformer_admin_72", _base, encoder_layers=60, decoder_layers=12)
_register("transformer_admin", "transformer_admin_200", _base, encoder_layers=100, decoder_layers=100)
for _name in ("iwslt_de_en", "wmt_en_de", "wmt_en_de_big"):
    _register("transformer_admin", f"transformer_admin_{_name}", getattr(transformer, f"transformer_{_name}"))
_register("transformer_lm_admin", "transformer_lm_admin", _post_ln_lm)
for _layers in (6, 12, 18, 24, 36, 48, 60, 72, 100):
    _register("transformer_lm_admin", f"transformer_lm_admin_{_layers}", _post_ln_lm, decoder_layers=_layers)
