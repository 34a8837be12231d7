"""What a checkpoint must hold, and how it is read: each part that may be wrong, in one line."""

import io
import math
import os
import pickle
import re
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from fairseq.logging import meters
from fairseq.models import ARCH_CONFIG_REGISTRY
from omegaconf import OmegaConf

from admin_fairseq import AdminError
from admin_fairseq.checkpoints import checks, files, unpickling

SIZES = {"d": 4, "f": 8, "*": 6}
# by hand, not from checks.py: sizes by letter
NORM = {"weight": "d", "bias": "d"}
ATTENTION = {
    f"{part}_proj.{name}": letters
    for part in ("q", "k", "v", "out")
    for name, letters in (("weight", "dd"), ("bias", "d"))
}
LAYER = {
    **{f"{norm}_layer_norm.{part}": letters for norm in ("self_attn", "final") for part, letters in NORM.items()},
    **{f"self_attn.{part}": letters for part, letters in ATTENTION.items()},
    **{"fc1.weight": "fd", "fc1.bias": "f", "fc2.weight": "df", "fc2.bias": "d"},
}
CROSS = {
    **{f"encoder_attn_layer_norm.{part}": letters for part, letters in NORM.items()},
    **{f"encoder_attn.{part}": letters for part, letters in ATTENTION.items()},
    **{f"encoder_attn.{part}_proj.weight": "d*" for part in "qkv"},
}
STACK = {
    **{f"layernorm_embedding.{part}": letters for part, letters in NORM.items()},
    **{"embed_tokens.weight": "**", "embed_positions.weight": "*d"},
    **{"project_in_dim.weight": "d*", "quant_noise.weight": "dd"},
}
LETTERS = {
    **{f"encoder.layers.{number}.{name}": letters for number in (0, 1) for name, letters in LAYER.items()},
    **{f"decoder.layers.0.{name}": letters for name, letters in (*LAYER.items(), *CROSS.items())},
    **{f"{stack}.{name}": letters for stack in ("encoder", "decoder") for name, letters in STACK.items()},
}


def weights():
    """Two encoder layers and a decoder layer."""
    made = {name: torch.ones([SIZES[letter] for letter in letters]) for name, letters in LETTERS.items()}
    norms = [name for name in made if name.endswith("_layer_norm.weight")]
    return {**made, **{name.replace("weight", "omega"): torch.ones(4) for name in norms}}


def settings(**options):
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_embed_dim": 4, "encoder_ffn_embed_dim": 8}
    return Namespace(**{"arch": "transformer", **sizes, "encoder_attention_heads": 2, **options})


def refused(message, function, *arguments):
    with pytest.raises(AdminError, match=message) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


def test_layers_by_stack():
    own = weights()
    layers = checks.check_weights(own)
    assert {stack: len(found) for stack, found in layers.items()} == {"encoder": 2, "decoder": 1}
    assert layers["encoder"][1]["fc1.weight"] is own["encoder.layers.1.fc1.weight"]
    wide = {name: torch.ones([2 * n for n in weight.shape]) for name, weight in own.items() if name[0] == "d"}
    checks.check_weights({**own, **wide})  # each stack has a width of its own


