"""Checkpoints of the authors' implementations of Admin, turned into checkpoints of this one.

Read are those of LiyuanLucasLiu/Transformer-Clinic (a fairseq 0.8), microsoft/deepnmt (a plugin of fairseq 0.9) and
microsoft/admin-torch. The first two name a layer's omegas ``attention_ratio_change`` and ``fc_ratio_change``
(encoder), ``self_ratio_change``, ``encoder_ratio_change`` and ``fc_ratio_change`` (decoder), and stack the input
projections of an attention as ``in_proj_weight`` and ``in_proj_bias``. admin-torch leaves names to its user and
documents ``residual_attn.omega`` and ``residual_ffn.omega`` (``as_module``), ``attn_omega`` and ``ffn_omega``
(``as_buffer``, ``as_parameter``); here every name that ends in ``omega`` is read, by the sub-layer it speaks of.
"""

from __future__ import annotations

import re
import warnings
from argparse import ArgumentParser, Namespace
from typing import Any, Sequence

import torch
from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer.transformer_legacy import base_architecture
from fairseq.tasks.translation import TranslationTask
from omegaconf import ListConfig, OmegaConf
from torch import Tensor

from admin_fairseq.checkpoints.files import State, settings
from admin_fairseq.errors import AdminError
from admin_fairseq.model import AdminTransformer

ADMIN, POST_LN = ("adaptive", "adaptive-profiling"), ("default", "looklinear")  # their --init-type
OMEGAS = {
    "attention_ratio_change": "self_attn",
    "self_ratio_change": "self_attn",
    "encoder_ratio_change": "encoder_attn",
    "fc_ratio_change": "final",
}
TASK_OPTIONS = ("source_lang", "target_lang", "max_source_positions", "max_target_positions", "truncate_source")
TEXTS = ("activation_fn", "adaptive_softmax_cutoff", "source_lang", "target_lang")  # all others are numbers
FILES = ("encoder_embed_path", "decoder_embed_path")  # read when a model is built; the weights are in the checkpoint
PRUNED = ("encoder_layers_to_keep", "decoder_layers_to_keep")  # done: the number of layers is what is left


def _is_omega(key: str) -> bool:
    return key.endswith("_layer_norm.omega")


