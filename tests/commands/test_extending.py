"""docs/extending.md as it stands: its code in a folder outside the package, given as --user-dir."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, TINY, TRAIN, WIDTHS, lm_command

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "experiments"
    folder.mkdir()
    (folder / "__init__.py").write_text("\n\n".join(CODE))
    return folder


def command(program, *arguments):
    """A command in a process of its own, where the folder's names are not registered yet."""
    done = subprocess.run(
        [sys.executable, "-m", program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_page_has_both_doors():
    assert len(CODE) == 2
    assert "@register_method" in CODE[0]
    assert "@register_start" in CODE[1]


def test_a_rule_trains_and_translates(user_dir, data, tmp_path):
    log = command(
        *("fairseq_cli.train", data, "--user-dir", user_dir, "--arch", "transformer_gated_18_18", *TINY, *TRAIN),
        *("--max-update", 2, "--save-dir", tmp_path),
    )
    assert "GatedTransformerEncoderLayerBase" in log
    out = command(
        *("fairseq_cli.generate", data, "--user-dir", user_dir, "--path", tmp_path / "checkpoint_last.pt", "--cpu"),
        *("--max-len-b", 5, "--required-batch-size-multiple", 1),
    )
    assert len(re.findall(r"^H-\d+\t", out, re.M)) == 30


def test_a_rule_is_a_language_model_too(user_dir, text, tmp_path):
    arguments = lm_command(text, tmp_path, "transformer_lm_gated_6", "--decoder-layers", "2", "--max-update", "2")
    assert "GatedTransformerDecoderLayerBase" in command("fairseq_cli.train", *arguments, "--user-dir", user_dir)


def test_what_knows_the_folder_and_what_does_not(user_dir, data, tmp_path):
    """A rule is analysed; a start is of no use any more once omega has been trained."""
    options = ("--user-dir", user_dir, "--cpu", "--max-tokens", "600", *TINY)
    out = command(
        "admin_fairseq", "analyze", "dependency", data, "--arch", "transformer_gated", "--out", tmp_path, *options
    )
    assert "dependency.json" in out
    start = ("--arch", "transformer_admin", "--admin-init", "half", "--max-update", 1, "--save-dir", tmp_path)
    command("fairseq_cli.train", data, "--user-dir", user_dir, *TINY, *TRAIN, *start)
    folded = command("admin_fairseq", "fold", tmp_path / "checkpoint_last.pt", tmp_path / "folded.pt")
    assert "as a stock transformer" in folded


def test_both_appear_in_the_comparison(user_dir, data, tmp_path):
    table = command(
        *("benchmarks.compare", data, "--user-dir", user_dir, "--methods", "gated,admin --admin-init half"),
        *("--depths", "2-2", "--lr", "1e-3", "--updates", "2", "--no-bleu", "--out", tmp_path, "--", *WIDTHS),
    )
    assert re.search(r"^\| gated +\| 2-2", table, re.M)
    assert re.search(r"^\| admin --admin-init half +\| 2-2", table, re.M)
    logs = [path.read_text() for path in tmp_path.glob("admin*/train.log")]
    # N = 4 and 6: sqrt(1 + N/2) in the last sub-layer
    assert ["encoder omega 1.000 to 1.732, decoder omega 1.000 to 2.000" in log for log in logs] == [True]
