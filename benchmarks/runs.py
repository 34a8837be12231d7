"""The runs of a comparison: fairseq-train and fairseq-generate as sub-processes, and the results they leave."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from fairseq.utils import import_user_module
from sacremoses import MosesDetokenizer

from admin_fairseq.architectures import METHODS
from admin_fairseq.errors import AdminError
from benchmarks.common import PLUGIN, child_environment, given, peak_memory, versions_and_hardware, write
from benchmarks.data import Data, fingerprint
from benchmarks.logs import NOT_FINITE, Result, RunError, bleu, read_log
from benchmarks.significance import of_folder
from examples.common.score import CometError, comet

# a line is left out where the user gives its first option: fairseq-train knows the others only beside it
DEFAULTS = """
--optimizer adam --adam-betas '(0.9, 0.98)'
--lr-scheduler inverse_sqrt
--criterion label_smoothed_cross_entropy --label-smoothing 0.1
--dropout 0.1
--max-tokens 4096
--required-batch-size-multiple 1
--num-workers 0
--distributed-world-size 1
"""
# the last line: one validation and one checkpoint, at the end
FIXED = """--user-dir {user_dir} --save-dir {folder} --arch {architecture} --encoder-layers {encoder}
--decoder-layers {decoder} --lr {lr:g} --warmup-updates {warmup} --seed {seed} --max-update {updates}
--log-format json --log-interval {interval}
--validate-interval 1000000 --save-interval 1000000 --no-epoch-checkpoints --no-save-optimizer-state"""
GENERATE = "--beam 5 --max-len-a 1.2 --max-len-b 10 --required-batch-size-multiple 1"
BUILT_IN = frozenset(METHODS)  # before a user dir adds its own


def import_methods(user_dir: Path) -> None:
    """Import a researcher's folder, as fairseq-train does: METHODS then has its methods, too.

    Raises:
        AdminError: there is no such folder.
    """
    if not user_dir.is_dir():
        raise AdminError(f"--user-dir {user_dir} is no folder; give the one whose __init__.py registers your methods")
    if user_dir != PLUGIN:
        import_user_module(argparse.Namespace(user_dir=str(user_dir)))


@dataclass(frozen=True)
class Run:
    method: str  # as in --methods: its name, and the options that make a variant of it
    depth: str
    lr: float
    warmup: int
    seed: int

    @property
    def name(self) -> str:
        method = "_".join(self.method.split()).replace("/", "_")
        return f"{method}_{self.depth}_lr{self.lr:g}_w{self.warmup}_s{self.seed}"

    @property
    def base_method(self) -> str:
        return self.method.split()[0]

    @property
    def options(self) -> list[str]:
        return self.method.split()[1:]

    @property
    def layers(self) -> list[int]:
        return [int(layers) for layers in self.depth.split("-")]


class Runner:
    """fairseq's commands as sub-processes, several at a time; they end when this process does, but for kill -9.

    ``lock`` is an open, locked file that they inherit: one that outlives us keeps it locked.
    """

    def __init__(self, args: argparse.Namespace, data: Data, lock: Any) -> None:
        self.args, self.data, self.lock, self.failures = args, data, lock, 0
        self.live: set[subprocess.Popen] = set()
        self.guard, self.stopped = threading.Lock(), False

    def command(self, log: Path, program: str, *arguments: Any) -> tuple[list[tuple[float, str]], float | None]:
        """Run it and write ``log``: (its lines, each with its time, and the peak resident set in MB).

        Raises:
            RunError: it failed, and not by a FloatingPointError.
        """
        command = [os.path.join(os.path.dirname(sys.executable), program), *map(str, arguments)]
        # with warnings on, torch and fairseq print hundreds of lines on each other's deprecations
        quiet = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        with self.guard:
            if self.stopped:
                raise RunError("interrupted")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=child_environment(**quiet, OMP_NUM_THREADS=str(self.args.threads)),
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
            self.live.add(process)
        lines, memory = [], None
        with process, open(log, "w", encoding="utf-8") as out:
            out.write(shlex.join(command) + "\n")
            for line in process.stdout:
                lines.append((time.monotonic(), line))
                out.write(line)
                out.flush()
                memory = peak_memory(process.pid) or memory
        with self.guard:
            self.live.remove(process)
        if process.returncode != 0 and not any(NOT_FINITE.match(line) for _, line in lines):
            last = next((line.strip() for _, line in reversed(lines) if line.strip()), "no output")
            raise RunError(f"exit code {process.returncode}: {last[:300]} (all of it in {log})")
        return lines, memory

    def stop(self) -> None:
        with self.guard:
            self.stopped = True
            for process in self.live:
                with contextlib.suppress(ProcessLookupError):  # it just ended
                    os.killpg(process.pid, signal.SIGKILL)

    def parallel(self, function: Callable[[Run], Any], runs: list[Run]) -> Iterator[tuple[Run, Any]]:
        """(run, function(run)) in the order in which they finish; those that fail are reported and left out."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = {pool.submit(function, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is None:
                        yield futures[future], future.result()
                    elif isinstance(error, RunError):
                        self.failures += 1
                        print(f"error: {futures[future].name}: {error}", file=sys.stderr, flush=True)
                    else:
                        raise error
            except BaseException:
                self.stop()
                raise

    def settings(self, run: Run) -> Result:
        """Everything that a result depends on, and in which two commands with the same --out may differ."""
        settings = {**asdict(run), "updates": self.args.updates, "data": self.data.fingerprint}
        settings["options"] = self.args.extra
        if run.base_method not in BUILT_IN:
            settings["user-dir"] = fingerprint(self.args.user_dir.rglob("*.py"))
        return settings

    def options(self, run: Run) -> list[str]:
        """For fairseq-train: those that follow --, then those of the variant."""
        return [*self.args.extra, *run.options]

    def stored(self, run: Run) -> Result | None:
        """The result of an earlier command, None if the run did not finish.

        Raises:
            AdminError: it came from other settings.
        """
        file = self.args.out / run.name / "result.json"
        if not file.exists():
            return None
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise AdminError(f"{file} is no result of this script; remove it, and the run is done again") from None
        for key, value in self.settings(run).items():
            if result["settings"].get(key) != value:
                was, now = (shlex.join(x) if isinstance(x, list) else x for x in (result["settings"].get(key), value))
                raise AdminError(f"{file.parent} was run with {key}: {was}; this is {now}. Choose another --out")
        return result

    def train(self, run: Run) -> Result:
        """Train from the start, and write result.json.

        Raises:
            RunError: fairseq-train failed otherwise than by diverging.
        """
        folder, options, started = self.args.out / run.name, self.options(run), time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        defaults = [shlex.split(line) for line in DEFAULTS.strip().splitlines()]
        defaults = [word for line in defaults if not given(line[0], options) for word in line]
        places = {"user_dir": self.args.user_dir, "folder": folder}  # may hold blanks, so filled in after splitting
        numbers = {**asdict(run), "encoder": run.layers[0], "decoder": run.layers[1], "updates": self.args.updates}
        numbers.update(architecture=f"transformer_{run.base_method}", interval=max(self.args.updates // 100, 1))
        fixed = [word.format(**places, **numbers) for word in FIXED.split()]
        words = [self.data.folder, *defaults, *options, *fixed]
        lines, memory = self.command(folder / "train.log", "fairseq-train", *words)
        for spare in ("checkpoint_best.pt", "crash.pt"):  # the first is a copy of checkpoint_last.pt
            (folder / spare).unlink(missing_ok=True)
        result = {"settings": self.settings(run), **read_log(lines, memory, self.data.positional, self.args.updates)}
        where = versions_and_hardware(given("--cpu", self.args.extra), self.args.jobs, self.args.threads)
        result.update(bleu=None, seconds=round(time.monotonic() - started), environment=where)
        write(folder / "result.json", json.dumps(result))
        return result

    def translate(self, run: Run) -> float:
        """BLEU of the run's translation of the test set against the tokenised reference."""
        folder, data = self.args.out / run.name, self.data
        lines, _ = self.command(
            *(folder / "generate.log", "fairseq-generate", data.folder, "--user-dir", self.args.user_dir),
            *("--path", folder / "checkpoint_last.pt", "-s", data.source, "-t", data.target, *data.remove_bpe),
            *(*GENERATE.split(), *(["--cpu"] if given("--cpu", self.options(run)) else [])),
        )
        return bleu("".join(line for _, line in lines))

    def comet(self, run: Run) -> float:
        """COMET of what translate left, detokenised.

        Raises:
            RunError: it could not be computed.
        """
        found, data = of_folder(self.args.out / run.name), self.data
        source, target = (MosesDetokenizer(lang=language) for language in (data.source, data.target))
        sides = zip((source, target, target), (found.sources, found.hypotheses, found.references))
        try:
            return comet(
                self.args.comet, *([words.detokenize(line.split()) for line in lines] for words, lines in sides)
            )
        except CometError as error:
            raise RunError(str(error)) from None
