"""examples/<recipe>: raw files to scores, at toy size, in the layout that each recipe downloads."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grammar
import pytest
import torch
from helpers import checkpoint
from toy import EXAMPLES, RECIPES, TOY, environment, lay_out, lines, script, sides, text


@pytest.mark.parametrize("recipe", RECIPES)
def test_raw_files_to_scores(finished, recipe):
    folder, printed = finished(recipe)
    source = recipe.split("_")[-2]
    test = text(recipe, "test", 25)
    if recipe == "iwslt14_de_en":  # dev2010, dev2012, tst2010, tst2011, tst2012
        test = [pair for number in (4, 3, 2, 1, 0) for pair in test[5 * number : 5 * number + 5]]
    assert lines(folder / f"data/text/raw.test.{source}") == [pair[0] for pair in test]
    scores = json.loads((folder / "run/test/scores.json").read_text())
    assert scores.pop("checkpoints") == ["checkpoint2.pt", "checkpoint1.pt"]
    log = (folder / "run/test/generate.err").read_text()
    lenpen = {"wmt14_en_de": "0.6", "wmt14_en_fr": "0.8"}.get(recipe, "1.0")
    assert f"'lenpen': {lenpen}" in log
    assert "'beam': 2" in log
    expected = ["tokenised BLEU, as in the paper", "detokenised sacreBLEU", "chrF"]
    if recipe == "wmt14_en_de":
        expected.insert(1, "tokenised BLEU, compounds split")
    assert list(scores) == expected
    assert all(name in printed for name in expected)
    assert all(scores[name]["signature"] in printed for name in expected)
    assert lines(folder / "run/test/references.txt") == [pair[1] for pair in test]
    assert len(lines(folder / "run/test/hypotheses.txt")) == len(test)
    settings = json.loads((folder / "run/settings.json").read_text())
    assert settings["METHOD"] == "admin"
    assert settings["BATCH"] == "1500"
    assert (folder / "run/admin_profile.json").exists()
    assert "loaded checkpoint" not in (folder / "run/train.log").read_text()


def test_splits_and_filters(finished):
    """The published recipes' rules, recomputed from the raw text."""
    folder, _ = finished("iwslt14_de_en")
    tokenised = list(zip(*(lines(folder / f"data/text/tok.train.{language}") for language in ("de", "en"))))
    assert len(tokenised) == 701  # the talk's title stays, its keywords do not
    kept = [
        pair
        for pair in tokenised
        if all(1 <= len(side.split()) <= 175 for side in pair)
        and max(len(pair[0].split()) / len(pair[1].split()), len(pair[1].split()) / len(pair[0].split())) <= 1.5
    ]
    valid = kept[22::23]
    assert lines(folder / "data/text/split.valid.de") == [pair[0] for pair in valid]
    train = [pair for number, pair in enumerate(kept, start=1) if number % 23]
    assert lines(folder / "data/text/split.train.en") == [pair[1] for pair in train]
    assert all(line == line.lower() for line in lines(folder / "data/text/split.train.de"))


# What a script says or writes when it begins something; each is killed a random moment after a random one of these.
BEGINNINGS = {
    "prepare": ["raw text", "tokenise the training text", "learn ", "apply BPE to the training text", "binarise"],
    "train": ["train in ", "Start iterating", "num_updates=2,", "Saving checkpoint to", "epoch 002:"],
    "evaluate": ["average checkpoints", "translate the test set"],
}


def kill_at_random(recipe: str, name: str, folder: Path, dice: random.Random) -> None:
    beginning, moment, log = dice.choice(BEGINNINGS[name]), dice.uniform(0, 0.7), folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", EXAMPLES / recipe / f"{name}.sh"],
            env=environment(folder),
            cwd=folder,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    while beginning not in log.read_text():
        assert process.poll() is None, f"{beginning!r} is nowhere in {log.read_text()}"
        time.sleep(0.02)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:])]
)
def test_killed_three_times_ends_the_same(finished, tmp_path, recipe):
    whole, _ = finished(recipe)
    shutil.copytree(whole / "raw", tmp_path / "raw")
    dice = random.Random(recipe)
    for name in ("prepare", "train", "evaluate"):
        kill_at_random(recipe, name, tmp_path, dice)
        result = script(recipe, name, folder=tmp_path)
        assert result.returncode == 0, result.stdout
    for path in (whole / "data").glob("*.*"):
        if path.suffix in (".bin", ".idx", ".txt"):
            assert path.read_bytes() == (tmp_path / "data" / path.name).read_bytes(), path.name
    models = [checkpoint(folder / "run/test/average.pt")["model"] for folder in (whole, tmp_path)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())
    for name in ("scores.json", "hypotheses.txt"):
        assert (whole / "run/test" / name).read_text() == (tmp_path / "run/test" / name).read_text()