def test_each_shape():
    own = weights()
    for name, letters in LETTERS.items():
        shape = tuple(own[name].shape)
        for other in ((*shape, 1), (0, *shape[1:]), shape[1:]):
            start = rf"its weight {re.escape(name)} is of shape \({', '.join(map(str, other))}"
            refused(start, checks.check_weights, {**own, name: torch.ones(other)})
        for place, letter in enumerate(letters):
            changed = {**own, name: torch.ones([size + (number == place) for number, size in enumerate(shape)])}
            if letter == "*":
                checks.check_weights(changed)
            else:
                refused(r"is of shape \(.*, not \(", checks.check_weights, changed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder.layers.0.fc1.weight", [1.0], "encoder.layers.0.fc1.weight is no tensor of numbers"),
        ("anything", torch.ones(1, dtype=torch.complex64), "anything is no tensor of numbers"),
        ("encoder.layers.0.odd_layer_norm.omega", torch.ones(4), "odd_layer_norm.omega is the omega of no sub-layer"),
        ("decoder.final_layer_norm.omega", torch.ones(4), "final_layer_norm.omega is the omega of no sub-layer"),
        ("encoder.layers.3.x", torch.ones(1), "its encoder has no layer 2, but 3 layers"),
        ("decoder.layers.0.final_layer_norm.omega", torch.ones(3), r"omega is of shape \(3,\), not \(4\)"),
        ("decoder.layers.0.final_layer_norm.omega", torch.ones(1, dtype=torch.int64), r"is of torch.int64, not of"),
        ("encoder.layers.0.fc2.weight", torch.ones(4, 9), r"fc2.weight is of shape \(4, 9\), not \(4, 8\)"),
    ],
)
def test_weights_that_are_refused(name, value, message):
    refused(message, checks.check_weights, {**weights(), name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder.layers.0.final_layer_norm.omega", torch.ones(1)),  # --admin-omega scalar
        ("encoder.layers.0.final_layer_norm.omega", torch.ones(4, dtype=torch.float16)),
        ("encoder.layers.01.fc1.weight", torch.ones(9)),
        ("encoder.version", torch.ones(0, dtype=torch.bool)),
    ],
)
def test_weights_that_fit(name, value):
    checks.check_weights({**weights(), name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_layers": 3}, "its setting encoder_layers is 3, but its weights have 2"),
        ({"encoder_embed_dim": 5}, "its setting encoder_embed_dim is 5, but its weights have 4"),
        ({"encoder_ffn_embed_dim": 9}, "its setting encoder_ffn_embed_dim is 9, but its weights have 8"),
        ({"encoder_attention_heads": 3}, "its setting encoder_attention_heads is 3, which does not divide 4"),
        ({"encoder_attention_heads": 0}, "its setting encoder_attention_heads is 0, which does not divide 4"),
        *(
            ({"max_source_positions": value}, "max_source_positions is .*; read are numbers from 1 to 1048576")
            for value in (0, -1, 2**20 + 1)
        ),
        ({"tokens_per_sample": 2.5}, "its setting tokens_per_sample is 2.5; read"),
        ({"max_target_positions": True}, "its setting max_target_positions is True; read"),
        *(({"dropout": value}, "its setting dropout is .*, which is no value") for value in (-0.1, 1.1, "x", True, [])),
        ({"encoder_layerdrop": 2}, "its setting encoder_layerdrop is '2'"),
        ({"quant_noise_pq": 2}, "its setting quant_noise_pq is '2'"),
        ({"quant_noise_scalar": 2}, "its setting quant_noise_scalar is '2'"),
        ({"encoder_learned_pos": "no"}, "its setting encoder_learned_pos is 'no'"),
        ({"activation_fn": "y" * 60}, f"its setting activation_fn is '{'y' * 50}', which"),
        *(
            ({"encoder_attention_heads": value}, "its setting encoder_attention_heads is .*, which is no value")
            for value in (2.0, -1, 2**31, "2", True)
        ),
        ({"decoder_output_dim": 9}, "its setting decoder_output_dim is 9, larger than any of its weights"),
        ({"decoder_input_dim": "9"}, "its setting decoder_input_dim is 9, larger than any of its weights"),
        ({"decoder_input_dim": "-9"}, "its setting decoder_input_dim is '-9', which is no value"),
    ],
)
def test_settings_that_are_refused(options, message):
    own = weights()
    refused(message, checks.check_settings, settings(**options), own, checks.check_weights(own))


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_layers": 5, "encoder_layers_to_keep": "0,1"},
        {"encoder_embed_dim": None, "activation_fn": None, "decoder_output_dim": None},
        {"max_source_positions": 2**20, "max_target_positions": 1},
        {"dropout": 1, "attention_dropout": 0, "encoder_layerdrop": 0.5},
        {"encoder_learned_pos": True, "decoder_learned_pos": False, "activation_fn": "gelu"},
        {"adaptive_softmax_factor": 2.5, "decoder_output_dim": 8, "decoder_input_dim": "8"},
        {"encoder_attention_heads": 1, "unknown": "anything"},
        {"encoder_attention_heads": 4},
    ],
)
def test_settings_that_fit(options):
    own = weights()
    checks.check_settings(settings(**options), own, checks.check_weights(own))


def test_sizes_are_asked_of_weights_that_are_there():
    own = {name: weight for name, weight in weights().items() if "final_layer_norm" not in name and "fc1" not in name}
    options = {"encoder_embed_dim": 5, "encoder_ffn_embed_dim": 7, "encoder_attention_heads": 3}
    checks.check_settings(settings(**options), own, checks.check_weights(own))


def test_settings_that_the_architecture_does_not_take(monkeypatch):
    def architecture(error):
        def complain(args):
            raise error

        monkeypatch.setitem(ARCH_CONFIG_REGISTRY, "transformer", complain)

    architecture(KeyError("a\nb" + "c" * 200))
    refused(rf"are not those of transformer \(KeyError: 'a\\nb{'c' * 95}\)$", checks.check_settings, settings(), {}, {})
    architecture(AdminError("said elsewhere"))
    checks.check_settings(settings(), {}, {})
    architecture(ValueError())
    checks.check_settings(settings(arch="fconv"), {}, {})


@pytest.mark.parametrize("arch", ["transformer", "transformer_lm", "transformer_admin", "transformer_lm_admin_24"])
def test_transformers(arch):
    assert checks.is_transformer(arch)


@pytest.mark.parametrize("arch", ["fconv", "nope", None, 3, ["transformer"]])
def test_other_models(arch):
    assert not checks.is_transformer(arch)


EXTRA = "its extra_state or optimizer_history is not what fairseq writes"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"extra_state": []}, EXTRA),
        ({"optimizer_history": {}}, EXTRA),
        ({"optimizer_history": [3]}, "its optimizer_history is not what fairseq writes"),
        ({"optimizer_history": [{"num_updates": "3"}]}, "its optimizer_history is not what fairseq writes"),
        ({"extra_state": {"ema": [1]}}, "its average of weights, ema, is no dictionary"),
        ({"extra_state": {"ema_fp32_params": {}}}, "average of weights, ema_fp32_params, does not fit its weights in"),
        ({"args": {"encoder_layers": 9}}, "its setting encoder_layers is 9"),
        ({"model": {"encoder.layers.1.x": torch.ones(1)}}, "its encoder has no layer 0"),
    ],
)
def test_parts_of_a_checkpoint(part, message):
    args = settings(**part.pop("args", {}))
    refused(message, checks.check, {"model": weights(), **part}, args)


