"""Copies fairseq-generate's log to standard output and shows how many sentences have been translated.

python progress.py TEXT < LOG > LOG        (TEXT has one line for each sentence)
"""

from __future__ import annotations

import sys

from tqdm import tqdm


def main() -> None:
    with open(sys.argv[1], "rb") as text:
        count = sum(1 for _ in text)
    with tqdm(total=count, unit=" sentences", desc="translating", delay=3, mininterval=1) as bar:
        for line in sys.stdin.buffer:
            sys.stdout.buffer.write(line)
            bar.update(line.startswith(b"H-"))


if __name__ == "__main__":
    main()
