"""What the settings in a checkpoint may say: values. fairseq runs some of them as code.

fairseq calls Python's ``eval`` on options when it builds a model, a task, a criterion or an optimizer, opens files that
options name, and resolves ``${oc.env:HOME}``. Every checkpoint that is read here or by fairseq's own commands goes
through :func:`checked` first; and fairseq's modules get :func:`literal` for an ``eval``, so that an option that this
file does not know, or a model of somebody else's, runs nothing either.
"""

from __future__ import annotations

import ast
import operator
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from typing import Any, Iterator

from fairseq.data.encoders import gpt2_bpe

from admin_fairseq.checkpoints.unpickling import plain
from admin_fairseq.errors import AdminError

# What the text of an evaluated option must be: numbers, in so many lists or tuples; or other values.
_NUMBERS, _LAYERS, _VALUES, _DICTIONARY = "numbers", "lists of numbers", "numbers and words", "a dictionary"
EVALUATED = {
    **dict.fromkeys(("adaptive_softmax_cutoff", "adaptive_input_cutoff"), _NUMBERS),
    **dict.fromkeys(("encoder_attention", "decoder_attention", "self_attention"), _NUMBERS),
    **dict.fromkeys(("project_input", "gated_attention", "downsample", "pretrained"), _NUMBERS),
    **dict.fromkeys(("left_pad_source", "left_pad_target"), _NUMBERS),
    **dict.fromkeys(("adam_betas", "adamax_betas", "lamb_betas", "adafactor_eps", "latent_temp"), _NUMBERS),
    **dict.fromkeys(("pipeline_balance", "pipeline_devices"), _NUMBERS),
    **dict.fromkeys(("pipeline_encoder_balance", "pipeline_encoder_devices"), _NUMBERS),
    **dict.fromkeys(("pipeline_decoder_balance", "pipeline_decoder_devices"), _NUMBERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "character_filters", "feature_encoder_spec"), _LAYERS),
    **dict.fromkeys(("conv_feature_layers", "conv_aggregator_layers", "conv_layers", "input_layers"), _LAYERS),
    "wer_args": _VALUES,
    **dict.fromkeys(("xformers_att_config", "encoder_xformers_att_config", "decoder_xformers_att_config"), _DICTIONARY),
    **dict.fromkeys(("update2lr", "epoch2lr"), _DICTIONARY),
}
# Names in fairseq's registries, by some of which it looks for files.
NAMES = ("_name", "arch", "task", "criterion", "optimizer", "lr_scheduler", "bpe", "tokenizer", "scoring", "simul_type")
# What to import, run, open, fetch or write where something is built. The weights of pretrained parts are in the
# checkpoint; the hub is told of a segmentation's files by its caller, or finds them beside the model.
FORGOTTEN = {
    **dict.fromkeys(("user_dir", "post_save_script", "log_file", "tensorboard_logdir", "wandb_project", "aim_repo")),
    **dict.fromkeys(("save_predictions", "replace_unk", "speaker_emb_path", "wer_kenlm_model", "wer_lexicon")),
    **dict.fromkeys(("bpe_codes", "bpe_merges", "bpe_vocab", "bpe_vocab_file")),
    **dict.fromkeys(("sentencepiece_model", "sentencepiece_model_path", "lang_to_offline_shard_ratio")),
    "gpt2_encoder_json": gpt2_bpe.DEFAULT_ENCODER_JSON,
    "gpt2_vocab_bpe": gpt2_bpe.DEFAULT_VOCAB_BPE,
    **dict.fromkeys(("embed_path", "encoder_embed_path", "decoder_embed_path", "ema_seed_model")),
    **dict.fromkeys(("load_pretrained_encoder_from", "load_pretrained_decoder_from", "quantization_config_path")),
    **dict.fromkeys(("azureml_logging", "use_plasma_view"), False),
}
MOST, DEEPEST = 100_000, 20  # values, levels
LONGEST = 10_000  # characters of an evaluated option, and values in what it says
METHODS = {"self", *dir(OrderedDict)}  # what settings are read by, as a dictionary and as a Namespace
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def literal(text: Any, *_: Any) -> Any:
    """What ``eval`` makes of numbers, texts, and lists, tuples, sets and dictionaries of them; ``[(512, 3)] * 20`` too.

    Raises:
        AdminError: it says anything else.
        TypeError: it is no text; as ``eval`` does.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError("expected text")
    try:
        if len(text) > LONGEST:
            raise ValueError("too long")
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise AdminError(f"fairseq would run {_short(text)} as code; it must be a plain value") from error


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        left = LONGEST
        values = []
        for each in node.elts:
            values.append(_value(each))
            left -= _size(values[-1])
            if left < 0:
                raise ValueError("too long")
        return kind(values)
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        sizes = [_size(side) if isinstance(side, (str, bytes, list, tuple)) else side for side in (left, right)]
        if sizes != [left, right] and not -1 < OPERATORS[type(node.op)](*sizes) <= LONGEST:
            raise ValueError("too long")
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("not a value")


def _size(value: Any) -> int:
    """Of a value, each list's items counted wherever it stands."""
    if isinstance(value, (str, bytes)):
        return max(1, len(value))
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return max(1, sum(map(_size, value))) if isinstance(value, (list, tuple, set)) else 1


