"""What the benchmarks share: the repository, options of the command line, processes, and what they run on."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, Iterable

import fairseq
import torch

import admin_fairseq
from admin_fairseq.files import writing

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "admin_fairseq"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write(path: Path, content: str | bytes) -> None:
    with writing(str(path)) as out:
        out.write(content.encode() if isinstance(content, str) else content)


# --- command line -----------------------------------------------------------------------------------------------------


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """A benchmark's own options, and those for fairseq-train behind --."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def given(option: str, words: Iterable[str]) -> bool:
    return any(word.split("=")[0] == option for word in words)


def comma_separated(kind: Callable[[str], Any], what: str, pattern: str) -> Callable[[str], list[Any]]:
    """The type of an option that takes several values; ``what`` an item is, and the pattern that it has."""

    def parse(text: str) -> list[Any]:
        for item in text.split(","):
            if not re.fullmatch(pattern, item):
                raise argparse.ArgumentTypeError(f"{item!r} is no {what}")
        return list(dict.fromkeys(map(kind, text.split(","))))

    return parse


depths = comma_separated(str, "depth such as 6-6", r"[1-9]\d*-[1-9]\d*")


def command_line(benchmark: str) -> str:
    """The command that is running, as a user would give it."""
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])


# --- processes and machine --------------------------------------------------------------------------------------------


def child_environment(**variables: str) -> dict[str, str]:
    """For a process that imports this repository's modules, wherever it is started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def peak_memory(pid: int) -> float | None:
    """Peak resident set of a running process in MB, where /proc knows it.

    What wait4 reports is no use here: it is at least what this process held when it started the other.
    """
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def versions_and_hardware(on_cpu: bool, jobs: int, threads: int) -> str:
    """In one line."""
    device = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    if torch.cuda.is_available() and not on_cpu:
        device = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        device = f"{os.cpu_count()} cores of {found[1]}" if found else device
    versions = f"admin_fairseq {admin_fairseq.__version__}, fairseq {fairseq.__version__}, torch {torch.__version__}"
    return f"{versions}, Python {platform.python_version()}; {device}, {jobs} x {threads} threads"
