"""Run the tests under every supported combination of Python, fairseq, torch and numpy: the table of docs/versions.md.

    python tests/matrix.py [--work DIR] [--only 3.8 3.13] [pytest arguments]

Each combination gets a virtual environment under DIR (kept, so that a second run only tests), a copy of this checkout
installed as a user installs it, and the tests of SUITE. Needs the interpreters, as
``python3.8`` or from pyenv, and downloads some gigabytes: torch brings its CUDA libraries along.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    python: str
    fairseq: str
    torch: str
    numpy: str


PYPI, FIXED = "fairseq==0.12.2", "fairseq-fixed==0.12.3.1"
ROWS = [
    Row("3.8", PYPI, "1.13.1", "1.24.4"),
    Row("3.9", PYPI, "2.8.0", "2.0.2"),
    Row("3.10", PYPI, "2.5.1", "1.26.4"),
    Row("3.10", PYPI, "2.14.1", "2.2.6"),
    Row("3.11", FIXED, "2.2.2", "1.26.4"),
    Row("3.11", FIXED, "2.13.0", "2.4.6"),
    Row("3.12", FIXED, "2.15.0", "2.5.5"),
    Row("3.13", FIXED, "2.15.0", "2.5.5"),
]
# what each fairseq needs for translation; 0.12.2's own list pulls another torch in by way of torchaudio
NEEDS = {
    PYPI: ["hydra-core==1.0.7", "omegaconf==2.0.6", "cffi", "cython<3"],
    FIXED: ["hydra-core==1.3.2", "omegaconf==2.3.0", "cython"],
}
COMMON = ["setuptools>=61,<80", "wheel", "bitarray", "packaging", "regex", "scikit-learn", "tqdm", "matplotlib"]
COMMON += ["pytest", "pytest-xdist"]
SUITE = [
    "tests/unit",
    "tests/commands",
    "tests/robustness/test_hostile_files.py",
]  # what else there is pins its programs


def interpreter(version: str) -> str | None:
    pyenv = sorted(glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    return pyenv[-1] if pyenv else shutil.which(f"python{version}")


def install(row: Row, folder: Path, log: Path) -> None:
    """Raises subprocess.CalledProcessError where pip fails."""
    python = folder / "bin" / "python"
    # fairseq compiles CUDA code where it finds a toolkit
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    environment["CFLAGS"] = "-O0 -g0"
    # 0.12.2's source distribution lacks the torch extensions' code, which it compiles where it sees torch;
    # fairseq-fixed in isolation downloads another torch
    isolation = [] if row.fairseq == PYPI else ["--no-build-isolation"]
    steps = [
        [interpreter(row.python), "-m", "venv", "--clear", folder],
        # newer pip rejects the metadata of omegaconf 2.0.6
        [python, "-m", "pip", "install", "pip<24.1"],
        [python, "-m", "pip", "install", f"torch=={row.torch}", f"numpy=={row.numpy}", *COMMON, *NEEDS[row.fairseq]],
        [python, "-m", "pip", "install", "--no-deps", *isolation, row.fairseq],
        [python, "-m", "pip", "install", "--no-build-isolation", ROOT],
    ]
    with log.open("w") as out:
        for step in steps:
            subprocess.run([*map(str, step)], env=environment, stdout=out, stderr=out, check=True)
    (folder / ".ready").touch()


def test(row: Row, work: Path, arguments: list[str]) -> str:
    """One cell of the table: what pytest counted, or what went wrong before it."""
    name = "-".join(row).replace("==", "-")
    folder, log = work / name, work / f"{name}.log"
    if interpreter(row.python) is None:
        return "no interpreter here"
    if not (folder / ".ready").exists():
        try:
            install(row, folder, log)
        except subprocess.CalledProcessError as error:
            return f"not installed: {' '.join(error.cmd[1:5])} failed, see {log}"
    command = [str(folder / "bin" / "python"), "-m", "pytest", "-n", "auto", "-p", "no:cacheprovider"]
    command += [*SUITE, *arguments]
    with log.open("a") as out:
        out.write(f"\n{' '.join(command)}\n")
        out.flush()
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=out)
    counts = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in ", log.read_text(), re.M)
    return counts[-1] if counts else f"no result, see {log}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix", help="folder of the environments")
    parser.add_argument("--only", nargs="+", metavar="PYTHON", help="rows of these Python versions only")
    args, pytest_arguments = parser.parse_known_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| Python | fairseq | torch | numpy | tests |\n|---|---|---|---|---|", flush=True)
    for row in ROWS:
        if args.only is None or row.python in args.only:
            result = test(row, args.work.resolve(), pytest_arguments)
            print(f"| {' | '.join(row).replace('==', ' ')} | {result} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
