"""Copies fairseq-generate's log of sources alone, adds the references, and shows how many have been translated.

python progress.py REFERENCES < LOG > LOG
"""

from __future__ import annotations

import sys

from tqdm import tqdm


def main() -> None:
    with open(sys.argv[1], "rb") as text:
        references = [b" ".join(line.split()) for line in text]
    with tqdm(total=len(references), unit=" sentences", desc="translating", delay=3, mininterval=1) as bar:
        for line in sys.stdin.buffer:
            sys.stdout.buffer.write(line)
            if line.startswith(b"S-"):
                number = int(line[2:].split(b"\t")[0])
                sys.stdout.buffer.write(b"T-%d\t%s\n" % (number, references[number]))
            bar.update(line.startswith(b"H-"))


if __name__ == "__main__":
    main()
