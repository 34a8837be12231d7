"""What a checkpoint of a Transformer holds, checked once where it is read: names, shapes, types and sizes that agree.

The functions behind the commands rely on it. Names that this file does not know are left alone.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any, Callable, Dict, List

import torch
from fairseq import utils
from fairseq.logging import meters
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer.transformer_legacy import base_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, base_lm_architecture
from torch import Tensor

from admin_fairseq.config import POSITIONS
from admin_fairseq.errors import AdminError

Weights = Dict[str, Tensor]
Layers = Dict[str, List[Weights]]  # by stack
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
LAYER = re.compile(r"(encoder|decoder)\.layers\.(0|[1-9]\d{0,4})\.(.+)")
# Sizes by letter: d the stack's width, f of its feed-forward networks, * any.
SHAPES: dict[str, tuple[str, ...]] = {"fc1.weight": ("f", "d"), "fc1.bias": ("f",)}
SHAPES.update({"fc2.weight": ("d", "f"), "fc2.bias": ("d",)})
for _norm in ("self_attn", "encoder_attn", "final"):
    SHAPES.update({f"{_norm}_layer_norm.{part}": ("d",) for part in ("weight", "bias")})
for _attention in ("self_attn", "encoder_attn"):
    for _part in "qkv":
        SHAPES[f"{_attention}.{_part}_proj.weight"] = ("d", "*" if _attention == "encoder_attn" else "d")
        SHAPES[f"{_attention}.{_part}_proj.bias"] = ("d",)
    SHAPES.update({f"{_attention}.out_proj.weight": ("d", "d"), f"{_attention}.out_proj.bias": ("d",)})
STACK_SHAPES = {
    **{f"layernorm_embedding.{part}": ("d",) for part in ("weight", "bias")},
    **{"embed_tokens.weight": ("*", "*"), "embed_positions.weight": ("*", "d")},
    **{"project_in_dim.weight": ("d", "*"), "quant_noise.weight": ("d", "d")},
}
LONGEST = 2**20  # positions; a table of them is made also where none is in the file


def check(state: dict[str, Any], args: Namespace | None) -> None:
    """Raises:
    AdminError: weights, settings or the rest of a checkpoint are not a Transformer's, in a message of one line.
    """
    layers = check_weights(state["model"])
    if args is not None:
        check_settings(args, state["model"], layers)
    extra = state.setdefault("extra_state", {})
    history = state.setdefault("optimizer_history", [])
    if not isinstance(extra, dict) or not isinstance(history, list):
        raise AdminError("its extra_state or optimizer_history is not what fairseq writes")
    if not all(isinstance(entry, dict) and isinstance(entry.get("num_updates", 0), int) for entry in history):
        raise AdminError("its optimizer_history is not what fairseq writes")
    for name in ("ema", "ema_fp32_params"):
        if name in extra:
            _check_average(extra[name], state["model"], name)


def check_weights(weights: Weights) -> Layers:
    """The layers' weights by stack.

    Raises:
        AdminError: one is no tensor, has another shape than the layer it belongs to, or belongs to none.
    """
    numbered: dict[str, dict[int, Weights]] = {}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) or weight.dtype not in (*FLOATING, *WHOLE):
            raise AdminError(f"its weight {name} is no tensor of numbers")
        layer = LAYER.fullmatch(name)
        if layer:
            numbered.setdefault(layer[1], {}).setdefault(int(layer[2]), {})[layer[3]] = weight
        is_omega = name.endswith("_layer_norm.omega")
        if is_omega and not (layer and layer[3].replace(".omega", ".weight") in SHAPES):
            raise AdminError(f"its weight {name} is the omega of no sub-layer")
    for stack, found in numbered.items():
        if sorted(found) != list(range(len(found))):
            missing = next(number for number in range(len(found)) if number not in found)
            raise AdminError(f"its {stack} has no layer {missing}, but {len(found)} layers")
    layers = {stack: [found[number] for number in range(len(found))] for stack, found in numbered.items()}
    for stack, own in layers.items():
        sizes: dict[str, int] = {}
        for number, layer_weights in enumerate(own):
            for name, weight in layer_weights.items():
                _check_layer_weight(f"{stack}.layers.{number}.{name}", name, weight, sizes)
        for name, shape in STACK_SHAPES.items():
            if f"{stack}.{name}" in weights:
                _check_shape(f"{stack}.{name}", weights[f"{stack}.{name}"], shape, sizes)
    return layers


def _check_layer_weight(full: str, name: str, weight: Tensor, sizes: dict[str, int]) -> None:
    if name in SHAPES:
        _check_shape(full, weight, SHAPES[name], sizes)
    elif name.endswith("_layer_norm.omega") and weight.numel() != 1:  # with --admin-omega scalar it is one number
        _check_shape(full, weight, ("d",), sizes)
    if name.endswith("_layer_norm.omega") and not weight.is_floating_point():
        raise AdminError(f"its weight {full} is of {weight.dtype}, not of floating-point numbers")


def _check_shape(name: str, weight: Tensor, shape: tuple[str, ...], sizes: dict[str, int]) -> None:
    expected = tuple(sizes.get(letter, "any") for letter in shape)
    fits = weight.dim() == len(shape) and all(own in (size, "any") for own, size in zip(expected, weight.shape))
    if not fits or not weight.numel():
        raise AdminError(f"its weight {name} is of shape {tuple(weight.shape)}, not ({', '.join(map(str, expected))})")
    sizes.update({letter: size for letter, size in zip(shape, weight.shape) if letter != "*"})


def _defaults() -> dict[str, Any]:
    args, lm_args = Namespace(), Namespace()
    base_architecture(args)
    base_lm_architecture(lm_args)
    return {**vars(lm_args), **vars(args)}


DEFAULTS = _defaults()
AS_TYPED = ("decoder_output_dim", "decoder_input_dim")  # fairseq-train keeps their values as strings


def is_transformer(arch: Any) -> bool:
    """Whether fairseq's Transformer, or a model like it, has this architecture."""
    kind = ARCH_MODEL_REGISTRY.get(arch) if isinstance(arch, str) else None
    return kind is not None and issubclass(kind, (TransformerModelBase, TransformerLanguageModel))


