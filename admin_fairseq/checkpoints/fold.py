"""An Admin checkpoint as one of the stock Transformer with the same outputs, and a stock one as Admin's.

    x_i = LN(omega_i * x_{i-1} + f_i(x_{i-1}))

With x'_{i-1} = omega_i * x_{i-1} this is a stock Post-LN sub-layer, if f_i divides its input by omega_i again. So for
each omega_i after the first of its stack, the weight and bias of the LayerNorm that makes x_{i-1} are multiplied by
omega_i, and the input columns of what reads x_{i-1} divided by it: queries, keys and values of self-attention, the
queries of encoder-decoder attention, fc1 of a feed-forward network. The last LayerNorm of a stack stays.

Source: Liu et al. 2020, "Understanding the Difficulty of Training Transformers", section 4.3, says that Admin "can be
reparameterized into the original Transformer".
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import OrderedDict
from typing import Callable, Iterator

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY
from fairseq.modules import SinusoidalPositionalEmbedding
from torch import Tensor

from admin_fairseq.checkpoints.checks import Weights, check_optimizer
from admin_fairseq.checkpoints.files import State, settings
from admin_fairseq.errors import AdminError
from admin_fairseq.rules import FAST_PATH_COPIES

STOCK = {"transformer_admin": "transformer", "transformer_lm_admin": "transformer_lm"}
ADMIN = {stock: admin for admin, stock in STOCK.items()}
ADMIN.update({"transformer_postln": "transformer_admin", "transformer_lm_postln": "transformer_lm_admin"})
# sub-layers in forward order, and what of each reads x_{i-1}
READERS = {
    "self_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "encoder_attn": ("encoder_attn.q_proj",),
    "final": ("fc1",),
}
# Weights divided by less leave the range of half precision and of 8-bit quantisation. Trained omegas are nowhere near.
NEAR_ZERO = 1e-3
PADDING = 1  # fairseq's dictionaries all have it there; positions count from the next row
# Adam's moments are sums of gradients and of their squares
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def fold(state: State, untie: bool = False, keep_optimizer: bool = False) -> State:
    """The checkpoint of a stock Post-LN model that computes what this Admin model computes.

    It is exact in evaluation, also for every dropout mask drawn in training, but not for LayerDrop's: a layer then
    reads what was scaled for another one. Weights keep their dtype and are rounded once. fairseq's average of the
    weights (``--store-ema``) is folded with its own omegas. The settings become one flat namespace, ``args``.

    Args:
        untie: where the first omega of a stack without ``--layernorm-embedding`` is not 1, scale a copy of the token
            embeddings of that stack, no longer shared, and write its positions as learned ones.
        keep_optimizer: keep Adam's state, in the new weights' coordinates.

    Raises:
        AdminError: no exact fold exists; the message lists every reason.
    """
    args = settings(state)
    if model_name(args) not in STOCK:
        raise AdminError(f"it is of architecture {args.arch}, not of an Admin model")
    for name in ("admin_init", "admin_margin", "admin_profile", "admin_profile_batches"):
        vars(args).pop(name, None)  # omega has its values; how it started may be known in a folder of the user's only
    ARCH_CONFIG_REGISTRY[args.arch](args)  # every size, whatever the architecture's default
    model = state["model"]
    frozen = {f"{name}.omega" for name, _, previous in _all_sub_layers(model) if previous is None}
    frozen = {name for name in frozen if torch.all(model[name] == 1)}
    problems: list[str] = []
    if getattr(args, "encoder_layers_to_keep", None) or getattr(args, "decoder_layers_to_keep", None):
        problems.append("layers_to_keep is set: layers that follow one another only after pruning cannot be folded")

    def fold_weights(weights: Weights, where: str) -> Weights:
        # an average of ones drifts from 1 by rounding
        weights = {name: model[name] if name in frozen else weight for name, weight in weights.items()}
        factors = _factors(weights, args, untie, lambda problem: problems.append(where + problem))
        weights = _untied(weights, args, factors)
        folded = {}
        for name, weight in weights.items():
            if not name.endswith("_layer_norm.omega"):
                folded[name] = (weight.double() * factors[name]).to(weight.dtype) if name in factors else weight
                if name in factors and factors[name].isfinite().all() and not folded[name].isfinite().all():
                    problems.append(f"{where}{name} times omega is beyond {weight.dtype}")
        return folded

    folded = _map_weights(state, fold_weights)
    factors = _factors(model, args, untie, lambda _: None)
    if untie and keep_optimizer:
        problems.append("--untie makes new weights, which have no state for --keep-optimizer; drop one of them")
    if problems:
        raise AdminError("no exact fold:" + "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems)))
    optimizer = _moved_optimizer(state, args, model, folded["model"], factors) if keep_optimizer else None
    for stack in ("encoder", "decoder"):
        if f"{stack}.embed_positions.weight" in factors:
            setattr(args, f"{stack}_learned_pos", True)
        if f"{stack}.embed_tokens.weight" in factors:
            args.share_decoder_input_output_embed = _is_output_tied(args) and stack == "encoder"
            args.share_all_embeddings = False
    args.arch = STOCK[model_name(args) or ""]
    if getattr(args, "optimizer", None) in ("radam", "novograd"):  # this plugin's
        args.optimizer = "adam"
    for name in [name for name in vars(args) if name.startswith("admin_") or name == "init_weights"]:
        delattr(args, name)
    return finished(folded, args, optimizer)


def unfold(state: State, keep_optimizer: bool = False) -> State:
    """The checkpoint of an Admin model with omega 1 that is this stock Post-LN model.

    Its fold is the stock checkpoint again, bit for bit.

    Args:
        keep_optimizer: keep Adam's state; omega has none yet.

    Raises:
        AdminError: it is not of a stock Post-LN Transformer.
    """
    args = settings(state)
    if model_name(args) not in ADMIN:
        raise AdminError(f"it is of architecture {args.arch}, not of a stock transformer or transformer_lm")
    if model_name(args) != args.arch:  # else the sizes are there, or are what Admin's architecture says
        ARCH_CONFIG_REGISTRY[args.arch](args)
    args.arch = ADMIN[model_name(args) or ""]
    # a Pre-LN model and BASE layers are refused here
    ARCH_CONFIG_REGISTRY[args.arch](Namespace(**vars(args)))

    def unfold_weights(weights: Weights, _: str) -> Weights:
        unfolded = {}
        for name, weight in weights.items():
            layer = re.fullmatch(r"(?:en|de)coder\.layers\.\d+\.(\w+)(\.bias)?", name)
            if not layer or layer[1] not in FAST_PATH_COPIES:
                unfolded[name] = weight
            if layer and layer[1].endswith("_layer_norm"):
                unfolded[f"{name[: -len('.bias')]}.omega"] = torch.ones_like(weight)
        return unfolded

    unfolded = _map_weights(state, unfold_weights)
    if not list(_all_sub_layers(unfolded["model"])):
        raise AdminError("its layers have no LayerNorms of the names that fairseq 0.12 gives them")
    optimizer = _moved_optimizer(state, args, state["model"], unfolded["model"], {}) if keep_optimizer else None
    return finished(unfolded, args, optimizer)


def model_name(args: Namespace) -> str | None:
    return ARCH_MODEL_NAME_REGISTRY.get(args.arch)


def _all_sub_layers(weights: Weights) -> Iterator[tuple[str, tuple[str, ...], str | None]]:
    """In forward order the name of each sub-layer's norm, what reads its input, and the norm before it in its stack."""
    for stack in ("encoder", "decoder"):
        layer, previous = 0, None
        while f"{stack}.layers.{layer}.final_layer_norm.omega" in weights:
            for kind, readers in READERS.items():
                name = f"{stack}.layers.{layer}.{kind}_layer_norm"
                if f"{name}.omega" in weights:
                    yield name, tuple(f"{stack}.layers.{layer}.{reader}.weight" for reader in readers), previous
                    previous = name
            layer += 1


