"""Two workers on one machine, over gloo: omega is that of the global batch, on every worker."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_same_checkpoint, generate, hypotheses, profile_in, run, train
from two_workers import Group


def assert_same_omega(first: dict, second: dict) -> None:
    assert first["tokens"] == second["tokens"]
    for stack in ("encoder", "decoder"):
        assert first[stack] == pytest.approx(second[stack], rel=1e-6)


@pytest.fixture(scope="module")
def one_worker(data, tmp_path_factory):
    """The profile of one worker's first two batches: dropout masks included."""
    folder = tmp_path_factory.mktemp("one")
    one = train(data, folder, "--admin-profile-batches", "2", "--dropout", "0.3", updates=1)
    assert one.code == 0, one.output
    return profile_in(folder)


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [("separate", "legacy_ddp"), ("separate", "pytorch_ddp"), ("torchrun", "no_c10d"), ("spawn", "c10d")],
)
def test_two_workers_profile_as_one(data, one_worker, tmp_path, launcher, backend):
    options = ["--ddp-backend", backend, "--dropout", "0.3", "--max-update", "2"]
    with Group(launcher, data, tmp_path / "two", *options) as group:
        log = group.finish()
    omegas = group.omegas()
    assert omegas[0].keys() == omegas[1].keys()
    for name, omega in omegas[0].items():
        assert torch.equal(omega, omegas[1][name])  # to the bit
    assert log.count("Admin: profiled") == 1
    if launcher == "separate":
        assert not list(tmp_path.glob("two/1/*"))

    two = profile_in(tmp_path / "two" / "0")
    assert two["settings"]["world_size"] == 2
    assert_same_omega(two, one_worker)
    measured = [value for stack in ("encoder", "decoder") for value in two[stack]]
    applied = [omega.mean().item() for omega in omegas[0].values()]
    assert applied == pytest.approx(measured, rel=1e-6)


def test_worker_with_an_empty_shard(data, tmp_path):
    """One batch for two workers: the second runs fairseq's dummy batch, which does not count."""
    options = ["--ddp-backend", "legacy_ddp", "--max-tokens", "100000", "--max-epoch", "1"]
    with Group("separate", data, tmp_path / "two", *options) as group:
        group.finish()
    first, second = group.omegas()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = train(data, tmp_path / "one", "--max-tokens", "100000", updates=1)
    assert one.code == 0, one.output
    assert_same_omega(profile_in(tmp_path / "two" / "0"), profile_in(tmp_path / "one"))


def test_a_given_profile_is_the_first_workers(data, tmp_path):
    """Each machine may have another file of that name, or none; without one on the first, every worker says so."""
    for rank, omega in (("0", 1.5), ("1", 2.5)):
        numbers = {"encoder": [1.0] + [omega] * 5, "decoder": [1.0] + [omega] * 5}
        (tmp_path / f"{rank}.json").write_text(json.dumps(numbers))
    options = ["--ddp-backend", "legacy_ddp", "--max-update", "1", "--admin-profile", tmp_path / "{rank}.json"]
    with Group("separate", data, tmp_path / "two", *options) as group:
        group.finish()
    for omegas in group.omegas():
        assert {omega.mean().item() for omega in omegas.values()} == {1.0, 1.5}
    (tmp_path / "0.json").unlink()
    with Group("separate", data, tmp_path / "none", *options) as group:
        assert all(worker.wait(timeout=120) != 0 for worker in group.workers)
    for log in group.logs:  # gloo's threads may add a line of their own when they are torn down
        (line,) = [line for line in log.read_text().splitlines() if "admin_fairseq: error:" in line]
        assert "cannot read the profile" in line
        assert "Traceback" not in log.read_text()


def kill_a_worker(group: Group, after: str) -> None:
    """kill -9 of torchrun's last worker once checkpoint ``after`` is there; the group ends with an error."""
    (launcher,) = group.workers
    while not (group.folder / "0" / after).exists():
        assert launcher.poll() is None, group.logs[0].read_text()
        time.sleep(0.05)
    workers = subprocess.check_output(["pgrep", "-P", str(launcher.pid)], text=True).split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0


def test_resume_after_a_worker_was_killed(data, tmp_path):
    """kill -9 of one worker in mid-epoch, and the same command again, is the run that nothing happened to."""
    options = ["--ddp-backend", "legacy_ddp", "--max-tokens", "100", "--save-interval-updates", "4", "--max-epoch", "1"]
    with Group("torchrun", data, tmp_path / "killed", *options, "--max-update", "1000") as group:
        kill_a_worker(group, after="checkpoint_1_4.pt")
    with Group("torchrun", data, tmp_path / "killed", *options, "--max-update", "12") as group:
        log = group.finish()
    assert "omega from the checkpoint" in log
    assert "Admin: profiled" not in log
    with Group("torchrun", data, tmp_path / "whole", *options, "--max-update", "12") as group:
        group.finish()
    assert_same_checkpoint(*(tmp_path / name / "0" / "checkpoint_1_12.pt" for name in ("killed", "whole")))


@pytest.fixture
def multi30k(tmp_path):
    """Multi30k German-English, lower-cased and split at punctuation: real text, 29,000 pairs."""
    raw = Path(os.environ.get("MULTI30K", ROOT.parent / "shared" / "data" / "multi30k"))
    if not raw.is_dir():
        pytest.skip("needs the raw Multi30k text as $MULTI30K/{train,valid,test}.{de,en}.gz")
    for file in raw.glob("*.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as lines, (tmp_path / file.stem).open("w") as out:
            out.writelines(" ".join(re.findall(r"\w+|[^\w\s]", line.lower())) + "\n" for line in lines)
    splits = [part for name in ("train", "valid", "test") for part in (f"--{name}pref", tmp_path / name)]
    limits = ["--joined-dictionary", "--nwordssrc", "8000", "--destdir", tmp_path / "bin"]
    result = run("fairseq-preprocess", "-s", "de", "-t", "en", *splits, *limits)
    assert result.code == 0, result.output
    return tmp_path / "bin"


@pytest.mark.slow
def test_12_12_on_real_text(multi30k, tmp_path):
    """Profile as one, survive kill -9, average, translate."""
    depth = ["--encoder-layers", "12", "--decoder-layers", "12", "--encoder-embed-dim", "128", "--dropout", "0.1"]
    options = [*depth, "--max-tokens", "1000", "--share-all-embeddings"]
    two = [*options, "--ddp-backend", "legacy_ddp", "--save-interval-updates", "10"]
    with Group("torchrun", multi30k, tmp_path / "two", *two, "--max-update", "1000") as group:
        kill_a_worker(group, after="checkpoint_1_20.pt")
    first, second = group.omegas()
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = train(multi30k, tmp_path / "one", *options, "--admin-profile-batches", "2", updates=1)
    assert one.code == 0, one.output
    folder = tmp_path / "two" / "0"
    profiles = [profile_in(folder), profile_in(tmp_path / "one")]
    assert profiles[0]["tokens"] == profiles[1]["tokens"]
    for stack in ("encoder", "decoder"):
        assert profiles[0][stack] == pytest.approx(profiles[1][stack], rel=1e-5)
    with Group("torchrun", multi30k, tmp_path / "two", *two, "--max-update", "60") as group:
        assert "omega from the checkpoint" in group.finish()
    average = ["--inputs", folder, "--num-update-checkpoints", "3", "--output", tmp_path / "average.pt"]
    assert run("admin-fairseq", "average", *average).code == 0
    assert len(hypotheses(generate(multi30k, tmp_path / "average.pt"))) == 1000
