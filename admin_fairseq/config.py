"""A model's options in one flat namespace, whichever of fairseq's commands they come from."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentParser, Namespace
from typing import Any, Iterable

from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_REGISTRY
from omegaconf import OmegaConf

from admin_fairseq.errors import AdminError

POSITIONS = ("max_source_positions", "max_target_positions", "tokens_per_sample")  # options of the task


def as_namespace(args: Any) -> Namespace:
    """fairseq-train's flat namespace; from hydra's config with ``encoder: {layers: 6}`` or ``encoder_layers: 6``.

    Raises:
        AdminError: hydra's config gives an option twice, with two values.
    """
    if isinstance(args, Namespace):
        return args
    options: dict[str, Any] = {}
    for key, value in (OmegaConf.to_container(args) if OmegaConf.is_config(args) else vars(args)).items():
        nested = value if key in ("encoder", "decoder", "quant_noise") else None
        parts = {key: value} if nested is None else {f"{key}_{name}": part for name, part in nested.items()}
        for name, part in parts.items():
            if None not in (options.get(name), part) and options[name] != part:
                raise AdminError(f"the model section gives {name} twice, as {options[name]} and as {part}; drop one")
            if options.get(name) is None:
                options[name] = part
    return Namespace(**options)


def nearest_architectures(name: str, count: int = 3) -> str:
    """Of this plugin and its user's: those with the same parts, in whatever order, first."""

    def parts(arch: str) -> set[str]:
        return {*re.split(r"_|(?<=\d)x(?=\d)", arch)}

    def unlike(arch: str) -> tuple[int, float]:
        return len(parts(arch) ^ parts(name)), -difflib.SequenceMatcher(None, arch, name).ratio()

    ours = [arch for arch, set_up in ARCH_CONFIG_REGISTRY.items() if not set_up.__module__.startswith("fairseq.")]
    return ", ".join(sorted(ours, key=unlike)[:count])


def unknown_architecture(name: str) -> str:
    """What to say of a name for --arch that there is not."""
    return (
        f"{name}: no such architecture; the nearest: {nearest_architectures(name)}."
        " admin-fairseq archs lists them; --encoder-layers and --decoder-layers make any depth"
    )


def refuse_unknown(args: Namespace, model: str, defaults: Iterable[str]) -> None:
    """hydra checks what a config file says against a dataclass, which our models have not (see :func:`as_namespace`).

    Raises:
        AdminError: an option is none of the model's own nor among the architecture's ``defaults``.
    """
    parser = ArgumentParser()
    MODEL_REGISTRY[model].add_args(parser)
    known = {action.dest for action in parser._actions} | set(defaults)
    for key in vars(args):
        if key not in known and not key.startswith("_") and key not in POSITIONS:
            similar = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean model.{similar[0]}?" if similar else ""
            raise AdminError(f"model.{key} is no option of {model}{hint}")
