"""fairseq's own commands, end to end on a tiny model."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    NO_LOADER,
    TRAIN,
    assert_refused,
    assert_same_checkpoint,
    checkpoint,
    generate,
    hypotheses,
    needs_stock_translation,
    omegas,
    profile_in,
    run,
    train,
)

from admin_fairseq import save_dir


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Eight updates in one go, with checkpoints after four and eight; read-only."""
    folder = tmp_path_factory.mktemp("trained")
    result = train(data, folder, "--save-interval-updates", "4", updates=8)
    assert result.code == 0, result.output
    return folder, result


def test_profiles_by_itself(trained):
    folder, result = trained
    (line,) = result.lines("Admin: profiled")
    assert "6 encoder and 6 decoder sub-layers" in line
    profile = profile_in(folder)
    assert [len(profile[stack]) for stack in ("encoder", "decoder")] == [6, 6]
    assert profile["encoder"][0] == profile["decoder"][0] == 1
    assert profile["encoder"] == sorted(profile["encoder"])
    # measured on the first training batch: its target tokens are the first update's words per batch
    assert profile["tokens"]["decoder"] == result.words()[0]
    assert not list(folder.glob("*.tmp"))


def test_omega_survives_the_first_updates_and_trains(trained):
    """What the pre-pass set is where training starts from, and it is trained from there."""
    folder, _ = trained
    profile = profile_in(folder)
    for stack in ("encoder", "decoder"):
        trained_omegas = [w for name, w in omegas(folder / "checkpoint_last.pt").items() if name.startswith(stack)]
        for start, omega in zip(profile[stack], trained_omegas):
            assert omega.mean().item() == pytest.approx(start, abs=0.02)  # 8 updates of Adam, lr up to 8e-4
        assert trained_omegas[0].eq(1).all()
        assert all(omega.unique().numel() > 1 for omega in trained_omegas[1:])


