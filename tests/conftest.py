"""Shared fixtures: a small binarised corpus, fairseq's own commands, and models built in this process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fairseq
import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]

import commands  # noqa: E402
import grammar  # noqa: E402

import admin_fairseq  # noqa: E402, F401  (registers the architectures, lets torch.load read checkpoints)

# the tests run side by side, one to a core; models this small gain nothing from a second thread
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONWARNINGS"] = "ignore"
torch.set_num_threads(1)

# `make test` runs these; elsewhere fairseq itself may fail where Admin works
DEFAULT_COMBINATION = fairseq.__version__.startswith("0.12.3") and torch.__version__ >= "2.13"
needs_stock_translation = pytest.mark.skipif(
    "_load_from_state_dict" in vars(TransformerEncoderLayerBase),  # which fills the inference-only copies
    reason="fairseq 0.12.2's own transformer cannot translate with torch 1.13 and newer",
)

TINY = [
    *("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
    *("--encoder-layers", "3", "--decoder-layers", "2"),
]
TRAIN = [
    *("--optimizer", "adam", "--lr", "2e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--max-tokens", "600", "--required-batch-size-multiple", "1", "--seed", "3", "--cpu", "--num-workers", "0"),
    *("--log-format", "json", "--log-interval", "1"),
]


class Result:
    """A finished command: exit code, everything it printed, and its training log."""

    def __init__(self, code: int, output: str) -> None:
        self.code, self.output = code, output

    def losses(self) -> dict[int, str]:
        """The training loss by update, as printed."""
        # | train_inner | {...} from fairseq-train, [train_inner][INFO] - {...} from fairseq-hydra-train
        rows = [json.loads(row) for row in re.findall(r"train_inner[] ].*?(\{.*\})", self.output)]
        return {int(row["num_updates"]): row["loss"] + " " + row["gnorm"] for row in rows}

    def lines(self, needle: str) -> list[str]:
        return [line for line in self.output.splitlines() if needle in line]


def run(command: str, *arguments: Any, cwd: Path = ROOT, input: str | None = None) -> Result:
    """Run one of fairseq's console commands, with the plugin as user dir, or the plugin's own."""
    plugin = ["--user-dir", str(ROOT / "admin_fairseq")]
    if command == "fairseq-hydra-train":
        plugin = [f"common.user_dir={ROOT / 'admin_fairseq'}"]
    elif command == "admin-fairseq":
        plugin = []
    argv = [*map(str, arguments), *plugin]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        if input is None and command in commands.ENTRY and not torch.cuda.is_available():  # which CUDA does not survive
            code = commands.run_forked(command, argv, cwd, environment, out)
        else:
            program = os.path.join(os.path.dirname(sys.executable), command)
            with open(out, "w") as file:
                code = subprocess.run(
                    [program, *argv],
                    cwd=cwd,
                    env=environment,
                    input=input,
                    text=True,
                    stdout=file,
                    stderr=file,
                    timeout=600,
                ).returncode
        return Result(code, out.read_text(errors="replace"))


def run_alone(tmp_path: Path, *arguments: str, **environment: str) -> None:
    """Python in a process of its own: Triton must know before it is imported whether it interprets."""
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT / "tests", env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def train(data: Path, save_dir: Path, *arguments: Any, arch: str = "transformer_admin", updates: int = 4) -> Result:
    """``fairseq-train`` on a tiny model; later arguments win."""
    return run(
        *("fairseq-train", data, "--arch", arch, "--save-dir", save_dir, *TINY, *TRAIN, "--max-update", updates),
        *arguments,
    )


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu")


def write_split(folder: Path, split: str, pairs: list[Any]) -> None:
    for side, language in enumerate(("de", "en")):
        (folder / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-bin of 400 training pairs from the demo's grammar, joined dictionary."""
    folder = tmp_path_factory.mktemp("data")
    pairs = grammar.corpus(460, seed=5)
    write_split(folder, "train", pairs[:400])
    write_split(folder, "valid", pairs[400:430])
    write_split(folder, "test", pairs[430:])
    result = run(
        *("fairseq-preprocess", "-s", "de", "-t", "en", "--joined-dictionary", "--destdir", folder / "bin"),
        *("--trainpref", folder / "train", "--validpref", folder / "valid", "--testpref", folder / "test"),
    )
    assert result.code == 0, result.output
    return folder / "bin"


@pytest.fixture
def build(data: Path):
    """build(arch, *options) -> (model, task, cfg), built exactly as fairseq-train builds it, from seed 3."""

    def build(arch: str, *arguments: str) -> Any:
        parser = options.get_training_parser()
        argv = [str(data), "--arch", arch, *TINY, *TRAIN, *arguments]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, argv))
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(cfg.common.seed)
        return task.build_model(cfg.model), task, cfg

    return build


@pytest.fixture
def batch(build):
    """batch(sentences) -> a collated training sample; ``same_length`` keeps padding out."""

    def batch(count: int = 8, start: int = 0, same_length: bool = False) -> dict[str, Any]:
        _, task, _ = build("transformer")
        task.load_dataset("train")
        dataset = task.dataset("train")
        chosen = range(len(dataset))
        if same_length:
            shape = [(len(dataset[i]["source"]), len(dataset[i]["target"])) for i in chosen]
            common = max(set(shape), key=shape.count)
            chosen = [i for i in chosen if shape[i] == common]
        return dataset.collater([dataset[i] for i in chosen[start : start + count]])

    return batch
