"""A binarised corpus, as the benchmarks see it."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from pathlib import Path
from typing import Iterable

import numpy as np
from fairseq.data import Dictionary, data_utils

from admin_fairseq.errors import DATA_HINT, AdminError
from benchmarks.divergence import context_free_perplexities


def fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Data:
    """A data-bin: its content's fingerprint, languages, context-free perplexities, and how its words were split."""

    def __init__(self, folder: Path, extra: list[str]) -> None:
        languages = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        languages.add_argument("-s", "--source-lang")
        languages.add_argument("-t", "--target-lang")
        asked, _ = languages.parse_known_args(extra)
        inferred = data_utils.infer_language_pair(str(folder)) if folder.is_dir() else (None, None)
        self.folder, self.source = folder, asked.source_lang or inferred[0]
        self.target = asked.target_lang or inferred[1]
        pairs = (f"{self.source}-{self.target}", f"{self.target}-{self.source}")
        found = [
            name for name in (f"train.{pair}.{self.target}" for pair in pairs) if (folder / f"{name}.idx").exists()
        ]
        if not found:
            raise AdminError(f"{folder} has no binarised training targets; {DATA_HINT.replace('DATA', 'DATA-BIN')}")
        kinds = ("dict.*", "*.idx", "*.bin")
        self.fingerprint = fingerprint(itertools.chain.from_iterable(folder.glob(kind) for kind in kinds))
        dictionary = Dictionary.load(str(folder / f"dict.{self.target}.txt"))
        targets = data_utils.load_indexed_dataset(str(folder / found[0]), dictionary)
        sentences = (targets[i].numpy() for i in range(len(targets)))
        self.unigram, self.positional = context_free_perplexities(sentences, len(dictionary))
        self.pairs, self.tokens = len(targets), int(np.sum(targets.sizes))
        self.test = any((folder / f"test.{pair}.{self.target}.idx").exists() for pair in pairs)
        self.remove_bpe = []
        if any(symbol.endswith("@@") for symbol in dictionary.symbols):
            self.remove_bpe = ["--remove-bpe"]
        elif any(symbol.startswith("▁") for symbol in dictionary.symbols):
            self.remove_bpe = ["--remove-bpe", "sentencepiece"]
