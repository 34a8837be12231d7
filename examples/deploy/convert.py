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
from typing import Any

DEMO = Path("runs", "admin")  # in the folder of make demo
REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(REPOSITORY), PYTHONWARNINGS="ignore")


def checkpoint_of(run: Path) -> Path:
    """The average that evaluate.sh wrote, else the best checkpoint, else the last."""
    folder = run / DEMO if (run / DEMO).is_dir() else run
    for name in ("test/average.pt", "checkpoint_best.pt", "checkpoint_last.pt"):
        if (folder / name).is_file():
            return folder / name
    sys.exit(f"error: {run} holds no checkpoint; give the RUN of a recipe's train.sh, or the folder of make demo")


def updates_of(checkpoint: Path) -> int:
    """How many updates it has seen; of an average, its newest. By a process of its own: a server needs no torch."""
    script = "import sys; from admin_fairseq.checkpoints import files; history = files.load(sys.argv[1])"
    script += "['optimizer_history']; print(history[-1]['num_updates'])"
    command = [sys.executable, "-c", script, str(checkpoint)]
    found = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    return int(found.stdout) if found.returncode == 0 else 0  # a checkpoint without an optimizer's history has none


def described(run: Path, checkpoint: Path) -> str:
    """The model in words, for the page."""
    parts, updates = ["/".join(run.parts[-2:])], updates_of(checkpoint)
    average = checkpoint.with_name("scores.json")
    scores = read_json(average) if average.is_file() else {}
    if len(scores.get("checkpoints", [])) > 1:
        parts.append(f"average of {len(scores['checkpoints'])} checkpoints")
    parts += [f"{updates:,} updates"] if updates else []
    parts += [f"BLEU {value['score']:.1f}" for name, value in scores.items() if name.startswith("detokenised")]
    return ", ".join(parts)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def convert(run: Path, out: Path, data: Path | None = None, quantization: str | None = None) -> None:
    """Make ``out``, or make it anew; ``data``: where prepare.sh's folder was moved to."""
    run, out = run.absolute(), out.absolute()
    if out.exists() and not (out / "text.json").is_file():
        sys.exit(f"error: {out} exists, and is not what convert.py makes; give another OUT")
    checkpoint = checkpoint_of(run)
    search = {"BEAM": "5", "LENPEN": "1"}
    data = data and data.absolute()
    if (run / DEMO).is_dir():
        data, codes, tokenize = run / "data/bin", run / "data/codes", ["--lowercase"]
    else:
        if data is None and not (run / "settings.json").is_file():
            sys.exit(f"error: {run} has no settings.json of train.sh; say by --data where what prepare.sh made is")
        data = data or Path(read_json(run / "settings.json")["DATA"])
        codes, step = data / "text/codes", data / ".done/tokenize-test"
        command = step.read_text("utf-8").split() if step.is_file() else []
        if command[:2] != ["tokenize", "test"]:
            sys.exit(
                f"error: {step} does not say how the text was treated; give by --data what prepare.sh made, or run"
                " prepare.sh again"
            )
        tokenize = command[2:]
        if checkpoint.parent.name == "test":
            search = read_json(run / "test/settings.json")
    source, target = next(data.glob("test.*-*.*.idx")).name.split(".")[1].split("-")
    text = {
        "source": source,
        "target": target,
        "tokenize": {option.lstrip("-"): True for option in tokenize},
        "search": {"beam_size": int(search["BEAM"]), "length_penalty": float(search["LENPEN"])},
        "model": described(run, checkpoint),
    }

    converter = Path(sys.executable).with_name("ct2-fairseq-converter")
    if not converter.is_file():
        sys.exit(f"error: {converter} is not there; pip install '.[deploy]' brings it")
    print(f"converting {checkpoint}", file=sys.stderr)
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        folded, model = partial / "folded.pt", partial / "model"
        call(sys.executable, "-m", "admin_fairseq", "fold", checkpoint, folded)
        options = ("--quantization", quantization) if quantization else ()
        call(converter, "--model_path", folded, "--data_dir", data, "--output_dir", model, *options)
        shutil.copy(codes, model / "codes")
        (model / "text.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        model.rename(out)
    except OSError as error:
        sys.exit(f"error: cannot write {out}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def call(*command: str | Path) -> None:
    """Run it, from where modules are ours; its output is shown if it fails."""
    finished = subprocess.run(
        [*map(str, command)], cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
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
