"""What a checkpoint's settings may say, and which options of fairseq's run as code."""

import ast
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import fairseq
import pytest
import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from admin_fairseq import AdminError
from admin_fairseq.checkpoints import checks, files
from admin_fairseq.checkpoints.guard import EVALUATED, FORGOTTEN, NAMES, checked, literal

SOURCES = [path for path in Path(fairseq.__file__).parent.rglob("*.py") if "examples" not in path.parts]
TEXTS = {path: path.read_text(encoding="utf-8") for path in SOURCES}
EVALUATORS = ("eval", "exec", "literal_eval", "eval_str_list", "eval_str_dict", "eval_bool")
# arguments that are no option by name: of the command line's own parsing, of data, of what has been named before
LOCAL = {"x", "val", "temp", "uf", "line.strip()", "lr_args_str.replace()", "optimizer_overrides"}


def evaluated():
    """Of every call in fairseq that evaluates: the option's or variable's name."""
    found = set()
    for path, text in TEXTS.items():
        if not any(f"{name}(" in text for name in EVALUATORS):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            is_python = isinstance(node.func, ast.Name) or name != "eval"  # editdistance has an eval as well
            if name in EVALUATORS and is_python:
                found.add((named(node.args[0]), path.name))
    return found


def named(node):
    if isinstance(node, ast.Call):
        return f"{named(node.func.value)}.{node.func.attr}()"
    if isinstance(node, ast.Subscript):
        key = getattr(node.slice, "value", None)  # on Python 3.8 in an Index
        return getattr(key, "value", key)
    return getattr(node, "attr", getattr(node, "id", None))


def test_every_option_that_fairseq_evaluates_is_known():
    found = evaluated()
    assert len(found) > 40
    assert {(name, file) for name, file in found if name not in EVALUATED and name not in LOCAL} == set()


def test_every_eval_in_fairseq_is_ours():
    modules = {path: module for module in list(sys.modules.values()) if (path := getattr(module, "__file__", None))}
    found = [
        modules[str(path)]
        for path, text in TEXTS.items()
        if re.search(r"(?<!\.)\beval\(", text) and str(path) in modules
    ]
    assert {module.__name__ for module in found} >= {"fairseq.utils", "fairseq.optim.adam", "fairseq.models.fconv"}
    assert {module.__name__ for module in found if module.eval is not literal} == set()


OPENERS = ("open", "cached_path", "parse_embedding", "load_align_dict", "call", "from_pretrained")
LOADERS = ("np", "torch", "Dictionary", "Path", "sp")
# read here as data or as a text of names, or part of DATA
READ = {"w2v_path", "seq2seq_path", "pretrained_mlm_checkpoint", "lang_dict", "f0_stats", "f0_vq_name", "fn", "cache"}


def opened():
    """Of every call in fairseq's models, tasks and so on that opens, fetches or runs a file: the option of its name."""
    found = set()
    for path, text in TEXTS.items():
        if path.parent.name in ("fairseq", "benchmark") and path.name not in ("utils.py", "hub_utils.py"):
            continue  # of the commands themselves
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            owner = getattr(getattr(node.func, "value", None), "id", None)
            if name in OPENERS or (name in ("load", "Load") and owner in LOADERS):
                for each in ast.walk(node.args[0]):
                    holder = getattr(each, "value", None)
                    if isinstance(each, ast.Attribute) and named(holder) in ("args", "cfg", "config", "generation"):
                        found.add(each.attr)
    return found


def test_no_file_that_an_option_names_is_opened():
    found = opened()
    assert found >= {"bpe_codes", "replace_unk", "encoder_embed_path"}
    assert found - set(FORGOTTEN) - READ - {"generation"} == set()
    assert "save_predictions" in FORGOTTEN  # a parameter there