def test_a_step_whose_child_dies_is_not_done(finished, tmp_path):
    """What the kernel does when memory runs out: the shell lives on, the program is gone, and so are its workers."""
    whole, _ = finished("multi30k_de_en")
    shutil.copytree(whole / "raw", tmp_path / "raw")
    for beginning, program in (("tokenise the training text", "corpus.py tokenize"), ("learn ", "corpus.py count")):
        with (tmp_path / "log").open("w") as out:
            process = subprocess.Popen(
                ["bash", EXAMPLES / "multi30k_de_en" / "prepare.sh"], env=environment(tmp_path), stdout=out, stderr=out
            )
        while subprocess.run(["pkill", "-KILL", "-o", "-f", f"{program} .*{tmp_path}"]).returncode:
            assert process.poll() is None, (tmp_path / "log").read_text()
        assert process.wait(timeout=60) == 1
        assert "failed; what to do is said above" in (tmp_path / "log").read_text()
        assert beginning in (tmp_path / "log").read_text()
    result = script("multi30k_de_en", "prepare", folder=tmp_path)
    assert result.returncode == 0, result.stdout
    for name in ("train.de-en.de.bin", "dict.en.txt"):
        assert (whole / "data" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "settings", "needle"),
    [
        ("prepare", {"BPE": "abc"}, "BPE=abc: give a whole number of at least 1"),
        ("prepare", {"WORKERS": "0"}, "WORKERS=0: give a whole number of at least 1"),
        ("train", {"EPOCHS": "0"}, "EPOCHS=0"),
        ("train", {"SEED": "-1"}, "SEED=-1"),
        ("train", {"SEED": "4000000000"}, "SEED=4000000000: give a whole number below 4000000000"),
        ("train", {"LR": "fast"}, "LR=fast: give a number"),
        ("train", {"GPUS": "-1"}, "GPUS=-1"),
        ("train", {"GPUS": "08"}, "GPUS=08"),
        ("train", {"BATCH": "4e3"}, "BATCH=4e3"),
        ("train", {"BATCH": "1", "GPUS": "8"}, "BATCH=1: give a whole number of at least 8"),
        ("train", {"NODES": "2"}, "NODES=2 needs GPUs"),
        ("train", {"NODE_RANK": "1"}, "NODE_RANK=1: machines are numbered"),
        ("train", {"MASTER": "foo"}, "MASTER=foo: give host:port"),
        ("train", {"DEPTH": "deep"}, "DEPTH=deep: give a number of layers"),
        ("train", {"METHOD": "magic"}, "METHOD=magic: choose one of admin"),
        ("train", {"PRECISION": "fp16"}, "PRECISION=fp16 needs a GPU"),
        ("train", {"SCHEDULE": "linear"}, "SCHEDULE=linear needs UPDATES"),
        ("evaluate", {"LAST": "many"}, "LAST=many: give a whole number"),
        ("evaluate", {}, "holds no checkpoint"),
    ],
)
def test_bad_settings(tmp_path, name, settings, needle):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dict.en.txt").touch()
    result = script("multi30k_de_en", name, folder=tmp_path, **settings)
    assert result.returncode == 1
    assert needle in result.stdout.splitlines()[-1]
    assert not (tmp_path / "run").exists()


HOSTILE = ["", "-delete", "a b", "'", '"x', "$(touch pwned)", "`touch pwned`", ";touch pwned;", "1\n2", "a:b", "0x1"]
ODD_FOLDERS = {"a b", "'", '"x', "$(touch pwned)", "`touch pwned`", ";touch pwned;", "0x1"}
FINE = {
    **dict.fromkeys(("RAW", "DATA", "RUN"), ODD_FOLDERS),
    "EXTRA": set(HOSTILE) - {"'", '"x'},
    "DRY_RUN": {""},
    "COMET": {"", *ODD_FOLDERS},
    "METHOD": {"0x1"},  # could be one: train.sh asks the plugin
}


def test_a_relative_folder_where_the_working_directory_has_a_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    result = script("multi30k_de_en", "train", folder=tmp_path / "a:b", DATA="data", DRY_RUN="1")
    assert result.returncode == 1
    assert f"error: DATA={tmp_path}/a:b/data: fairseq takes no path with a colon" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate"])
