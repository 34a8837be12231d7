"""GPU-hours and cost of a whole training, from the throughput of its first updates.

    python examples/common/estimate.py RUN [--price 2.5]

Start train.sh, stop it after some hundred updates, and run this on its folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from fairseq.data.indexed_dataset import MMapIndexedDataset


def throughput(log: str) -> float:
    """Target tokens a second: the median over the log's lines, so that start-up and saving do not count."""
    rates = [float(rate) for rate in re.findall(r"train_inner .*?\bwps=([\d.]+)", log)]
    if len(rates) < 3:
        sys.exit("error: train.log has too few updates; let the training run on")
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("--price", type=float, default=2.5, metavar="X", help="of a GPU-hour, in your currency")
    args = parser.parse_args()
    settings = json.loads((args.run / "settings.json").read_text(encoding="utf-8"))
    log = (args.run / "train.log").read_text(encoding="utf-8")
    rate = throughput(log)
    workers = int(re.findall(r"training on (\d+) devices", log)[-1])
    files = Path(settings["DATA"]).glob("train.*.idx")
    (target,) = (path for path in files if re.fullmatch(r"train\.\w+-(\w+)\.\1\.idx", path.name))
    dataset = MMapIndexedDataset(str(target.with_suffix("")))  # its sizes go with it
    tokens = int(dataset.sizes.sum())
    hours = tokens * int(settings["EPOCHS"]) / rate / 3600
    print(
        f"{tokens:,} target tokens x {settings['EPOCHS']} epochs at {rate:,.0f} tokens/s on {workers} devices:"
        f" {hours:,.1f} hours, {hours * workers:,.1f} device-hours, {hours * workers * args.price:,.0f} at"
        f" {args.price:g} each"
    )


if __name__ == "__main__":
    main()
