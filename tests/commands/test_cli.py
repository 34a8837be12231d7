import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from helpers import ROOT, run

import admin_fairseq
from admin_fairseq import AdminError, AdminTransformer, Profile, listing
from admin_fairseq.architectures import METHODS
from admin_fairseq.checkpoints.files import load
from admin_fairseq.cli import main, make_parser


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "admin_profile.json"
    variances = {"encoder": [1.25, 0.75], "decoder": [0.5625, 2.4375, 1.0]}
    shortcuts = {"encoder": [1.0, 2.25], "decoder": [1.0, 1.5625, 4.0]}
    omegas = {"encoder": [1.0, 1.5], "decoder": [1.0, 1.25, 2.0]}
    Profile(**omegas, branch_variance=variances, shortcut_variance=shortcuts).write(str(path))
    return path


def test_show_profile(profile_file):
    result = run("admin-fairseq", "show", profile_file)
    assert result.code == 0, result.output
    assert result.lines("sub-layers") == ["encoder: 2 sub-layers, margin 1", "decoder: 3 sub-layers, margin 1"]
    assert result.lines("self_attn")[0].split()[:5] == ["0", "self_attn", "1.000", "1.250", "55.6%"]
    last = result.lines("ffn")[1]
    assert last.split()[:5] == ["0", "ffn", "2.000", "1.000", "20.0%"]
    assert last.count("#") == 2 * result.lines("self_attn")[1].count("#")


def test_show_explains_its_columns(profile_file, capsys):
    """Those that are there, below the table."""
    main(["show", str(profile_file)])
    head, below = capsys.readouterr().out.split("\n\n")
    assert re.findall(r"^  (\S[\w\[\] ]*?)  ", below, re.M) == ["omega", "Var[f]", "share of f"]
    assert all(name in head.splitlines()[1] for name in ("omega", "Var[f]", "share of f"))