def test_given_profile_trains_bit_identically(trained, data, tmp_path):
    """The pre-pass leaves random state and data iterator alone, and the file loses no bit."""
    folder, profiled = trained
    given = train(data, tmp_path, "--admin-profile", folder / "admin_profile.json", updates=8)
    assert given.code == 0, given.output
    assert given.lines("no profiling, omega from")
    assert given.losses() == profiled.losses()
    assert_same_checkpoint(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


def test_resume_is_bit_identical_and_does_not_profile(trained, data, tmp_path):
    folder, uninterrupted = trained
    shutil.copy(folder / "checkpoint_1_4.pt", tmp_path / "checkpoint_last.pt")
    resumed = train(data, tmp_path, "--admin-profile", "/does/not/exist", updates=8)
    assert resumed.code == 0, resumed.output
    assert resumed.lines("omega from the checkpoint")
    assert not resumed.lines("Admin: profiled")
    assert not (tmp_path / "admin_profile.json").exists()
    assert resumed.losses() == {n: loss for n, loss in uninterrupted.losses().items() if n > 4}
    assert_same_checkpoint(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


def test_several_profile_batches(data, tmp_path):
    """Under a margin, which the profile keeps and its later use may change; other weights get a warning."""
    result = train(data, tmp_path, "--admin-profile-batches", "3", "--admin-margin", "4", updates=3)
    assert result.code == 0, result.output
    assert "margin 4, encoder omega 1.000 to" in result.lines("Admin: profiled")[0]
    profile = profile_in(tmp_path)
    assert (profile["batches"], profile["tokens"]["decoder"], profile["margin"]) == (3, sum(result.words()), 4)
    other = ["--admin-profile", tmp_path / "admin_profile.json", "--admin-margin", "2", "--init-weights", "fairseq"]
    result = train(data, tmp_path / "other", *other, updates=1)
    (line,) = result.lines("no profiling, omega from")
    assert result.lines("was profiled with --init-weights authors, and this model starts otherwise")
    last = (1 + 2 * sum(profile["branch_variance"]["encoder"][:-1])) ** 0.5
    assert float(line.split("encoder omega 1.000 to ")[1].split(",")[0]) == pytest.approx(last, rel=0.1)
    assert "(margin 2)" in line


def test_curriculum_is_profiled_on_the_batch_it_starts_with(trained, data, tmp_path):
    """--curriculum leaves the first epochs' batches in order."""
    _, shuffled = trained
    ordered = train(data, tmp_path, "--curriculum", "1", updates=1)
    assert ordered.code == 0, ordered.output
    profile = profile_in(tmp_path)
    assert profile["tokens"]["decoder"] == ordered.words()[0] != shuffled.words()[0]


def test_stopping_after_an_epoch_changes_nothing_with_fresh_batches(data, tmp_path):
    """fairseq keeps the first epoch's batches, but a run that is resumed makes others, unless told to each epoch."""
    options = ["--update-epoch-batch-itr", "True", "--dropout", "0.1"]
    whole = train(data, tmp_path / "whole", *options, "--max-epoch", "2", updates=100)
    parts = [train(data, tmp_path / "parts", *options, "--max-epoch", epochs, updates=100) for epochs in ("1", "2")]
    assert whole.losses() == {**parts[0].losses(), **parts[1].losses()}
    assert_same_checkpoint(*(tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts")))


def test_no_save_writes_nothing(data, tmp_path):
    result = train(data, tmp_path, "--no-save", updates=1)
    assert result.code == 0, result.output
    assert not list(tmp_path.iterdir())


def test_a_second_training_in_the_same_folder_is_refused(trained, data, tmp_path):
    release = save_dir.claim(str(tmp_path))
    for arch in ("transformer_admin", "transformer"):
        second = train(data, tmp_path, arch=arch, updates=1)
        assert second.code == 1
        (line,) = second.lines("admin_fairseq: error:")
        assert f"another training is at work in {tmp_path} (process {os.getpid()} on " in line
        assert "Traceback" not in second.output
        assert os.listdir(tmp_path) == [save_dir.MARK]
    release()
    assert save_dir.MARK not in os.listdir(trained[0])  # a training takes its own away


def test_finetune_from_an_admin_checkpoint_keeps_omega(trained, data, tmp_path):
    folder, _ = trained
    result = train(data, tmp_path, "--finetune-from-model", folder / "checkpoint_last.pt", "--lr", "1e-12", updates=1)
    assert result.code == 0, result.output
    assert result.lines("no profiling, omega from the checkpoint")
    expected = omegas(folder / "checkpoint_last.pt")
    for name, omega in omegas(tmp_path / "checkpoint_last.pt").items():
        torch.testing.assert_close(omega, expected[name])


@needs_stock_translation
def test_finetune_from_a_stock_checkpoint_starts_at_the_old_model(data, tmp_path):
    stock = train(data, tmp_path / "stock", arch="transformer", updates=3)
    assert stock.code == 0, stock.output
    tuned = train(
        *(data, tmp_path / "admin", "--finetune-from-model", tmp_path / "stock/checkpoint_last.pt", "--lr", "1e-12"),
        *("--admin-fast", "off"),  # scores to the last digit
    )
    assert tuned.code == 0, tuned.output
    assert tuned.lines("omega from a stock Post-LN checkpoint (omega 1)")
    scores = [
        hypotheses(generate(data, tmp_path / name / "checkpoint_last.pt", "--score-reference"))
        for name in ("stock", "admin")
    ]
    assert len(scores[0]) == 30
    assert scores[0] == scores[1]


@pytest.mark.parametrize("options", [[], ["--reset-optimizer"]])
def test_restore_file(trained, data, tmp_path, options):
    folder, _ = trained
    restored = train(data, tmp_path, "--restore-file", folder / "checkpoint_1_4.pt", *options, "--lr", "1e-12")
    assert restored.code == 0, restored.output
    assert restored.lines("omega from the checkpoint")
    expected = omegas(folder / "checkpoint_1_4.pt")
    for name, omega in omegas(tmp_path / "checkpoint_last.pt").items():
        torch.testing.assert_close(omega, expected[name])


def test_restore_file_of_a_stock_model(data, tmp_path):
    assert train(data, tmp_path / "stock", arch="transformer", updates=1).code == 0
    restore = ["--restore-file", tmp_path / "stock/checkpoint_last.pt"]
    assert_refused(train(data, tmp_path / "save", *restore, updates=2), "--reset-optimizer", tmp_path / "save")
    restored = train(data, tmp_path / "save", *restore, "--reset-optimizer", updates=2)
    assert restored.code == 0, restored.output
    assert restored.lines("omega from a stock Post-LN checkpoint (omega 1)")


def test_stock_pre_ln_checkpoint_is_refused(data, tmp_path):
    stock = ["--encoder-normalize-before", "--decoder-normalize-before"]
    assert train(data, tmp_path / "stock", *stock, arch="transformer", updates=1).code == 0
    tuned = train(data, tmp_path / "admin", "--finetune-from-model", tmp_path / "stock/checkpoint_last.pt")
    assert tuned.code != 0
    assert "Pre-LN" in tuned.output.splitlines()[-1]


def test_unit_omega_starts_as_stock(data, tmp_path):
    stock = train(data, tmp_path / "stock", "--dropout", "0.1", arch="transformer", updates=3)
    unit = train(data, tmp_path / "unit", "--dropout", "0.1", "--admin-init", "unit", updates=3)
    assert (stock.code, unit.code) == (0, 0), unit.output
    first = [result.losses()[1].split()[0] for result in (stock, unit)]
    assert first[0] == first[1]  # later ones differ: omega is trained


def test_generate_needs_only_the_checkpoint(trained, data, tmp_path):
    folder, _ = trained
    shutil.copy(folder / "checkpoint_last.pt", tmp_path / "alone.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = generate(data, tmp_path / "alone.pt", cwd=elsewhere)
    assert len(hypotheses(result)) == 30
    assert "BLEU" in result.lines("Generate test with beam=3")[0]
    assert not list(elsewhere.iterdir())


def test_validate(trained, data):
    folder, training = trained
    result = run(
        *("fairseq-validate", data, "--task", "translation", "--path", folder / "checkpoint_last.pt", "--cpu"),
        *("--max-tokens", "600", "--required-batch-size-multiple", "1", "--log-format", "json", *NO_LOADER),
    )
    assert result.code == 0, result.output
    logged = [re.search(r'valid_loss": "?([\d.]+)', r.lines("valid_loss")[-1])[1] for r in (training, result)]
    assert logged[0] == logged[1]


def test_ensemble(trained, data):
    folder, _ = trained
    first, last = folder / "checkpoint_1_4.pt", folder / "checkpoint_last.pt"
    single = hypotheses(generate(data, last))
    assert hypotheses(generate(data, f"{last}:{last}")) == single
    assert hypotheses(generate(data, f"{first}:{last}")) != single


def test_interactive(trained, data):
    folder, _ = trained
    result = run(
        *("fairseq-interactive", data, "--path", folder / "checkpoint_last.pt", "--cpu", "--beam", "2"),
        *("-s", "de", "-t", "en"),
        input="der hund sieht die katze .\n",
    )
    assert len(hypotheses(result)) == 1


def test_translations_come_from_omega(trained, data, tmp_path):
    """Scoring the references with omega changed must change the scores: generation really applies it."""
    folder, _ = trained
    state = checkpoint(folder / "checkpoint_last.pt")
    for name, weight in state["model"].items():
        if name.startswith("encoder") and name.endswith(".omega"):
            weight.fill_(5.0)
    torch.save(state, tmp_path / "changed.pt")
    scores = [
        hypotheses(generate(data, path, "--score-reference"))
        for path in (folder / "checkpoint_last.pt", tmp_path / "changed.pt")
    ]
    assert len(scores[0]) == len(scores[1]) == 30
    assert scores[0] != scores[1]


def test_eval_bleu_checkpoints_load_again(data, tmp_path):
    """--eval-bleu stores numpy arrays in the checkpoint, which torch >= 2.6 refuses unless they are allow-listed."""
    options = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}', "--save-interval-updates", "1"]
    assert train(data, tmp_path, *options, updates=1).code == 0
    resumed = train(data, tmp_path, *options, updates=2)
    assert resumed.code == 0, resumed.output
    assert list(resumed.losses()) == [2]
    assert generate(data, tmp_path / "checkpoint_last.pt").code == 0


@pytest.fixture
def broken_data(data, tmp_path):
    """broken_data(pattern) -> a copy of the data without the files that match."""

    def copy(pattern: str) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(data, folder, ignore=shutil.ignore_patterns(pattern))
        return folder

    return copy


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["--encoder-normalize-before"], "Post-LN"),
        (["--admin-init", "logn", "--admin-profile", "p.json"], "exclude each other"),
        (["--admin-profile", "/does/not/exist.json"], "/does/not/exist.json"),
        (["--admin-margin", "0"], "--admin-margin must be a positive number, not 0.0"),
    ],
)
def test_bad_options(data, tmp_path, options, needle):
    assert_refused(train(data, tmp_path / "save", *options), needle, tmp_path / "save")


def test_bad_profile(data, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"encoder": [1.0] * 12, "decoder": [1.0] * 18}))
    result = train(data, tmp_path / "save", "--admin-profile", tmp_path / "p.json")
    assert_refused(result, "12 encoder sub-layers, the model 6", tmp_path / "save")