def test_every_setting_of_every_script_is_looked_at(tmp_path, name):
    """What it cannot be ends the script before anything is made."""
    begin = [EXAMPLES / "iwslt14_de_en" / f"{name}.sh"]
    usual = {key: value for key, value in environment(tmp_path).items() if key not in TOY}
    printed = subprocess.run([*begin, "--help"], env=usual, text=True, stdout=subprocess.PIPE).stdout
    settings = re.findall(r"^  ([A-Z_]+) ", printed, re.M)
    assert len(settings) > 3
    for setting in settings:
        for value in set(HOSTILE) - FINE.get(setting, set()):
            result = subprocess.run(
                begin,
                env={**usual, setting: value},
                cwd=tmp_path,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert result.returncode == 1, (setting, value, result.stdout)
            assert f"error: {setting}" in result.stdout, (setting, value, result.stdout)
    assert not os.listdir(tmp_path)


def test_folders_of_odd_names_and_a_users_shell(tmp_path):
    """Nothing in a name is run, relative ones become absolute, and CDPATH and the like change nothing."""
    folder = tmp_path / "$(touch pwned) -x'"
    (folder / "data").mkdir(parents=True)
    (folder / "data/dict.en.txt").touch()
    extra = "`touch pwned` ';touch pwned'"
    shell = {"CDPATH": f".:{EXAMPLES}:/", "GLOBIGNORE": "*", "POSIXLY_CORRECT": "1", "DRY_RUN": "1"}
    result = script("multi30k_de_en", "train", folder=folder, DATA="data", RUN="./-run", EXTRA=extra, **shell)
    assert result.returncode == 0, result.stdout
    command = result.stdout.splitlines()[-1]
    assert f"{tmp_path}/" + r"\$\(touch\ pwned\)\ -x\'/data --user-dir " in command
    assert r"-x\'/./-run --keep-last" in command
    assert command.rstrip().endswith(r"\`touch pwned\` \;touch\ pwned")
    assert os.listdir(folder) == ["data"]
    assert os.listdir(folder / "data") == ["dict.en.txt"]


def test_no_file_in_a_runs_folder_is_run(copied, tmp_path):
    """A run may come from elsewhere; Python looks for modules in the working directory first."""
    folder = copied("multi30k_de_en").rename(tmp_path / "x&y")  # bash 5.2 can take & for what is replaced
    for name in ("torch", "omegaconf", "admin_fairseq", "fairseq", "sacrebleu", "tqdm"):
        (folder / f"run/{name}.py").write_text("open('pwned', 'w')\nraise SystemExit('pwned')\n")
    shutil.rmtree(folder / "run/test")
    command = ["bash", EXAMPLES / "multi30k_de_en/evaluate.sh"]
    env = environment(folder, RUN=".")
    result = subprocess.run(
        command, env=env, cwd=folder / "run", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    assert (folder / "run/test/scores.json").exists()
    assert not list(folder.rglob("pwned"))


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:])]
)
def test_a_sentence_that_is_too_long_stops_nothing(tmp_path, recipe):
    """prepare names it, training leaves it out, evaluate has an empty line for a source: no line is lost."""
    raw = tmp_path / "raw"
    raw.mkdir()
    source, target = recipe.split("_")[-2:]
    long, sizes = ("x " * 1100, "y"), {"train": 60, "valid": 6, "test": 6}
    for split, count in sizes.items():
        pairs = [*grammar.corpus(count, seed=count), long, *grammar.corpus(1, seed=1)]
        if split == "test":
            pairs += [long[::-1], ("z", "z")]
        for language, lines_ in zip((source, target), zip(*pairs)):
            (raw / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines_))
    settings = {"BPE": "60", "EPOCHS": "1", "SAVE_UPDATES": "1000", "BEAM": "1"}
    result = script(recipe, "prepare", "train", "evaluate", folder=tmp_path, **settings)
    assert result.returncode == 0, result.stdout
    for split, language, count in (("valid", source, 8), ("test", source, 10), ("test", target, 10)):
        number = 9 if language == target else 7
        named = rf"bpe.{split}.{language} has 1 of more than 1,023 tokens among {count} .* 1,100 in line {number}: "
        assert re.search(named, result.stdout), result.stdout
    assert "training leaves them out" in result.stdout
    assert "in line 9: evaluate.sh scores them as all others" in result.stdout
    assert "1 of 10 sentences have more than 1,023 tokens" in result.stdout
    assert "line 7\n" in result.stdout
    translations = (tmp_path / "run/test/hypotheses.tok.txt").read_text().split("\n")
    assert len(translations) == 11
    assert [number for number, line in enumerate(translations, start=1) if not line] == [7, 11]
    log = (tmp_path / "run/test/generate.log").read_text()
    assert re.search(rf"^T-8\t{long[0].strip()}$", log, re.M)