CODE = "__import__('os').system('touch {}') or [100,200]"
FORMS = {
    "args": lambda name, value: {"args": Namespace(**{name: value})},
    "args as a dictionary": lambda name, value: {"args": {name: value}},
    "attributes": lambda name, value: {"args": with_attribute(name, value)},
    "cfg": lambda name, value: {"args": None, "cfg": {"model": {"_name": "x", name: value}}},
    "a part of cfg": lambda name, value: {"cfg": {"optimizer": {"groups": [{"a": {name: value}}]}}},
    "omegaconf": lambda name, value: {"cfg": OmegaConf.create({"model": {name: value}})},
    "the settings in settings": lambda name, value: {"args": Namespace(w2v_args=Namespace(**{name: value}))},
}


def with_attribute(name, value):
    settings = OrderedDict()
    vars(settings)[name] = value
    return settings


def read(folder, content):
    torch.save({"model": {"w": torch.ones(1)}, **content}, folder / "c.pt")
    return files.load(str(folder / "c.pt"))


def read_by_fairseq(folder, content):
    extra = {"extra_state": {"train_iterator": {"epoch": 1}}, "optimizer_history": [{"lr_scheduler_state": {}}]}
    torch.save({"model": {"w": torch.ones(1)}, **extra, **content}, folder / "c.pt")
    return checkpoint_utils.load_checkpoint_to_cpu(str(folder / "c.pt"))


READERS = [read, read_by_fairseq]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_settings_holds_code_or_interpolation(tmp_path, form, reader):
    proof = tmp_path / "proof"
    wrong = [(name, CODE.format(proof)) for name in (*EVALUATED, *NAMES)]
    wrong += [("source_lang", "${oc.env:HOME}"), ("anything", ["a", {"b": "x${env:HOME}"}])]
    for number, (name, value) in enumerate(wrong):
        if number % len(FORMS) != list(FORMS).index(form) and name != "adaptive_softmax_cutoff" and "lang" not in name:
            continue  # each option in one of the forms
        with pytest.raises(AdminError, match=rf"c\.pt: its setting ({name}|b|anything) is ") as error:
            reader(tmp_path, FORMS[form](name, value))
        assert "\n" not in str(error.value)
    assert not proof.exists()


@pytest.mark.parametrize("name", EVALUATED)
def test_each_option_by_its_form(name):
    good = {
        "numbers": ["[100, 200]", "(0.9, 0.98)", "True", "", "1e-30,1e-3", "[]", "-1", "None"],
        "lists of numbers": ["[(512, 3)] * 20", "[(512, 10, 5)] + [(512, 3, 2)] * 4", "6", "[1, [2, 3]]"],
        "numbers and words": ["('a', 'b', 1, -2.5)", "None"],
        "a dictionary": ["{'name': 'x', 1: [2]}", "{}"],
    }
    form = EVALUATED[name]
    for text in good[form]:
        assert checked(Namespace(**{name: text})) == Namespace(**{name: text})
    for value in (None, [100, 200], 6, True, {"a": 1}):
        assert checked({name: value}) == {name: value}  # not text: not evaluated
    bad = ["print(1)", "[x for x in (1,)]", "().__class__", "f'{1}'", "lambda: 1", "x", "[0] * 99999", "1 if 1 else 2"]
    bad += [] if form == "a dictionary" else ["{}"]
    bad += ["'text'"] if form in ("numbers", "lists of numbers", "a dictionary") else []
    bad += ["[[[1]]]"] if form != "a dictionary" else ["[1]"]
    bad += [] if form in ("lists of numbers", "a dictionary") else ["[[1]]"]
    bad += ["(" * 300 + ")" * 300, "[1", "\0"]
    for value in (*bad, ["print(1)"]):
        with pytest.raises(AdminError, match=f"its setting {name} is .*, which fairseq would run as code; read are"):
            checked({name: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" [1, 2.5, -3]", [1, 2.5, -3]),
        ("0.9, 0.98", (0.9, 0.98)),
        ("[(512, 3)] * 2 + [(1,)]", [(512, 3), (512, 3), (1,)]),
        ("{'a': {1, 2}, 'b': None}", {"a": {1, 2}, "b": None}),
        ("2 * 3 - 4 / 2", 4.0),
        (b"True", True),
        ("[0] * 10000", [0] * 10000),
        ("[0] * 0", []),
        ("[[0] * 9999, 1]", [[0] * 9999, 1]),
        ("['a' * 9999, 1]", ["a" * 9999, 1]),
        ("['', 1] * 5000", ["", 1] * 5000),
        ("[{1: 2}] * 5000", [{1: 2}] * 5000),
        ("'' * 1", ""),
    ],
)
def test_literals(text, value):
    assert literal(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "[0] * 10001",
        "[[0] * 101] * 100",
        "[[0] * 9999, 1, 2]",
        "['ab' * 5000, 1]",
        "[{1: 2}] * 5001",
        "[0] * -1",
        "[0] * 1e9",
        "10 ** 9",
        "x" * 100,
    ],
)
def test_other_texts_are_named_in_short(text):
    shown = repr(text) if len(text) < 60 else "'" + "x" * 56 + "..."
    with pytest.raises(AdminError, match=rf"^fairseq would run {re.escape(shown)} as code; it must be a plain value$"):
        literal(text)