def _factors(weights: Weights, args: Namespace, untie: bool, report: Callable[[str], None]) -> Weights:
    """What each weight of the fold is multiplied by, in float64; ``report`` is told what prevents it."""
    factors: Weights = {}
    for name, readers, previous in _all_sub_layers(weights):
        stack = name.split(".")[0]
        # one number a dimension, also where omega is one number
        omega = torch.ones_like(weights[f"{name}.weight"], dtype=torch.float64) * weights[f"{name}.omega"].double()
        if torch.all(omega == 1):
            continue
        if not torch.all(omega.abs() >= NEAR_ZERO):  # a NaN is not, either
            report(f"{name}.omega reaches {omega.abs().min():.1e}, and weights are divided by it")
        if getattr(args, "cross_self_attention", False) and stack == "decoder" and "self_attn" in name:
            report(f"{name}.omega is not 1: --cross-self-attention reads encoder and decoder by the same weights")
        missing = [reader for reader in readers if reader not in weights]
        if missing:
            report(f"there is no {missing[0]} (is the model quantised?)")
        factors.update((reader, 1 / omega) for reader in readers)
        if previous is not None:
            factors.update({f"{previous}.weight": omega, f"{previous}.bias": omega})
        else:
            factors.update(_input_factors(weights, stack, omega, args, untie, report))
    return factors


def _input_factors(
    weights: Weights, stack: str, omega: Tensor, args: Namespace, untie: bool, report: Callable[[str], None]
) -> Weights:
    """The first omega of a stack scales the last linear map before the first layer, if there is one."""
    noise, project = (f"{stack}.{name}.weight" for name in ("quant_noise", "project_in_dim"))
    if stack == "encoder" and noise in weights:
        return {noise: omega[:, None]}
    if f"{stack}.layernorm_embedding.weight" in weights:
        return {f"{stack}.layernorm_embedding.{part}": omega for part in ("weight", "bias")}
    embedding = f"{stack}.embed_tokens.weight"
    if not untie:
        report(f"the first omega of the {stack} is not 1: it can only be folded by untying embeddings (--untie)")
    elif embedding not in weights or getattr(args, "merge_src_tgt_embed", False):
        report(f"the first omega of the {stack} is not 1, and its embeddings cannot be untied")
    factors = {} if args.no_token_positional_embeddings else {f"{stack}.embed_positions.weight": omega}
    before = [name for name in (project, noise) if name in weights]
    factors[before[0] if before else embedding] = omega[:, None] if before else omega
    return factors