def test_extra_options_are_quoted_as_in_a_shell(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dict.en.txt").touch()
    extra = "--adam-betas '(0.9, 0.999)' --wandb-project *"
    result = script("multi30k_de_en", "train", folder=tmp_path, EXTRA=extra, DRY_RUN="1")
    assert result.stdout.rstrip().endswith(r"--adam-betas \(0.9\,\ 0.999\) --wandb-project \*")


def test_done_steps_are_skipped_and_other_settings_refused(finished, copied):
    raw, folder = str(finished("multi30k_de_en")[0] / "raw"), copied("multi30k_de_en")
    started = time.time()
    again = script("multi30k_de_en", "prepare", folder=folder, RAW=raw)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("already done") > 8
    assert not [path for path in folder.glob("data/text/*") if path.stat().st_mtime > started]
    for name, setting in (("prepare", "BPE"), ("train", "LR")):
        other = script("multi30k_de_en", name, folder=folder, **{setting: "77"})
        assert other.returncode == 1
        assert f"{setting}=77 (was " in other.stdout.splitlines()[-1]


def test_evaluation_follows_what_changed(copied):
    """Another beam or a longer training is evaluated anew; nothing else is."""
    folder = copied("multi30k_de_en")
    (folder / "link").symlink_to("run")
    linked = script("multi30k_de_en", "evaluate", folder=folder, RUN=str(folder / "link"))
    assert linked.stdout.count("already done") == 2
    again = script("multi30k_de_en", "evaluate", folder=folder, BEAM="1")
    assert again.stdout.count("already done") == 1
    longer = script("multi30k_de_en", "train", "evaluate", folder=folder, EPOCHS="3")
    assert longer.returncode == 0, longer.stdout
    assert "already done" not in longer.stdout
    assert "checkpoint3.pt" in longer.stdout


def test_evaluation_within_the_first_epoch(copied):
    """Where fairseq ends by --max-update before an epoch does, it leaves no epoch's checkpoint."""
    folder = copied("multi30k_de_en")
    for epoch in folder.rglob("checkpoint[0-9]*.pt"):
        epoch.unlink()
    result = script("multi30k_de_en", "evaluate", folder=folder)
    assert result.returncode == 0, result.stdout
    assert "checkpoint_last.pt" in result.stdout


def test_own_corpus(tmp_path):
    (tmp_path / "raw").mkdir()
    for split in ("train", "valid", "test"):
        for name, content in sides(f"{split}.{{l}}", "wmt14_en_de", text("wmt14_en_de", split, 150)).items():
            (tmp_path / "raw" / name).write_text(content, encoding="utf-8")
    result = script("wmt14_en_de", "prepare", folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "that corpus is used" in result.stdout
    assert len(lines(tmp_path / "data/text/bpe.valid.de")) == 150


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["prepare", "train", "evaluate"])
def test_help_and_bad_arguments(recipe, name, tmp_path):
    shown = script(recipe, f"{name}.sh --help #", folder=tmp_path)
    assert shown.returncode == 0, shown.stdout
    assert "Settings are environment variables" in shown.stdout
    wrong = script(recipe, f"{name}.sh --fast #", folder=tmp_path)
    assert wrong.returncode == 1
    assert "unknown argument --fast" in wrong.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("iwslt14_de_en", {"GPUS": "1"}, ["--max-tokens 4096 --update-freq 1", "--lr 7e-4", "--warmup-updates 6000"]),
        (
            "wmt14_en_de",
            {"GPUS": "4"},
            [
                "--max-tokens 8192 --update-freq 1",
                "--distributed-world-size 4",
                "--init-weights authors --admin-margin 1 ",
            ],
        ),
        ("wmt14_en_de", {"GPUS": "3"}, ["--max-tokens 5461 --update-freq 2"]),
        ("wmt14_en_de", {"GPUS": "1"}, ["--max-tokens 8192 --update-freq 4", "--fp16"]),
        ("wmt14_en_fr", {"GPUS": "8"}, ["--max-tokens 8000 --update-freq 10", "--lr 7e-4", "--dropout 0.1"]),
        (
            "wmt14_en_fr",
            {"GPUS": "8", "NODES": "2", "NODE_RANK": "1", "MASTER": "one:1234", "DEPTH": "72"},
            [
                "--max-tokens 5000 --update-freq 16",
                "--encoder-layers 60 --decoder-layers 12",
                "--lr 1e-3",
                "--dropout 0.2",
                "torchrun --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr one --master-port 1234",
            ],
        ),
        (
            "multi30k_de_en",
            {"GPUS": "0", "METHOD": "preln"},
            ["--arch transformer_preln ", "--cpu", "--init-weights authors --dropout"],
        ),
        ("multi30k_de_en", {"GPUS": "0"}, ["--init-weights authors --admin-margin 16 "]),
        ("multi30k_de_en", {"GPUS": "0", "EXTRA": "--admin-init logn"}, ["--init-weights authors --dropout"]),
        ("iwslt14_de_en", {"GPUS": "1", "EXTRA": "--admin-profile-batches 4"}, ["--admin-margin 1 "]),
        (
            "iwslt14_de_en",
            {"GPUS": "1", "SCHEDULE": "linear", "UPDATES": "100000", "WARMUP": "1"},
            ["--lr-scheduler polynomial_decay --total-num-update 100000"],
        ),
        ("iwslt14_de_en", {"GPUS": "1", "RDROP": "5"}, ["label_smoothed_cross_entropy_with_rdrop --rdrop-alpha 5"]),
    ],
)
def test_the_papers_batch_on_any_number_of_gpus(tmp_path, recipe, settings, expected):
    (tmp_path / "data").mkdir()
    (tmp_path / f"data/dict.{recipe[-2:]}.txt").touch()
    env = {key: value for key, value in environment(tmp_path, DRY_RUN="1").items() if key not in TOY}
    result = subprocess.run(
        ["bash", EXAMPLES / recipe / "train.sh"], env={**env, **settings}, text=True, stdout=subprocess.PIPE
    )
    assert result.returncode == 0, result.stdout
    for needle in expected:
        assert needle in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "settings", "needle"),
    [
        ("train", {}, "is not prepared"),
        ("evaluate", {}, "is not prepared"),
    ],
)
def test_out_of_order(tmp_path, name, settings, needle):
    result = script("multi30k_de_en", name, folder=tmp_path, **settings)
    assert result.returncode == 1
    assert needle in result.stdout