def test_what_a_checkpoint_may_lack():
    state = {"model": weights()}
    checks.check(state, None)
    assert (state["extra_state"], state["optimizer_history"]) == ({}, [])
    state = {"model": weights(), "extra_state": {"epoch": 2}, "optimizer_history": [{}, {"num_updates": 3}]}
    checks.check(state, settings())
    assert state["extra_state"] == {"epoch": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda own: own.pop("encoder.layers.0.fc1.weight"),
            r"does not fit its weights in encoder.layers.0.fc1.weight",
        ),
        (
            lambda own: own.update({"decoder.embed_tokens.weight": torch.ones(1)}),
            "does not fit .* decoder.embed_tokens",
        ),
        (
            lambda own: own.update({"decoder.embed_tokens.weight": 3}),
            "does not fit its weights in decoder.embed_tokens",
        ),
        (lambda own: own.update(more=torch.ones(1)), "ema, has weights that the model has not"),
        (lambda own: own.update(mark=torch.ones(2, dtype=torch.complex64)), "mark is no tensor of numbers"),
    ],
)
def test_an_average_that_does_not_fit(change, message):
    state = {"model": {**weights(), "mark": torch.ones(2)}}
    average = dict(state["model"])
    change(average)
    refused(message, checks.check, {**state, "extra_state": {"ema": average}}, None)


def test_an_average_may_lack_what_is_not_trained():
    state = {"model": {**weights(), "encoder.layers.0.count": torch.ones(1, dtype=torch.int64)}}
    average = {name: weight for name, weight in state["model"].items() if ".layers." in name and "count" not in name}
    checks.check({**state, "extra_state": {"ema": average}}, None)


@pytest.mark.parametrize(
    ("history", "after"), [([], ""), ([{"num_updates": 9}, {"num_updates": 7}], " after update 7")]
)
@pytest.mark.parametrize("where", ["model", "ema", "ema_fp32_params"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(where, value, history, after):
    bad = {"a": torch.ones(2), "whole": torch.ones(1, dtype=torch.int64), "b": torch.tensor([1, value])}
    state = {"model": {"a": torch.ones(2)}, "extra_state": {}, "optimizer_history": history}
    (state if where == "model" else state["extra_state"])[where] = bad
    refused(f"its weight b holds numbers that are not finite{after}: the training", checks.check_finite, state)


def test_weights_that_are_finite():
    checks.check_finite(
        {"model": {"a": torch.ones(2), "b._float_tensor": torch.tensor([math.nan]), "c": torch.ones(1)}}
    )
    state = {"model": {"b._float_tensor": torch.tensor([math.nan]), "c": torch.tensor([math.inf])}}
    refused("its weight c holds", checks.check_finite, state)


GROUP = {"params": [0, 1], "lr": 0.1}


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        [],
        {"state": {}},
        {"param_groups": [GROUP]},
        {"state": {0: 3}, "param_groups": [GROUP]},
        {"state": {}, "param_groups": {}},
        {"state": {}, "param_groups": [GROUP, 3]},
        {"state": {}, "param_groups": [GROUP, {}]},
        {"state": {}, "param_groups": [{"params": (0, 1)}]},
        {"state": {}, "param_groups": [{"params": [0, True]}]},
    ],
)
def test_an_optimizer_that_is_none(optimizer):
    refused("its optimizer's state ", checks.check_optimizer, optimizer)
    checks.check_optimizer({"state": {0: {}}, "param_groups": [GROUP]})


def written(folder, state, name="c.pt"):
    torch.save(state, folder / name)
    return str(folder / name)


def test_no_file(tmp_path):
    refused(rf"^no such file: {tmp_path}/c\.pt$", files.load, f"{tmp_path}/c.pt")
    refused(rf"^{tmp_path} is a folder, not a checkpoint$", files.load, str(tmp_path))
    for name in ("last", "best"):
        (tmp_path / f"checkpoint_{name}.pt").touch()
    best, last = (f"{tmp_path}/checkpoint_{name}.pt" for name in ("best", "last"))
    refused(f"is a folder, not a checkpoint; give {best} or {last}$", files.load, str(tmp_path))


def test_load_says_which_file(tmp_path):
    path = written(tmp_path, {"model": {"w": torch.tensor([math.nan])}, "args": settings()})
    assert files.load(path)["model"]["w"].isnan()
    refused(rf"^{path}: its weight w holds", files.load, path, True)
    path = written(tmp_path, {"model": {"encoder.layers.1.x": torch.ones(1)}})
    refused(rf"^{path}: its encoder has no layer 0", files.load, path)
    assert "extra_state" not in files.load(path, checked=False)
    for name in ("args", "cfg"):
        path = written(tmp_path, {"model": weights(), name: {"model": {"_name": "x", "encoder_layers": 9}}["model"]})
        if name == "args":
            refused("its setting encoder_layers is 9", files.load, path)
    path = written(tmp_path, {"model": weights(), "cfg": {"model": {"_name": "transformer", "encoder_layers": 9}}})
    refused("its setting encoder_layers is 9", files.load, path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"is not a fairseq checkpoint \('model'\)"),
        ({"model": []}, r"is not a fairseq checkpoint \(its weights are not a dictionary\)"),
        ({"model": {3: torch.ones(1)}}, r"is not a fairseq checkpoint \(a weight's name is not text\)"),
        ([], "is not a fairseq checkpoint"),
        ({"model": {}, "a": Path()}, r"holds an object of pathlib\S+, which safe loading does not read; nothing in"),
    ],
)
def test_other_states(tmp_path, state, message):
    refused(f"^{tmp_path}/c.pt {message}", files.load, written(tmp_path, state))


def test_many_names_for_the_same_numbers(tmp_path):
    shared = torch.ones(50_000)
    own = {"w": torch.ones(3), "text": "no tensor", **{f"embeddings.{number}": shared for number in range(40)}}
    assert len(files.load(written(tmp_path, {"model": own}), checked=False)["model"]) == 42
    own.update({f"more.{number}": shared for number in range(40)})
    refused("many times as large as the file", files.load, written(tmp_path, {"model": own}))


