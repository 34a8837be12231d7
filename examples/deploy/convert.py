"""A recipe's run as a folder that holds all a translator needs, for CTranslate2: no fairseq, no torch.

    python convert.py RUN OUT [--quantization int8]

RUN may also be the folder of `make demo`. `admin-fairseq fold` makes a stock Transformer of the Admin checkpoint, and
ct2-fairseq-converter a CTranslate2 model of that. Beside it go the BPE codes and text.json: how to treat text, and the
recipe's search.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKPOINTS = ("test/average.pt", "checkpoint_best.pt", "checkpoint_last.pt")  # the first that is there
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2]), PYTHONWARNINGS="ignore")


def convert(run: Path, out: Path, data: Path | None = None, quantization: str | None = None) -> None:
    """Make ``out``, unless it is newer than the checkpoint; ``data``: where the data-bin was moved to."""
    read = lambda path: json.loads(path.read_text("utf-8"))  # noqa: E731
    search = {"BEAM": "5", "LENPEN": "1"}
    if (run / "runs" / "admin").is_dir():  # make demo
        codes, tokenize, data, run = run / "data/codes", ["--lowercase"], run / "data/bin", run / "runs/admin"
    elif (run / "settings.json").is_file():
        data = data or Path(read(run / "settings.json")["DATA"])
        codes, step = data / "text/codes", data / ".done/tokenize-test"
        command = step.read_text("utf-8").split() if step.is_file() else []
        if command[:2] != ["tokenize", "test"]:
            sys.exit(f"error: {step} does not say how the text was treated; give what prepare.sh made by --data")
        tokenize = command[2:]
        if (run / CHECKPOINTS[0]).is_file():
            search = read(run / "test/settings.json")
    else:
        sys.exit(f"error: {run} is neither the RUN of a recipe's train.sh nor the folder of make demo")
    checkpoint = next((run / name for name in CHECKPOINTS if (run / name).is_file()), None)
    if checkpoint is None:
        sys.exit(f"error: {run} holds no checkpoint")
    if (out / "text.json").is_file() and (out / "text.json").stat().st_mtime > checkpoint.stat().st_mtime:
        return
    source, target = next(data.glob("test.*-*.*.idx")).name.split(".")[1].split("-")
    text = {
        "source": source,
        "target": target,
        "tokenize": {option.lstrip("-"): True for option in tokenize},
        "search": {"beam_size": int(search["BEAM"]), "length_penalty": float(search["LENPEN"])},
    }

    print(f"converting {checkpoint}", flush=True)
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    folded, model = partial / "folded.pt", partial / "model"
    call(sys.executable, "-m", "admin_fairseq", "fold", checkpoint.resolve(), folded.resolve())
    options = ("--quantization", quantization) if quantization else ()
    converter = Path(sys.executable).with_name("ct2-fairseq-converter")
    call(converter, "--model_path", folded, "--data_dir", data, "--output_dir", model, *options)
    shutil.copy(codes, model / "codes")
    (model / "text.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    model.rename(out)
    shutil.rmtree(partial)


def call(*command: str | Path) -> None:
    """Run it; its output is shown if it fails."""
    finished = subprocess.run([*map(str, command)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if finished.returncode != 0:
        sys.stderr.buffer.write(finished.stdout)
        sys.exit(f"error: {' '.join(map(str, command))} failed, as said above")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="what prepare.sh made, if it was moved since the training")
    parser.add_argument("--quantization", metavar="TYPE", help="of the weights, for example int8 (default: none)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    add_options(parser)
    args = parser.parse_args()
    convert(args.run, args.out, args.data, args.quantization)


if __name__ == "__main__":
    main()