def convert(state: State) -> State:
    """The checkpoint of ``transformer_admin`` that computes what the given one does.

    Weights keep their dtype. Every omega is kept, the first of each stack too, though it is not trained any further
    here; a plain Post-LN model gets omega 1. Of the options only those of the model and of the task are kept:
    training starts anew.

    Args:
        state: a checkpoint as :func:`admin_fairseq.checkpoints.files.load` returns it.

    Raises:
        AdminError: it cannot be converted; the message lists every reason found.
    """
    if any(_is_omega(key) for key in state["model"]):
        raise AdminError("it is a checkpoint of this plugin already")
    options = _options(state)
    problems = _check(options)
    kept = _kept(options, problems)
    weights = _rename(state["model"], problems)
    init = options.get("init_type") or options.get("admin_init_type")
    if init is None and not any(_is_omega(key) for key in weights):
        problems.append(
            "it holds no omega and was not made by Transformer-Clinic, deepnmt or admin-torch (a stock Post-LN"
            " checkpoint needs no import: give it to --finetune-from-model)"
        )
    if not problems:
        cfg, model = _build(kept, weights, problems)
    if not problems:
        weights = _fit(weights, model, init in POST_LN, problems)
    if problems:
        raise AdminError("; ".join(problems))

    fresh = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    return {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": weights,
        "criterion": None,
        "optimizer_history": [fresh],
        "task_state": {},
        "extra_state": {"train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}},
    }


def _options(state: State) -> dict[str, Any]:
    """All options that say something, by name."""
    try:
        return {name: value for name, value in vars(settings(state)).items() if value is not None}
    except AdminError:
        return {}  # what is missing is then reported with the rest


def _check(options: dict[str, Any]) -> list[str]:
    problems = []
    arch = options.get("arch")
    if not re.fullmatch(r"(adv_)?transformer(_\w+)?", str(arch)) or "_lm" in str(arch):
        problems.append(f"its architecture is {arch}, not an encoder-decoder Transformer")
    task = options.get("task", "translation")
    if task not in ("translation", "adv_translation"):
        problems.append(f"its task is {task}, not translation")
    for name in ("encoder_normalize_before", "decoder_normalize_before"):
        if options.get(name):
            problems.append(f"it is a Pre-LN model ({name}); Admin is Post-LN")
    init = options.get("init_type") or options.get("admin_init_type")
    if init not in (None, *ADMIN, *POST_LN):
        problems.append(f"its init type is {init}; read are {', '.join((*ADMIN, *POST_LN))}")
    if options.get("layer_wise_attention"):
        problems.append("layer_wise_attention is in no fairseq that this plugin works with")
    return problems


def _kept(options: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """transformer_admin's options: the old ones that still exist, without any that would be evaluated or opened."""
    parser, defaults = ArgumentParser(), Namespace()
    AdminTransformer.add_args(parser)
    base_architecture(defaults)
    known = {action.dest for action in parser._actions} | set(vars(defaults)) | set(TASK_OPTIONS)
    kept = {}
    for name in sorted(known.intersection(options).difference(FILES, PRUNED)):
        texts = options[name] if isinstance(options[name], (list, ListConfig)) else [options[name]]
        is_text = name in TEXTS and all(re.fullmatch(r"[\w, -]+", str(text)) for text in texts)
        if is_text or isinstance(options[name], (int, float)):
            kept[name] = options[name]
        else:
            problems.append(f"the option {name} has the value {str(options[name])[:50]!r}")
    for name in ("left_pad_source", "left_pad_target"):
        if name in options:
            kept[name] = str(options[name]) == "True"  # "True" before the task was set up, True after
    return kept


def _rename(weights: dict[str, Any], problems: list[str]) -> dict[str, Tensor]:
    """The weights under today's names; nothing is dropped but fixed positions and versions, which are not weights."""
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        if re.fullmatch(r"(en|de)coder\.(version|embed_positions\.(weights|_float_tensor))", key):
            continue
        if not isinstance(value, Tensor):
            problems.append(f"{key} is not a tensor")
            continue
        if not value.is_floating_point() or value.layout is not torch.strided or value.is_meta:
            problems.append(f"{key} is not a dense tensor of floating-point numbers")
            continue
        if not torch.isfinite(value).all():
            problems.append(f"{key} holds numbers that are not finite")
        for name, part in _parts(key, value):
            if name in renamed:
                problems.append(f"{key} is a second {name}")
            renamed[name] = part
    return renamed


def _parts(key: str, value: Tensor) -> Sequence[tuple[str, Tensor]]:
    """One old weight as one or three new ones."""
    layer = re.fullmatch(r"((?:en|de)coder\.layers\.\d+)\.(.+)", key)
    if key == "decoder.embed_out":
        return [("decoder.output_projection.weight", value)]
    if not layer:
        return [(key, value)]
    prefix, name = layer.groups()
    attention = re.fullmatch(r"(\w+_attn)\.(in|q|k|v)_proj_(weight|bias)", name)
    if attention and value.dim() > 0:
        owner, projection, kind = attention.groups()
        names = [projection] if projection != "in" else ["q", "k", "v"]
        parts = [value] if projection != "in" else [part.clone() for part in value.chunk(3)]
        return [(f"{prefix}.{owner}.{which}_proj.{kind}", part) for which, part in zip(names, parts)]
    sub_layer = OMEGAS.get(name) or _sub_layer(name)
    return [(f"{prefix}.{sub_layer}_layer_norm.omega" if sub_layer else key, value)]


def _sub_layer(name: str) -> str | None:
    """The sub-layer that an admin-torch user's name of an omega speaks of."""
    if not re.search(r"(^|[._])omega$", name):
        return None
    for words, sub_layer in (("encoder|cross", "encoder_attn"), ("ffn|fc|feed", "final"), ("attn|att", "self_attn")):
        if re.search(words, name):
            return sub_layer
    return None


def _build(kept: dict[str, Any], weights: dict[str, Tensor], problems: list[str]) -> tuple[Any, Any]:
    """The configuration and the model that fairseq will build from it, to see whether the weights fit."""
    try:
        dictionaries = []
        for stack in ("encoder", "decoder"):
            dictionary = Dictionary()
            for number in range(len(weights.get(f"{stack}.embed_tokens.weight", ())) - len(dictionary)):
                dictionary.add_symbol(str(number))
            dictionaries.append(dictionary)
        argv = ["", "--arch", "transformer_admin", "--admin-margin", "1", "--task", "translation"]  # no folder of data
        parser = fairseq_options.get_training_parser()
        args = fairseq_options.parse_args_and_arch(parser, argv, modify_parser=lambda p: p.set_defaults(**kept))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hydra's, about how fairseq calls it
            cfg = convert_namespace_to_omegaconf(args)
        return cfg, TranslationTask(cfg.task, *dictionaries).build_model(cfg.model)
    except Exception as error:  # whatever the options in the file make fairseq raise
        problems.append(f"no model can be built from its options ({type(error).__name__}: {str(error)[:200]})")
        return None, None


def _fit(weights: dict[str, Tensor], model: Any, omega_is_one: bool, problems: list[str]) -> dict[str, Tensor]:
    """The weights in the model's order, with what is no weight from the model itself."""
    fitted, missing, shapes, expected = {}, [], [], model.state_dict()
    owners: dict[int, str] = {}  # of a tensor that the model shares, by its memory
    for name, own in expected.items():
        value = weights.get(name)
        if value is None and name == "decoder.output_projection.weight" and model.decoder.share_input_output_embed:
            value = weights.get("decoder.embed_tokens.weight")  # fairseq names it twice since 0.10
        if value is None and (name.endswith(("version", "_float_tensor")) or (omega_is_one and _is_omega(name))):
            value = own
        elif value is not None and _is_omega(name) and value.numel() == 1:  # admin-torch's buffer
            value = value.reshape(1).expand_as(own).clone()
        if value is None:
            missing.append(name)
        elif value.shape != own.shape:
            shapes.append(f"{name} {tuple(value.shape)} instead of {tuple(own.shape)}")
        else:
            fitted[name] = value
            owner = owners.setdefault(own.data_ptr(), name)
            if owner != name and not torch.equal(fitted[owner], value):  # fairseq's _float_tensor may be NaN
                problems.append(f"{name} differs from {owner}, which its options call one and the same")
    unknown = sorted(set(weights).difference(expected))
    for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            problems.append(f"{kind}: {', '.join(names[:20])}{more}")
    return fitted
