"""What many tests use: fairseq's commands, trained checkpoints, and what is compared. Fixtures are in conftest.py."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterable

import fairseq
import forked
import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.configs import FairseqConfig, GenerationConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq_cli import preprocess as fairseq_preprocess
from fairseq_cli import train as fairseq_train
from torch import nn

import admin_fairseq  # noqa: F401  (registers the architectures, lets torch.load read checkpoints)
from admin_fairseq.norm import OmegaLayerNorm

ROOT = Path(__file__).resolve().parent.parent

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
needs_fused_adam = pytest.mark.skipif(torch.__version__ < "2.4", reason="torch before 2.4 has no fused Adam for CPUs")

# built of the parts of others (keel, preln, postln, rezero): tests of equations, starts, decoding step by step and
# checkpointed activations run these methods too, but not every variation; their trainings are slow tests
SAME_PARTS = ("periln", "lnscaling", "mixln", "dsinit", "tfixup")

TINY = [
    *("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
    *("--encoder-layers", "3", "--decoder-layers", "2"),
]
NO_LOADER = ["--num-workers", "0"]  # a process that loads the data takes longer to end than a tiny model to translate
WIDTHS = [*TINY[:8], "--max-tokens", "600", "--cpu"]  # for benchmarks that set depth and schedule themselves
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

    def updates(self) -> dict[int, dict[str, str]]:
        """What the training log says of each update."""
        # | train_inner | {...} from fairseq-train, [train_inner][INFO] - {...} from fairseq-hydra-train
        rows = [json.loads(row) for row in re.findall(r"train_inner[] ].*?(\{.*\})", self.output)]
        return {int(row["num_updates"]): row for row in rows}

    def losses(self) -> dict[int, str]:
        """Training loss and gradient norm by update, as printed."""
        return {number: row["loss"] + " " + row["gnorm"] for number, row in self.updates().items()}

    def words(self) -> list[int]:
        """The target tokens of each update."""
        return [int(row["wpb"]) for row in self.updates().values()]

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
        if input is None and command in forked.ENTRY and not torch.cuda.is_available():  # which CUDA does not survive
            code = forked.run_forked(command, argv, cwd, environment, out)
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


def output_of(command: Iterable[Any], **options: Any) -> str:
    """What a command prints, which has to succeed; ``options`` are those of subprocess.run."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([*map(str, command)], text=True, **both, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_alone(tmp_path: Path, *arguments: str, **environment: str) -> None:
    """Python in tests/unit in a process of its own: Triton must know before it is imported whether it interprets."""
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT / "tests/unit", env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def preprocess(*arguments: Any) -> None:
    """fairseq-preprocess's main function."""
    fairseq_preprocess.main(options.get_preprocessing_parser().parse_args([*map(str, arguments)]))


def train(data: Path, save_dir: Path, *arguments: Any, arch: str = "transformer_admin", updates: int = 4) -> Result:
    """``fairseq-train`` on a tiny model; later arguments win."""
    return run(
        *("fairseq-train", data, "--arch", arch, "--save-dir", save_dir, *TINY, *TRAIN, "--max-update", updates),
        *arguments,
    )


def lm_command(text: Path, save_dir: Path | str, arch: str, *arguments: Any) -> list[Any]:
    """``fairseq-train``'s arguments for a tiny decoder-only model."""
    start = TRAIN.index("--criterion")
    return [
        *(text, "--task", "language_modeling", "--tokens-per-sample", "32", "--arch", arch, "--save-dir", save_dir),
        *("--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--decoder-attention-heads", "2"),
        *(*TRAIN[:start], *TRAIN[start + 4 :], *arguments),
    ]


@functools.lru_cache(maxsize=None)
def configured(argv: tuple[str, ...]) -> bytes:
    """fairseq-train's configuration, pickled, since a copy by OmegaConf would share the model's options.

    Hydra takes many times as long over it as a tiny model takes to be built.
    """
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), list(argv)))
    return pickle.dumps(cfg)


