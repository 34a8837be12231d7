"""Mutated checkpoints and profiles against every command: one line or a result, never a traceback.

``FUZZ=N`` says how many of each kind; ``make fuzz`` takes 10,000 files in all. Seeds are fixed.
"""

import contextlib
import io
import os
import warnings
from pathlib import Path

import fuzz
import pytest
import torch
from commands.test_legacy import clinic
from commands.test_legacy import options as clinic_options
from commands.test_legacy import state as clinic_state
from fairseq import checkpoint_utils
from helpers import TINY, TRAIN, built
from hypothesis import HealthCheck, given, settings
from omegaconf import OmegaConf

from admin_fairseq import AdminError, Profile, read_profile
from admin_fairseq.cli import main

EXAMPLES = int(os.environ.get("FUZZ", "25"))
SETTINGS = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FOLD = ["fold", "bad.pt", "out.pt"]
COMMANDS = {
    "transformer_admin": [["show", "bad.pt"], FOLD, [*FOLD, "--keep-optimizer"], [*FOLD, "--untie"]],
    "transformer": [["unfold", "bad.pt", "out.pt"], ["unfold", "bad.pt", "out.pt", "--keep-optimizer"]],
    "authors": [["import", "bad.pt", "out.pt"]],
}
COMMANDS["transformer_admin"] += [["average", "--inputs", "good.pt", "bad.pt", "--output", "out.pt"]]
RARE = {  # a second each
    "transformer_admin": [
        ["deepen", "bad.pt", "out.pt", "DATA", "--encoder-layers", "4"],
        [*FOLD, "--verify", "DATA", "--sentences", "4"],
        ["analyze", "omega", "--path", "bad.pt", "--out", "analysis"],
        ["analyze", "dependency", "DATA", "--path", "bad.pt", "--out", "analysis", "--positions", "8"],
    ]
}


def real_state(arch, data):
    """What fairseq-train would have saved, with an average of the weights and Adam's state."""
    model, _, cfg = built(
        [data, "--arch", arch, *TINY, "--encoder-layers", "2", "--encoder-ffn-embed-dim", "8", *TRAIN]
    )
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = [(number, p) for number, p in enumerate(p for p in model.parameters() if p.requires_grad)]
    zeros = {number: torch.zeros(p.shape) for number, p in trained}
    moments = {number: {"step": 3, "exp_avg": zero, "exp_avg_sq": zero.clone()} for number, zero in zeros.items()}
    return {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {"criterion_name": "X", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 3}
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"version": 2, "epoch": 1}, "ema": dict(weights), "val_loss": 2.5},
        "last_optimizer_state": {"state": moments, "param_groups": [{"lr": 0.1, "params": [n for n, _ in trained]}]},
    }


@pytest.fixture(scope="module")
def corpus(data):
    """Real states by kind, in the forms of settings that fairseq has kept."""
    args = clinic_options()
    states = {"authors": {**clinic_state(args, clinic(args)), "extra_state": {"val_loss": 4.0}}}
    for arch in ("transformer_admin", "transformer"):
        states[arch] = real_state(arch, data)
        if arch == "transformer":  # Namespace, as fairseq before 1.0 and as fairseq-train's own keeps it
            sections = [section for section in states[arch]["cfg"].values() if section is not None]
            flat = {
                key: value
                for section in sections
                if not isinstance(section, str)
                for key, value in (section if isinstance(section, dict) else vars(section)).items()
            }
            states[arch] = {**states[arch], "args": fuzz.Namespace(**{**flat, "arch": "transformer"}), "cfg": None}
    return states


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("fuzz")
    torch.save(corpus["transformer_admin"], folder / "good.pt")
    return folder


def outcome(arguments):
    """None if the command did it, or why not in one line; anything else is raised."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        try:
            main(arguments)
        except AdminError as error:
            assert "\n" not in str(error) or str(error).count("\n  - "), error
            return str(error)
    return None


def attack(folder, content, commands, data):
    before = os.getcwd()
    os.chdir(folder)
    try:
        Path("bad.pt").write_bytes(content)
        for command in commands:
            done = outcome([str(data) if part == "DATA" else part for part in command]) is None
            left = {"bad.pt", "good.pt", "analysis", *(["out.pt"] if done and "out.pt" in command else [])}
            assert set(os.listdir()) <= left, (command, os.listdir())
            with contextlib.suppress(FileNotFoundError):
                os.remove("out.pt")
        with contextlib.suppress(AdminError):
            checkpoint_utils.load_checkpoint_to_cpu("bad.pt")
    finally:
        os.chdir(before)


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_unmutated_are_taken(folder, corpus, data, kind):
    (folder / "bad.pt").write_bytes(fuzz.saved(corpus[kind]))
    before = os.getcwd()
    os.chdir(folder)
    try:
        for command in [*COMMANDS[kind], *RARE.get(kind, [])]:
            assert outcome([str(data) if part == "DATA" else part for part in command]) is None
        os.remove("out.pt")
    finally:
        os.chdir(before)


@pytest.mark.parametrize("kind", COMMANDS)
def test_checkpoints_with_other_contents(folder, corpus, data, kind):
    count = 0

    @SETTINGS
    @given(fuzz.mutations)
    def run(mutation):
        nonlocal count
        count += 1
        rare = RARE.get(kind, []) if count % 20 == 0 else []
        attack(folder, fuzz.saved(fuzz.mutated(corpus[kind], mutation)), [*COMMANDS[kind], *rare], data)

    run()


def test_checkpoints_with_other_bytes(folder, corpus, data):
    content = fuzz.saved({**corpus["transformer_admin"], "last_optimizer_state": None})

    @SETTINGS
    @given(fuzz.mutations)
    def run(mutation):
        attack(folder, fuzz.bent(content, mutation), COMMANDS["transformer_admin"][:2], data)

    run()


PROFILE = Profile([1.0, 1.5], [1.0, 1.25, 2.0], {"encoder": [1.0, 2.0]}, {"encoder": [1.0, 2.0]}, {"encoder": 9}, 1)
RATIO = "1 1.0\n2 1.2\n1 1.0\n2 1.3\n3 1.5\n"


@pytest.mark.parametrize("form", ["json", "init", "one column", "bytes"])
def test_profiles(folder, form):
    PROFILE.write(str(folder / "admin_profile.json"))
    text = (folder / "admin_profile.json").read_text()
    os.remove(folder / "admin_profile.json")
    text = {"init": RATIO, "one column": "1.0\n1.2\n1.0\n1.3\n1.5\n"}.get(form, text)
    bad = folder / "bad.json"

    @SETTINGS
    @given(fuzz.mutations)
    def run(mutation):
        if form == "bytes":
            bad.write_bytes(fuzz.bent(text.encode(), mutation))
        else:
            bad.write_text(fuzz.with_words(text, mutation))
        outcome(["show", str(bad)])
        outcome(["show", str(bad), "--json"])
        for known in ((), (2, 3)):
            with contextlib.suppress(AdminError):
                profile = read_profile(str(bad), *known)
                assert all(omega > 0 for omega in [*profile.encoder, *profile.decoder])
                assert all(0 <= share <= 1 for stack in ("encoder", "decoder") for share in profile.shares(stack))

    run()
    os.remove(bad)
