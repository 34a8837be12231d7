"""The architectures and their options as text, which ``fairseq-train --help`` shows of none."""

from __future__ import annotations

import argparse
import textwrap
from argparse import Namespace

from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY

from admin_fairseq.architectures import DEPTHS, LM_DEPTHS, METHODS, STOCK
from admin_fairseq.arguments import nearest
from admin_fairseq.config import unknown_architecture
from admin_fairseq.errors import AdminError
from admin_fairseq.files import aligned


def archs(part: str | None) -> str:
    """Every method, and how its architectures are called; or the sizes of those whose names hold ``part``.

    Raises:
        AdminError: no name holds it.
    """
    if part is None:
        return _methods()
    ours = [name for method in METHODS for name in _names(method)]
    found = [name for name in ours if part in name]
    if not found:
        raise AdminError(f"no architecture has {part} in its name; the nearest: {nearest(part, ours)}")
    return aligned([("--arch", "layers", "width", "feed-forward", "heads", "options"), *map(_sizes, found)])


def _names(method: str) -> list[str]:
    name, lm = f"transformer_{method}", f"transformer_lm_{method}"
    suffixes = [*DEPTHS, *(f"_{suffix}" for suffix in STOCK)]
    return [name, *(name + suffix for suffix in suffixes), lm, *(f"{lm}_{n}" for n in LM_DEPTHS)]


def _methods() -> str:
    lines = [f"{'METHOD':15}  a sub-layer: x its input, f its branch, LN its LayerNorm"]
    for method, models in METHODS.items():
        defaults, rule = _defaults(f"transformer_{method}"), getattr(MODEL_REGISTRY[models.translation], "rule", None)
        if rule is None:
            text = "x + f(LN(x)), fairseq's own" if defaults.encoder_normalize_before else "LN(x + f), fairseq's own"
        else:
            text = (rule.__doc__ or rule.__name__).strip().splitlines()[0].rstrip(".")
        options = _own_options(f"transformer_{method}", defaults)
        lines.append(f"{method:15}  {text}{f' ({options})' if options else ''}")
    suffixes = ", ".join([*(suffix[1:] for suffix in DEPTHS), *STOCK])
    lines += ["", "transformer_METHOD and transformer_METHOD_SUFFIX translate, transformer_lm_METHOD and"]
    lines += ["transformer_lm_METHOD_DEPTH are language models:"]
    lines += textwrap.wrap(f"SUFFIX  {suffixes}", 100, subsequent_indent=" " * 8)
    lines += [f"DEPTH   {', '.join(map(str, LM_DEPTHS))}", ""]
    lines += ["Sizes: admin-fairseq archs NAME. Options: admin-fairseq options ARCH."]
    return "\n".join(lines) + "\n"


def _defaults(arch: str) -> Namespace:
    """What a name for --arch stands for."""
    options = Namespace()
    ARCH_CONFIG_REGISTRY[arch](options)
    return options


def _own_options(arch: str, defaults: Namespace) -> str:
    """Those in which a method differs from another one of the same model."""
    own = {key: value for key, value in ARCH_MODEL_REGISTRY[arch].own_options.items() if value is not None}
    given = {key: getattr(defaults, key) for key, value in own.items() if getattr(defaults, key) != value}
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in given.items())


def _sizes(arch: str) -> tuple[str, ...]:
    defaults = _defaults(arch)
    stacks = [stack for stack in ("encoder", "decoder") if hasattr(defaults, f"{stack}_layers")]

    def both(name: str) -> str:
        values = [str(getattr(defaults, f"{stack}_{name}")) for stack in stacks]
        return values[0] if len({*values}) == 1 and name != "layers" else "-".join(values)

    numbers = (both(name) for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads"))
    return (arch, *numbers, _own_options(arch, defaults))


def options(arch: str) -> str:
    """The options of an architecture's model, the plugin's own first, with their defaults.

    Raises:
        AdminError: there is no such architecture.
    """
    if arch not in ARCH_MODEL_REGISTRY:
        raise AdminError(unknown_architecture(arch))
    model, defaults = ARCH_MODEL_REGISTRY[arch], _defaults(arch)
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False)
    model.add_args(parser)
    own = getattr(model, "own_options", {})
    help = parser._get_formatter()
    for title, is_own in (("of this plugin", True), ("of fairseq's Transformer", False)):
        actions = [action for action in parser._actions if (action.dest in own) == is_own]
        for action in actions:
            value = getattr(defaults, action.dest, None)
            if "default" not in (action.help or "") and value not in (None, False, ""):
                action.help = f"{action.help or ''} (default: {value})".replace("%", "%%").strip()
        if actions:
            help.start_section(title)
            help.add_arguments(actions)
            help.end_section()
    return f"fairseq-train DATA --user-dir admin_fairseq --arch {arch}\n\n{help.format_help()}"