def test_sizes_are_checked_before_fairseq_builds(tmp_path):
    bad = {"model": weights(), "args": settings(encoder_embed_dim=5)}
    for arch, name in (("transformer", "args"), ("transformer", "cfg"), ("fconv", "args"), ("transformer", "none")):
        options = settings(encoder_embed_dim=5, arch=arch)
        state = {"model": bad["model"], name: options if name != "cfg" else {"model": {**vars(options), "_name": arch}}}
        with open(written(tmp_path, state), "rb") as file:
            if arch == "fconv" or name == "none":
                files.read(file, forgets=True)
            else:
                refused(r"c\.pt: its setting encoder_embed_dim is 5", lambda: files.read(file, forgets=True))
        with open(tmp_path / "c.pt", "rb") as file:
            files.read(file)


def test_building():
    for error in (AdminError("a"), OSError("b")):
        with pytest.raises(type(error), match=f"^{error}$"), files.building("model"):
            raise error
    message = rf"^no task can be built from its settings \(ValueError: a b {'c' * 196}\)$"
    with pytest.raises(AdminError, match=message), files.building("task"):
        raise ValueError("a\n b " + "c" * 300)


def test_forms_of_settings():
    flat = {"arch": "x", "dropout": 0.1, "user_dir": "evil", "encoder_embed_path": "evil"}
    expected = Namespace(**{**flat, "user_dir": None, "encoder_embed_path": None})
    sections = {
        "model": {"_name": "x", "dropout": 0.1, "encoder_embed_path": "evil"},
        "common": {"user_dir": "evil"},
        "number": 3,
        "nothing": None,
    }
    assert files.settings({"args": flat}) == files.settings({"args": Namespace(**flat), "cfg": sections}) == expected
    for cfg in (sections, OmegaConf.create(sections), {**sections, "model": Namespace(**sections["model"])}):
        assert files.settings({"args": None, "cfg": cfg}) == expected
    named = files.settings(
        {"cfg": {**sections, "task": {"_name": "translation", "source_lang": "de", "encoder": {"layers": 3}}}}
    )
    assert named.encoder == {"layers": 3}  # of a model's section it would be encoder_layers
    assert (named.arch, named.task, named.source_lang, hasattr(named, "_name")) == ("x", "translation", "de", False)
    assert files.settings({"args": {"dropout": 0.1}}) == Namespace(arch=None, dropout=0.1)
    refused("^it holds no settings$", files.settings, {"args": None, "cfg": []})
    refused("^it holds no settings$", files.settings, {})
    refused("^its settings have names that are not text$", files.settings, {"args": {3: 4}})
    refused("^no model can be built from its settings", files.settings, {"cfg": {"model": {3: 4}}})


def test_meters_of_many_names_are_looked_at_once(monkeypatch):
    seen, meter = [], meters.AverageMeter()
    monkeypatch.setattr(checks, "_new_meter", lambda name: seen.append(name) or meter)
    group = [(0, "loss", "AverageMeter", meter.state_dict())]
    checks.check_progress({"extra_state": {"metrics": dict.fromkeys("abc", group)}})
    assert seen == ["AverageMeter"]


LOSS = (0, "loss", "AverageMeter", meters.AverageMeter().state_dict())
PROGRESS, METERS = "its extra_state does not say how far the training has come", "the meters in its extra_state are not"
NO_STATE = "its optimizer's state is not that of a torch optimizer"


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"extra_state": None, "last_optimizer_state": None},
        {"extra_state": {"train_iterator": {"epoch": 1, "shuffle": None}, "metrics": {"a": [LOSS], "b": [LOSS, LOSS]}}},
        {"extra_state": {"best": None, "previous_training_time": 1.5}, "optimizer_history": [{}, {"num_updates": 0}]},
        {"extra_state": {"best": torch.tensor(1.5), "train_iterator": {"epoch": 2**31 - 1, "version": 2}}},
        {"last_optimizer_state": {}},
        {"last_optimizer_state": {"loss_scale": 1.0}},
        {"last_optimizer_state": {"state": {0: {}}, "param_groups": [{"params": [0]}]}},
    ],
)
def test_what_a_training_goes_on_from(state):
    checks.check_progress(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"extra_state": [1]}, PROGRESS),
        ({"extra_state": {"train_iterator": [1]}}, PROGRESS),
        *(({"extra_state": {"train_iterator": {"epoch": epoch}}}, PROGRESS) for epoch in ("1", -1, 2**31, 1.5)),
        *(({"optimizer_history": [{}, {"num_updates": n}]}, PROGRESS) for n in ("1", -1, 2**31)),
        ({"optimizer_history": {"num_updates": 1}}, PROGRESS),
        ({"optimizer_history": [1]}, PROGRESS),
        *(({"extra_state": {"best": best}}, PROGRESS) for best in ("1", b"1", [1], (1,), {})),
        ({"extra_state": {"previous_training_time": "1"}}, PROGRESS),
        ({"extra_state": {"metrics": [LOSS]}}, METERS),
        ({"extra_state": {"metrics": {"a": [(*LOSS[:3], None)], "b": [LOSS]}}}, METERS),
        ({"extra_state": {"metrics": {"a": [(*LOSS[:2], "NoMeter", {})]}}}, METERS),
        ({"extra_state": {"metrics": {"a": [(*LOSS[:2], "OrderedDict", {})]}}}, METERS),
        ({"extra_state": {"metrics": {"a": [(*LOSS[:2], "safe_round", {})]}}}, METERS),
        ({"last_optimizer_state": "Adam's"}, NO_STATE),
        ({"last_optimizer_state": {"state": {}}}, NO_STATE),
        ({"last_optimizer_state": {"param_groups": []}}, NO_STATE),
        ({"last_optimizer_state": {"state": {0: 1}, "param_groups": []}}, NO_STATE),
    ],
)
def test_what_no_training_goes_on_from(state, message):
    refused(message, checks.check_progress, state)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_weights_as_torch_has_them(tmp_path, count):
    """An OrderedDict, filled one by one or at once."""
    weights = OrderedDict((f"w{number}", torch.tensor(number)) for number in range(count))
    torch.save({"model": weights, "args": None}, tmp_path / "c.pt")
    read = files.load(str(tmp_path / "c.pt"))["model"]
    assert type(read) is OrderedDict and read == weights