def test_show_a_run(profile_file, capsys):
    """Its last checkpoint; before there is one, its profile."""
    folder = profile_file.parent
    main(["show", str(folder)])
    assert capsys.readouterr().out.startswith(f"{profile_file}\nencoder: 2 sub-layers")
    torch.save({"model": {"encoder.layers.0.final_layer_norm.omega": torch.ones(2)}}, folder / "checkpoint_last.pt")
    main(["show", str(folder)])
    assert capsys.readouterr().out.splitlines()[0] == str(folder / "checkpoint_last.pt")
    main(["show", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["encoder"][0]["sub_layer"] == "ffn"
    with pytest.raises(AdminError, match=r"holds no checkpoint_last\.pt and no admin_profile\.json"):
        main(["show", str(folder.parent)])


def test_show_a_profile_without_the_shortcuts_variance(profile_file, capsys):
    """As they were written before it was recorded: the share of the branch is not known."""
    content = json.loads(profile_file.read_text())
    del content["shortcut_variance"]
    profile_file.write_text(json.dumps(content))
    main(["show", str(profile_file)])
    head, row = capsys.readouterr().out.splitlines()[1:3]
    assert head.endswith("Var[f]")
    assert row.split()[:4] == ["0", "self_attn", "1.000", "1.250"]


def test_show_checkpoint(profile_file, capsys):
    """With the first omega, as the profile in the folder has it; without, if that is of another model."""
    names = ["encoder.layers.0.self_attn", "encoder.layers.0.final"]
    names += [f"decoder.layers.0.{kind}" for kind in ("self_attn", "encoder_attn", "final")]
    omegas = {f"{name}_layer_norm.omega": torch.tensor([1.0, 4.0]) + i for i, name in enumerate(names)}
    path = str(profile_file.parent / "c.pt")
    torch.save({"model": omegas}, path)
    main(["show", path])
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines() if "#" in line]
    assert rows[0] == ["0", "self_attn", "2.500", "1.500", "1.000"]
    assert rows[3] == ["0", "encoder_attn", "5.500", "1.500", "1.250"]
    torch.save({"model": {**omegas, "decoder.layers.1.final_layer_norm.omega": torch.ones(2)}}, path)
    main(["show", path, "--json"])
    row = json.loads(capsys.readouterr().out)["decoder"][-1]
    assert row == {"layer": 1, "sub_layer": "ffn", "omega": 1, "std": 0}


def test_show_a_diverged_checkpoint(tmp_path, capsys):
    path = str(tmp_path / "c.pt")
    omegas = {"encoder.layers.0.self_attn_layer_norm.omega": torch.tensor([float("nan")])}
    torch.save({"model": {**omegas, "encoder.layers.0.final_layer_norm.omega": torch.ones(1)}}, path)
    main(["show", path])
    first, second = capsys.readouterr().out.splitlines()[2:4]
    assert "nan" in first and first.count("#") == 0 and second.count("#") == 30
    main(["show", path, "--json"])
    assert json.loads(capsys.readouterr().out)["encoder"][0]["omega"] is None
    torch.save({"model": {name: torch.zeros(1) for name in omegas}}, path)
    main(["show", path])
    assert "#" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nope.json", "nope.pt", "garbage.pt", "garbage.json", "empty.json"])
def test_show_bad_file(tmp_path, name):
    if name.startswith("garbage"):
        (tmp_path / name).write_text("garbage")
    if name.startswith("empty"):
        (tmp_path / name).write_text('{"encoder": [], "decoder": []}')
    result = run("admin-fairseq", "show", tmp_path / name)
    assert result.code == 1
    assert name in result.lines("admin_fairseq: error:")[0]
    assert "Traceback" not in result.output


def numpy_checkpoint(path, module):
    """A checkpoint of --eval-bleu, written under a numpy that calls its core ``module``."""
    torch.save({"model": {"w": torch.ones(1)}, "counts": np.arange(3.0), "mean": np.float64(2)}, path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    ours = (np.zeros(0).__reduce__()[0].__module__).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in entries.items():
            target.writestr(name, content.replace(ours, module) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_checkpoints_of_either_numpy_load(tmp_path, module):
    numpy_checkpoint(tmp_path / "c.pt", module)
    state = load(str(tmp_path / "c.pt"))
    assert state["counts"].tolist() == [0, 1, 2]


def test_an_object_that_is_not_loaded_is_named(tmp_path):
    torch.save({"model": {}, "task_state": {"dict": Dictionary()}}, tmp_path / "good.pt")
    assert isinstance(load(str(tmp_path / "good.pt"))["task_state"]["dict"], Dictionary)
    torch.save({"model": {}, "odd": Path("x")}, tmp_path / "odd.pt")
    with pytest.raises(AdminError, match=r"holds an object of pathlib\S+, which safe loading does not read"):
        load(str(tmp_path / "odd.pt"))


def sub_commands(parser):
    """Every parser that has a --help."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from sub_commands(command)


PARSERS = [*sub_commands(make_parser())]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_help_ends_with_an_example(parser):
    """One that the command accepts."""
    last = parser.format_help().rpartition("\n\n")[2].splitlines()
    assert last[0] == "example:" and len(last) > 1
    for line in last[1:]:
        program, *words = shlex.split(line)
        assert program == "admin-fairseq"
        args, rest = make_parser().parse_known_args(words)
        if parser.prog != program:
            assert parser.prog in line
        assert not rest or args.takes_rest


@pytest.mark.parametrize("program", [[str(Path(sys.executable).with_name("admin-fairseq"))], [sys.executable, "-m"]])
def test_help_and_version_answer_at_once(program):
    """Importing torch and fairseq takes seconds."""
    program += ["admin_fairseq"] * (len(program) - 1)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for words in (["--version"], ["--help"], ["fold", "--help"], ["analyze", "report", "--help"]):
        subprocess.run([*program, *words], env=environment, stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4 * 0.5


def test_archs():
    shown = listing.archs(None)
    assert all(f"\n{method} " in shown for method in METHODS)
    assert "admin_logn " in shown and "(--admin-init logn)" in shown
    head, first, *_ = listing.archs("transformer_deepnorm_18").splitlines()
    assert first.split() == ["transformer_deepnorm_18_2", "18-2", "512", "2048", "8"]
    assert head.index("width") == first.index("512")
    assert listing.archs("lm_preln_24").splitlines()[1].split()[:2] == ["transformer_lm_preln_24", "24"]
    with pytest.raises(AdminError, match="nearest: transformer_admin_24_6, "):
        listing.archs("transformer_admin_24x6")


def test_every_architecture_is_listed():
    ours = {model for method in METHODS.values() for model in method} - {"transformer", "transformer_lm"}
    names = {name for name, model in ARCH_MODEL_REGISTRY.items() if model in map(MODEL_REGISTRY.get, ours)}
    assert names <= set(re.findall(r"^(\S+)", listing.archs("transformer"), re.M))


def test_options(capsys):
    main(["options", "transformer_admin_18_2"])
    own, stock = capsys.readouterr().out.split("of fairseq's Transformer:")
    assert all(f"--{option.replace('_', '-')} " in own for option in AdminTransformer.own_options)
    assert re.search(r"--encoder-layers ENCODER_LAYERS\s+encoder: number of layers \(default: 18\)", stock)
    own, _ = listing.options("transformer_lm_preln").split("of fairseq's Transformer:")
    assert re.findall(r"--[\w-]+ ", own.split("of this plugin:")[1]) == ["--init-weights "]
    with pytest.raises(AdminError, match="nearest: transformer_admin_24_6, "):
        main(["options", "transformer_admin_24_24"])


def test_usage():
    assert run("admin-fairseq", "--help").code == 0
    assert run("admin-fairseq").code == 2
    assert run("admin-fairseq", "show").code == 2
    assert run("admin-fairseq", "--version").lines("admin_fairseq ")


def test_nothing_is_printed_but_what_was_asked_for():
    """Some of fairseq's modules set up everybody's logging when they are imported, and then log."""
    command = [sys.executable, "-m", "admin_fairseq", "archs"]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.stdout.endswith(listing.archs(None))
    assert not {"INFO", "DEBUG"} & set(re.split(r"\W", finished.stdout))
    command[-1] = "--version"
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.stdout.endswith(f"admin_fairseq {admin_fairseq.__version__}\n")
