"""The named architectures: every method at every depth, as fairseq's ``--arch`` knows them.

``transformer_<method>`` is fairseq's base Transformer (6-6), ``transformer_<method>_<E>_<D>`` the same with E encoder
and D decoder layers, and ``transformer_<method>_<suffix>`` the stock architecture of that suffix.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from argparse import Namespace
from typing import Any, Callable

from fairseq.models import MODEL_REGISTRY, register_model_architecture, transformer_lm
from fairseq.models.transformer import transformer_legacy as transformer
from fairseq.models.transformer_lm import TransformerLanguageModelConfig

from admin_fairseq import methods, model  # noqa: F401  (its models register themselves)
from admin_fairseq.config import flat, refuse_unknown

Defaults = Callable[[Any], None]

# method: (the model it is, what its options are by default)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "admin": ("transformer_admin", {}),
    "admin_logn": ("transformer_admin", {"admin_init": "logn"}),  # admin-torch's O(log n)
    "admin_sqrt": ("transformer_admin", {"admin_init": "sqrt"}),  # admin-torch's O(1)
    "admin_fixed": ("transformer_admin", {"admin_omega": "fixed"}),
    "admin_scalar": ("transformer_admin", {"admin_omega": "scalar"}),
    "postln": ("transformer", {"encoder_normalize_before": False, "decoder_normalize_before": False}),
    "preln": ("transformer", {"encoder_normalize_before": True, "decoder_normalize_before": True}),
    **{method: (f"transformer_{method}", {}) for method in methods.RULES},
}
DEPTHS = {f"_{n}_{m}": (n, m) for n, m in ((6, 6), (12, 12), (18, 18), (60, 12), (100, 100))}
DEPTHS.update({"_72": (60, 12), "_200": (100, 100)})
STOCK = ("iwslt_de_en", "wmt_en_de", "wmt_en_de_big")
LM_DEPTHS = (6, 12, 18, 24, 36, 48, 60, 72, 100)


def _register(model_name: str, name: str, base: Defaults, **defaults: Any) -> None:
    """Register an architecture: a stock one with other defaults, and the model's own options."""

    @register_model_architecture(model_name, name)
    def architecture(args: Any) -> None:
        own = getattr(MODEL_REGISTRY[model_name], "own_options", None)  # None: fairseq's model itself
        options = flat(args)
        if options is not args and own is not None:
            stock = Namespace()
            base(stock)
            refuse_unknown(options, model_name, vars(stock))
            for key in [key for key, value in vars(options).items() if value is None]:  # null: as the architecture says
                delattr(options, key)
        # base_layers: fairseq 0.12.2 looks for it in hydra's config
        for key, value in {"base_layers": 0, **(own or {}), **defaults}.items():
            setattr(options, key, getattr(options, key, value))
        if own is not None:
            MODEL_REGISTRY[model_name].check(options)
        base(options)
        if getattr(options, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
            options.tpu = False  # fairseq-train takes --bf16 for a wish for TPUs; GPUs know bf16 too
        if options is not args:  # hydra's config, from which fairseq builds the model and which it saves
            for key, value in vars(options).items():
                args[key] = value


def _post_ln_lm(args: Namespace) -> None:
    """Stock base language model, but Post-LN."""
    transformer_lm.base_lm_architecture(args)
    args.decoder_normalize_before = False
    for field in dataclasses.fields(TransformerLanguageModelConfig):
        is_interpolation = str(field.default).startswith("${")  # of another section: task, common
        if not hasattr(args, field.name) and not is_interpolation:
            setattr(args, field.name, field.default)


for _method, (_model, _options) in METHODS.items():
    _name = f"transformer_{_method}"
    _register(_model, _name, transformer.base_architecture, **_options)
    for _suffix, (_n, _m) in DEPTHS.items():
        _depth = {"encoder_layers": _n, "decoder_layers": _m}
        _register(_model, _name + _suffix, transformer.base_architecture, **_depth, **_options)
    for _suffix in STOCK:
        _register(_model, f"{_name}_{_suffix}", getattr(transformer, f"transformer_{_suffix}"), **_options)

_register("transformer_lm_admin", "transformer_lm_admin", _post_ln_lm)
for _n in LM_DEPTHS:
    _register("transformer_lm_admin", f"transformer_lm_admin_{_n}", _post_ln_lm, decoder_layers=_n)