def test_what_is_saved_is_read(tmp_path):
    files.save({"model": {"w": torch.arange(3)}, "args": None}, str(tmp_path / "c.pt"))
    assert files.load(str(tmp_path / "c.pt"))["model"]["w"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("TorchScript's mark", "a TorchScript archive"),
        ("tar", "a tar archive"),
        ("a compressed archive", "its parts are compressed, which torch.save does not do"),
        ("overlapping parts", "its parts are larger than the file"),
        ("gadget: a persistent name", "it names what is no storage"),
        ("gadget: an old-style object", "it holds more than data"),
        ("gadget: an object of what holds none", "it makes an object of what makes none"),
        ("gadget: a state for a listed class", "it sets the state of what has none"),
        ("tensor: negative numbers", "a tensor's length is no number"),
        *(
            (f"tensor: {what}", "a tensor's shape is not made of numbers")
            for what in ("strides without sizes", "a negative start", "negative strides", "a shape of text")
        ),
    ],
)
def test_why_a_hostile_file_is_not_read(tmp_path, what, reason):
    (tmp_path / "bad.pt").write_bytes(hostile.files()[what]())
    refused(rf"bad\.pt is not a fairseq checkpoint \({reason}", files.load, str(tmp_path / "bad.pt"))


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.5")
def test_what_torch_was_told_to_load_is_not(tmp_path):
    with torch.serialization.safe_globals([type(Path())]):
        path = written(tmp_path, {"model": {}, "a": Path()})
        refused("holds an object of pathlib", files.load, path)


def stored(count, kind="FloatStorage", key="0"):
    """A checkpoint with a tensor of so many numbers, of 64 bytes in the file."""
    count = hostile.number(count)
    rest = b"K\0" + count + b"\x85" + b"K\1\x85" + b"\x89" + hostile.call("collections", "OrderedDict", b"")
    value = hostile.storage(count, key, kind) + rest
    return hostile.archive(hostile.state(hostile.call("torch._utils", "_rebuild_tensor_v2", value)))


@pytest.mark.parametrize(("kind", "most"), [("FloatStorage", 16), ("HalfStorage", 32), ("DoubleStorage", 8)])
def test_a_tensor_has_its_own_part_of_the_file(tmp_path, kind, most):
    (tmp_path / "c.pt").write_bytes(stored(most, kind))
    assert len(files.load(str(tmp_path / "c.pt"))["odd"]) == most
    for count, key in ((most + 1, "0"), (1, "9")):
        (tmp_path / "c.pt").write_bytes(stored(count, kind, key))
        refused(f"a tensor of {count} numbers is larger than its part", files.load, str(tmp_path / "c.pt"))


@pytest.mark.parametrize(
    ("offset", "size", "stride", "fits"),
    [
        *((0, (4, 4), (4, 1), True), (0, (4, 4), (1, 4), True), (0, (16,), (1,), True), (15, (), (), True)),
        *((2, (3, 2), (6, 1), True), (3, (3, 2), (6, 1), False), (1, (16,), (1,), False), (16, (), (), False)),
        *((99, (0, 3), (3, 1), True), (0, (17,), (0,), False), (0, (16,), (0,), True)),
    ],
)
def test_a_tensor_ends_where_its_storage_does(offset, size, stride, fits):
    storage = unpickling._Storage(unpickling._Numbers(torch.float32), 16)
    numbers = torch.arange(16.0)
    storage.fill(io.BytesIO(numbers.numpy().tobytes()))
    if fits:
        read = unpickling._tensor(storage, offset, size, stride, True)
        assert read.requires_grad and torch.equal(read, numbers.as_strided(size, stride, offset if read.numel() else 0))
        assert read._base is None
    else:
        with pytest.raises(pickle.UnpicklingError, match="has only 16 numbers in the file"):
            unpickling._tensor(storage, offset, size, stride)


def test_an_empty_tensor_and_a_dtype(tmp_path):
    state = files.load(written(tmp_path, {"model": {"w": torch.zeros(0)}, "dtype": torch.float16}))
    assert (len(state["model"]["w"]), state["dtype"]) == (0, torch.float16)
    for module, name in (("other", "FloatStorage"), ("torch", "load"), ("other", "float16")):
        with pytest.raises(pickle.UnpicklingError, match=f"^Unsupported global: GLOBAL {module}.{name}$"):
            unpickling.Unpickler(io.BytesIO()).find_class(module, name)