def _has_form(value: Any, form: str) -> bool:
    if form is _DICTIONARY:
        return value is None or isinstance(value, dict)
    kinds: tuple[type, ...] = (int, float, type(None), *((str,) if form is _VALUES else ()))
    return all(isinstance(each, kinds) for each in _flat(value, 2 if form is _LAYERS else 1))


def _flat(value: Any, levels: int) -> Iterator[Any]:
    if levels and isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each, levels - 1)
    else:
        yield value


def guard_fairseq() -> None:
    """Give fairseq's modules :func:`literal` under the name ``eval``."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fairseq" and module is not None:
            module.__dict__.setdefault("eval", literal)


def checked(settings: Any, forgets: bool = False) -> Any:
    """A checkpoint's settings as plain data; a Namespace stays one.

    Args:
        forgets: without what :data:`FORGOTTEN` names, for whoever builds something from them.

    Raises:
        AdminError: they hold what fairseq would run or resolve, or more than settings are.
    """
    return _Settings(forgets).checked(settings, "settings", 0)


class _Settings:
    def __init__(self, forgets: bool) -> None:
        self.forgets, self.count = forgets, 0

    def checked(self, value: Any, name: str, level: int) -> Any:
        self.count += 1
        value = plain(value)
        if self.count > MOST or level > DEEPEST:
            raise AdminError("its settings hold more values than settings do")
        if name in NAMES and not isinstance(value, (str, dict, Namespace, type(None))):
            raise AdminError(f"its setting {name} is {_short(value)}, which is no name")
        if isinstance(value, str):
            _check_text(value, name)
            return value
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, (list, tuple)):
            return type(value)([self.checked(each, name, level + 1) for each in value])
        if isinstance(value, (dict, Namespace)):
            # as fold writes them: fairseq asks for the attributes of a dictionary that has some
            options = {**value, **getattr(value, "__dict__", {})} if isinstance(value, dict) else vars(value)
            kept: dict[Any, Any] = {}
            for key, each in options.items():
                if not (isinstance(key, int) or key is None or (isinstance(key, str) and key.isprintable())):
                    raise AdminError(f"its {name} have a name that is not text: {_short(key)}")
                if key in METHODS or str(key).startswith("__"):
                    raise AdminError(f"its {name} have {_short(key)}, which is no setting")
                each = FORGOTTEN[key] if self.forgets and key in FORGOTTEN else each
                kept[key] = self.checked(each, str(key), level + 1)
            if isinstance(value, Namespace):
                return _namespace(kept)
            return _with_attributes(kept) if isinstance(value, OrderedDict) and vars(value) else kept
        raise AdminError(f"its setting {name} is of {type(value).__name__}, which is no value")


def _namespace(options: dict[Any, Any]) -> Namespace:
    if not all(isinstance(name, str) for name in options):
        raise AdminError("its settings have names that are not text")
    return Namespace(**options)


def _with_attributes(options: dict[Any, Any]) -> Any:
    values = OrderedDict(options)
    vars(values).update(options)
    return values


def _check_text(text: str, name: str) -> None:
    """Raises:
    AdminError: fairseq would run it, or resolve it.
    """
    if "${" in text:
        raise AdminError(f"its setting {name} is {_short(text)}, which would be replaced by what that stands for here")
    if name in NAMES and not re.fullmatch(r"[\w.@-]*", text):
        raise AdminError(f"its setting {name} is {_short(text)}, which is no name")
    check_evaluated(text, name, f"its setting {name}")


def check_evaluated(text: Any, name: str, named: str) -> None:
    """Of an option of any name, which messages call ``named``.

    Raises:
        AdminError: it is text that fairseq evaluates, and not of the values that it should be.
    """
    if name in EVALUATED and text and isinstance(text, str):
        try:
            is_value = _has_form(literal(text), EVALUATED[name])
        except AdminError:
            is_value = False
        if not is_value:
            raise AdminError(f"{named} is {_short(text)}, which fairseq would run as code; read are {EVALUATED[name]}")


def _short(text: Any) -> str:
    shown = repr(text) if isinstance(text, (str, bytes, int, float, type(None))) else f"of {type(text).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