# ---- common/prepare.sh by itself ---------------------------------------------------------------------------------


@pytest.fixture
def toy_recipe(tmp_path):
    """toy_recipe(*lines) runs the download of a recipe that lists these files."""

    def run(*files: str) -> subprocess.CompletedProcess:
        folder = tmp_path / "toy_de_en"
        folder.mkdir(exist_ok=True)
        rows = "\n".join(f"file {row}" for row in files)
        (folder / "prepare.sh").write_text(f". {EXAMPLES}/common/prepare.sh\n{rows}\ndownload\n")
        command = ["bash", folder / "prepare.sh"]
        return subprocess.run(
            command, env=environment(tmp_path), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return run


def test_download_resumes_and_checks(toy_recipe, tmp_path):
    content = os.urandom(50_000)
    (tmp_path / "remote").write_bytes(content)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/file.part").write_bytes(content[:20_000])
    result = toy_recipe(f"file file://{tmp_path}/remote 50000 md5:{hashlib.md5(content).hexdigest()}")
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "raw/file").read_bytes() == content
    assert os.listdir(tmp_path / "raw") == ["file"]


@pytest.mark.parametrize("check", ["49999", "- md5:00", "- sha256:00"])
def test_a_wrong_download_is_removed(toy_recipe, tmp_path, check):
    (tmp_path / "remote").write_bytes(b"x" * 50_000)
    result = toy_recipe(f"file file://{tmp_path}/remote {check}")
    assert result.returncode == 1
    assert "it was removed" in result.stdout
    assert not os.listdir(tmp_path / "raw")


def test_without_a_network_it_says_what_to_put_where(toy_recipe, tmp_path):
    result = toy_recipe(f"a.tgz file://{tmp_path}/nowhere", f"b.tgz file://{tmp_path}/nothing")
    assert result.returncode == 1
    for name, remote in (("a.tgz", "nowhere"), ("b.tgz", "nothing")):
        assert f"file://{tmp_path}/{remote} -> {tmp_path}/raw/{name}" in result.stdout