def built(argv: list[Any]) -> Any:
    """(model, task, cfg), built exactly as fairseq-train builds it."""
    cfg = pickle.loads(configured(tuple(map(str, argv))))
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    return task.build_model(cfg.model), task, cfg


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu")


def profile_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "admin_profile.json").read_text())


def write_split(folder: Path, split: str, pairs: list[Any]) -> None:
    for side, language in enumerate(("de", "en")):
        (folder / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")


def generate(data, path, *arguments, cwd=ROOT):
    return run(
        *("fairseq-generate", data, "--path", path, "--cpu", "--beam", "3", "--max-len-b", "20"),
        # newer fairseq drops the last batch, in generation too, unless its size is a multiple of this (default 8)
        *("--max-tokens", "800", "--required-batch-size-multiple", "1", *NO_LOADER, *arguments),
        cwd=cwd,
    )


def hypotheses(result):
    """Score and text of every hypothesis."""
    assert result.code == 0, result.output
    return [line for line in result.output.splitlines() if line.startswith("H-")]


def omegas(path):
    return {name: weight for name, weight in checkpoint(path)["model"].items() if name.endswith(".omega")}


def assert_same_checkpoint(first, second):
    """Bit-identical weights and optimizer state."""
    first, second = checkpoint(first), checkpoint(second)
    assert first["model"].keys() == second["model"].keys()
    for name, weight in first["model"].items():
        if not name.endswith("._float_tensor"):  # fairseq 0.12.2's placeholder, never initialised
            assert torch.equal(weight, second["model"][name]), name
    states = [state["last_optimizer_state"]["state"] for state in (first, second)]
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        assert torch.equal(values["exp_avg_sq"], states[1][key]["exp_avg_sq"])


def assert_refused(result, needle, save_dir):
    """One line on stderr that says what is wrong, no traceback, a non-zero exit, and nothing written."""
    assert result.code != 0
    assert "Traceback" not in result.output, result.output
    (line,) = result.lines("admin_fairseq: error:")
    assert needle in line
    assert not save_dir.exists() or not list(save_dir.iterdir())


def train_here(arch, data, save_dir, flags, on_gpu=False):
    """fairseq-train's main function; returns its configuration."""
    flags, criterion = flags.split(), ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"]
    start = TRAIN.index("--criterion")
    base = [*TINY, *TRAIN[:start], *TRAIN[start + len(criterion) :]]
    assert TRAIN[start : start + len(criterion)] == criterion
    if "language_modeling" in flags:
        base[: len(TINY)] = ["--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--decoder-layers", "2"]
    elif "--criterion" not in flags:
        base += criterion
    if on_gpu:
        base.remove("--cpu")
    parser = options.get_training_parser()
    argv = [str(data), "--arch", arch, "--save-dir", str(save_dir), "--max-update", "2", *base, *flags]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, argv))
    fairseq_train.main(cfg)
    return cfg


def unsettle(model: nn.Module) -> None:
    """Move what starts at 0 or 1, so that the model's equation shows: norms, omegas, biases, ReZero's factors."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name or name.endswith(("bias", "rezero_weight")):
                weight.add_(torch.randn_like(weight) * 0.3)


def loss_and_gradients(model, task, cfg, sample):
    criterion = task.build_criterion(cfg.criterion)
    torch.manual_seed(11)
    model.train()
    loss, _, _ = criterion(model, sample)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def prepared(model, print_alignment=None):
    """As fairseq-generate prepares it."""
    cfg = FairseqConfig()
    cfg.generation.print_alignment = print_alignment
    model.eval().prepare_for_inference_(cfg)
    return model


def translate(models, task, sample, **settings):
    """Three hypotheses a sentence, in a row."""
    generator = task.build_generator(models, GenerationConfig(beam=3, max_len_b=12, **settings))
    return [beam for sentence in task.inference_step(generator, models, sample) for beam in sentence]


def norm_with_values(dim: int = 6, dropout: nn.Module = None) -> OmegaLayerNorm:
    norm = OmegaLayerNorm(dim, dropout or nn.Identity()).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    return norm