@pytest.mark.parametrize("state", [3, (), (3, "<"), (3, ">", None, None, None), (3, "<", 1, None, None)])
def test_dtypes_of_other_than_numbers(state):
    with pytest.raises(pickle.UnpicklingError, match=r"^Unsupported class numpy\.dtype of other than numbers$"):
        unpickling.PlainType("f4").__setstate__(state)
    for order in "<|=":
        unpickling.PlainType("f4").__setstate__((3, order, None, None, None))
    with pytest.raises(pickle.UnpicklingError, match=r"^Unsupported class numpy\.dtype\('O8'\)$"):
        unpickling.PlainType("O8")
    with pytest.raises(pickle.UnpicklingError, match=r"^an array's values are not bytes$"):
        unpickling.PlainType("f4").values(bytearray(4))


@pytest.mark.parametrize("shape", [(2, 3), (0,), (6,), ()])
@pytest.mark.parametrize("order", "CF")
def test_arrays(tmp_path, shape, order):
    array = np.array(np.arange(np.prod(shape)).reshape(shape), order=order, dtype="f4")
    read = files.load(written(tmp_path, {"model": {}, "a": array}))["a"]
    assert np.array_equal(read, array)
    assert (read.dtype, read.flags.f_contiguous, read.flags.c_contiguous) == (
        *(array.dtype, array.flags.f_contiguous, array.flags.c_contiguous),
    )


def test_the_form_before_torch_1_6(tmp_path):
    state = {"model": {"w": torch.arange(3.0), "h": torch.ones(2).half()}, "counts": np.arange(3)}
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    read = files.load(str(tmp_path / "c.pt"))
    assert all(torch.equal(read["model"][name], weight) for name, weight in state["model"].items())
    with open(os.open(tmp_path / "c.pt", os.O_RDONLY), "rb") as file:  # which has no name
        assert files.read(file)["counts"].tolist() == [0, 1, 2]
    assert torch.serialization.pickle is pickle


def test_bytes_are_not_made_by_a_number(tmp_path):
    (tmp_path / "c.pt").write_bytes(hostile.archive(hostile.state(hostile.call("builtins", "bytes", hostile.LONG))))
    refused("is not a fairseq checkpoint", files.load, str(tmp_path / "c.pt"))


@pytest.mark.parametrize("shape", [(-1,), (1.0,), (True,)])
def test_arrays_of_no_shape(shape):
    kind = unpickling.PlainType("f4")
    for given, of in ((shape, kind), ((1,), np.dtype("f4"))):
        with pytest.raises(pickle.UnpicklingError, match=r"^an array is not one of numbers$"):
            unpickling.PlainArray().__setstate__((1, given, of, False, bytes(4)))


def unpickled(body):
    return unpickling.Unpickler(io.BytesIO(b"\x80\x02" + body + b".")).load()


METER = hostile.name("fairseq.meters", "AverageMeter") + b")\x81"  # has a hash of its own
ORDERED = hostile.name("collections", "OrderedDict")
EMPTY = hostile.NAMESPACE + b")\x81"
CALLS, MAKES = r"^it calls what only holds data$", "^it makes an object of what makes none$"
SETS, NAME = "^it sets the state of what has none$", "^a dictionary has a name that is no text or number$"
PAIRS, DIGITS = "^it makes a dictionary of what holds no pairs$", "^it holds a number of too many digits$"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ORDERED + b"]R", CALLS),
        (hostile.NAMESPACE + b")R", CALLS),
        (hostile.NAMESPACE + b"K\1\x85\x81", MAKES),
        (hostile.text("x") + b")\x81", MAKES),
        *((each + b"b", SETS) for each in (EMPTY + b"]", b"}}", ORDERED + b")R]", hostile.NAMESPACE + b"}")),
        (ORDERED + b")R}" + hostile.text("items") + b"K\1sb", "^it replaces what a dictionary does$"),
        *((each, "^it puts something into what is no dict$") for each in (b"]K\1K\2s", EMPTY + b"(K\1K\2u")),
        *((each, "^it puts something into what is no list$") for each in (b"}K\1a", EMPTY + b"(K\1e")),
        *((each, NAME) for each in (b"}" + METER + b"K\1s", b"}" + b"K\1" + METER + b"\x86K\1s")),
        *((each, NAME) for each in (b"}(K\1K\2" + METER + b"K\3u", b"(K\1K\2" + METER + b"K\3d")),
        *((each, NAME) for each in (b"\x8f(K\1" + METER + b"\x90", b"(K\1" + METER + b"\x91")),
        *((hostile.number(each), DIGITS) for each in (2**128, -(2**128))),
        (b"\x8b" + struct.pack("<i", 17) + b"\0" * 16 + b"\1", DIGITS),
        (hostile.call("_codecs", "encode", b"K\1"), "^it encodes what is no text$"),
        *((hostile.call("collections", "OrderedDict", each), PAIRS) for each in (b"}", b"K\1K\2K\3\x87\x85")),
        (hostile.call("collections", "OrderedDict", hostile.text("ab") + b"\x85"), PAIRS),
        (hostile.call("collections", "OrderedDict", METER + b"K\1\x86\x85"), NAME),
        (hostile.storage(b"K\1"), "^it names what is no storage$"),
        (b"I1\n", "^it holds more than data$"),
    ],
)
def test_programs_that_are_refused(body, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        unpickled(body)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"U\x02\xc3\xa9", "\xe9"),  # as Python 2 writes text
        *((hostile.number(each), each) for each in (2**127, -(2**127))),
        (b"\x8b" + struct.pack("<i", 1) + b"\5", 5),
        (b"(K\1K\2K\3K\4d", {1: 2, 3: 4}),
        (b"}(K\1K\2K\3K\4u", {1: 2, 3: 4}),
        *((b"}" + key + b"K\3s", {each: 3}) for key, each in ((b"K\1N\x86", (1, None)), (b"N", None), (b"\x88", True))),
        *((b"}" + key + b"K\3s", {each: 3}) for key, each in ((b"C\1x", b"x"), (b"G" + struct.pack(">d", 0.5), 0.5))),
        (b"\x8f(K\1K\2\x90", {1, 2}),
        (b"(K\1K\2\x91", frozenset({1, 2})),
        (b"](K\1K\2e", [1, 2]),
        (b"]K\1a", [1]),
        (hostile.call("collections", "OrderedDict", b"K\1K\2\x86\x85"), OrderedDict({1: 2})),
        (pickle.dumps(defaultdict(int, a=1), 2)[2:-1], {"a": 1}),
        (EMPTY + b"}" + hostile.text("x") + b"K\1sb", Namespace(x=1)),
    ],
)
def test_programs_that_are_data(body, value):
    read = unpickled(body)
    assert (read, type(read)) == (value, type(value))