def _is_output_tied(args: Namespace) -> bool:
    return getattr(args, "share_all_embeddings", False) or args.share_decoder_input_output_embed


def _untied(weights: Weights, args: Namespace, factors: Weights) -> Weights:
    """The same weights with positions where ``factors`` scales them, and the output layer under its own name."""
    weights = dict(weights)
    for stack, limit in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        name = f"{stack}.embed_positions.weight"
        if name in factors and name not in weights:
            rows = (getattr(args, limit, None) or args.tokens_per_sample) + PADDING + 1
            like = weights[f"{stack}.layers.0.final_layer_norm.weight"]
            weights[name] = SinusoidalPositionalEmbedding.get_embedding(rows, len(like), PADDING).to(like.dtype)
            weights.pop(f"{stack}.embed_positions._float_tensor", None)
    if "decoder.embed_tokens.weight" in factors and _is_output_tied(args):
        weights.setdefault("decoder.output_projection.weight", weights["decoder.embed_tokens.weight"])
    return weights


def _map_weights(state: State, function: Callable[[Weights, str], Weights]) -> State:
    """The checkpoint with new weights wherever it has some; ``function`` also gets the start of its messages."""
    extra = dict(state["extra_state"])
    # averages shown while an epoch is under way; with --eval-bleu they hold arrays that torch's safe loading refuses
    extra.pop("metrics", None)
    for name in ("ema", "ema_fp32_params"):
        if name in extra:
            extra[name] = function(extra[name], "of the weights' average, ")
    return {**state, "model": function(state["model"], ""), "extra_state": extra}


def finished(state: State, args: Namespace, optimizer: State | None) -> State:
    """With these settings, in a form that torch's safe loading reads without an entry in its list of classes.

    A stock fairseq on torch >= 2.6 lists none and cannot load the Namespace that it saves. It asks for attributes only,
    and so does CTranslate2's converter but for language models; of the classes that are safe to load, OrderedDict has
    them.
    """
    args.user_dir = None
    values = OrderedDict(vars(args))
    vars(values).update(vars(args))
    state = {**state, "args": values, "cfg": None}
    state.pop("last_optimizer_state", None)
    return state if optimizer is None else {**state, "last_optimizer_state": optimizer}


def _moved_optimizer(state: State, args: Namespace, before: Weights, after: Weights, factors: Weights) -> State:
    """Adam's state for the new model's parameters, by name; the gradient of a weight times s is 1/s of its gradient.

    Raises:
        AdminError: there is none, or it is not Adam's with one entry a parameter.
    """
    optimizer = state.get("last_optimizer_state")
    if optimizer is None:
        raise AdminError("--keep-optimizer: there is no optimizer state")
    check_optimizer(optimizer)
    groups = optimizer.get("param_groups", ())
    old, new = _parameters(before, args), _parameters(after, args)
    if getattr(args, "optimizer", None) != "adam" or len(groups) != 1 or len(groups[0]["params"]) != len(old):
        raise AdminError("--keep-optimizer: the state is not that of --optimizer adam with one entry a parameter")
    numbers = dict(zip(old, groups[0]["params"]))
    moved = {}
    for number, name in enumerate(new):
        entry = dict(optimizer["state"].get(numbers.get(name), ()))
        for moment, power in POWERS.items():
            if moment in entry:
                if getattr(entry[moment], "shape", None) != before[name].shape:
                    raise AdminError(f"--keep-optimizer: the state's entry for {name} is of another shape")
                factor = factors.get(name, torch.ones(())) ** power
                entry[moment] = (entry[moment].double() / factor).to(entry[moment].dtype)
        if entry:
            moved[number] = entry
    return {**optimizer, "state": moved, "param_groups": [{**groups[0], "params": list(range(len(new)))}]}


def _parameters(weights: Weights, args: Namespace) -> list[str]:
    """The names of a model's trained parameters, in the order in which its optimizer has them."""
    tied = set()
    if getattr(args, "share_all_embeddings", False) or getattr(args, "merge_src_tgt_embed", False):
        tied.add("decoder.embed_tokens.weight")
    if tied or args.share_decoder_input_output_embed:
        tied.add("decoder.output_projection.weight")
    # the first omega of a stack is frozen, or all are
    fixed = getattr(args, "admin_omega", None) == "fixed"
    tied.update(f"{name}.omega" for name, _, previous in _all_sub_layers(weights) if fixed or previous is None)
    return [name for name in weights if name not in tied and not name.endswith((".version", "._float_tensor"))]
