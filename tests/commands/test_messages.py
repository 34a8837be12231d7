"""Mistakes that users have reported, each said in one line; fairseq's commands run in this process."""

from __future__ import annotations

import re
import shutil
import sys

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq_cli import generate, interactive, train
from helpers import DEFAULT_COMBINATION, NO_LOADER, ROOT, TINY, TRAIN, lm_command, preprocess

from admin_fairseq import AdminTransformer, cli, hints
from admin_fairseq.config import nearest_architectures
from admin_fairseq.errors import AdminError, explain

COMMANDS = {
    train: options.get_training_parser,
    generate: options.get_generation_parser,
    interactive: options.get_interactive_generation_parser,
}


def run_here(command, *arguments):
    args = options.parse_args_and_arch(COMMANDS[command](), [*map(str, arguments)])
    command.main(convert_namespace_to_omegaconf(args))


def line(command, *arguments):
    """What is said of the error that a command ends in."""
    try:
        run_here(command, *arguments)
    except Exception as error:
        said = explain(error)
        assert said is not None, repr(error)
        assert len(said) < 500 and "\n" not in said
        return said
    raise AssertionError("it went well")


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """A trained model's checkpoint, and the arguments of its training."""
    folder = tmp_path_factory.mktemp("messages")
    argv = [data, "--arch", "transformer_admin", "--admin-init", "logn", *TINY, *TRAIN, "--max-update", 1]
    run_here(train, *argv, "--save-dir", folder, "--disable-validation")
    return folder / "checkpoint_last.pt", argv


@pytest.fixture(scope="module")
def other(data, tmp_path_factory):
    """Data with dictionaries of its own."""
    folder, splits = tmp_path_factory.mktemp("other"), data.parent
    preprocess(
        *("-s", "de", "-t", "en", "--nwordssrc", 64, "--nwordstgt", 64, "--destdir", folder),
        *("--trainpref", splits / "train", "--validpref", splits / "valid", "--testpref", splits / "test"),
    )
    return folder


def test_another_dictionary(model, other, tmp_path):
    path, argv = model
    for said in (
        line(train, other, *argv[1:], "--save-dir", tmp_path, "--finetune-from-model", path),
        line(generate, other, "--path", path, "--cpu", *NO_LOADER),
    ):
        assert re.search(r"dictionary has \d\d\d words and that in DATA 64: .* --srcdict", said)


def test_a_checkpoint_of_a_method_that_is_not_there(model, data, tmp_path):
    state = torch.load(model[0], weights_only=False)
    state["cfg"]["model"].arch = state["cfg"]["model"]._name = "transformer_mine"
    torch.save(state, tmp_path / "mine.pt")
    said = line(generate, data, "--path", tmp_path / "mine.pt", "--cpu", *NO_LOADER)
    assert said.startswith("transformer_mine: no such architecture;")
    assert said.endswith("needs its folder as --user-dir")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "checkpoint_last.pt", "{data}"], "nowhere/checkpoint_last.pt: no such file"),
        (["{folder}", "checkpoint_best.pt", "{data}"], "checkpoint_best.pt: no such file"),
        (["{folder}", "checkpoint_last.pt", "nowhere"], "nowhere: no such folder; give what fairseq-preprocess wrote"),
        (["{folder}", "checkpoint_last.pt", "./bin"], "./bin: no such folder in .*, where a name that begins"),
    ],
)
def test_folders_of_a_hub_interface(model, data, arguments, said):
    with pytest.raises(AdminError, match=said):
        AdminTransformer.from_pretrained(*(each.format(folder=model[0].parent, data=data) for each in arguments))


def test_another_width_is_not_taken_for_another_dictionary(model, tmp_path):
    path, argv = model
    widths = ("--encoder-embed-dim", 16, "--decoder-embed-dim", 16)
    said = line(train, *argv, *widths, "--save-dir", tmp_path, "--finetune-from-model", path)
    assert said.startswith("Cannot load model parameters")


def test_two_checkpoints_to_start_from(model, tmp_path):
    path, argv = model
    said = line(train, *argv, "--save-dir", tmp_path, "--finetune-from-model", path, "--restore-file", path)
    assert said.startswith("--finetune-from-model and --restore-file") and "{" not in said


def test_replace_unk(model, data, tmp_path):
    """Without a value fairseq opens a file called @@; with an empty one it copies the source word."""
    path, _ = model
    (tmp_path / "in").write_text("zzz\n")
    argv = [data, "--path", path, "--cpu", "--input", tmp_path / "in"]
    assert '--replace-unk ""' in line(interactive, *argv, "--replace-unk")
    run_here(interactive, *argv, "--replace-unk", "", "--max-len-b", 3)
    raw = tmp_path / "raw"
    shutil.copytree(str(data), str(raw))
    for side in ("de", "en"):
        shutil.copy(str(data.parent / f"test.{side}"), str(raw / f"test.de-en.{side}"))
    for value in ([], [""]):
        argv = [raw, "--path", path, "--cpu", *NO_LOADER, "--max-len-b", 1, "--replace-unk", *value]
        said = line(generate, *argv)
        assert "fairseq-interactive" in said and "--dataset-impl raw" in said
    run_here(generate, *argv, "--dataset-impl", "raw")