def test_names_of_python_2():
    find = unpickling.Unpickler(io.BytesIO()).find_class
    assert find("__builtin__", "long") is find("builtins", "int")
    assert find("__builtin__", "bytes") is find("builtins", "bytes")


FLOATS = unpickling._Numbers(torch.float32)
NO_STORAGE = "^it names what is no storage$"


def test_names_of_storages():
    name = unpickling.Unpickler(io.BytesIO(), lambda *storage: storage).persistent_load
    for word, count, more in (("storage", 3, ()), (b"storage", 0, ()), ("storage", 3, (None,))):
        assert name((word, FLOATS, "7", "cpu", count, *more)) == (FLOATS, "7", count)


@pytest.mark.parametrize(
    ("pid", "message"),
    [
        (["storage", FLOATS, "7", "cpu", 3], NO_STORAGE),
        (("storage", FLOATS, "7", "cpu"), NO_STORAGE),
        (("module", FLOATS, "7", "cpu", 3), NO_STORAGE),
        (("storage", torch.float32, "7", "cpu", 3), NO_STORAGE),
        (("storage", FLOATS, 7, "cpu", 3), NO_STORAGE),
        (("storage", FLOATS, "7", "cpu", 3, ("view", 0, 1)), NO_STORAGE),
        *((("storage", FLOATS, "7", "cpu", count), "^a tensor's length is no number$") for count in (-1, True, "3")),
    ],
)
def test_names_of_no_storages(pid, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        unpickling.Unpickler(io.BytesIO(), lambda *storage: storage).persistent_load(pid)


STORAGE = unpickling._Storage(FLOATS, 16)


@pytest.mark.parametrize(
    ("storage", "offset", "size", "stride", "message"),
    [
        *((each, 0, (1,), (1,), "a storage, a shape and strides$") for each in (torch.ones(16), [], FLOATS)),
        *((STORAGE, 0, *each, "a storage, a shape and strides$") for each in (([1], (1,)), ((1,), [1]))),
        *((STORAGE, 0, *each, "is not made of numbers$") for each in (((1, 1), (1,)), ((1,), ()), ((-1,), (1,)))),
        *((STORAGE, 0, *each, "is not made of numbers$") for each in (((1.0,), (1,)), ((1,), (True,)), ((1,), (-1,)))),
        *((STORAGE, each, (1,), (1,), "is not made of numbers$") for each in (-1, None, 1.0)),
    ],
)
def test_tensors_of_no_numbers(storage, offset, size, stride, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        unpickling._tensor(storage, offset, size, stride)


def test_which_tensors_are_trained():
    whole = unpickling._Storage(unpickling._Numbers(torch.int64), 1)
    for storage, asked, trained in (
        (STORAGE, True, True),
        (STORAGE, 1, False),
        (STORAGE, False, False),
        (whole, True, False),
    ):
        assert unpickling._tensor(storage, 0, (1,), (1,), asked).requires_grad is trained
    assert not unpickling._tensor(STORAGE, 0, (1,), (1,)).requires_grad


def test_storages_are_read_in_parts():
    asked = []

    def readinto(part):
        asked.append(len(part))
        count = min(len(part), 2**23)
        part[:count] = b"\1" * count
        return count

    storage = unpickling._Storage(unpickling._Numbers(torch.uint8), 2**24 + 9)
    storage.fill(Namespace(readinto=readinto))
    assert asked == [2**24, 2**23 + 9, 9]
    assert storage.tensor.sum() == 2**24 + 9
    with pytest.raises(pickle.UnpicklingError, match=r"^the file ends before its tensors do$"):
        STORAGE.fill(io.BytesIO(bytes(63)))


def test_an_array_without_a_state_is_empty():
    read = unpickled(hostile.array(b"", b"", b"")[: -len(b"(K\1\x89tb")])
    assert (type(read), read.shape, read.dtype) == (unpickling.PlainArray, (0,), np.int8)


def test_names_for_the_same_numbers_stay_so(tmp_path):
    both, trained = torch.arange(6.0), torch.nn.Parameter(torch.ones(2))
    state = {"model": {"a": both, "b": both[2:], "c": trained}}
    for is_archive in (True, False):
        torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=is_archive)
        read = files.load(str(tmp_path / "c.pt"))["model"]
        assert read["b"].data_ptr() == read["a"].data_ptr() + 8
        assert (read["b"].tolist(), read["c"].tolist()) == ([2, 3, 4, 5], [1, 1])


def with_parts(path, change):
    """The good archive with its parts, a dictionary, changed."""
    with zipfile.ZipFile(io.BytesIO(hostile.archive(hostile.GOOD))) as archive:
        parts = [(name.partition("/")[2], archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in change(parts):
            archive.writestr(name, content)
    return open(path, "rb")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: [(f"a/{part[0]}", part[1]), (f"b/{part[0]}", part[1])], "^its parts are compressed"),
        (lambda part: [("a/" + part[0].replace("data.pkl", "other"), part[1])], r"^an archive without data\.pkl$"),
        (lambda part: [("a/" + part[0], part[1].replace(b"little", b"big"))], "^written on a big-endian machine$"),
        (lambda part: [("a/" + part[0], part[1])] * (part[0] != "byteorder"), None),  # torch before 2.1
    ],
)
def test_parts_of_an_archive(tmp_path, change, message):
    with with_parts(tmp_path / "c.pt", lambda parts: [new for part in parts for new in change(part)]) as file:
        if message is None:
            assert unpickling.read(file)["odd"] == 1
        else:
            with pytest.raises(pickle.UnpicklingError, match=message):
                unpickling.read(file)


