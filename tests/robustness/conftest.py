"""Checkpoints to read, and a recipe's run that nothing disturbed."""

from __future__ import annotations

import time
from pathlib import Path

import at_work
import grammar
import pytest
import torch
from helpers import train
from test_legacy import clinic, options, state


@pytest.fixture(scope="session")
def inputs(data, tmp_path_factory) -> Path:
    """A trained checkpoint, and one of the authors' code."""
    folder = tmp_path_factory.mktemp("inputs")
    result = train(data, folder / "run", "--save-interval-updates", "2", "--disable-validation", updates=4)
    assert result.code == 0, result.output
    theirs = options()
    old = state(theirs, clinic(theirs))
    del old["extra_state"]["train_meters"]  # fairseq's of today have another name
    torch.save(old, folder / "theirs.pt")
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A tiny recipe from raw text to scores that nothing disturbed, and the seconds of each step."""
    folder, seconds = tmp_path_factory.mktemp("whole"), {}
    (folder / "raw").mkdir()
    for split, count in (("train", 60), ("valid", 8), ("test", 8)):
        for language, lines in zip(("de", "en"), zip(*grammar.corpus(count, seed=count))):
            (folder / f"raw/{split}.{language}").write_text("".join(f"{line}\n" for line in lines))
    for step in at_work.STEPS:
        started = time.monotonic()
        assert at_work.start(step, folder).wait(600) == 0, (folder / f"{step}.log").read_text()
        seconds[step] = time.monotonic() - started
    return folder, seconds