def test_long_texts_are_no_literals():
    assert literal("1" + " " * 9999) == 1
    with pytest.raises(AdminError, match=r"^fairseq would run '1  .* as code"):
        literal("1" + " " * 10000)


@pytest.mark.parametrize("name", ["self", "keys", "update", "__class__", "__other__"])
def test_names_that_settings_are_read_by(name):
    values = Namespace()
    vars(values)[name] = 1
    for settings in (values, {name: 1}, {"model": {name: 1}}):
        with pytest.raises(AdminError, match=f"^its .* have '{name}', which is no setting$"):
            checked(settings)


def test_fairseq_evaluates_literals_only(tmp_path):
    code = CODE.format(tmp_path / "proof")
    for evaluate in (utils.eval_str_list, utils.eval_str_dict, utils.eval_bool):
        with pytest.raises(AdminError, match=r"fairseq would run .* as code"):
            evaluate(code)
    assert utils.eval_str_list("[1, 2]", int) == [1, 2]
    assert [utils.eval_bool(value) for value in ("True", "0", True, None)] == [True, False, False, False]
    assert not (tmp_path / "proof").exists()


def test_models_evaluate_literals_only(tmp_path):
    """Also where the settings did not come from a checkpoint that was read here."""
    task = Namespace(source_dictionary=Dictionary(), target_dictionary=Dictionary())
    args = Namespace(encoder_layers=CODE.format(tmp_path / "proof"), max_source_positions=9, max_target_positions=9)
    ARCH_CONFIG_REGISTRY["fconv"](args)
    with pytest.raises(AdminError, match="fairseq would run"):
        ARCH_MODEL_REGISTRY["fconv"].build_model(args, task)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("form", ["args", "cfg", "omegaconf"])