def test_parts_as_large_as_the_file(tmp_path):
    with with_parts(tmp_path / "c.pt", lambda parts: [(f"a/{name}", content) for name, content in parts]) as file:
        with zipfile.ZipFile(file) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
        assert unpickling._read_archive(file, whole)["odd"] == 1
        with pytest.raises(pickle.UnpicklingError, match=r"^its parts are larger than the file$"):
            unpickling._read_archive(file, whole - 1)


def in_a_row(machine=None, keys=("0",), count=2, kind="DoubleStorage", start=0x1950A86A20F9469CFC6C):
    """Of the form before torch 1.6: two tensors of one storage, of 16 bytes."""
    machine = {"little_endian": True} if machine is None else machine
    made = hostile.storage(b"K\2", kind=kind)[:-2] + b"NtQ"
    rest = b"K\0" + b"K\2\x85" + b"K\1\x85" + b"\x89" + hostile.call("collections", "OrderedDict", b"")
    tensor = hostile.call("torch._utils", "_rebuild_tensor_v2", made + rest)
    state = b"\x80\x02}" + hostile.text("a") + tensor + b"s" + hostile.text("b") + tensor + b"s."
    head = b"".join(pickle.dumps(part, 2) for part in (start, 1001, machine))
    keys = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2)
    return io.BytesIO(head + state + keys + struct.pack("<q", count) + np.array([1.5, 2.5]).tobytes())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": 3}, r"^not written by torch\.save$"),
        *(({"machine": each}, "big-endian") for each in ({"little_endian": False}, {}, [], {"little_endian": 1})),
        *(({"keys": each}, "its storages are not those of its tensors$") for each in ((), ("1",), ("0", "0"), "0")),
        *(({"keys": each}, "its storages are not those of its tensors$") for each in ({"0": 0}, (0,), ("0", "1"))),
        *(({"count": each}, "its storages are not those of its tensors$") for each in (1, 3, 2 << 56)),
    ],
)
def test_parts_of_the_form_before_torch_1_6(changed, message):
    assert unpickling._read_in_a_row(in_a_row(), 16)["b"].tolist() == [1.5, 2.5]  # its storage counts once
    with pytest.raises(pickle.UnpicklingError, match=r"^a tensor of 2 numbers is larger than its part of the file$"):
        unpickling._read_in_a_row(in_a_row(), 15)
    with pytest.raises(pickle.UnpicklingError, match=message):
        unpickling._read_in_a_row(in_a_row(**changed), 16)


def test_a_file_is_read_from_its_start(tmp_path):
    torch.save({"model": {}}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bad.pt").write_bytes(b"??" + (tmp_path / "c.pt").read_bytes()[2:])
    refused(r"bad\.pt is not a fairseq checkpoint", files.load, str(tmp_path / "bad.pt"))


@pytest.mark.parametrize("count", [15, 17])
def test_the_same_bytes_have_one_length(count):
    assert unpickling._same(STORAGE, FLOATS, 16) is STORAGE
    with pytest.raises(pickle.UnpicklingError, match=r"^it reads the same bytes as numbers of two kinds$"):
        unpickling._same(STORAGE, FLOATS, count)


def test_how_much_and_how_deep_data_may_be():
    weight = torch.ones(2, dtype=torch.float64)
    unpickling._check_data([weight, weight], 32)
    with pytest.raises(pickle.UnpicklingError, match=r"^its weights are many times as large as the file$"):
        unpickling._check_data([weight, weight], 31)
    deep = []
    for _ in range(unpickling.DEEPEST):
        deep = [deep]
    unpickling._check_data(deep, 0)
    with pytest.raises(pickle.UnpicklingError, match=r"^its values are nested more than 50 deep$"):
        unpickling._check_data([deep], 0)
    around = [1]
    around.append(around)
    unpickling._check_data(around, 0)


@pytest.mark.parametrize("holds", [list, lambda values: {"a": values}, lambda values: {1: with_own(a=values)}])
def test_data_holds_nothing_else(holds):
    unpickling._check_data(
        holds([1, np.float64(2), unpickling.PlainArray(), torch.float16, None, Namespace(a=b"x")]), 0
    )
    for value in (Path(), int, Namespace(a=[Path()]), with_own(b=Path()), OrderedDict(b=Path())):
        for values in ([value, 1], [value, torch.ones(0)], [1, value]):
            with pytest.raises(pickle.UnpicklingError, match=r"^it holds a \w+, which is no data$"):
                unpickling._check_data(holds(values), 0)


def with_own(**attributes):
    value = OrderedDict()
    vars(value).update(attributes)
    return value
