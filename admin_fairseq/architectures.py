"""The named architectures: every method at every width and depth, as fairseq's ``--arch`` knows them.

``transformer_<method>`` is fairseq's base Transformer (6-6), ``transformer_<method>_<E>_<D>`` the same with E encoder
and D decoder layers, and ``transformer_<method>_<suffix>`` the stock architecture of that suffix. Decoder-only:
``transformer_lm_<method>`` is fairseq's base language model, ``transformer_lm_<method>_<N>`` the same with N layers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from argparse import Namespace
from typing import Any, Callable, NamedTuple

from fairseq.models import MODEL_REGISTRY, register_model, register_model_architecture, transformer_lm
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer import transformer_legacy as transformer
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from admin_fairseq.config import as_namespace, refuse_unknown
from admin_fairseq.errors import AdminError
from admin_fairseq.family import FamilyLanguageModel, FamilyModel
from admin_fairseq.rules import Rule, RuledModel

Defaults = Callable[[Any], None]

DEPTHS = {
    f"_{n}_{m}": (n, m)
    for n, m in ((6, 6), (12, 1), (12, 2), (12, 12), (18, 2), (18, 18), (24, 6), (40, 6), (60, 12), (100, 100))
}
DEPTHS.update({"_72": (60, 12), "_200": (100, 100)})
STOCK = ("iwslt_de_en", "wmt_en_de", "wmt_en_de_big")
LM_DEPTHS = (6, 12, 18, 24, 36, 48, 60, 72, 100)


class Method(NamedTuple):
    """The models that a method's architectures are of, by their registered names."""

    translation: str
    language_model: str


METHODS: dict[str, Method] = {}  # by name


def register_method(name: str) -> Callable[[type[Rule]], type[Rule]]:
    """A decorator that makes architectures of a :class:`~admin_fairseq.rules.Rule`: translation and language models.

    Raises:
        AdminError: it is used without a name, the name is taken, or the class is not derived from Rule.
    """
    if not isinstance(name, str):
        raise AdminError('@register_method needs a name: write @register_method("name")')
    if name in METHODS:
        raise AdminError(f'@register_method("{name}"): there is such a method already; choose another name')

    def register(rule: type[Rule]) -> type[Rule]:
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise AdminError(f'@register_method("{name}"): {rule.__name__} must be a class derived from Rule')
        register_models(name, RuledModel, rule.__module__, rule=rule, __doc__=rule.__doc__)
        register_family(name, **normalize_before(rule.pre_ln))
        return rule

    return register


def register_models(method: str, mixin: type[FamilyModel], module: str, **attributes: Any) -> None:
    """Register a translation and a language model of a method, as classes of this module."""
    bases: dict[str, tuple[type, ...]] = {"transformer": (mixin, TransformerModel)}
    bases["transformer_lm"] = (FamilyLanguageModel, mixin, TransformerLanguageModel)
    for kind, classes in bases.items():
        model = type(f"{kind}_{method}", classes, {"method": method, "__module__": module, **attributes})
        setattr(sys.modules[module], model.__name__, model)  # pickle finds a class by its name
        register_model(model.__name__)(model)


def normalize_before(pre_ln: bool) -> dict[str, Any]:
    """fairseq's options for LayerNorms in front of the branches, or behind the sums."""
    return {"encoder_normalize_before": pre_ln, "decoder_normalize_before": pre_ln}


def register_family(method: str, models_of: str | None = None, **options: Any) -> None:
    """Register the architectures of a method: of another method's models if that is named, these options by default."""
    translation, language_model = (f"{kind}_{models_of or method}" for kind in ("transformer", "transformer_lm"))
    METHODS[method] = Method(translation, language_model)
    name = f"transformer_{method}"
    _register(translation, name, transformer.base_architecture, **options)
    for suffix, (n, m) in DEPTHS.items():
        layers = {"encoder_layers": n, "decoder_layers": m}
        _register(translation, name + suffix, transformer.base_architecture, **layers, **options)
    for suffix in STOCK:
        _register(translation, f"{name}_{suffix}", getattr(transformer, f"transformer_{suffix}"), **options)
    name = f"transformer_lm_{method}"
    _register(language_model, name, _base_lm, **options)
    for n in LM_DEPTHS:
        _register(language_model, f"{name}_{n}", _base_lm, decoder_layers=n, **options)


def _register(model_name: str, name: str, base: Defaults, **defaults: Any) -> None:
    """Register an architecture: a stock one with other defaults, and the model's own options."""

    @register_model_architecture(model_name, name)
    def architecture(args: Any) -> None:
        model = MODEL_REGISTRY[model_name]
        options = as_namespace(args)
        if options is not args:
            for key in [key for key, value in vars(options).items() if value is None]:  # null: as the architecture says
                delattr(options, key)
            stock = Namespace()
            base(stock)
            refuse_unknown(options, model_name, vars(stock))
        # base_layers: fairseq 0.12.2 looks for it in hydra's config
        for key, value in {"base_layers": 0, **model.own_options, **defaults}.items():
            setattr(options, key, getattr(options, key, value))
        model.settle(options)
        model.check(options)
        base(options)
        if getattr(options, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
            options.tpu = False  # fairseq-train takes --bf16 for a wish for TPUs; GPUs know bf16 too
        if options is not args:  # hydra's config, from which fairseq builds the model and which it saves
            for key, value in vars(options).items():
                args[key] = value


def _base_lm(args: Namespace) -> None:
    """Stock base language model, but Post-LN unless asked otherwise."""
    normalize_before = getattr(args, "decoder_normalize_before", False)
    transformer_lm.base_lm_architecture(args)
    args.decoder_normalize_before = normalize_before
    for field in dataclasses.fields(TransformerLanguageModelConfig):
        is_interpolation = str(field.default).startswith("${")  # of another section: task, common
        if not hasattr(args, field.name) and not is_interpolation:
            setattr(args, field.name, field.default)