def test_ways_round_faults_of_fairseq(model, data, tmp_path):
    """As docs/troubleshooting.md has them."""
    path, argv = model
    (tmp_path / "in").write_text("zzz\nyyy\n")
    diverse = ("--beam", 4, "--diverse-beam-groups", 4, "--max-len-b", 3)
    run_here(interactive, data, "--path", path, "--cpu", "--input", tmp_path / "in", *diverse)
    bin = tmp_path / "bin"
    shutil.copytree(str(data), str(bin))
    for name in ("de.bin", "de.idx", "en.bin", "en.idx"):
        shutil.copy(str(data / f"valid.de-en.{name}"), str(bin / f"train1.de-en.{name}"))
    both = ("--upsample-primary", 1, "--no-save", "--disable-validation")
    run_here(train, bin, *argv[1:], *both, "--save-dir", tmp_path)


def test_options_that_need_each_other(model, data):
    said = line(generate, data, "--path", model[0], "--cpu", "--sampling", "--beam", 5)
    assert said == "--sampling requires --nbest to be equal to --beam"


def test_language_model_beside_a_translator(model, data, text, tmp_path):
    lm = tmp_path / "lm"
    argv = lm_command(text, lm, "transformer_lm_admin_6", "--admin-init", "logn", "--max-update", 1)
    run_here(train, *argv, "--disable-validation")
    bin = tmp_path / "bin"
    shutil.copytree(str(data), str(bin))
    argv = [bin, "--path", model[0], "--cpu", *NO_LOADER, "--lm-path", lm / "checkpoint_last.pt", "--max-len-b", 3]
    assert "dict.txt of its own data in DATA" in line(generate, *argv)
    shutil.copy(str(text / "dict.txt"), str(bin))
    assert "must have the dictionary of the target language" in line(generate, *argv)
    if DEFAULT_COMBINATION:  # others go on from the block
        argv = [text, "--task", "language_modeling", "--path", lm / "checkpoint_last.pt", "--cpu", *NO_LOADER]
        assert "--sample-break-mode eos" in line(generate, *argv, "--tokens-per-sample", 32)
    argv = [text, "--task", "language_modeling", "--path", lm / "checkpoint_last.pt", "--cpu", *NO_LOADER]
    for skipping in ([], ["--skip-invalid-size-inputs-valid-test"]):
        said = line(generate, *argv, *skipping)
        assert "--sample-break-mode eos" in said and "train" not in said


def test_checkpoints_written_beside_training(model, tmp_path, monkeypatch):
    """fairseq logs that a package is missing, trains nothing and exits with 0."""
    monkeypatch.setitem(sys.modules, "iopath", None)
    argv = [*model[1], "--save-dir", tmp_path / "save", "--write-checkpoints-asynchronously"]
    assert "pip install iopath" in line(train, *argv)
    assert not (tmp_path / "save").exists()