def test_data_missing(tmp_path):
    assert_refused(train(tmp_path / "nowhere", tmp_path / "save"), "nowhere", tmp_path / "save")


def test_data_is_a_file(data, tmp_path):
    assert_refused(train(data / "dict.de.txt", tmp_path / "save"), "Not a directory", tmp_path / "save")


def test_save_dir_is_a_file(data, tmp_path):
    (tmp_path / "file").write_text("")
    result = train(data, tmp_path / "file" / "save")
    assert_refused(result, "Not a directory", tmp_path / "save")
    assert "DATA" not in result.lines("admin_fairseq: error:")[0]


def test_finetune_from_nothing_or_from_another_depth(trained, data, tmp_path):
    folder, _ = trained
    missing = train(data, tmp_path / "save", "--finetune-from-model", tmp_path / "nope.pt")
    assert_refused(missing, "no such file: ", tmp_path / "save")
    deeper = ["--encoder-layers", "4", "--finetune-from-model", folder / "checkpoint_last.pt"]
    assert_refused(train(data, tmp_path / "save", *deeper), "architectures match", tmp_path / "save")


def test_data_folder_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(train(tmp_path / "empty", tmp_path / "save"), "DATA", tmp_path / "save")


def test_dictionary_missing(broken_data, tmp_path):
    assert_refused(train(broken_data("dict.en.txt"), tmp_path / "save"), "dict.en.txt", tmp_path / "save")