def check_settings(args: Namespace, weights: Weights, layers: Layers) -> None:
    """Raises:
    AdminError: an option of the model is of another type than fairseq's, or says another size than the weights have.
    """
    options = vars(args)
    check_options(options)
    largest = max((size for weight in weights.values() for size in weight.shape), default=0)
    for name in AS_TYPED:
        if _number(options.get(name) or 0) > largest:
            raise AdminError(f"its setting {name} is {options[name]}, larger than any of its weights")
    for stack, own in layers.items():
        is_pruned = options.get(f"{stack}_layers_to_keep")
        sizes = {"layers": None if is_pruned else len(own)}
        norm, fc1 = own[0].get("final_layer_norm.weight"), own[0].get("fc1.weight")
        sizes.update(embed_dim=None if norm is None else len(norm), ffn_embed_dim=None if fc1 is None else len(fc1))
        for name, size in sizes.items():
            value = options.get(f"{stack}_{name}")
            if None not in (value, size) and value != size:
                raise AdminError(f"its setting {stack}_{name} is {value}, but its weights have {size}")
        heads, width = options.get(f"{stack}_attention_heads"), sizes["embed_dim"]
        if heads is not None and width is not None and (heads < 1 or width % heads):
            raise AdminError(f"its setting {stack}_attention_heads is {heads}, which does not divide {width}")
    if is_transformer(options.get("arch")):
        try:
            ARCH_CONFIG_REGISTRY[args.arch](Namespace(**options))
        except AdminError:
            pass  # the command says so, if it minds
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise AdminError(f"its settings are not those of {args.arch} ({what})") from error


def check_options(options: dict[str, Any], named: Callable[[str], str] = "its setting {}".format) -> None:
    """Of a checkpoint, and of a model that is about to be built and trained; ``named`` is what messages call an option.

    Raises:
        AdminError: an option of the model has a value that it cannot have.
    """
    for name, value in options.items():
        if value is not None and name in DEFAULTS:
            _check_option(name, value, named(name))
    for name in POSITIONS:
        value = options.get(name)
        if value is not None and not (type(value) is int and 0 < value <= LONGEST):
            raise AdminError(f"{named(name)} is {value!r:.50}; read are numbers from 1 to {LONGEST}")


