"""Shared fixtures: a small binarised corpus, and models built in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grammar
import pytest
import torch.nn.functional as F
from fairseq import utils
from helpers import TINY, TRAIN, built, lm_command, preprocess, write_split
from tqdm import tqdm

from admin_fairseq.analysis import amplification, dependency, gradients


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-bin of 400 training pairs from the demo's grammar, joined dictionary."""
    folder = tmp_path_factory.mktemp("data")
    pairs = grammar.corpus(460, seed=5)
    write_split(folder, "train", pairs[:400])
    write_split(folder, "valid", pairs[400:430])
    write_split(folder, "test", pairs[430:])
    preprocess(
        *("-s", "de", "-t", "en", "--joined-dictionary", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid", "--testpref", folder / "test"),
    )
    return folder / "bin"


@pytest.fixture(scope="session")
def text(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus's English as language-model data."""
    folder = tmp_path_factory.mktemp("text")
    splits = [item for name in ("train", "valid", "test") for item in (f"--{name}pref", data.parent / f"{name}.en")]
    preprocess("--only-source", *splits, "--destdir", folder)
    return folder


@pytest.fixture(autouse=True)
def own_excepthook(monkeypatch):
    """A command that is called in this process sets it."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def build(data: Path):
    """build(arch, *options) -> (model, task, cfg) of fairseq-train, from seed 3."""
    return lambda arch, *arguments: built([data, "--arch", arch, *TINY, *TRAIN, *arguments])


@pytest.fixture
def build_lm(text: Path):
    """build_lm(arch, *options) -> the same of a decoder-only model."""
    return lambda arch, *arguments: built(lm_command(text, "unused", arch, *arguments))


@pytest.fixture(scope="session")
def train_set(data: Path) -> Any:
    _, task, _ = built([data, "--arch", "transformer", *TINY, *TRAIN])
    task.load_dataset("train")
    return task.dataset("train")


@pytest.fixture
def batch(train_set):
    """batch(sentences) -> a collated training sample; ``same_length`` keeps padding out."""

    def batch(count: int = 8, start: int = 0, same_length: bool = False) -> dict[str, Any]:
        chosen = range(len(train_set))
        if same_length:
            shape = [(len(train_set[i]["source"]), len(train_set[i]["target"])) for i in chosen]
            common = max(set(shape), key=shape.count)
            chosen = [i for i in chosen if shape[i] == common]
        return train_set.collater([train_set[i] for i in chosen[start : start + count]])

    return batch


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that analyses make, which show nothing in commands as short as the tests'."""
    made = []

    class Noted(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    for module in (amplification, dependency, gradients):
        monkeypatch.setattr(module, "tqdm", Noted)
    return made


@pytest.fixture
def exact_softmax(monkeypatch):
    """fairseq's own attention takes its softmax in float32, which hides what float64 would show."""
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: F.softmax(x, dim=dim))