def test_an_architecture_that_is_not_there(data):
    said = line(train, data, "--arch", "transformer_admin_24x6")
    assert "transformer_admin_24x6: no such architecture; the nearest: transformer_admin_24_6, " in said


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("transformer_wmt_en_de_admin", "transformer_admin_wmt_en_de"),
        ("transformer_admin_18", "transformer_admin_18_18"),
        ("transformr_admin_6_6", "transformer_admin_6_6"),
        ("nosuch", ""),
    ],
)
def test_the_nearest_architectures_are_ours(name, meant):
    found = nearest_architectures(name).split(", ")
    assert found[0] == meant or not meant
    assert not any(ARCH_CONFIG_REGISTRY[arch].__module__.startswith("fairseq.") for arch in found)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--warmup-update 8", "--warmup-update: no option of this fairseq; the nearest: --warmup-updates"),
        ("--max-epochs 8", "--max-epochs: no option of this fairseq; the nearest: --max-epoch"),
        ("--criterion label_smoothed_cross_entrop", "the nearest: label_smoothed_cross_entropy, "),
        ("--optimizer adamw", "--optimizer adamw: no such choice; the nearest: adam"),
        ("--admin-init lgn", "--admin-init lgn: no such choice; the nearest: logn, "),
    ],
)
def test_misspelt(data, wrong, meant):
    argv = (data, "--arch", "transformer_admin", "--lr-scheduler", "inverse_sqrt")
    assert meant in line(train, *argv, *wrong.split())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--share-all-embeddings"], "fairseq-preprocess --joined-dictionary"),
        (["--restore-file", "nope.pt"], "--restore-file: no such file: nope.pt; "),
        (["--restore-file", "nope/checkpoint_last.pt"], "no such file"),
        (["--restore-file", "{run}"], "--restore-file: {run} is a folder, not a checkpoint; give {run}/checkpoint_"),
        (["--finetune-from-model", "nope.pt"], "--finetune-from-model: no such file: nope.pt"),
        (["--finetune-from-model", "{run}"], "{run} is a folder, not a checkpoint; give {run}/checkpoint_last.pt"),
        (["--best-checkpoint-metric", "bleu"], "bleu needs --eval-bleu"),
        (["--best-checkpoint-metric", "bleux", "--max-update", 1], "--best-checkpoint-metric bleux: validation"),
        (["--eval-bleu", "--eval-bleu-args", "{beam: 5}"], "not JSON: {beam: 5} ("),
        (["--encoder-attention-heads", 3], "the width must be a multiple of the heads"),
        (["--max-tokens", 2], "none that fits --max-tokens"),
        (["--max-tokens", 8, "--max-update", 1], "exceed max_tokens=8: raise --max-tokens"),
        (["--update-freq", "2,0"], "give a number of at least 1"),
        (["--adam-betas", "(0.9 0.98)"], "--adam-betas is '(0.9 0.98)', which fairseq would run as code; read are nu"),
        (["--fp16"], "--fp16 needs a GPU; on CPUs take --bf16"),
        (["--encoder-layerdrop", 2], "--encoder-layerdrop is '2.0', which is no value of that option"),
        (["--decoder-layerdrop", "-0.5"], "--decoder-layerdrop is '-0.5', which is no"),
        (["--dropout", 1.5], "--dropout is '1.5', which is no value of that option"),
        (["--max-source-positions", 2000000], "--max-source-positions is 2000000; read are numbers from 1 to 1048576"),
    ],
)
def test_a_training_that_cannot_be(model, other, tmp_path, wrong, said):
    folder = other if "--share-all-embeddings" in wrong else model[1][0]
    run = str(model[0].parent)
    wrong, said = [str(word).replace("{run}", run) for word in wrong], said.replace("{run}", run)
    assert said in line(train, folder, *model[1][1:], *wrong, "--save-dir", tmp_path, "--max-epoch", 1)
    assert not list(tmp_path.glob("*.pt"))


def test_a_training_that_may_be_its_own_start(model, tmp_path):
    last = tmp_path / "checkpoint_last.pt"
    args = [*map(str, [*model[1], "--save-dir", tmp_path, "--restore-file", last])]
    assert options.parse_args_and_arch(options.get_training_parser(), args).restore_file == str(last)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("show nope", "no such file: nope"),
        ("fold RUN out.pt", "is a folder, not a checkpoint; give RUN/checkpoint_last.pt"),
        ("profile nope --arch transformer_admin --out out", "no such folder: nope"),
        ("analyze report nope --out out", "no such folder: nope"),
    ],
)
def test_files_that_are_not_there(model, monkeypatch, tmp_path, argv, said):
    run = str(model[0].parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdminError) as error:
        cli.main(argv.replace("RUN", run).split())
    assert said.replace("RUN", run) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("wrong", "meant"), [(["shw"], "show"), (["analyze", "omga"], "omega")])
def test_a_misspelt_sub_command(capsys, wrong, meant):
    with pytest.raises(SystemExit):
        cli.main(wrong)
    assert f"{wrong[-1]}: no such choice; the nearest: {meant}, " in capsys.readouterr().err


# --- names of other implementations -----------------------------------------------------------------------------------

PAGE = (ROOT / "docs/coming.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^\| `(--[^`]+)` \| (.*?) \|$", PAGE, re.M)


@pytest.mark.parametrize(("flags", "instead"), NAMES, ids=[flags for flags, _ in NAMES])
def test_names_of_other_implementations(data, tmp_path, monkeypatch, flags, instead):
    """Each row: refused in a line that names what the page names, or taken as it is."""
    argv = [data, "--arch", "transformer_admin", *flags.split()]
    if instead.startswith("the same"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "x.pt").touch()
        options.parse_args_and_arch(options.get_training_parser(), [*map(str, argv)])
        return
    said = line(train, *argv)
    first = re.search(r"`([^`]+)`", instead)
    assert (first[1] if first else "drop it") in said
    assert said.endswith(hints.PAGE)


def test_every_name_is_on_the_page():
    for name in [*hints.FLAGS, *hints.VALUES]:
        assert name in PAGE.replace("_path", "-path"), name


def test_what_else_is_wrong_is_said_too(data):
    said = line(train, data, "--arch", "transformer_admin", "--init-type", "adaptive", "--tyop", "--min-lr", "1e-9")
    assert said.index("--init-type adaptive: drop it") < said.index("--tyop: no option") < said.index("--min-lr: ")
    assert line(train, data, "--arch", "transformer", "--tyop", 3) == "--tyop: no option of this fairseq"
    assert line(train, data, data, "--arch", "transformer") == f"unrecognized arguments: {data}"