def _number(value: Any) -> Any:
    """Of a string of digits its number."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value) else value


def _check_option(name: str, value: Any, named: str) -> None:
    default, value = DEFAULTS[name], _number(value) if name in AS_TYPED else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "activation_fn":
        fits = value in utils.get_available_activation_fns()
    elif name.endswith(("dropout", "layerdrop", "quant_noise_pq", "quant_noise_scalar")):
        fits = is_number and 0 <= value <= 1
    elif isinstance(default, bool):
        fits = value in (True, False)
    elif isinstance(default, int):
        fits = is_number and 0 <= value < 2**31 and (type(value) is int or name.endswith("factor"))
    else:
        fits = True
    if not fits:
        raise AdminError(f"{named} is {str(value)[:50]!r}, which is no value of that option")


def _check_average(average: Any, weights: Weights, name: str) -> None:
    """Of the weights, as fairseq keeps it."""
    if not isinstance(average, dict):
        raise AdminError(f"its average of weights, {name}, is no dictionary")
    for key, weight in weights.items():
        own = average.get(key)
        needed = weight.is_floating_point() and LAYER.fullmatch(key)
        if (needed and own is None) or (own is not None and getattr(own, "shape", None) != weight.shape):
            raise AdminError(f"its average of weights, {name}, does not fit its weights in {key}")
    if set(average) - set(weights):
        raise AdminError(f"its average of weights, {name}, has weights that the model has not")
    check_weights(average)


def check_finite(state: dict[str, Any]) -> None:
    """Raises:
    AdminError: a weight, or one of their average, is not a finite number; names it, the update and what to do.
    """
    extra = state.get("extra_state", {})
    parts = [state["model"], *(extra[name] for name in ("ema", "ema_fp32_params") if name in extra)]
    for part in parts:
        for name, weight in part.items():
            if name.endswith("_float_tensor"):  # fairseq's mark of a dtype, in memory that nobody has written
                continue
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                update = (state.get("optimizer_history") or [{}])[-1].get("num_updates")
                after = f" after update {update}" if update else ""
                raise AdminError(
                    f"its weight {name} holds numbers that are not finite{after}: the training diverged; take an"
                    " earlier checkpoint"
                )


def check_progress(state: dict[str, Any]) -> None:
    """What fairseq goes on from, besides weights and settings; any of it may be missing.

    Raises:
        AdminError: it is not what fairseq writes.
    """
    extra, history = state.get("extra_state") or {}, state.get("optimizer_history") or []
    if not _says_how_far(extra, history):
        raise AdminError("its extra_state does not say how far the training has come as fairseq does")
    try:
        groups = {id(group): group for group in extra.get("metrics", {}).values()}  # each once, if it has many names
        for group in groups.values():
            for _, _, name, meter in group:
                _new_meter(name).load_state_dict(meter)
    except Exception as error:
        raise AdminError("the meters in its extra_state are not fairseq's") from error
    optimizer = state.get("last_optimizer_state")
    if optimizer is not None and not isinstance(optimizer, dict):
        raise AdminError("its optimizer's state is not that of a torch optimizer")
    if optimizer and ("state" in optimizer or "param_groups" in optimizer):
        check_optimizer(optimizer)


def _says_how_far(extra: Any, history: Any) -> bool:
    """Whether what is said of it is of fairseq's types, and counters are small enough to count on."""
    iterator = extra.get("train_iterator", {}) if isinstance(extra, dict) else None
    if not isinstance(iterator, dict) or not isinstance(history, list):
        return False
    if not all(isinstance(entry, dict) for entry in history):
        return False
    counts = [*iterator.values(), *(entry.get("num_updates") for entry in history)]
    numbers = [extra.get("best"), extra.get("previous_training_time")]
    return all(count is None or (isinstance(count, int) and 0 <= count < 2**31) for count in counts) and not any(
        isinstance(number, (str, bytes, list, tuple, dict)) for number in numbers
    )


def _new_meter(name: str) -> meters.Meter:
    kind = getattr(meters, name)
    if not (isinstance(kind, type) and issubclass(kind, meters.Meter)):
        raise TypeError(name)
    return kind()


def check_optimizer(optimizer: Any) -> None:
    """Raises:
    AdminError: the state is not that of a torch optimizer.
    """
    states = optimizer.get("state") if isinstance(optimizer, dict) else None
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not (isinstance(states, dict) and all(isinstance(entry, dict) for entry in states.values())):
        raise AdminError("its optimizer's state is not that of a torch optimizer")
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        raise AdminError("its optimizer's state is not that of a torch optimizer")
    for group in groups:
        numbers = group.get("params")
        if not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
            raise AdminError("its optimizer's state does not say which parameters it is of")