def test_nothing_is_imported_opened_or_written_from_settings(tmp_path, form):
    """What is read stays as it is; what is built from it does not have it."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text("raise SystemExit('imported')")
    for name in FORGOTTEN:
        content = FORMS[form](name, str(tmp_path / "evil"))
        assert getattr(files.settings(read(tmp_path, content)), name) == FORGOTTEN[name]
    sections = {"model": {"_name": "x"}, "task": {"_name": "x"}, "common": {"user_dir": str(tmp_path / "evil")}}
    loaded = read_by_fairseq(tmp_path, {"args": None, "cfg": sections})
    assert loaded["cfg"]["common"]["user_dir"] is None


def test_settings_of_absurd_size(tmp_path):
    many = {"a": []}
    for _ in range(40):  # shared: a few bytes in the file, terabytes once copied
        many = {"a": [many, many]}
    deep = []
    for _ in range(100):
        deep = [deep]
    for content in (many, {"a": deep}, {"a": [0] * 200_000}):
        with pytest.raises(AdminError, match=r"more values than settings do|nested more than 50 deep"):
            read(tmp_path, {"args": content})
    for value in (b"True", torch.ones(1), {(1, 2): 3}):
        with pytest.raises(AdminError, match=r"no value|not text"):
            read(tmp_path, {"args": {"adam_betas": value}})


def test_what_fairseq_cannot_upgrade_is_one_line(tmp_path):
    with pytest.raises(
        AdminError, match=r"c\.pt is not a checkpoint that this fairseq reads \(\w+Error: .*\)$"
    ) as error:
        read_by_fairseq(tmp_path, {"args": Namespace(), "optimizer_history": [{}]})
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "none.pt"))


def nested(levels, kind):
    value = 0
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
def test_how_deep_and_how_many(kind):
    assert checked(nested(20, kind)) == nested(20, kind)
    assert len(checked([0] * 99_999)) == 99_999
    for value in (nested(21, kind), [0] * 100_000):
        with pytest.raises(AdminError, match="more values than settings do"):
            checked(value)


def test_names_and_attributes():
    assert checked({None: 1, 2: (3,)}) == {None: 1, 2: (3,)}
    with pytest.raises(AdminError, match=r"^its settings have a name that is not text: of tuple$"):
        checked({(1, 2): 3})
    with pytest.raises(AdminError, match=r"^its setting task is of list, which is no name$"):
        checked({"task": ["x"]})
    read = checked(with_attribute("user_dir", "x"), forgets=True)
    assert (dict(read), vars(read)) == ({"user_dir": None}, {"user_dir": None})  # as fold writes them
    assert type(checked(OrderedDict(a=1))) is dict


def test_a_registry_is_asked_for_names_only():
    assert checked({"arch": "transformer_vaswani_wmt_en_de_big", "task": None, "criterion": {"_name": "ctc"}})
    for value in ("../../etc/x", "a b", 3, ["x"]):
        with pytest.raises(AdminError, match=r"its setting task is .*, which is no name"):
            checked({"task": value})
    assert set(tasks.TASK_REGISTRY) == {name for name in tasks.TASK_REGISTRY if checked({"task": name})}


def test_a_number_that_fairseq_keeps_as_it_was_typed():
    """fairseq-train --decoder-output-dim 32 writes "32" into its checkpoints."""
    weights = {"decoder.output_projection.weight": torch.ones(100, 32)}
    checks.check_settings(Namespace(decoder_output_dim="32", decoder_input_dim=32), weights, {})
    for value, line in (
        ("101", "is 101, larger than any of its weights"),
        ("3x", "is '3x', which is no value of that"),
    ):
        with pytest.raises(AdminError, match=f"its setting decoder_output_dim {line}"):
            checks.check_settings(Namespace(decoder_output_dim=value), weights, {})
    with pytest.raises(AdminError, match="its setting encoder_layers is '6', which is no value of that option"):
        checks.check_settings(Namespace(encoder_layers="6"), weights, {})


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        ({"extra_state": {"train_iterator": {"epoch": "x"}}}, "how far the training has come"),
        ({"extra_state": {"train_iterator": 3}}, "how far the training has come"),
        ({"extra_state": {"train_iterator": {"epoch": 1}, "metrics": {"a": [(1, "b", "np", {})]}}}, "meters"),
        ({"extra_state": {"train_iterator": {"epoch": 1}, "metrics": {"a": [(1, "b", "__loader__", {})]}}}, "meters"),
        ({"extra_state": {"train_iterator": {"epoch": 1}, "metrics": {"a": [(1, "b", "AverageMeter", {})]}}}, "meters"),
        ({"last_optimizer_state": 5}, "optimizer"),
        ({"last_optimizer_state": {"state": 5, "param_groups": 7}}, "optimizer"),
    ],
)
def test_what_a_training_goes_on_from_is_fairseqs(tmp_path, content, needle):
    with pytest.raises(AdminError, match=rf"c\.pt: .*{needle}"):
        read_by_fairseq(tmp_path, content)