def test_files_of_the_users_own_are_used_as_they_are(toy_recipe, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/file").write_text("mine")
    result = toy_recipe(f"file file://{tmp_path}/nowhere 50000")
    assert result.returncode == 0
    assert "4 bytes instead of 50000; it is used as it is" in result.stdout


def test_a_server_that_cannot_resume(toy_recipe, tmp_path):
    """Python's own web server knows no byte ranges."""
    content = os.urandom(50_000)
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/file").write_bytes(content)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/file.part").write_bytes(content[:20_000])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "remote"))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = toy_recipe(f"file http://localhost:{server.server_port}/file 50000")
        server.shutdown()
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "raw/file").read_bytes() == content


def test_a_broken_archive_is_named(tmp_path):
    lay_out("wmt14_en_de", tmp_path / "raw")
    archive = tmp_path / "raw/training-parallel-nc-v12.tgz"
    with archive.open("r+b") as file:
        file.truncate(archive.stat().st_size // 2)
    result = script("wmt14_en_de", "prepare", folder=tmp_path)
    assert result.returncode == 1
    assert f"error: {archive} is broken" in result.stdout
    assert "Traceback" not in result.stdout
    archive.unlink()
    again = script("wmt14_en_de", "prepare", folder=tmp_path, http_proxy="http://localhost:9", no_proxy="")
    assert again.returncode == 1
    assert f"-> {archive}" in again.stdout


# ---- common/checkpoints.py and estimate.py -----------------------------------------------------------------------


def save(path: Path, value: float) -> None:
    torch.save({"model": {"w": torch.full((5000,), value)}}, path)


def last_after(folder: Path, *options: str) -> Any:
    command = [sys.executable, EXAMPLES / "common/checkpoints.py", folder, *options]
    finished = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last = folder / "checkpoint_last.pt"
    return finished, checkpoint(last)["model"]["w"][0].item() if last.exists() else None


@pytest.mark.parametrize("damage", ["empty", "half", "zeros"])
def test_a_broken_last_checkpoint_is_replaced(tmp_path, damage):
    for name, value in (("1", 1), ("_2_30", 2.3), ("_2_7", 2.07), ("_last", 3)):
        save(tmp_path / f"checkpoint{name}.pt", value)
    assert last_after(tmp_path)[1] == 3
    last = tmp_path / "checkpoint_last.pt"
    content = last.read_bytes()
    middle = len(content) // 2
    broken = {"empty": b"", "half": content[:middle], "zeros": content[:middle] + bytes(500) + content[middle + 500 :]}
    last.write_bytes(broken[damage])
    assert last_after(tmp_path)[1] == pytest.approx(2.3)
    last.write_bytes(broken[damage])
    (tmp_path / "checkpoint_2_30.pt").write_bytes(broken["half"])
    assert last_after(tmp_path)[1] == pytest.approx(2.07)
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(broken["half"])
    assert last_after(tmp_path)[1] is None


def test_whole_epochs_for_another_number_of_gpus(tmp_path):
    save(tmp_path / "checkpoint_last.pt", 1.5)
    finished, value = last_after(tmp_path, "--whole-epochs")
    assert (finished.returncode, value) == (1, 1.5)
    assert "no finished epoch" in finished.stdout
    save(tmp_path / "checkpoint1.pt", 1)
    assert last_after(tmp_path, "--whole-epochs")[1] == 1


def test_a_run_goes_on_in_other_batches_from_its_last_epoch(copied):
    result = script("multi30k_de_en", "train", folder=copied("multi30k_de_en"), EPOCHS="3", MAX_TOKENS="300")
    assert result.returncode == 0, result.stdout
    assert "going on from" in result.stdout
    assert "checkpoint2.pt" in result.stdout


def test_estimate(finished):
    folder, _ = finished("multi30k_de_en")
    command = [sys.executable, EXAMPLES / "common/estimate.py", folder / "run", "--price", "2"]
    printed = subprocess.check_output(command, text=True)
    words = sum(len(line.split()) + 1 for line in lines(folder / "data/text/bpe.train.en"))
    assert printed.startswith(f"{words:,} target tokens x 2 epochs at ")
    assert " on 1 devices" in printed


def test_two_runs_in_one_folder(copied):
    folder = copied("multi30k_de_en")
    with (folder / "data/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = script("multi30k_de_en", "prepare", folder=folder)
    assert result.returncode == 1
    assert "another run is at work" in result.stdout