def test_training_split_missing(broken_data, tmp_path):
    result = train(broken_data("train.*"), tmp_path / "save", "-s", "de", "-t", "en")
    assert_refused(result, "train", tmp_path / "save")


def test_training_set_empty(data, tmp_path):
    """Nothing left to train on: an empty file, or every pair too long."""
    for language in ("de", "en"):
        (tmp_path / f"none.{language}").write_text("")
    result = run(
        *("fairseq-preprocess", "-s", "de", "-t", "en", "--srcdict", data / "dict.de.txt", "--joined-dictionary"),
        *("--trainpref", tmp_path / "none", "--validpref", tmp_path / "none", "--destdir", tmp_path / "bin"),
    )
    assert result.code == 0, result.output
    assert_refused(train(tmp_path / "bin", tmp_path / "save"), "data set is empty", tmp_path / "save")
    too_long = train(data, tmp_path / "save", "--max-source-positions", "1", "--max-target-positions", "1")
    assert_refused(too_long, "data set is empty", tmp_path / "save")


def test_variance_not_finite(trained, data, tmp_path):
    """Pretrained embeddings with a NaN reach the pre-pass."""
    rows = [line.split()[0] for line in (data / "dict.de.txt").read_text(encoding="utf-8").splitlines()]
    table = "".join(f"{word} {' '.join(['nan'] * 32)}\n" for word in rows)
    (tmp_path / "embeddings").write_text(f"{len(rows)} 32\n{table}", encoding="utf-8")
    result = train(data, tmp_path / "save", "--encoder-embed-path", tmp_path / "embeddings")
    assert_refused(result, "encoder.layers.0.self_attn_layer_norm", tmp_path / "save")


@pytest.mark.slow
def test_72_layers_at_full_width(data, tmp_path):
    """transformer_admin_72 as a user types it: 60 and 12 layers, 512 wide, two updates, resume, translate."""
    flags = [flag for flag in TRAIN if flag not in ("--max-tokens", "600")] + ["--max-tokens", "300"]
    command = ["fairseq-train", data, "--arch", "transformer_admin_72", "--save-dir", tmp_path, *flags]
    first = run(*command, "--max-update", "2")
    assert first.code == 0, first.output
    assert "120 encoder and 36 decoder sub-layers" in first.lines("Admin: profiled")[0]
    resumed = run(*command, "--max-update", "3")
    assert resumed.code == 0, resumed.output
    assert list(resumed.losses()) == [3]
    assert generate(data, tmp_path / "checkpoint_last.pt", "--max-len-b", "3").code == 0
